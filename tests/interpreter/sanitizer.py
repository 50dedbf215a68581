"""A sanitizer for Triton kernels that run on the CPU under TRITON_INTERPRET=1.

Triton's interpreter gets bfloat16 wrong and lets most memory errors pass, so that a kernel can be right
here and wrong on a GPU. `install()` patches it: bfloat16 is exact, and `SanitizerError` is raised when

- an unmasked lane of a load, store or atomic lies outside every tensor argument of the launch;
- two programs store to one address, or one program reads or atomically updates what another stores;
- one store writes an address twice;
- an int32 addition, subtraction or multiplication overflows (unsigned integers may wrap).

Lanes that a load masks off without `other` are undefined on a GPU: they hold NaN or a large integer here.
"""

import functools
from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Any, NoReturn

import numpy as np
import torch
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, InterpreterError, TensorHandle
from triton.runtime.jit import TensorWrapper
from triton.tools.tensor_descriptor import TensorDescriptor

INT32_POISON = 0x7F7F7F7F  # in masked-off lanes: odd, and out of bounds as an index


class SanitizerError(AssertionError):
    """A kernel did what is wrong or undefined on a GPU."""


@functools.cache
def install() -> None:
    """Patch triton's interpreter for the rest of the process."""
    _make_bfloat16_exact()
    _watch_memory()
    _poison_masked_lanes()
    # Triton's own check, off by default, is this function too, but takes unsigned integers and poison as well.
    TritonSemantic.binary_op_sanitize_overflow_impl = _check_overflow


def _replace(owner: Any, name: str) -> Callable[[Callable], None]:
    """Put the decorated function, which gets the original as its first argument, in the place of owner.name."""
    original = getattr(owner, name)

    def put(replacement: Callable) -> None:
        setattr(owner, name, lambda *args, **kwargs: replacement(original, *args, **kwargs))

    return put


def _widen(bfloat16_bits: np.ndarray) -> np.ndarray:
    """The float32 numbers that bfloat16 bits stand for."""
    return (bfloat16_bits.astype(np.uint32) << 16).view(np.float32)


def _narrow(numbers: np.ndarray, *, toward_zero: bool = False) -> np.ndarray:
    """The bfloat16 bits of float32 numbers, rounded to nearest even unless `toward_zero`."""
    bits = numbers.view(np.uint32)
    rounded = bits if toward_zero else bits + (0x7FFF + (bits >> 16 & 1))
    quiet_nan = bits >> 16 | 0x40  # a NaN whose payload lies in the lower half must not become an infinity
    return np.where(np.isnan(numbers), quiet_nan, rounded >> 16).astype(np.uint16)


def _make_bfloat16_exact() -> None:
    # The interpreter holds bfloat16 as uint16, and computes with these integers.
    @_replace(interpreter, "_convert_float")
    def convert_float(original: Callable, data: np.ndarray, source: tl.dtype, target: tl.dtype, rounding: Any) -> Any:
        if (source, target) == (tl.bfloat16, tl.float32):
            return _widen(data)
        if (source, target) == (tl.float32, tl.bfloat16):
            return _narrow(data, toward_zero=rounding == interpreter._ir.ROUNDING_MODE.RTZ)
        return original(data, source, target, rounding)

    @_replace(InterpreterBuilder, "cast_impl")
    def cast_impl(original: Callable, self: InterpreterBuilder, source: TensorHandle, target: tl.dtype) -> TensorHandle:
        if target.scalar == tl.bfloat16:  # through float32, as on a GPU; from bfloat16 triton itself does so
            source = TensorHandle(source.data.astype(np.float32), tl.float32)
        return original(self, source, target)

    # Only triton 3.9 has it, and without it a bfloat16 tensor times a Python number is an error.
    InterpreterBuilder.get_bf16 = lambda self, value: self.cast_impl(self.get_fp32(value), tl.bfloat16)

    @_replace(InterpreterBuilder, "create_dot")
    def dot(original: Callable, self: InterpreterBuilder, lhs: TensorHandle, rhs: TensorHandle, *args: Any) -> Any:
        return original(self, _float32(lhs), _float32(rhs), *args)

    for name in ("binary_op", "unary_op", "create_clampf", "create_fma"):
        _replace(InterpreterBuilder, name)(_compute_in_float32)
    for name in ("sum", "min_max"):
        _replace(interpreter.ReduceOps, name)(_reduce_in_float32)
    for name in ("cumsum", "cumprod"):
        _replace(interpreter.ScanOps, name)(_reduce_in_float32)


def _float32(argument: Any) -> Any:
    """A bfloat16 operand as float32, anything else as it is."""
    if isinstance(argument, TensorHandle) and argument.dtype.scalar == tl.bfloat16:
        return TensorHandle(_widen(argument.data), tl.float32)
    return argument


