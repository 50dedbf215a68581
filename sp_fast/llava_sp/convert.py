"""Official LLaVA-SP checkpoints to folders that transformers loads as ``LlavaSpForConditionalGeneration``."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig

from sp_fast.errors import CheckpointError, first_line
from sp_fast.llava_sp.configuration import LlavaSpConfig
from sp_fast.llava_sp.conversion import (
    Conversion,
    Plan,
    by_part,
    count_parts,
    dtype_name,
    model_shapes,
    one_dtype,
    peak_memory,
    planned_files,
    shard_files,
    write_json,
)
from sp_fast.llava_sp.model_card import licences, model_card
from sp_fast.llava_sp.modeling import LlavaSpForConditionalGeneration
from sp_fast.llava_sp.official_config import (
    PUBLISHED_LAYER,
    read_config,
    selected_layer,
    text_config,
    vision_config,
)
from sp_fast.llava_sp.official_names import HEAD_WEIGHT, LANGUAGE, PROJECTOR, TOWER, WHOLE
from sp_fast.llava_sp.packing import cast, packed
from sp_fast.llava_sp.processing import LlavaSpProcessor, add_image_token
from sp_fast.llava_sp.shards import write_file
from sp_fast.llava_sp.sources import Official, folder_of, read_official
from sp_fast.llava_sp.vocabulary import chat_template, load_tokenizer, tokenizer_files
from sp_fast.recognise import check_whole, recognise
from sp_fast.stored_tensor import StoredTensor

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

#: In the output: what the model has no place for, for the way back.
KEPT = "official"
NEWLINE_FILE = "image_newline.safetensors"
_EMBEDDINGS = f"{LANGUAGE}embed_tokens.weight"
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
_BESIDE = (
    "config.json", "generation_config.json", "processor_config.json", "chat_template.jinja", "tokenizer files",
    "README.md", f"{KEPT}/",
)  # fmt: skip


@dataclass(frozen=True)
class FromOfficial:
    """What to convert.

    Args:
        source: an official checkpoint, file or folder: a whole model, a projector (``model.bin``), or a LoRA folder.
        out: the folder to write.
        base: the language model's folder, for a projector or a LoRA folder.
        vision_tower: a CLIP's or SigLIP's folder, where the checkpoint holds no tower or does not know its shape.
        tokenizer: a folder with one, where the language model's holds none.
        template: a chat template's name or file; see ``vocabulary.chat_template``.
        pyramid: "crop" or "pool", for the transformer variants, whose keys are the same.
        dtype: of all weights; None: their own, which must be one.
        shard_size: bytes of one file at most, unless a single tensor has more.
    """

    source: Path
    out: Path
    base: Path | None = None
    vision_tower: Path | None = None
    tokenizer: Path | None = None
    template: str | None = None
    pyramid: str | None = None
    dtype: str | None = None
    shard_size: int = 4 * 10**9


def plan_from_official(request: FromOfficial) -> Conversion:
    """Reads everything but the weights, checks every name, shape and type, and says what will be written.

    Raises:
        CheckpointError, ConfigError: parts that are missing, damaged, or do not fit each other.
    """
    official = read_official(request.source, request.base, request.vision_tower)
    text = _text_config(official)
    vision = _vision_config(official, request.vision_tower)
    layer, notes = _layer(official, vision.hidden_size)
    shapes = {key: tensor.shape for key, tensor in official.projector.items()}
    grid = vision.image_size // vision.patch_size
    variant, projector = recognise(str(request.source), shapes, grid, request.pyramid)
    tokenizer = load_tokenizer(request.tokenizer or official.language_folder, text)
    template = chat_template(request.template, tokenizer, text)
    if official.facts.get("mm_use_im_start_end") and not (request.template and Path(request.template).is_file()):
        raise CheckpointError(
            f"{official.source / 'config.json'} has mm_use_im_start_end=true: its prompts have tokens around each "
            "image that no built-in chat template writes: give a file that does, with --chat-template"
        )
    parts = {**by_part(official.rest), "projector": official.projector}
    dtype = one_dtype(official.where, parts, request.dtype)
    named = {"dtype": dtype_name(dtype)}
    config = LlavaSpConfig(
        vision_config=vision.to_dict() | named,
        text_config=text.to_dict() | named,
        projector_config=projector.to_dict(),
        image_token_index=add_image_token(tokenizer),
        vision_feature_layer=layer,
        architectures=[LlavaSpForConditionalGeneration.__name__],
        **named,
    )
    tensors = _ordered_tensors(official, config, dtype)
    shards = shard_files(tensors, request.shard_size)
    plan = Plan(
        to="ours",
        kind=official.kind,
        variant=variant,
        dtype=dtype_name(dtype),
        sources={role: str(path) for role, path in official.origins.items()},
        out=str(request.out),
        parts=count_parts(tensors),
        files=planned_files(tensors, shards, list(_BESIDE)),
        peak_memory_estimate_bytes=peak_memory(tensors, shards),
        notes=[*official.notes, *notes],
    )

    def beside(folder: Path) -> None:
        config.save_pretrained(folder)
        generation_config(official.language_folder, text, tokenizer).save_pretrained(folder)
        LlavaSpProcessor.for_model(config, tokenizer, template).save_pretrained(folder)
        _keep(official, request, folder / KEPT)
        (folder / "README.md").write_text(model_card(plan, config, licences(official.origins)), encoding="utf-8")

    sources = tuple(p for p in (request.source, request.base, request.vision_tower, request.tokenizer) if p)
    return Conversion(plan, tensors, shards, beside, sources)


def _text_config(official: Official) -> PretrainedConfig:
    path = official.language_folder / "config.json"
    return text_config(path, read_config(path, "give the language model's folder with its config.json"))


def _vision_config(official: Official, folder: Path | None) -> PretrainedConfig:
    has_head = any(name.startswith(f"{TOWER}head.") for name in official.rest)
    return vision_config(folder and folder_of(folder), official.facts.get("mm_vision_tower"), has_head)


def _layer(official: Official, tower_width: int) -> tuple[int, list[str]]:
    """The tower's hidden state that the projector reads, and notes on what the checkpoint's config.json asks for."""
    if not official.facts:
        return PUBLISHED_LAYER, [
            f"{official.source.name} has no config.json: the tower's hidden state {PUBLISHED_LAYER} is read, as in "
            "every published script"
        ]
    notes = []
    if official.image_newline is not None:
        notes.append(
            f"image_newline, which only tiled images (anyres) need, is not used; it is kept in {KEPT}/{NEWLINE_FILE}, "
            "for the way back"
        )
    aspect = official.facts.get("image_aspect_ratio", "pad")
    if aspect != "pad":
        notes.append(
            f"trained with image_aspect_ratio={aspect!r}; this model's processor pads every image to one square instead"
        )
    return selected_layer(official.source / "config.json", official.facts, tower_width), notes


def _ordered_tensors(official: Official, config: LlavaSpConfig, dtype: torch.dtype) -> dict[str, StoredTensor]:
    """Every tensor of the model, in the model's order, in one type."""
    rest = official.rest
    expected = model_shapes(config, rest)
    if config.tie_word_embeddings:
        _check_tied_head(official.where, rest)
    check_whole(official.where, {k: s for k, s in expected.items() if not k.startswith(PROJECTOR)}, rest, WHOLE)
    made = {name: cast(official.where, name, tensor, dtype) for name, tensor in rest.items()}
    projector = packed(str(official.origins["checkpoint"]), config.projector, official.projector, dtype)
    made |= {PROJECTOR + name: tensor for name, tensor in projector.items()}
    return {name: made[name] for name in expected}


