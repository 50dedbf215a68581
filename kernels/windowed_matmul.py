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
from sp_fast.kernels.device import why_not_triton
from sp_fast.kernels.window import Window, decode_windows
from sp_fast.kernels.windowed_matmul_torch import (
    dense_rows,
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
        backend: "torch" or "triton", for the forward and its gradients.
    Returns:
        ``[B, O, D]``: the outputs of all windows, in their order.
    Raises:
        ValueError: shapes, dtypes or devices that do not belong together, or a window that leaves its tensors.
    Gradients: for ``rows`` and ``weights``, each only where asked for; differentiable once.
    """
    if not weights or not windows:
        raise ValueError("there is nothing to multiply: give at least one weight and one window")
    rows, *weights = autocast_tensors(rows, *weights)
    check_backend(backend, len(weights))
    _check(rows, weights, decode_windows(windows))
    with no_autocast(rows):
        return _forward_op(rows, list(weights), list(windows), backend)


@torch.no_grad()
def windowed_matmul_dweight(
    grad: Tensor,
    rows: Tensor,
    outs: Sequence[Tensor | None],
    windows: Sequence[int],
    *,
    add: bool = False,
    backend: str = "torch",
) -> None:
    """The weights' gradients, written into buffers of the caller's: no other is allocated.

    Args:
        grad: ``[B, O, D]``, of the outputs.
        rows: ``[B, R, C]``, of ``grad``'s dtype.
        outs: for each weight a contiguous ``[cells, C, D]`` in float32 or in ``grad``'s dtype, one dtype for all; None
            for a weight whose gradient is not wanted, which costs nothing.
        windows: integers of ``encode_windows``.
        add: to what the buffers hold (gradient accumulation), in one pass; else they are overwritten.
        backend: "torch" or "triton".
    Raises:
        ValueError: shapes, dtypes or devices that do not belong together, or a buffer that is not contiguous.
    """
    found = decode_windows(windows)
    check_backend(backend, len(outs))
    if backend == "triton" and (reason := why_not_triton(rows.device, rows.dtype)):
        raise ValueError(f"backend='triton' cannot run here, since {reason}: use backend='torch'")
    if not found:
        raise ValueError("there is nothing to multiply: give at least one window")
    if grad.device != rows.device:
        raise ValueError(f"the gradient is on {grad.device} but the rows on {rows.device}: move one of them")
    if rows.dim() != 3 or grad.shape[:2] != (len(rows), sum(w.outputs for w in found)) or grad.dtype != rows.dtype:
        raise ValueError(
            f"a gradient {grad.dtype} of shape {tuple(grad.shape)} does not belong to rows {rows.dtype} of shape "
            f"{tuple(rows.shape)} and {sum(w.outputs for w in found)} outputs"
        )
    asked = [out for out in outs if out is not None]
    for out in asked:
        if out.dtype not in (grad.dtype, torch.float32) or out.dtype != asked[0].dtype:
            raise ValueError(f"a gradient is written in {grad.dtype} or float32, as all others are, not in {out.dtype}")
        if out.shape[1:] != (rows.shape[2], grad.shape[2]) or not out.is_contiguous() or out.device != rows.device:
            raise ValueError(
                f"a gradient's buffer is a contiguous [cells, {rows.shape[2]}, {grad.shape[2]}] on {rows.device}, not "
                f"{tuple(out.shape)} of strides {out.stride()} on {out.device}"
            )
    check_windows(rows, [None if out is None else len(out) for out in outs], found)
    if asked:
        _write_dweight(grad.contiguous(), dense_rows(rows), outs, found, add, backend)


def check_backend(backend: str, weights: int) -> None:
    if backend not in _FORWARDS:
        raise ValueError(f"backend={backend!r} is none of {', '.join(map(repr, _FORWARDS))}")
    if backend == "triton" and weights > 2:
        raise ValueError(f"the Triton kernels take one or two packed weights, not {weights}: use backend='torch'")


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
    check_windows(rows, [len(weight) for weight in weights], windows)


def check_windows(rows: Tensor, cells: Sequence[int | None], windows: list[Window]) -> None:
    """``cells`` of each weight, None for one that is not there to be held against."""
    for w in windows:
        if min(w.weight, w.cell, w.origin) < 0 or w.weight >= len(cells):
            raise ValueError(f"{w} leaves the weights, of which there are {len(cells)}, or begins before them")
        if cells[w.weight] is not None and w.cell + w.cells > cells[w.weight]:
            raise ValueError(f"{w} leaves the weights, which have {list(cells)} cells")
        if w.last_source >= rows.shape[1]:
            raise ValueError(f"{w} leaves the {rows.shape[1]} rows: it reads row {w.last_source}")
        if w.width > w.row_stride:
            raise ValueError(f"{w} is wider than its row stride, and would read a row for two cells")


def _write_dweight(
    grad: Tensor, rows: Tensor, outs: Sequence[Tensor | None], windows: list[Window], add: bool, backend: str
) -> None:
    """Windows may share cells, and leave some alone: a projector's do neither, and all is one pass."""
    layers = disjoint_layers(windows)
    if not add:
        for i, out in enumerate(outs):
            met = sum(w.cells for w, _ in layers[0] if w.weight == i)
            if out is not None and (met < len(out) or not len(grad)):
                out.zero_()
    if not len(grad):
        return
    for layer in layers:
        part = grad if len(layers) == 1 else torch.cat([grad[:, columns] for _, columns in layer], dim=1)
        _DWEIGHTS[backend](part, rows, outs, [w for w, _ in layer], add or layer is not layers[0])


def disjoint_layers(windows: list[Window]) -> list[list[tuple[Window, slice]]]:
    """Windows that share no cell together, each with its outputs."""
    layers: list[list[tuple[Window, slice]]] = []
    first = 0
    for w in windows:
        free = (layer for layer in layers if not any(_share_cells(w, other) for other, _ in layer))
        layer = next(free, None)
        if layer is None:
            layers.append(layer := [])
        layer.append((w, slice(first, first + w.outputs)))
        first += w.outputs
    return layers


def _share_cells(a: Window, b: Window) -> bool:
    return a.weight == b.weight and a.cell < b.cell + b.cells and b.cell < a.cell + a.cells


# Registration: opaque to torch.compile, with shapes for tracing and a gradient that is computed only where asked for.


@torch.library.custom_op("sp_fast::windowed_matmul", mutates_args=())
def _forward_op(rows: Tensor, weights: Sequence[Tensor], windows: Sequence[int], backend: str) -> Tensor:
    return _FORWARDS[backend](rows, weights, decode_windows(windows))


@torch.library.custom_op("sp_fast::windowed_matmul_dweight", mutates_args=())
def _dweight_op(grad: Tensor, rows: Tensor, cells: Sequence[int], windows: Sequence[int], backend: str) -> list[Tensor]:
    """``cells`` of each weight, 0 for a gradient that is not wanted."""
    found = [rows.new_empty(n, rows.shape[2], grad.shape[2]) for n in cells]
    outs = [out if len(out) else None for out in found]
    _write_dweight(grad.contiguous(), dense_rows(rows), outs, decode_windows(windows), False, backend)
    return found


@torch.library.custom_op("sp_fast::windowed_matmul_drows", mutates_args=())
def _drows_op(grad: Tensor, rows: Tensor, weights: Sequence[Tensor], windows: Sequence[int], backend: str) -> Tensor:
    if not len(grad):
        return rows.new_empty(rows.shape)
    return _DROWS[backend](grad.contiguous(), rows, weights, decode_windows(windows))


# Triton is imported where it is asked for.


def _forward_triton(rows: Tensor, weights: Sequence[Tensor], windows: Sequence[Window]) -> Tensor:
    from sp_fast.kernels.windowed_matmul_triton import windowed_matmul_triton

    return windowed_matmul_triton(rows, weights, windows)


def _dweight_triton(
    grad: Tensor, rows: Tensor, outs: Sequence[Tensor | None], windows: Sequence[Window], add: bool
) -> None:
    from sp_fast.kernels.windowed_matmul_dweight_triton import windowed_matmul_dweight_triton

    windowed_matmul_dweight_triton(grad, rows, outs, windows, add)


def _drows_triton(grad: Tensor, rows: Tensor, weights: Sequence[Tensor], windows: Sequence[Window]) -> Tensor:
    from sp_fast.kernels.windowed_matmul_drows_triton import windowed_matmul_drows_triton

    return windowed_matmul_drows_triton(grad, rows, weights, windows)


_FORWARDS = {"torch": windowed_matmul_torch, "triton": _forward_triton}
_DWEIGHTS = {"torch": windowed_matmul_dweight_torch, "triton": _dweight_triton}
_DROWS = {"torch": windowed_matmul_drows_torch, "triton": _drows_triton}


@_forward_op.register_fake
def _(rows: Tensor, weights: Sequence[Tensor], windows: Sequence[int], backend: str) -> Tensor:
    outputs = sum(w.outputs for w in decode_windows(windows))
    return rows.new_empty(rows.shape[0], outputs, weights[0].shape[2])


@_dweight_op.register_fake
def _(grad: Tensor, rows: Tensor, cells: Sequence[int], windows: Sequence[int], backend: str) -> list[Tensor]:
    return [rows.new_empty(n, rows.shape[2], grad.shape[2]) for n in cells]


@_drows_op.register_fake
def _(grad: Tensor, rows: Tensor, weights: Sequence[Tensor], windows: Sequence[int], backend: str) -> Tensor:
    return rows.new_empty(rows.shape)


def _save(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    rows, weights, ctx.windows, ctx.backend = inputs
    ctx.save_for_backward(rows, *weights)


def _backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple:
    rows, *weights = ctx.saved_tensors
    wants_rows, wants_weights, *_ = ctx.needs_input_grad
    drows, dweights = None, [None] * len(weights)
    with no_autocast(grad):
        if wants_rows:  # first: its scratch is free again before gigabytes of gradients are made
            drows = _drows_op(grad, rows, weights, ctx.windows, ctx.backend)
        if any(wants_weights):
            cells = [len(weight) * wanted for weight, wanted in zip(weights, wants_weights, strict=True)]
            found = _dweight_op(grad, rows, cells, ctx.windows, ctx.backend)
            dweights = [dweight if wanted else None for dweight, wanted in zip(found, wants_weights, strict=True)]
    return drows, dweights, None, None


_forward_op.register_autograd(_backward, setup_context=_save)
