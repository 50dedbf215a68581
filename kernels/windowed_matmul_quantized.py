"""Windowed matmul on quantised weights: weight-only, the features stay what they are.

    out[b, o, :] = sum_q rows[b, source(o, q), :] @ (scale[cell + q] * value[cell + q])^T          (quantized.py)

What it saves: at small batch the forward is as fast as its weights are read, and these are a half (int8, fp8) or a
quarter (int4) of bfloat16's bytes. At the published widths (crop-dfi, one image) 0.90 or 0.48 GB and 8.2 GFLOP: 210
or 111 us at 4.3 TB/s.

There is no gradient: not for the weights, which are integers, and not for the rows either.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sp_fast.kernels.autocast import autocast_tensors, no_autocast
from sp_fast.kernels.quantized import SCHEMES, dequantize_cells
from sp_fast.kernels.window import Window, decode_windows
from sp_fast.kernels.windowed_matmul import check_backend, check_windows
from sp_fast.kernels.windowed_matmul_torch import dense_rows, row_operands

PIECE_BYTES = 2 * 2**20  # of widened weights at a time, which stay in a core's cache


def windowed_matmul_quantized(
    rows: Tensor, values: Sequence[Tensor], scales: Sequence[Tensor], windows: Sequence[int], backend: str = "torch"
) -> Tensor:
    """Every window's product with quantised weights, in one call.

    Args:
        rows: ``[B, R, C]`` of a floating-point type; any strides.
        values: packed weights ``[cells, D, C]`` of int8 or float8_e4m3fn, or ``[cells, D, C / 2]`` of uint8 (int4);
            contiguous, of one type.
        scales: of each weight ``[cells, groups, D]`` float32, contiguous; see quantized.py.
        windows: integers of ``encode_windows``.
        backend: "torch" or "triton".
    Returns:
        ``[B, O, D]`` in the rows' type: the outputs of all windows, in their order. Sums are float32 or wider.
    Raises:
        ValueError: shapes, types or devices that do not belong together, or a window that leaves its tensors.
        NotImplementedError: in a backward pass that reaches the rows.
    """
    if not values or not windows or len(values) != len(scales):
        raise ValueError(
            f"give at least one weight and one window, and scales for each: {len(values)} values, {len(scales)} scales"
        )
    (rows,) = autocast_tensors(rows)
    check_backend(backend, len(values))
    _check(rows, values, scales)
    check_windows(rows, [len(value) for value in values], decode_windows(windows))
    with no_autocast(rows):
        return _quantized_op(rows, list(values), list(scales), list(windows), backend)


def _check(rows: Tensor, values: Sequence[Tensor], scales: Sequence[Tensor]) -> None:
    if rows.dim() != 3 or not rows.is_floating_point():
        raise ValueError(f"rows must be [batch, rows, width] in floating point, not {rows.dtype} {tuple(rows.shape)}")
    scheme = SCHEMES.get(values[0].dtype)
    if scheme is None:
        raise ValueError(f"values are {values[0].dtype}, which is none of {', '.join(map(str, SCHEMES))}")
    width, depth = rows.shape[2], values[0].shape[1] if values[0].dim() == 3 else 0
    if width % scheme.channels:
        raise ValueError(f"{scheme.name} stores {scheme.channels} channels a byte, which {width} channels do not fill")
    for value, scale in zip(values, scales, strict=True):
        expected = scheme.shapes(len(value), width, depth)
        if (tuple(value.shape), tuple(scale.shape)) != expected:
            raise ValueError(
                f"values {tuple(value.shape)} and scales {tuple(scale.shape)} are not {scheme.name}'s {expected[0]} "
                f"and {expected[1]} for rows of {width} channels"
            )
        if (value.dtype, scale.dtype) != (scheme.dtype, torch.float32):
            raise ValueError(
                f"values {value.dtype} with scales {scale.dtype} must be {scheme.dtype}, as all are, and float32"
            )
        if not (value.is_contiguous() and scale.is_contiguous()) or {value.device, scale.device} != {rows.device}:
            raise ValueError(
                f"values on {value.device} and scales on {scale.device} must be contiguous, on the rows' {rows.device}"
            )


def windowed_matmul_quantized_torch(
    rows: Tensor, values: Sequence[Tensor], scales: Sequence[Tensor], windows: Sequence[Window]
) -> Tensor:
    """In plain torch: a few cells at a time are widened into a buffer, and multiplied while they are in the cache."""
    rows, wide = dense_rows(rows), torch.promote_types(rows.dtype, torch.float32)
    depth, width = values[0].shape[1], rows.shape[2]
    cells = max(1, PIECE_BYTES // (depth * width * wide.itemsize))
    buffer = rows.new_empty(cells, depth, width, dtype=wide)
    outs = []
    for w in windows:
        out = rows.new_zeros(rows.shape[0] * w.outputs, depth, dtype=wide)
        for first, operand in row_operands(rows, w):
            for start in range(0, w.width, cells):
                part = operand[start : start + cells].to(wide)
                piece = slice(first + start, first + start + len(part))
                out += _product(part, values[w.weight][piece], scales[w.weight][piece], buffer[: len(part)])
        outs.append(out.view(rows.shape[0], w.outputs, depth).to(rows.dtype))
    return torch.cat(outs, dim=1)


def _product(operand: Tensor, values: Tensor, scales: Tensor, buffer: Tensor) -> Tensor:
    """``[B * outputs, D]``, summed over the cells of ``operand`` ``[cells, B * outputs, C]``."""
    if scales.shape[1] > 1:
        dequantize_cells(values, scales, buffer)
        return torch.bmm(operand, buffer.transpose(1, 2)).sum(0)
    SCHEMES[values.dtype].decode(values, buffer)  # one scale an output: of the results, which are fewer
    return torch.bmm(operand, buffer.transpose(1, 2)).mul_(scales).sum(0)


@torch.library.custom_op("sp_fast::windowed_matmul_quantized", mutates_args=())
def _quantized_op(
    rows: Tensor, values: Sequence[Tensor], scales: Sequence[Tensor], windows: Sequence[int], backend: str
) -> Tensor:
    return _FORWARDS[backend](rows, values, scales, decode_windows(windows))


@_quantized_op.register_fake
def _(rows: Tensor, values: Sequence[Tensor], scales: Sequence[Tensor], windows: Sequence[int], backend: str) -> Tensor:
    return rows.new_empty(rows.shape[0], sum(w.outputs for w in decode_windows(windows)), values[0].shape[1])


def _refuse(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple:
    raise NotImplementedError(
        "quantised weights pass no gradient to the features: detach() them, or train with projector.dequantized()"
    )


_quantized_op.register_autograd(_refuse)


def _forward_triton(
    rows: Tensor, values: Sequence[Tensor], scales: Sequence[Tensor], windows: Sequence[Window]
) -> Tensor:
    from sp_fast.kernels.windowed_matmul_quantized_triton import windowed_matmul_quantized_triton

    return windowed_matmul_quantized_triton(rows, values, scales, windows)


_FORWARDS = {"torch": windowed_matmul_quantized_torch, "triton": _forward_triton}
