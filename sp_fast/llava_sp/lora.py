"""LoRA adapters merged into the weights that they adapt, one tensor at a time, when it is read.

    W' = W + s B A,  s = alpha / r, or alpha / sqrt(r) where use_rslora

in float32, or float64 for such weights, and rounded once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sp_fast.errors import CheckpointError, first_line
from sp_fast.llava_sp.official_names import Parts, split
from sp_fast.recognise import listed
from sp_fast.stored_tensor import StoredTensor
from sp_fast.tensor_files import check_together, file_problem, read_file, read_json

CONFIG_FILE, WEIGHTS_FILES = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")
_NAME = re.compile(r"(?P<weight>.+)\.lora_(?P<side>[AB])(\.default)?\.weight")
# Fields of PEFT's LoraConfig that must have one of these values where they are given, and those that do not matter
# to a merge. Any other must be empty: it may change what the adapter means.
_ACCEPTED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),  # others change the base as well
}
_HARMLESS = {
    "r", "lora_alpha", "use_rslora", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "lora_dropout", "qalora_group_size", "megatron_core", "loftq_config", "runtime_config",
}  # fmt: skip


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter, or a part of one."""
    return any((folder / name).exists() for name in (CONFIG_FILE, *WEIGHTS_FILES))


def adapted(
    folder: Path, base: Mapping[str, StoredTensor], our_name: Callable[[str, str], str] | None = None
) -> dict[str, StoredTensor]:
    """The weights of ``base`` (our names) that the adapter in a folder changes, changed.

    Args:
        our_name: of a file and the name of an adapted weight in it; without, the names are the official code's.

    Raises:
        CheckpointError: no whole adapter, a feature that is not supported, or an adapter of another model.
    """
    scale_of = _scale(folder / CONFIG_FILE)
    path = next((folder / name for name in WEIGHTS_FILES if (folder / name).is_file()), None)
    if path is None:
        raise CheckpointError(f"{folder} has {CONFIG_FILE} but none of {', '.join(WEIGHTS_FILES)}: fetch it whole")
    check_together(folder / CONFIG_FILE, path)
    pairs: dict[str, dict[str, StoredTensor]] = {}
    unknown = []
    for name, tensor in read_file(path).items():
        if match := _NAME.fullmatch(name):
            pairs.setdefault(match["weight"] + ".weight", {})[match["side"]] = tensor
        else:
            unknown.append(name)
    if unknown:
        raise CheckpointError(
            f"{path} holds {listed(unknown)}, which is no pair of lora_A and lora_B of a linear layer: merge it where "
            "it was made (merge_and_unload() in PEFT), and convert the whole model"
        )
    if not pairs:
        raise CheckpointError(f"{path} holds no tensors: fetch it again")
    named = {name: (our_name or _official_weight)(str(path), name) for name in pairs}
    if lost := [name for name, ours in named.items() if ours not in base]:
        raise CheckpointError(
            f"{path} adapts {listed(lost)}, which the language model does not have: give the --base that it was "
            "trained on"
        )
    return {ours: _merged(path, name, base[ours], pairs[name], *scale_of) for name, ours in named.items()}


def _official_weight(where: str, name: str) -> str:
    """Our name of an adapted weight; of the projector's weights there is none to merge into, so the name stays."""
    parts: Parts = split(where, {name: StoredTensor((), None, Tensor)})
    return next(iter(parts.rest), name)


def _scale(path: Path) -> tuple[int, float]:
    """Rank and scale. Raises CheckpointError for anything that a plain merge would get wrong."""
    way_out = "merge it where it was made (merge_and_unload() in PEFT), and convert the whole model"
    if problem := file_problem(path):
        raise CheckpointError(f"{path} {problem}, but an adapter's scale is in it: fetch it")
    try:
        values = dict(read_json(path))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read ({first_line(error)}): fetch it again") from error
    for name, value in values.items():
        accepted = _ACCEPTED.get(name)
        if value not in accepted if accepted else (value and name not in _HARMLESS):
            raise CheckpointError(
                f"{path} has {name}={value!r:.100}, which this conversion does not support: {way_out}"
            )
    rank, alpha = values.get("r"), values.get("lora_alpha")
    for name, value in (("r", rank), ("lora_alpha", alpha)):
        if not isinstance(value, (int, float)) or isinstance(value, bool) or value <= 0:
            raise CheckpointError(f"{path} has {name}={value!r} where a number above 0 is expected: fetch it again")
    return rank, alpha / (rank**0.5 if values.get("use_rslora") else rank)


def _merged(
    path: Path, name: str, weight: StoredTensor, pair: Mapping[str, StoredTensor], rank: int, scale: float
) -> StoredTensor:
    shapes = {side: list(pair[side].shape) for side in pair}
    if len(weight.shape) != 2 or shapes != {"A": [rank, weight.shape[1]], "B": [weight.shape[0], rank]}:
        raise CheckpointError(
            f"{path}: the adapter of {name} has shapes {shapes}, but r={rank} and the weight is {list(weight.shape)}: "
            "give the --base that it was trained on"
        )
    if weight.dtype is None or any(tensor.dtype is None for tensor in pair.values()):
        raise CheckpointError(f"{path}: {name} or its adapter is not floating-point: give the unquantised ones")
    return StoredTensor(weight.shape, weight.dtype, partial(_merge, weight, pair["A"], pair["B"], scale))


def _merge(weight: StoredTensor, a: StoredTensor, b: StoredTensor, scale: float) -> Tensor:
    wide = torch.promote_types(weight.dtype, torch.float32)
    return torch.addmm(weight.load().to(wide), b.load().to(wide), a.load().to(wide), alpha=scale).to(weight.dtype)
