"""Windowed matmul in plain torch: forward, weight gradient, row gradient. The path of a CPU.

A window is walked row by row, every cell a product of its own. On a CPU that is faster than one thin product with
K = 589,824, and more exact: each sum has C terms before the cells are added up.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from sp_fast.kernels.window import Window

COLUMNS_BYTES = 64 * 2**20  # of im2col at a time, in half precision


def windowed_matmul_torch(rows: Tensor, weights: Sequence[Tensor], windows: Sequence[Window]) -> Tensor:
    """The forward by matrix products; accumulates as torch's matmul does."""
    rows = dense_rows(rows)
    return torch.cat([_window_product(rows, weights[w.weight], w) for w in windows], dim=1)


def windowed_matmul_dweight_torch(
    grad: Tensor, rows: Tensor, outs: Sequence[Tensor | None], windows: Sequence[Window], add: bool
) -> None:
    """The weights' gradients, written into ``outs`` or added to them, in their type; None skips a weight.

    Windows share no cell, and cells of no window are left alone.
    """
    for w, dout in zip(windows, _split(grad, windows), strict=True):
        if (buffer := outs[w.weight]) is not None:
            for cell, operand in row_operands(rows, w):
                out = buffer[cell : cell + w.width]
                x, y = operand.transpose(1, 2).to(out.dtype), dout.expand(w.width, -1, -1).to(out.dtype)
                if add:
                    out.baddbmm_(x, y)
                else:
                    torch.bmm(x, y, out=out)


def windowed_matmul_drows_torch(
    grad: Tensor, rows: Tensor, weights: Sequence[Tensor], windows: Sequence[Window]
) -> Tensor:
    """The rows' gradient ``[B, R, C]``, summed in at least float32 where windows overlap."""
    batch, _, width = rows.shape
    total = rows.new_zeros(rows.shape, dtype=torch.promote_types(rows.dtype, torch.float32))
    for w, dout in zip(windows, _split(grad, windows), strict=True):
        for down in range(w.height):
            cell = w.cell + down * w.width
            part = dout @ weights[w.weight][cell : cell + w.width].flatten(0, 1).t()
            part = part.view(batch, w.outputs, w.width, width)
            for output in range(w.outputs):
                start = w.source(output, down * w.width)
                total[:, start : start + w.width] += part[:, output]
    return total.to(rows.dtype)


def _window_product(rows: Tensor, weight: Tensor, w: Window) -> Tensor:
    """One window's outputs ``[B, outputs, D]``."""
    batch, depth = rows.shape[0], weight.shape[2]
    if _has_half_products(rows):  # partial sums would each be rounded: one product, which sums in float32
        images = max(1, COLUMNS_BYTES // (w.outputs * w.cells * rows.shape[2] * rows.dtype.itemsize))
        matrix = weight[w.cell : w.cell + w.cells].flatten(0, 1)
        products = [_columns(part, w) @ matrix for part in rows.split(images)]
        return torch.cat(products).view(batch, w.outputs, depth)
    wide = torch.promote_types(rows.dtype, torch.float32)
    out = rows.new_zeros(batch * w.outputs, depth, dtype=wide)
    for cell, operand in row_operands(rows, w):
        out += torch.bmm(operand.to(wide), weight[cell : cell + w.width].to(wide)).sum(0)
    return out.view(batch, w.outputs, depth).to(rows.dtype)


def _has_half_products(rows: Tensor) -> bool:
    """True for half precision that the device multiplies natively; float16 on a CPU is faster widened by the row."""
    return rows.dtype == torch.bfloat16 or (rows.dtype == torch.float16 and rows.device.type != "cpu")


def _columns(rows: Tensor, w: Window) -> Tensor:
    """im2col: what all cells of a window read, ``[B * outputs, cells * C]``."""
    columns = rows.new_empty(rows.shape[0] * w.outputs, w.cells, rows.shape[2])
    for cell, operand in row_operands(rows, w):
        first = cell - w.cell
        columns[:, first : first + w.width] = operand.transpose(0, 1)
    return columns.flatten(1)


def row_operands(rows: Tensor, w: Window) -> Iterator[tuple[int, Tensor]]:
    """For each window row: its first weight cell, and the rows that its cells read, ``[width, B * outputs, C]``.

    A view for a single output; overlapping outputs take a copy, of one window row.
    """
    batch, width = rows.shape[0], rows.shape[2]
    size = (w.width, batch, w.out_height, w.out_width, width)
    stride = (width, rows.stride(0), w.step * w.row_stride * width, w.step * width, 1)
    for down in range(w.height):
        offset = rows.storage_offset() + w.source(0, down * w.width) * width
        operand = rows.as_strided(size, stride, offset).reshape(w.width, batch * w.outputs, width)
        yield w.cell + down * w.width, operand


def dense_rows(rows: Tensor) -> Tensor:
    """Rows whose channels and rows are contiguous; a batch stride of its own (a cut-off CLS token) is kept."""
    dense = rows.stride(2) == 1 and rows.stride(1) == rows.shape[2]
    return rows if dense else rows.contiguous()


def _split(grad: Tensor, windows: Sequence[Window]) -> list[Tensor]:
    """The output gradient by window, each ``[B * outputs, D]``."""
    return [part.flatten(0, 1) for part in grad.split([w.outputs for w in windows], dim=1)]
