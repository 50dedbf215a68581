"""Reading tensors from files, safely and lazily: names, shapes and dtypes first, data one tensor at a time.

Nothing here runs code from a file: safetensors hold none, and pickled files are read with ``weights_only=True``.
"""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from sp_fast.errors import CheckpointError

# In a folder, the first of these that exists is read.
FOLDER_FILES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
    "non_lora_trainables.bin",
    "model.bin",
    "mm_projector.bin",
)
_SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES = tuple(_SAFETENSORS_DTYPES.values())


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that has not been read yet. ``dtype`` is None for anything but the common floating-point types."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None
    load: Callable[[], Tensor]


def stored_tensors(source: str | os.PathLike[str] | Mapping[str, Tensor]) -> tuple[str, dict[str, StoredTensor]]:
    """What to call the source in messages, and its tensors by name.

    Raises:
        CheckpointError: no such file, none that is known in a folder, or one that is damaged or unsafe.
    """
    if isinstance(source, Mapping):
        return "the state dict", {name: _in_memory("the state dict", name, t) for name, t in source.items()}
    path = Path(source)
    if path.is_dir():
        path = next((path / name for name in FOLDER_FILES if (path / name).is_file()), None)
        if path is None:
            raise CheckpointError(f"{source} holds none of {', '.join(FOLDER_FILES)}: name the checkpoint file itself")
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist: give a checkpoint file or the folder that holds it")
    return str(path), read_index(path) if path.name.endswith(".index.json") else read_file(path)


def read_file(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file: safetensors by its name, else a torch file."""
    try:
        return _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} was refused: it is damaged, or holds pickled code or objects beside tensors, which are never "
            f"loaded ({_first_line(error)}); ask its author for a safetensors file"
        ) from error
    except CheckpointError:
        raise
    except Exception as error:  # readers of damaged files fail in any way
        raise CheckpointError(f"{path} is truncated or damaged ({_first_line(error)}): fetch it again") from error


def read_index(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a sharded checkpoint; shards stay inside the index's folder."""
    try:
        shards: dict[str, str] = json.loads(path.read_text())["weight_map"]
        names = sorted(set(shards.values()))
    except Exception as error:  # any content but an index
        raise CheckpointError(f"{path} is no index of shards ({_first_line(error)}): fetch it again") from error
    tensors: dict[str, StoredTensor] = {}
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(f"{path} names the shard {name!r}, which is not a plain file beside it")
        if not (path.parent / name).is_file():
            raise CheckpointError(f"{path} names the shard {name}, which is missing: fetch it")
        shard = read_file(path.parent / name)
        repeated = sorted(tensors.keys() & shard.keys())
        if repeated:
            raise CheckpointError(f"{path}: {repeated[0]} is in more than one shard, {name} among them")
        tensors |= shard
    return tensors


def _read_safetensors(path: Path) -> dict[str, StoredTensor]:
    file = safe_open(path, framework="pt")
    tensors = {}
    for name in file.keys():  # noqa: SIM118, the handle is no mapping
        header = file.get_slice(name)
        dtype = _SAFETENSORS_DTYPES.get(header.get_dtype())
        tensors[name] = StoredTensor(tuple(header.get_shape()), dtype, lambda name=name: file.get_tensor(name))
    return tensors


def _read_torch(path: Path) -> dict[str, StoredTensor]:
    # A zip file can be mapped; the format before torch 1.6 can only be read.
    content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a state dict of named tensors")
    return {name: _in_memory(str(path), name, tensor) for name, tensor in content.items()}


def _in_memory(where: str, name: object, tensor: object) -> StoredTensor:
    if not isinstance(name, str) or not isinstance(tensor, Tensor) or not _is_dense(tensor):
        raise CheckpointError(f"{where}: {name!r} is a {type(tensor).__name__}, not a named dense tensor")
    dtype = tensor.dtype if tensor.dtype in DTYPES else None
    return StoredTensor(tuple(tensor.shape), dtype, lambda: tensor.detach())


def _is_dense(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_meta and not tensor.is_quantized


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
