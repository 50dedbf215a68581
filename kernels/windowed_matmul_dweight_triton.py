"""Windowed matmul, weight gradient, in Triton: a write stream.

    dweight[cell + q] = sum_{b, o} rows[b, source(o, q), :]^T @ dout[b, o, :]          rank B * O

One program makes one (cell, tile of C, tile of D). All windows of all weights are one launch; a weight that is not
asked for has no programs.

Counts at the published widths (crop-dfi, bf16): 1.80 GB written, 417 us at 4.3 TB/s, whatever the batch; 8.2 GFLOP an
image, so compute passes memory at about B=40. What it saves that a compiler cannot: a gradient of its own, or a copy,
for every slice of a packed weight, and with ``add`` the buffer that a sum would need.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import triton
import triton.language as tl
from torch import Tensor

from sp_fast.kernels.device import chip_of
from sp_fast.kernels.launch import Launch
from sp_fast.kernels.tiles import OuterTiles, outer_tiles
from sp_fast.kernels.window import Window
from sp_fast.kernels.windowed_plan_triton import WEIGHT, find_window, interleave, plan_windows

WHOLE = tl.constexpr(2**30)  # a tile of rows that holds all: a unit walks them itself


@triton.jit
def _outer(
    unit,
    rows_ptr,  # [B, R, C], rows contiguous, images stride_b apart
    grad_ptr,  # [B, O, D]
    out0_ptr,  # [cells, C, D]
    out1_ptr,  # [cells, C, D]
    batch,
    stride_b,
    WINDOWS: tl.constexpr,
    O: tl.constexpr,  # noqa: E741
    C: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
    ADD: tl.constexpr,
):
    """One unit. The tiles of a cell are neighbours, and share its rows in the L2."""
    C_TILES: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    D_TILES: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    window = find_window(unit, batch, WINDOWS, C_TILES * D_TILES, WHOLE)
    outputs, out_width, step, origin, width, row_stride, cell, _, weight, _, first, place = window
    q = place // (C_TILES * D_TILES)
    tile = place % (C_TILES * D_TILES)
    offs_c = tile // D_TILES * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_d = tile % D_TILES * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_c = (offs_c < C)[None, :]
    mask_d = (offs_d < D)[None, :]
    origin += q // width * row_stride + q % width

    m = batch * outputs
    acc = tl.zeros((BLOCK_C, BLOCK_D), tl.float32)
    for m0 in tl.range(0, m, BLOCK_M, num_stages=STAGES):
        offs_m = m0 + tl.arange(0, BLOCK_M)
        mask_m = (offs_m < m)[:, None]
        image = (offs_m // outputs).to(tl.int64)
        output = offs_m % outputs
        source = origin + (output // out_width * row_stride + output % out_width) * step
        x = tl.load(
            rows_ptr + (image * stride_b + source * C)[:, None] + offs_c[None, :], mask=mask_m & mask_c, other=0.0
        )
        g = tl.load(
            grad_ptr + ((image * O + first + output) * D)[:, None] + offs_d[None, :], mask=mask_m & mask_d, other=0.0
        )
        acc = tl.dot(tl.trans(x), g, acc, input_precision="ieee")

    out_ptr = tl.where(weight == 0, out0_ptr, out1_ptr) + (cell + q).to(tl.int64) * (C * D)
    out_ptrs = out_ptr + offs_c[:, None] * D + offs_d[None, :]
    mask = tl.trans(mask_c) & mask_d
    if ADD:
        acc += tl.load(out_ptrs, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _windowed_matmul_dweight_kernel(
    rows_ptr,
    grad_ptr,
    out0_ptr,
    out1_ptr,
    batch,
    stride_b,
    SINGLE: tl.constexpr,
    MANY: tl.constexpr,
    O: tl.constexpr,  # noqa: E741
    C: tl.constexpr,
    D: tl.constexpr,
    BLOCK_SINGLE: tl.constexpr,
    BLOCK_MANY: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
    ADD: tl.constexpr,
):
    """One unit a program."""
    TILES: tl.constexpr = ((C + BLOCK_C - 1) // BLOCK_C) * ((D + BLOCK_D - 1) // BLOCK_D)
    is_many, unit = interleave(batch, SINGLE, MANY, TILES, WHOLE, WHOLE)
    if is_many:
        if len(MANY) > 0:
            _outer(
                unit, rows_ptr, grad_ptr, out0_ptr, out1_ptr, batch, stride_b, MANY, O, C, D, BLOCK_MANY, BLOCK_C,
                BLOCK_D, STAGES, ADD,
            )  # fmt: skip
    else:
        if len(SINGLE) > 0:
            _outer(
                unit, rows_ptr, grad_ptr, out0_ptr, out1_ptr, batch, stride_b, SINGLE, O, C, D, BLOCK_SINGLE, BLOCK_C,
                BLOCK_D, STAGES, ADD,
            )  # fmt: skip


def windowed_matmul_dweight_triton(
    grad: Tensor,
    rows: Tensor,
    outs: Sequence[Tensor | None],
    windows: Sequence[Window],
    add: bool,
    tiles: OuterTiles | None = None,
) -> None:
    """The weight gradient on a GPU, for windows that share no cell; cells of no window are left alone.

    Args:
        grad: ``[B, O, D]``, contiguous.
        rows: ``[B, R, C]``, rows contiguous; any stride between images.
        outs: for each weight a contiguous ``[cells, C, D]``, all of one type, or None for a weight not asked for.
        add: to what the buffers hold; else it is overwritten.
        tiles: overrides the launch choice.
    """
    batch, outputs, depth = grad.shape
    width = rows.shape[2]
    asked = [out for out in outs if out is not None]
    single, many = (
        tuple(w for w in plan if outs[w[WEIGHT.value]] is not None) for plan in plan_windows(windows, (1, 1))
    )
    tiles = tiles or outer_tiles(chip_of(rows.device), rows.dtype, batch, width, depth)
    if add:  # what is added to takes registers too
        tiles = replace(tiles, block_d=min(tiles.block_d, 64))
    constants = {
        "SINGLE": single, "MANY": many, "O": outputs, "C": width, "D": depth, "BLOCK_SINGLE": tiles.block_single,
        "BLOCK_MANY": tiles.block_many, "BLOCK_C": tiles.block_c, "BLOCK_D": tiles.block_d, "STAGES": tiles.stages,
        "ADD": add,
    }  # fmt: skip
    cells = sum(w.cells for w in windows if outs[w.weight] is not None)
    if not cells:
        return
    programs = cells * triton.cdiv(width, tiles.block_c) * triton.cdiv(depth, tiles.block_d)
    first, last = (asked[0] if out is None else out for out in (outs[0], outs[-1]))
    Launch(_windowed_matmul_dweight_kernel, (programs,), constants, tiles.warps, tiles.registers)(
        rows, grad, first, last, batch, rows.stride(0)
    )