def _compute_in_float32(original: Callable, self: InterpreterBuilder, *args: Any) -> TensorHandle:
    result = original(self, *map(_float32, args))
    if result.data.dtype == bool:  # a comparison, which triton leaves its operands' type, so that splat mistakes it
        return TensorHandle(result.data, tl.int1)
    if args[0].dtype.scalar == tl.bfloat16:
        return TensorHandle(_narrow(result.data), tl.bfloat16)
    return result


def _reduce_in_float32(original: Callable, self: Any, tensor: tl.tensor, *args: Any, **kwargs: Any) -> Any:
    if tensor.dtype != tl.bfloat16:
        return original(self, tensor, *args, **kwargs)
    cast = interpreter.interpreter_semantic.cast
    result = original(self, cast(tensor, tl.float32), *args, **kwargs)
    results = result if isinstance(result, list | tuple) else [result]
    return [cast(each, tl.bfloat16) if each.dtype == tl.float32 else each for each in results]  # not an index


class _Launch:
    """What the programs of one launch may access, and what they did access.

    Accesses are kept as spans: rows of start address, end address and the program's place in `programs`.
    """

    def __init__(self, arguments: Any) -> None:
        self.extents = [_extent(tensor) for tensor in _tensors(arguments) if tensor.numel()]
        self.programs: list[tuple[int, int, int]] = []
        self.stores: list[np.ndarray] = []
        self.reads: list[np.ndarray] = []  # loads and atomics

    def access(self, kind: str, pointers: TensorHandle, mask: Any) -> None:
        """Check and record one load, store or atomic of the running program."""
        program = interpreter.interpreter_builder.grid_idx
        if program not in self.programs[-1:]:
            self.programs.append(program)
        size = interpreter._get_np_dtype(pointers.get_element_ty()).itemsize
        starts = np.sort(pointers.data[np.broadcast_to(mask, pointers.data.shape)])
        if not starts.size:
            return
        self._check_bounds(kind, starts, size)
        if kind == "store" and (np.diff(starts) < size).any():
            raise SanitizerError(f"duplicate store: one store of program {program} writes an address twice")
        starts = starts.astype(np.int64)
        spans = np.stack([starts, starts + size, np.full_like(starts, len(self.programs) - 1)], axis=1)
        (self.stores if kind == "store" else self.reads).append(_merge(spans))

    def _check_bounds(self, kind: str, starts: np.ndarray, size: int) -> None:
        if any(low <= starts[0] and starts[-1] <= high - size for low, high in self.extents):
            return  # almost always: all lanes lie in one tensor
        starts = starts.astype(float)  # a wild pointer may lie anywhere in 64 bits, where differences would wrap
        of_extents = [np.maximum(low - starts, starts + size - high) for low, high in self.extents]
        outside = np.min([np.full_like(starts, np.inf), *of_extents], axis=0)
        if (outside > 0).any():
            lanes = f"{(outside > 0).sum()} lanes of program {self.programs[-1]}, up to {outside.max():.0f} bytes"
            raise SanitizerError(f"out-of-bounds {kind}: {lanes} outside the nearest tensor argument")

    def check_races(self) -> None:
        """Raise if what one program stored is stored or read by another one."""
        if not self.stores:
            return
        stores = _spans_by_address(self.stores)
        (overlaps,) = np.nonzero(stores[1:, 0] < stores[:-1, 1])
        if overlaps.size:
            self._fail("write-write race", stores[overlaps[0]], stores[overlaps[0] + 1])
        if not self.reads:
            return
        # Stores are disjoint from here on, so that a read overlaps those from `first` to `last`.
        reads = _spans_by_address(self.reads)
        first = np.searchsorted(stores[:, 1], reads[:, 0], side="right")
        last = np.searchsorted(stores[:, 0], reads[:, 1], side="left") - 1
        reads, first, last = (values[first <= last] for values in (reads, first, last))
        neighbourhood = np.cumsum(np.diff(stores[:, 2], prepend=stores[0, 2]) != 0)  # of stores by one program
        (races,) = np.nonzero((stores[first, 2] != reads[:, 2]) | (neighbourhood[first] != neighbourhood[last]))
        if races.size:
            read, overlapping = reads[races[0]], stores[first[races[0]] : last[races[0]] + 1]
            self._fail("read-write race", read, overlapping[overlapping[:, 2] != read[2]][0])

    def _fail(self, race: str, one: np.ndarray, other: np.ndarray) -> NoReturn:
        programs = f"{self.programs[one[2]]} and {self.programs[other[2]]}"
        raise SanitizerError(f"{race}: {min(one[1], other[1]) - max(one[0], other[0])} bytes of programs {programs}")


