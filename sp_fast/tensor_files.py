"""Reading tensors from files, safely and lazily: names, shapes and dtypes first, data one tensor at a time.

Nothing here runs code from a file, or believes a length in it. Safetensors hold no code; torch_files.py reads what
torch.save writes.
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from sp_fast.errors import CheckpointError, first_line
from sp_fast.stored_tensor import DTYPES, LONGEST_LIST, StoredTensor, check_listed
from sp_fast.torch_files import read_torch

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


def stored_tensors(source: str | os.PathLike[str] | Mapping[str, Tensor]) -> tuple[str, dict[str, StoredTensor]]:
    """What to call the source in messages, and its tensors by name.

    Raises:
        CheckpointError: no such file, none that is known in a folder, or one that is damaged or unsafe.
    """
    if isinstance(source, Mapping):
        return "the state dict", {name: _in_memory(name, tensor) for name, tensor in source.items()}
    path = Path(source)
    if path.is_dir():
        path = next((path / name for name in FOLDER_FILES if (path / name).is_file()), None)
        if path is None:
            raise CheckpointError(f"{source} holds none of {', '.join(FOLDER_FILES)}: name the checkpoint file itself")
    if problem := file_problem(path):
        raise CheckpointError(f"{path} {problem}: give a checkpoint file or the folder that holds it")
    return str(path), read_index(path) if path.name.endswith(".index.json") else read_file(path)


def file_problem(path: Path) -> str | None:
    """What keeps a path from being read as a file, if anything: reading a pipe or a device need not end."""
    try:
        return None if path.is_file() else "is no regular file" if path.exists() else "does not exist"
    except OSError as error:  # not allowed, or no name that the system takes
        return f"cannot be opened ({error.strerror})"


def check_together(first: Path, other: Path) -> None:
    """Raises CheckpointError where a checkpoint's other file is a link that leaves it.

    It may lead where the first file's link leads: Hugging Face's cache links every file of a snapshot into one folder.
    """
    if other.resolve().parent not in (first.parent.resolve(), first.resolve().parent):
        raise CheckpointError(
            f"{other} is a link to {other.resolve()}, outside the checkpoint's folder: put the file itself there, or "
            f"link {first.name} into the same folder too"
        )


def read_file(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file: safetensors by its name, else a torch file."""
    try:
        return _read_safetensors(path) if path.suffix == ".safetensors" else read_torch(path)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} was refused: it is damaged, or holds pickled code or objects beside tensors, which are never "
            f"loaded ({first_line(error)}); ask its author for a safetensors file"
        ) from error
    except CheckpointError:
        raise
    except Exception as error:  # readers of damaged files fail in any way
        raise CheckpointError(f"{path} is truncated or damaged ({first_line(error)}): fetch it again") from error


def read_index(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a sharded checkpoint; shards stay inside the index's folder."""
    try:
        shards: dict[str, str] = read_json(path)["weight_map"]
        names = sorted(set(shards.values()))
    except Exception as error:  # any content but an index
        raise CheckpointError(f"{path} is no index of shards ({first_line(error)}): fetch it again") from error
    tensors: dict[str, StoredTensor] = {}
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not name.isprintable():
            raise CheckpointError(
                f"{path} names the shard {name!r:.100}, which is not a plain file beside it: fetch the checkpoint again"
            )
        if problem := file_problem(path.parent / name):
            raise CheckpointError(f"{path} names the shard {name:.100}, which is missing: it {problem}; fetch it")
        check_together(path, path.parent / name)
        shard = read_file(path.parent / name)
        repeated = sorted(tensors.keys() & shard.keys())
        if repeated:
            raise CheckpointError(f"{path}: {repeated[0]} is in more than one shard, {name} among them: fetch it again")
        tensors |= shard
    return tensors


def read_json(path: Path) -> Any:
    """What a small file of JSON holds. Raises OSError or ValueError."""
    with path.open("rb") as file:
        return _parsed(file.read(LONGEST_LIST + 1))


def _in_memory(name: object, tensor: object) -> StoredTensor:
    if not isinstance(name, str) or not isinstance(tensor, Tensor) or not _is_dense(tensor):
        raise CheckpointError(
            f"the state dict: {name!r} is a {type(tensor).__name__}, not a named dense tensor: give those only"
        )
    dtype = tensor.dtype if tensor.dtype in DTYPES else None
    return StoredTensor(tuple(tensor.shape), dtype, lambda: tensor.detach())


def _is_dense(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not (tensor.is_meta or tensor.is_quantized or tensor.is_nested)


def _parsed(text: bytes) -> Any:
    if len(text) > LONGEST_LIST:
        raise ValueError(f"more than {LONGEST_LIST} bytes of JSON")
    try:
        return json.loads(text.decode(), object_pairs_hook=_distinct)
    except RecursionError:
        raise ValueError("JSON that is nested too deeply") from None


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, of which every reader makes something else where it gives a name twice."""
    names = dict(pairs)
    if len(names) != len(pairs):
        raise ValueError("JSON that gives one name twice")
    return names


def _read_safetensors(path: Path) -> dict[str, StoredTensor]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > LONGEST_LIST:
            raise ValueError(f"{length} bytes of header")
        _parsed(file.read(length))  # strictly: of two tensors with one name and place, safe_open takes the last
    handle = safe_open(path, framework="pt")
    tensors = {}
    for name in handle.keys():  # noqa: SIM118, the handle is no mapping
        header = handle.get_slice(name)
        check_listed(name, header.get_shape())
        dtype = _SAFETENSORS_DTYPES.get(header.get_dtype())
        tensors[name] = StoredTensor(tuple(header.get_shape()), dtype, partial(handle.get_tensor, name))
    return tensors
