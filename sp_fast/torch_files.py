"""Files of torch.save: what their pickle says of each tensor, as plain data, and where in the file its bytes lie.

They are read without torch.load: with ``weights_only=True`` it runs no code either, but a pickle of a few bytes has it
crash the process, fill the memory, or give tensors of bytes that the file does not hold.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import zipfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from sp_fast.errors import CheckpointError
from sp_fast.stored_tensor import DTYPES, LONGEST_LIST, StoredTensor, check_listed

_STORAGES = {
    f"torch.{kind}Storage": dtype
    for kind, dtype in {
        "Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16,
        "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8,
        "Bool": torch.bool, "ComplexFloat": torch.complex64, "ComplexDouble": torch.complex128,
    }.items()
}  # fmt: skip
_MAGIC = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)
_CLASSES = ("torch.Tensor", "torch.nn.parameter.Parameter")
_REBUILD = ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state")
_REBUILD_TENSOR, _REBUILD_TYPE = "torch._utils._rebuild_tensor_v2", "torch._tensor._rebuild_from_type_v2"
_NAMES = {"collections.OrderedDict", _REBUILD_TENSOR, _REBUILD_TYPE, *_REBUILD, *_CLASSES, *_STORAGES}


class _Name(str):
    """A class or function that a pickle names. It is not imported."""


class _Storage(NamedTuple):
    """What a pickle says of a storage: ``count`` elements."""

    dtype: torch.dtype
    key: str
    count: int


class _Tensor(NamedTuple):
    """What a pickle says of a tensor; offset and strides count elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class _Place(NamedTuple):
    """Bytes of a file."""

    begin: int
    length: int


