"""Windowed matmul: all convolutions of the projector as products of map rows with packed weights.

    out[b, o, :] = sum_q rows[b, source(o, q), :] @ weight[cell + q]          (window.py defines source)
    dweight[cell + q] = sum_{b, o} rows[b, source(o, q), :]^T @ dout[b, o, :]
    drows[b, source(o, q), :] += dout[b, o, :] @ weight[cell + q]^T

What it saves: a convolution library re-lays ``[D, C, k, k]`` weights out on every call, three times the bytes of the
product itself; autograd over slices of a packed parameter would allocate a full-size gradient for every level. Here a
weight ``[cells, C, D]`` is read once, in place, and its gradient is written once, into one buffer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sp_fast.kernels.autocast import autocast_tensors, no_autocast
from sp_fast.kernels.window import Window, decode_windows
from sp_fast.kernels.windowed_matmul_torch import (
    windowed_matmul_drows_torch,
    windowed_matmul_dweight_torch,
    windowed_matmul_torch,
)


def windowed_matmul(rows: Tensor, weights: Sequence[Tensor], windows: Sequence[int], backend: str = "torch") -> Tensor:
    """Every window's product, in one differentiable call.

    Args:
        rows: ``[B, R, C]``, R the rows of an image; any strides.
        weights: packed weights ``[cells, C, D]``, of one dtype and device with ``rows``.
        windows: integers of ``encode_windows``.
        backend: "torch" or "triton", for the forward; gradients take the torch path.
    Returns:
        ``[B, O, D]``: the outputs of all windows, in their order.
    Raises:
        ValueError: shapes, dtypes or devices that do not belong together, or a window that leaves its tensors.
    Gradients: for ``rows`` and ``weights``, each only where asked for; differentiable once.
    """
    if not weights or not windows:
        raise ValueError("there is nothing to multiply: give at least one weight and one window")
    rows, *weights = autocast_tensors(rows, *weights)
    _check(rows, weights, decode_windows(windows))
    with no_autocast(rows):
        return _forward_op(rows, list(weights), list(windows), backend)


def _check(rows: Tensor, weights: Sequence[Tensor], windows: list[Window]) -> None:
    if rows.dim() != 3:
        raise ValueError(f"rows must be [batch, rows, width], not of shape {tuple(rows.shape)}")
    for weight in weights:
        if weight.dim() != 3 or weight.shape[1] != rows.shape[2] or weight.shape[2] != weights[0].shape[2]:
            raise ValueError(
                f"a weight of shape {tuple(weight.shape)} is not [cells, {rows.shape[2]}, {weights[0].shape[-1]}]"
            )
        if weight.dtype != rows.dtype:
            raise ValueError(
                f"the features are {rows.dtype} but the weights {weight.dtype}: cast one of them "
                f"(features.to(weight.dtype) or module.to(features.dtype)), or run under torch.autocast"
            )
        if weight.device != rows.device:
            raise ValueError(f"the features are on {rows.device} but the weights on {weight.device}: move one of them")
    cells = [weight.shape[0] for weight in weights]
    for w in windows:
        if min(w.weight, w.cell, w.origin) < 0 or w.weight >= len(cells) or w.cell + w.cells > cells[w.weight]:
            raise ValueError(f"{w} leaves the weights, which have {cells} cells")
        if w.last_source >= rows.shape[1]:
            raise ValueError(f"{w} leaves the {rows.shape[1]} rows: it reads row {w.last_source}")


# Registration: opaque to torch.compile, with shapes for tracing and a gradient that is computed only where asked for.


@torch.library.custom_op("sp_fast::windowed_matmul", mutates_args=())
def _forward_op(rows: Tensor, weights: Sequence[Tensor], windows: Sequence[int], backend: str) -> Tensor:
    return _FORWARDS[backend](rows, weights, decode_windows(windows))


def _forward_triton(rows: Tensor, weights: Sequence[Tensor], windows: Sequence[Window]) -> Tensor:
    from sp_fast.kernels.windowed_matmul_triton import windowed_matmul_triton

    return windowed_matmul_triton(rows, weights, windows)


_FORWARDS = {"torch": windowed_matmul_torch, "triton": _forward_triton}


@torch.library.custom_op("sp_fast::windowed_matmul_dweight", mutates_args=())
def _dweight_op(grad: Tensor, rows: Tensor, cells: Sequence[int], windows: Sequence[int]) -> list[Tensor]:
    return windowed_matmul_dweight_torch(grad, rows, cells, decode_windows(windows))


@torch.library.custom_op("sp_fast::windowed_matmul_drows", mutates_args=())
def _drows_op(grad: Tensor, rows: Tensor, weights: Sequence[Tensor], windows: Sequence[int]) -> Tensor:
    return windowed_matmul_drows_torch(grad, rows, weights, decode_windows(windows))


@_forward_op.register_fake
def _(rows: Tensor, weights: Sequence[Tensor], windows: Sequence[int], backend: str) -> Tensor:
    outputs = sum(w.outputs for w in decode_windows(windows))
    return rows.new_empty(rows.shape[0], outputs, weights[0].shape[2])


@_dweight_op.register_fake
def _(grad: Tensor, rows: Tensor, cells: Sequence[int], windows: Sequence[int]) -> list[Tensor]:
    return [rows.new_empty(n, rows.shape[2], grad.shape[2]) for n in cells]


@_drows_op.register_fake
def _(grad: Tensor, rows: Tensor, weights: Sequence[Tensor], windows: Sequence[int]) -> Tensor:
    return rows.new_empty(rows.shape)


def _save(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    rows, weights, ctx.windows, _ = inputs
    ctx.save_for_backward(rows, *weights)


def _backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple:
    rows, *weights = ctx.saved_tensors
    wants_rows, wants_weights, *_ = ctx.needs_input_grad
    drows, dweights = None, [None] * len(weights)
    with no_autocast(grad):
        if any(wants_weights):
            cells = [len(weight) * wanted for weight, wanted in zip(weights, wants_weights, strict=True)]
            found = _dweight_op(grad, rows, cells, ctx.windows)
            dweights = [dweight if wanted else None for dweight, wanted in zip(found, wants_weights, strict=True)]
        if wants_rows:
            drows = _drows_op(grad, rows, weights, ctx.windows)
    return drows, dweights, None, None


_forward_op.register_autograd(_backward, setup_context=_save)
