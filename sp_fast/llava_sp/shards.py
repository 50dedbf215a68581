"""Safetensors in shards, with transformers' names and index, written one tensor at a time.

safetensors' own writer takes a whole file's tensors at once; here no more than one tensor is in memory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from sp_fast.errors import ConfigError
from sp_fast.stored_tensor import StoredTensor

INDEX_FILE = "model.safetensors.index.json"
_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int8: "I8", torch.uint8: "U8", torch.int32: "I32",  # of quantised weights
}  # fmt: skip
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def size_in_bytes(tensor: StoredTensor) -> int:
    """Of the tensor's elements."""
    return math.prod(tensor.shape) * tensor.dtype.itemsize


def parse_size(text: str) -> int:
    """Bytes of ``"4GB"``, ``"500MB"``. Raises ConfigError for anything else."""
    number, unit = text[:-2], text[-2:].upper()
    try:
        size = float(number) * _UNITS[unit]
    except (KeyError, ValueError):
        size = 0
    if not 1 <= size < 2**63:
        raise ConfigError(f"shard size {text!r} is none: give e.g. 4GB or 500MB")
    return int(size)


def plan_shards(tensors: Mapping[str, StoredTensor], limit: int) -> dict[str, list[str]]:
    """Names of tensors by file name, in their order. A tensor above the limit (bytes) has a file of its own."""
    shards: list[list[str]] = []
    room = 0
    for name, tensor in tensors.items():
        size = size_in_bytes(tensor)
        if not shards or size > room:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room -= size
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i:05}-of-{len(shards):05}.safetensors": names for i, names in enumerate(shards, 1)}


def write_shards(
    folder: Path,
    tensors: Mapping[str, StoredTensor],
    shards: Mapping[str, list[str]],
    advance: Callable[[int], object] = lambda size: None,
) -> None:
    """Writes a plan's files, and their index where there are several; ``advance`` is told of every tensor's bytes."""
    for file, names in shards.items():
        write_file(folder / file, {name: tensors[name] for name in names}, advance)
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(map(size_in_bytes, tensors.values()))},
            "weight_map": {name: file for file, names in shards.items() for name in names},
        }
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def write_file(
    path: Path, tensors: Mapping[str, StoredTensor], advance: Callable[[int], object] = lambda size: None
) -> None:
    """One safetensors file: the length of a header, the header, the tensors' bytes in its order."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + size_in_bytes(tensor)
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the data are aligned
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(_bytes(tensor.load()))
            advance(size_in_bytes(tensor))


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