def _tensors(argument: Any) -> Iterator[torch.Tensor]:
    """The tensors in a kernel's argument, or in a tuple of arguments."""
    if isinstance(argument, torch.Tensor):
        yield argument
    elif isinstance(argument, TensorWrapper | TensorDescriptor):
        yield from _tensors(argument.base)
    elif isinstance(argument, tuple):
        for item in argument:
            yield from _tensors(item)


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """The first address of a tensor's elements, and the one after its last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def _merge(spans: np.ndarray) -> np.ndarray:
    """Spans of one program, sorted, and joined where they touch or overlap."""
    spans = spans[np.argsort(spans[:, 0])]
    reach = np.maximum.accumulate(spans[:, 1])
    opening = np.append(True, spans[1:, 0] > reach[:-1])
    closing = np.append(opening[1:], True)
    return np.stack([spans[opening, 0], reach[closing], spans[opening, 2]], axis=1)


def _spans_by_address(accesses: list[np.ndarray]) -> np.ndarray:
    """The spans of all programs, merged within each; accesses of one program follow each other."""
    programs = groupby(accesses, key=lambda spans: spans[0, 2])
    spans = np.concatenate([_merge(np.concatenate(list(of_program))) for _, of_program in programs])
    return spans[np.argsort(spans[:, 0])]


def _watch_memory() -> None:
    @_replace(GridExecutor, "_init_args_hst")
    def init_args_hst(original: Callable, self: GridExecutor, args: Any, kwargs: dict) -> Any:
        # Tensors of a device are copied here, and the kernel works on the copies.
        host_args, host_kwargs = original(self, args, kwargs)
        interpreter.interpreter_builder.launch = _Launch((*host_args, *host_kwargs.values()))
        return host_args, host_kwargs

    @_replace(GridExecutor, "__call__")
    def launch(original: Callable, *args: Any, **kwargs: Any) -> None:
        try:
            original(*args, **kwargs)
        except InterpreterError as error:
            cause = error
            while isinstance(cause, InterpreterError):  # one for the launch, and one for each device function
                cause = cause.__cause__
            if isinstance(cause, SanitizerError):
                raise cause from None
            raise
        interpreter.interpreter_builder.launch.check_races()

    _watch("create_masked_load", "load", pointers=0, mask=1)
    _watch("create_masked_store", "store", pointers=0, mask=2)
    _watch("create_atomic_rmw", "atomic", pointers=1, mask=3)
    _watch("create_atomic_cas", "atomic", pointers=0, mask=None)


def _watch(name: str, kind: str, pointers: int, mask: int | None) -> None:
    """Record what a method of the builder accesses, given the places of its pointers and mask."""

    @_replace(InterpreterBuilder, name)
    def watched(original: Callable, self: InterpreterBuilder, *args: Any, **kwargs: Any) -> Any:
        self.launch.access(kind, args[pointers], True if mask is None else args[mask].data)
        return original(self, *args, **kwargs)


def _poison(dtype: tl.dtype, shape: tuple[int, ...]) -> TensorHandle:
    np_dtype = interpreter._get_np_dtype(dtype)
    if np.issubdtype(np_dtype, np.floating):
        value = np.nan
    elif dtype == tl.bfloat16:
        value = 0x7FC0  # NaN
    else:
        value = int.from_bytes(b"\x7f" * np_dtype.itemsize)
    return TensorHandle(np.full(shape, value, np_dtype), dtype)


def _poison_masked_lanes() -> None:
    @_replace(InterpreterBuilder, "create_masked_load")
    def masked_load(original: Callable, self: Any, pointers: Any, mask: Any, other: Any, *args: Any, **kw: Any) -> Any:
        if other is None:
            other = _poison(pointers.get_element_ty(), pointers.data.shape)
        return original(self, pointers, mask, other, *args, **kw)

    @_replace(InterpreterBuilder, "binary_op")
    def binary_op(original: Callable, self: Any, lhs: TensorHandle, rhs: TensorHandle, operation: Any) -> TensorHandle:
        # Index arithmetic on lanes that are dropped later must not overflow, so poison stays poison in it.
        result = original(self, lhs, rhs, operation)
        if operation in (np.add, np.subtract, np.multiply) and result.dtype.scalar == tl.int32:
            poisoned = _poisoned(lhs, rhs)
            if poisoned.any():
                result.data[np.broadcast_to(poisoned, result.data.shape)] = INT32_POISON
        return result


def _poisoned(lhs: TensorHandle, rhs: TensorHandle) -> np.ndarray:
    return (lhs.data == INT32_POISON) | (rhs.data == INT32_POISON)


_EXACTLY = {"add": np.add, "sub": np.subtract, "mul": np.multiply}


def _check_overflow(semantic: TritonSemantic, lhs: tl.tensor, rhs: tl.tensor, operation: Callable) -> None:
    if lhs.dtype != tl.int32:
        return
    # In numpy, not by the interpreter's own int64 operations: a third of all its time.
    exact = _EXACTLY[operation.__name__](lhs.handle.data.astype(np.int64), rhs.handle.data.astype(np.int64))
    overflowing = exact != exact.astype(np.int32)
    if overflowing.any():
        overflowing &= ~_poisoned(lhs.handle, rhs.handle)
    if overflowing.any():
        lanes = f"{overflowing.sum()} lanes of program {interpreter.interpreter_builder.grid_idx}"
        raise SanitizerError(f"int32 overflow in {operation.__name__}: {lanes}, such as {exact[overflowing][0]}")
