"""A conversion before it is written: its tensors, unread, what goes beside them, and the plan that says so."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Container, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sp_fast.errors import CheckpointError
from sp_fast.llava_sp.configuration import LlavaSpConfig
from sp_fast.llava_sp.modeling import LlavaSpForConditionalGeneration
from sp_fast.llava_sp.new_folder import check_target, new_folder
from sp_fast.llava_sp.official_names import HEAD_WEIGHT, LANGUAGE, PROJECTOR, TOWER
from sp_fast.llava_sp.shards import plan_shards, size_in_bytes, write_shards
from sp_fast.stored_tensor import DTYPES, StoredTensor

_PROGRAM = 700 * 2**20  # torch and transformers, imported
PARTS: dict[str, str | tuple[str, ...]] = {
    "vision tower": TOWER,
    "projector": PROJECTOR,
    "language model": (LANGUAGE, HEAD_WEIGHT),
}
DTYPE_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}


@dataclass(frozen=True)
class Part:
    """One of the model's three parts."""

    name: str
    tensors: int
    parameters: int
    bytes: int


@dataclass(frozen=True)
class Plan:
    """What a conversion does."""

    to: str
    kind: str
    variant: str
    dtype: str
    sources: dict[str, str]
    out: str
    parts: list[Part]
    #: file names; bytes where they are known before they are written
    files: dict[str, int | None]
    #: an estimate: the largest thing that is made in memory, what it is made from, and the program
    peak_memory_estimate_bytes: int
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """As one JSON object."""
        return asdict(self)


@dataclass(frozen=True)
class Conversion:
    """``plan``, and how it is carried out.

    Args:
        tensors: by the names that they are written under, into ``shards`` (or one torch file), unread.
        beside: writes every other file into the folder.
        sources: what is read, and therefore must not be replaced.
    """

    plan: Plan
    tensors: dict[str, StoredTensor]
    shards: dict[str, list[str]]
    beside: Callable[[Path], object]
    sources: tuple[Path, ...]

    @property
    def size(self) -> int:
        """Bytes of weights."""
        return sum(map(size_in_bytes, self.tensors.values()))

    def check_target(self, force: bool) -> None:
        """Raises CheckpointError where the output may not be written."""
        check_target(Path(self.plan.out), force, self.sources)

    def write(self, force: bool, advance: Callable[[int], object] = lambda size: None) -> None:
        """Writes the output folder, whole or not at all; ``advance`` is told of every tensor's bytes.

        Raises:
            CheckpointError: the target may not be written, or data turn out to be damaged or not finite.
            ResourceError: the disk is too small.
        """
        self.check_target(force)
        with new_folder(Path(self.plan.out), self.size) as folder:
            if self.shards.keys() == {"model.bin"}:
                torch.save(
                    {name: _loaded(tensor, advance) for name, tensor in self.tensors.items()}, folder / "model.bin"
                )
            else:
                write_shards(folder, self.tensors, self.shards, advance)
            self.beside(folder)


def shard_files(tensors: Mapping[str, StoredTensor], limit: int | None) -> dict[str, list[str]]:
    """Files and the names of their tensors: safetensors of up to ``limit`` bytes, or with None one torch file."""
    return {"model.bin": list(tensors)} if limit is None else plan_shards(tensors, limit)


def planned_files(
    tensors: Mapping[str, StoredTensor], shards: Mapping[str, list[str]], beside: list[str]
) -> dict[str, int | None]:
    """For a plan: bytes of weights by file, and the other files."""
    sizes = {file: sum(size_in_bytes(tensors[name]) for name in names) for file, names in shards.items()}
    return {**sizes, **dict.fromkeys(beside)}


def peak_memory(tensors: Mapping[str, StoredTensor], shards: Mapping[str, list[str]]) -> int:
    """An estimate in bytes: a tensor and its source, or all of a torch file; and the program."""
    sizes = [size_in_bytes(tensor) for tensor in tensors.values()]
    return _PROGRAM + (sum(sizes) + max(sizes) if "model.bin" in shards else 2 * max(sizes))


def model_shapes(config: LlavaSpConfig, given: Container[str]) -> dict[str, tuple[int, ...]]:
    """Every tensor of the model, in its order; of a head that is tied to the embeddings only where it is given."""
    with torch.device("meta"):
        state = LlavaSpForConditionalGeneration(config).state_dict()
    tied = config.tie_word_embeddings and HEAD_WEIGHT not in given
    return {name: tuple(tensor.shape) for name, tensor in state.items() if not (tied and name == HEAD_WEIGHT)}


def count_parts(tensors: Mapping[str, StoredTensor]) -> list[Part]:
    """Of tensors by our names."""
    return [
        Part(name, len(found), sum(math.prod(t.shape) for t in found.values()), sum(map(size_in_bytes, found.values())))
        for name, found in by_part(tensors).items()
    ]


def by_part(tensors: Mapping[str, StoredTensor]) -> dict[str, dict[str, StoredTensor]]:
    """Tensors by our names, part by part; no part is empty."""
    split = {part: {k: t for k, t in tensors.items() if k.startswith(names)} for part, names in PARTS.items()}
    return {part: found for part, found in split.items() if found}


def one_dtype(where: str, parts: Mapping[str, Mapping[str, StoredTensor]], asked: str | None) -> torch.dtype:
    """The type that was asked for, else the one that all tensors share. Raises CheckpointError where they do not."""
    if asked is not None:
        return DTYPE_NAMES[asked]
    found = {
        part: sorted({dtype_name(t.dtype) for t in tensors.values() if t.dtype}) for part, tensors in parts.items()
    }
    every = {name for names in found.values() for name in names}
    if len(every) != 1:
        listed = "; ".join(f"{part}: {' and '.join(names) or 'none'}" for part, names in found.items())
        raise CheckpointError(f"{where} mixes types ({listed}), and a model has one: choose it with --dtype")
    return DTYPE_NAMES[every.pop()]


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """As transformers writes configurations."""
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def dtype_name(dtype: torch.dtype) -> str:
    """``"bfloat16"`` of ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")


def _loaded(tensor: StoredTensor, advance: Callable[[int], object]) -> Tensor:
    """A copy of its own: what is a view of a file would be saved with all of that file."""
    loaded = tensor.load().clone(memory_format=torch.contiguous_format)
    advance(size_in_bytes(tensor))
    return loaded