def read_torch(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file.

    Raises:
        UnpicklingError: it holds more than tensors by name.
        CheckpointError, ValueError: it holds something else, or is damaged. Other errors come from deeper damage.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        content, places = (_archive if file.read(4) == b"PK\3\4" else _before_archives)(file, size)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not named tensors: give a saved state dict")
    claimed = 0
    for name, tensor in content.items():
        if not isinstance(tensor, _Tensor):
            raise CheckpointError(
                f"{path}: {name!r:.100} is a {type(tensor).__name__}, not a named dense tensor: save tensors only"
            )
        check_listed(name, tensor.shape)
        _check_place(name, tensor, places)
        claimed += math.prod(tensor.shape) * tensor.storage.dtype.itemsize
    if claimed > 2 * size:  # tied weights count twice; more is a small file that asks for a large memory
        raise ValueError(f"its tensors would take {claimed} bytes, of which it holds {size}")
    data = torch.from_file(str(path), size=size, dtype=torch.uint8)  # mapped, not read
    tensors = {}
    for name, tensor in content.items():
        dtype = tensor.storage.dtype if tensor.storage.dtype in DTYPES else None
        load = partial(_view, data, places[tensor.storage.key], tensor)
        tensors[name] = StoredTensor(tensor.shape, dtype, load)
    return tensors


def _check_place(name: str, tensor: _Tensor, places: Mapping[str, _Place]) -> None:
    """All that is read of the tensor must lie in its storage, and all of that in the file."""
    (dtype, key, count), offset, shape, stride = tensor
    lengths = (count, offset, *shape, *stride)
    if len(shape) != len(stride) or not all(isinstance(n, int) and 0 <= n < 2**63 for n in lengths):
        raise ValueError(f"{name} has a shape, strides or an offset that no tensor has")
    last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    if key not in places or count * dtype.itemsize > places[key].length or (last >= count and 0 not in shape):
        raise ValueError(f"{name} is larger than what is stored of it")


def _view(data: Tensor, place: _Place, tensor: _Tensor) -> Tensor:
    (dtype, _, count), offset, shape, stride = tensor
    raw = data[place.begin :][: count * dtype.itemsize]
    if place.begin % dtype.itemsize:  # the format before archives does not align
        raw = raw.clone()
    return raw.view(dtype)[offset:].as_strided(shape, stride)


def _archive(file: BinaryIO, size: int) -> tuple[Any, dict[str, _Place]]:
    """The content of a zip archive of torch.save, and the places of its storages.

    Entries are ranges of the file that are never unpacked, so their names cannot lead anywhere, nor can they grow.
    """
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
    root = entries[0].filename.split("/")[0] + "/"
    names = [entry.filename.removeprefix(root) for entry in entries]
    if "constants.pkl" in names:
        raise pickle.UnpicklingError("it is a TorchScript program")
    if len(set(names)) < len(names) or not all(entry.filename.startswith(root) for entry in entries):
        raise ValueError("its entries have one name twice, or lie in several folders")
    places = {name: _place(file, entry, size) for name, entry in zip(names, entries, strict=True)}
    if "data.pkl" not in places or _read(file, places.get("byteorder", _Place(0, 0))) not in (b"", b"little"):
        raise ValueError("no torch.save on a little-endian machine wrote it")
    content = _plain(io.BytesIO(_read(file, places["data.pkl"])), {})
    return content, {name.removeprefix("data/"): place for name, place in places.items() if name.startswith("data/")}


def _place(file: BinaryIO, entry: zipfile.ZipInfo, size: int) -> _Place:
    header = _read(file, _Place(entry.header_offset, 30))
    begin = entry.header_offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    packed = entry.compress_type or entry.compress_size != entry.file_size or entry.flag_bits & 1
    if packed or header[:4] != b"PK\3\4" or begin + entry.file_size > size:
        raise ValueError(f"{entry.filename[:40]!r} is compressed, encrypted, or not where the archive says")
    return _Place(begin, entry.file_size)


def _read(file: BinaryIO, place: _Place) -> bytes:
    if place.length > LONGEST_LIST:
        raise ValueError(f"a pickle of {place.length} bytes")
    file.seek(place.begin)
    return file.read(place.length)


def _before_archives(file: BinaryIO, size: int) -> tuple[Any, dict[str, _Place]]:
    """As ``_archive``, for the format before torch 1.6: a magic number, four pickles, storages one after the other."""
    head = io.BytesIO(_read(file, _Place(0, min(size, LONGEST_LIST))))
    if head.read(len(_MAGIC)) != _MAGIC:
        raise ValueError("no torch.save wrote it")
    kept: dict[str, _Storage] = {}
    _, _, content, keys = (_plain(head, kept) for _ in range(4))
    places, begin = {}, head.tell()
    for key in keys:
        if not isinstance(key, str) or begin > size:
            break
        length = int.from_bytes(_read(file, _Place(begin, 8)), "little") * kept[key].dtype.itemsize
        places[key] = _Place(begin + 8, length)
        begin += 8 + length
    if begin != size:
        raise ValueError(f"its storages end at byte {begin} of {size}")
    return content, places


def _plain(file: BinaryIO, kept: dict[str, _Storage]) -> Any:
    """The value of the next pickle, made of plain data only; its storages are added to ``kept``.

    A pickle is a program for a stack machine. This one knows only the instructions that torch.save gives for tensors by
    name, imports nothing and calls nothing: ``_called`` says what the few functions in ``_NAMES`` would return.
    """
    stack: list[Any] = []
    outer: list[list[Any]] = []
    memo: dict[int, Any] = {}
    for opcode, argument, _ in pickletools.genops(file):
        match opcode.name:
            case "PROTO" if argument <= pickle.HIGHEST_PROTOCOL:
                pass
            case "STOP":
                break
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode.name])
            case "BINUNICODE" | "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT":
                stack.append(argument)
            case "EMPTY_TUPLE" | "EMPTY_LIST" | "EMPTY_DICT":
                stack.append({"EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict}[opcode.name]())
            case "MARK":
                outer.append(stack)
                stack = []
            case "TUPLE" | "APPENDS" | "SETITEMS":
                items, stack = stack, outer.pop()
                _put(opcode.name, items, stack)
            case "TUPLE1" | "TUPLE2" | "TUPLE3" | "APPEND" | "SETITEM":
                count = {"TUPLE2": 2, "TUPLE3": 3, "SETITEM": 2}.get(opcode.name, 1)
                _put(opcode.name, [stack.pop() for _ in range(count)][::-1], stack)
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL" if (name := argument.replace(" ", ".")) in _NAMES:
                stack.append(_Name(name))
            case "REDUCE":
                arguments = stack.pop()
                stack.append(_called(stack.pop(), arguments))
            case "BUILD" if isinstance(stack[-2], dict):
                stack.pop()  # attributes of an OrderedDict, such as _metadata
            case "BINPERSID":
                storage = _storage(stack.pop())
                stack.append(kept.setdefault(storage.key, storage))
            case _:
                raise pickle.UnpicklingError(f"{opcode.name} {argument or ''!r} in its pickle")
    return stack.pop()


def _put(opcode: str, items: list[Any], stack: list[Any]) -> None:
    """A tuple of items onto the stack, or the items into the list or dict that lies on it."""
    if opcode.startswith("TUPLE"):
        stack.append(tuple(items))
    elif opcode.startswith("APPEND"):
        list.extend(stack[-1], items)
    else:
        for name, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(name, str) or name in stack[-1]:
                raise pickle.UnpicklingError(f"a name that is a {type(name).__name__}, or that is given twice")
            dict.__setitem__(stack[-1], name, value)


def _called(function: object, arguments: object) -> Any:
    """Tensors without requires_grad, hooks and attributes."""
    match isinstance(function, _Name) and str(function), arguments:
        case "collections.OrderedDict", ():
            return {}
        case str(name), (_Storage() as storage, offset, tuple() as shape, tuple() as stride, _, _) if (
            name == _REBUILD_TENSOR
        ):
            return _Tensor(storage, offset, shape, stride)
        case str(name), (_Tensor() as tensor, *_) if name in _REBUILD:
            return tensor
        case str(name), (inner, _Name() as kind, values, _) if name == _REBUILD_TYPE and kind in _CLASSES:
            return _called(inner, values)
    # Only a name is printed: tuples of one tuple, made of such tuples, are endless in print.
    raise pickle.UnpicklingError(f"a call of {function if isinstance(function, _Name) else 'no function'}")


def _storage(identifier: object) -> _Storage:
    match identifier:
        case ("storage", _Name() as kind, str() as key, _, int() as count, *rest) if (
            kind in _STORAGES and rest in ([], [None])  # None: no view of another storage, before archives
        ):
            return _Storage(_STORAGES[kind], key, count)
    raise pickle.UnpicklingError("something beside storages is kept outside its pickle")
