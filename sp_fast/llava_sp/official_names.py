"""Names of the language model's and the tower's tensors, officially and here, both ways. The projector's own are
layout.py's."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from sp_fast.errors import CheckpointError
from sp_fast.layout import MERGE_FIRST
from sp_fast.recognise import PREFIXES, listed, projector_names
from sp_fast.stored_tensor import StoredTensor

TOWER, PROJECTOR, LANGUAGE = "model.vision_tower.", "model.multi_modal_projector.", "model.language_model."
HEAD_WEIGHT = "lm_head.weight"
WHOLE = "give whole checkpoints, with the config.json that each was saved with"  # a way out
IMAGE_NEWLINE = "image_newline"
_LANGUAGE_KEYS = ("layers.", "embed_tokens.", "norm.")
# transformers 4 wraps CLIP's and SigLIP's vision models once, and the official code twice more.
_TOWER_KEY = re.compile(r"(vision_tower\.)*(vision_model\.)?")
_OFFICIAL_TOWER = "model.vision_tower.vision_tower.vision_model."
_BESIDE_TOWER = re.compile(r"(text_model|visual_projection|text_projection|logit_scale|logit_bias)\b")
# Which old releases stored, and every release computes.
_BUFFERS = re.compile(r"(rotary_emb\.inv_freq|embeddings\.position_ids)$")
_UNMERGED = re.compile(
    r"(\blora_|\bbase_layer\b|\bmodules_to_save\b|\boriginal_module\b"
    r"|\.(SCB|absmax|quant_map|quant_state|nested_absmax|nested_quant_map|weight_format|qweight|qzeros|scales)\b)"
)


@dataclass(frozen=True)
class Parts:
    """A checkpoint's tensors: the projector's by official key without prefix, the others by our name."""

    projector: dict[str, StoredTensor]
    rest: dict[str, StoredTensor]
    image_newline: StoredTensor | None


def split(where: str, tensors: Mapping[str, StoredTensor]) -> Parts:
    """The parts of an official checkpoint, or of a language model's own.

    Raises:
        CheckpointError: names that no LLaVA-SP model has, a tensor under two names, adapters or quantised weights.
    """
    refuse_unmerged(where, tensors)
    projector = projector_names(where, tensors)
    rest: dict[str, StoredTensor] = {}
    newline = None
    for name in tensors.keys() - set(projector.values()):
        key = _without_prefix(name)
        if key == IMAGE_NEWLINE:
            newline = tensors[name]
        elif not _BUFFERS.search(key):
            _put(where, rest, our_name(key), tensors[name])
    return Parts({key: tensors[name] for key, name in projector.items()}, rest, newline)


def tower_tensors(where: str, tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """By our name, the tensors of a vision tower's checkpoint, which may be a whole CLIP or SigLIP with its text half.

    Raises:
        CheckpointError: as ``split``.
    """
    refuse_unmerged(where, tensors)
    found: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        if not _BESIDE_TOWER.match(name) and not _BUFFERS.search(name):
            _put(where, found, TOWER + _TOWER_KEY.sub("", name, count=1), tensor)
    return found


def our_name(key: str) -> str:
    """Of an official key without prefix that is not the projector's: ``layers.0.mlp...``, ``lm_head.weight``."""
    if key.startswith("vision_tower."):
        return TOWER + _TOWER_KEY.sub("", key, count=1)
    return LANGUAGE + key if key.startswith(_LANGUAGE_KEYS) else key


def official_name(name: str) -> str:
    """The reverse of ``our_name``, with the official prefix."""
    if name.startswith(TOWER):
        return _OFFICIAL_TOWER + name.removeprefix(TOWER)
    return "model." + name.removeprefix(LANGUAGE) if name.startswith(LANGUAGE) else name


def refuse_unmerged(where: str, names: Iterable[str]) -> None:
    """Raises CheckpointError for names that wrappers and quantised layers give to weights."""
    if found := [name for name in names if _UNMERGED.search(name)]:
        raise CheckpointError(
            f"{where} holds {listed(found)}: {MERGE_FIRST}, and quantised weights have lost bits: give the unquantised "
            "checkpoint"
        )


def _without_prefix(name: str) -> str:
    while prefix := next((p for p in PREFIXES if name.startswith(p)), None):
        name = name[len(prefix) :]
    return name


def _put(where: str, found: dict[str, StoredTensor], name: str, tensor: StoredTensor) -> None:
    if name in found:
        raise CheckpointError(f"{where} holds {name} twice, under different prefixes: keep one")
    found[name] = tensor