def _check_tied_head(where: str, rest: Mapping[str, StoredTensor]) -> None:
    head, embeddings = rest.get(HEAD_WEIGHT), rest.get(_EMBEDDINGS)
    if head is not None and embeddings is not None and not torch.equal(head.load(), embeddings.load()):
        raise CheckpointError(
            f"{where}: {HEAD_WEIGHT} is not the embeddings, although config.json has tie_word_embeddings=true: set "
            "it to false there"
        )


def generation_config(folder: Path, text: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """The one in a folder, without settings of a sampling that is off, which transformers refuses to save.

    Raises:
        CheckpointError: it is damaged.
    """
    path = folder / "generation_config.json"
    values: dict[str, Any] = {name: getattr(text, name, None) for name in ("bos_token_id", "eos_token_id")}
    if path.exists():
        values |= read_config(path, "")
    if not values.get("do_sample"):
        values = {k: v for k, v in values.items() if k not in _SAMPLING}
    values |= {"pad_token_id": tokenizer.pad_token_id}
    values = {k: v for k, v in values.items() if k not in ("transformers_version", "_from_model_config")}
    try:
        return GenerationConfig(**values)
    except Exception as error:  # configurations check themselves in any way
        raise CheckpointError(f"{path} is refused by transformers ({first_line(error)}): mend or remove it") from error


def _keep(official: Official, request: FromOfficial, folder: Path) -> None:
    folder.mkdir()
    if official.facts:
        own = {k: v for k, v in official.facts.items() if k != "_name_or_path"}  # a path on somebody's machine
        write_json(folder / "config.json", own)
    for path in tokenizer_files(request.tokenizer or official.language_folder):
        shutil.copy(path, folder)
    if official.image_newline is not None:
        write_file(folder / NEWLINE_FILE, {"image_newline": official.image_newline})
