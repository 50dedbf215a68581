"""What is compressed: an official checkpoint, our own projector's folder, or the folder of a whole model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sp_fast.checkpoint import MODEL_TYPE, WEIGHTS_FILE, inspect_official, inspect_pretrained, official_tensors
from sp_fast.compact_config import COMPACT
from sp_fast.config import SPProjectorConfig
from sp_fast.errors import CheckpointError, ConfigError
from sp_fast.projector import SPProjector
from sp_fast.stored_tensor import StoredTensor
from sp_fast.tensor_files import read_file, read_json

if TYPE_CHECKING:
    from sp_fast.llava_sp.assemble import Assembly


@dataclass(frozen=True)
class Source:
    """A projector that has not been read yet.

    Args:
        kind: "official", "projector", or "model", which has an ``assembly``.
        dtype: of its weights, and of what is written.
        load: the projector on the CPU, in ``dtype`` or float32.
    """

    kind: str
    path: Path
    config: SPProjectorConfig
    dtype: torch.dtype
    load: Callable[[], SPProjector]
    assembly: Assembly | None = None


def read_source(path: Path, grid: int | None = None) -> Source:
    """Names, shapes and types are read, and no weights.

    Args:
        grid: patches along a side, which official checkpoints cannot tell (24, or 16 for conv224).

    Raises:
        CheckpointError: no such checkpoint, or a damaged one.
        ConfigError: a projector that has no full extractor, or whose weights are quantised.
    """
    found = {MODEL_TYPE: _projector, "llava_sp": _model}.get(_model_type(path), _official)(path, grid)
    _check_full(path, found.config)
    return found


def _model_type(path: Path) -> object:
    try:
        values = read_json(path / "config.json")
    except (OSError, ValueError):  # a file, or a folder that its own reader will judge
        return None
    return values.get("model_type") if isinstance(values, dict) else None


def _official(path: Path, grid: int | None) -> Source:
    _, config = inspect_official(path, grid)
    dtype = _dtype(path, official_tensors(path))
    return Source("official", path, config, dtype, lambda: SPProjector.from_official(path, config.grid))


def _projector(path: Path, grid: int | None) -> Source:
    config = inspect_pretrained(path)
    _check_full(path, config)
    if not (path / WEIGHTS_FILE).is_file():
        raise CheckpointError(f"{path} has no {WEIGHTS_FILE}: give the folder that save_pretrained wrote")
    dtype = _dtype(path, read_file(path / WEIGHTS_FILE))
    return Source("projector", path, config, dtype, lambda: SPProjector.from_pretrained(path))


def _model(path: Path, grid: int | None) -> Source:
    from sp_fast.llava_sp.assemble import disassemble
    from sp_fast.llava_sp.official_names import PROJECTOR
    from sp_fast.tensor_files import stored_tensors

    assembly = disassemble(path)
    config = assembly.config.projector
    _check_full(path, config)
    tensors = stored_tensors(path)[1]
    dtype = _dtype(path, {name: t for name, t in tensors.items() if name.startswith(PROJECTOR)})
    return Source("model", path, config, dtype, lambda: assembly.make_projector(0), assembly)


def _check_full(path: Path, config: SPProjectorConfig) -> None:
    if config.extractor in COMPACT:
        raise ConfigError(
            f"{path} is compact already (extractor={config.extractor!r}), and a second compression would add its error "
            "to the first: give the full projector that it was made from"
        )
    if config.extractor != "full":
        raise ConfigError(f"{path} has extractor={config.extractor!r}, and so no convolutions to compress")
    if config.quantization is not None:
        raise ConfigError(
            f"{path} is quantised to {config.quantization} already, and a compression of that would add its error to "
            "the first: give the projector before quantisation"
        )


def _dtype(path: Path, tensors: Mapping[str, StoredTensor]) -> torch.dtype:
    found = {tensor.dtype for tensor in tensors.values()}
    if len(found) != 1 or None in found:
        names = ", ".join(sorted(str(dtype) for dtype in found))
        raise CheckpointError(f"{path} mixes types ({names}): convert the projector to one of them first")
    return found.pop()
