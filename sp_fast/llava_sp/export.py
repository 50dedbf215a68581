"""Folders of ``LlavaSpForConditionalGeneration`` to official LLaVA-SP checkpoints."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sp_fast.errors import CheckpointError, SPFastError, first_line
from sp_fast.layout import MERGE_FIRST
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
from sp_fast.llava_sp.convert import KEPT, NEWLINE_FILE
from sp_fast.llava_sp.official_config import official_config, projector_fields, read_config, tower_name
from sp_fast.llava_sp.official_names import PROJECTOR, WHOLE, official_name, refuse_unmerged
from sp_fast.llava_sp.packing import cast, unpacked
from sp_fast.llava_sp.sources import read_if_there
from sp_fast.llava_sp.vocabulary import load_tokenizer, same_words, save_without_image, tokenizer_files
from sp_fast.recognise import check_whole, recognise
from sp_fast.stored_tensor import StoredTensor
from sp_fast.tensor_files import read_file, stored_tensors

_GENERATION = "generation_config.json"


@dataclass(frozen=True)
class ToOfficial:
    """What to export.

    Args:
        source: a folder that ``save_pretrained`` of LLaVA-SP, or a conversion from official files, wrote.
        out: the folder to write.
        layout: "full", shards of the whole model; or "projector", the ``model.bin`` of the first training stage.
        vision_tower: what ``mm_vision_tower`` shall be; None: what it was, or the name of a tower of that shape.
        tokenizer: a folder whose tokenizer is copied; None: what it was, or this model's without ``<image>``.
        dtype: of all weights; None: their own.
        shard_size: bytes of one file at most, unless a single tensor has more.
    """

    source: Path
    out: Path
    layout: str = "full"
    vision_tower: str | None = None
    tokenizer: Path | None = None
    dtype: str | None = None
    shard_size: int = 4 * 10**9


def plan_to_official(request: ToOfficial) -> Conversion:
    """Reads everything but the weights, checks every name, shape and type, and says what will be written.

    Raises:
        CheckpointError, ConfigError: no whole model of ours, or one that the official code has no form for.
    """
    where, full = str(request.source), request.layout == "full"
    config = _our_config(request.source)
    stored = stored_tensors(request.source)[1]
    refuse_unmerged(where, stored)
    check_whole(where, model_shapes(config, stored), stored, WHOLE)
    dtype = one_dtype(where, by_part(stored), request.dtype)
    packed = by_part(stored)["projector"]
    projector = unpacked(where, config.projector, {k.removeprefix(PROJECTOR): tensor for k, tensor in packed.items()})
    variant = _variant(where, config, projector)
    ours = stored if full else packed
    tensors = {official_name(name): tensor for name, tensor in ours.items() if name not in packed}
    tensors |= {f"model.{key}": tensor for key, tensor in projector.items()}
    tensors = {name: cast(where, name, tensor, dtype) for name, tensor in tensors.items()}
    newline = request.source / KEPT / NEWLINE_FILE
    if full and newline.is_file():
        tensors |= {f"model.{key}": tensor for key, tensor in read_file(newline).items()}
    shards = shard_files(tensors, request.shard_size if full else None)
    values = _official_values(request, config, dtype_name(dtype))
    beside = ["config.json", *([_GENERATION, "tokenizer files"] if full else [])]
    plan = Plan(
        to="official",
        kind=request.layout,
        variant=variant,
        dtype=dtype_name(dtype),
        sources={"model": where},
        out=str(request.out),
        parts=count_parts({name: cast(where, name, tensor, dtype) for name, tensor in ours.items()}),
        files=planned_files(tensors, shards, beside),
        peak_memory_estimate_bytes=peak_memory(tensors, shards),
        notes=[],
    )
    tokenizer = _tokenizer(request, config) if full else None

    def write_beside(folder: Path) -> None:
        write_json(folder / "config.json", values)
        if tokenizer is not None:
            tokenizer(folder)
            if (request.source / _GENERATION).is_file():
                shutil.copy(request.source / _GENERATION, folder)

    sources = tuple(path for path in (request.source, request.tokenizer) if path)
    return Conversion(plan, tensors, shards, write_beside, sources)


def _our_config(source: Path) -> LlavaSpConfig:
    path = source / "config.json"
    values = read_config(path, "give a folder with a LLaVA-SP model of transformers")
    if (source / "adapter_config.json").exists() or "quantization_config" in values:
        raise CheckpointError(
            f"{source} is an adapter or quantised: {MERGE_FIRST}, save the whole model in bfloat16 or float16, and "
            "convert that"
        )
    if values.get("model_type") != LlavaSpConfig.model_type:
        raise CheckpointError(
            f"{path} is of model_type {values.get('model_type')!r}, not {LlavaSpConfig.model_type!r}: give a LLaVA-SP "
            "model of transformers, or leave out --to official to convert official files"
        )
    try:
        config = LlavaSpConfig.from_dict(values)
    except SPFastError:
        raise
    except Exception as error:  # configurations check themselves in any way
        raise CheckpointError(f"{path} is no LLaVA-SP configuration ({first_line(error)}): fetch it again") from error
    if (scheme := config.projector.quantization) is not None:
        raise CheckpointError(
            f"{source} has a projector whose packed weights are quantised to {scheme}, and the official layout has "
            "none such: convert the model before quantisation, or one with projector.dequantized()"
        )
    return config


def _variant(where: str, config: LlavaSpConfig, projector: Mapping[str, StoredTensor]) -> str:
    """The official name of the projector. Raises CheckpointError where the official code has no such form."""
    if not config.projector.spatial_tokens:
        raise CheckpointError(
            f"{where}: the official LLaVA-SP code has no projector without spatial tokens: such a model stays in this "
            "package's form; its projector alone goes to LLaVA-1.5's with official_state_dict()"
        )
    shapes = {key: tensor.shape for key, tensor in projector.items()}
    pyramid = config.projector.pyramid if config.projector.extractor == "transformer" else None
    name, found = recognise(where, shapes, config.projector.grid, pyramid)
    if found != config.projector:
        raise CheckpointError(
            f"{where}: the official code has no projector of {config.projector}; its nearest is {name}, {found}: such "
            "a model stays in this package's form"
        )
    return name


def _official_values(request: ToOfficial, config: LlavaSpConfig, dtype: str) -> dict[str, Any]:
    """Of config.json."""
    kept = read_if_there(request.source / KEPT)
    tower = request.vision_tower or kept.get("mm_vision_tower") or tower_name(config.vision_config)
    if tower is None:
        raise CheckpointError(
            f"{request.source} does not say where the official code finds the vision tower (mm_vision_tower): give a "
            "folder or a name with --vision-tower"
        )
    if request.layout == "projector":
        return projector_fields(config, tower)
    return official_config(config, kept, tower, dtype)


def _tokenizer(request: ToOfficial, config: LlavaSpConfig) -> Callable[[Path], object]:
    """What writes the tokenizer: files that are copied, or else this model's own without ``<image>``.

    The files that were kept are, as the official code reads some that transformers no longer writes; but not where
    the model has got another vocabulary since.
    """
    given = request.tokenizer or request.source / KEPT
    files = tokenizer_files(given)
    if request.tokenizer and not files:
        raise CheckpointError(f"--tokenizer {request.tokenizer} holds no tokenizer: give a folder with one")
    tokenizer = None if request.tokenizer else load_tokenizer(request.source, config.text_config)
    if files and (tokenizer is None or same_words(tokenizer, load_tokenizer(given, config.text_config))):
        return lambda target: [shutil.copy(path, target) for path in files]
    return lambda target: save_without_image(tokenizer, target, config.text_config.vocab_size)
