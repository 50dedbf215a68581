"""Windowed matmul, forward, in Triton: a weight stream at small batch, a tiled product at large, one kernel for both.

    partial[w, s, (b, o), :] = sum over the cells q of split s of window w: rows[b, source(o, q), :] @ weight[cell + q]
    out[b, o, :] = sum_s partial[w, s, (b, o), :]          (second kernel; s ascending)

One program multiplies one (split, tile of D, tile of rows). All windows of all weights are one launch.

Counts at the published widths (crop-dfi, bf16): 1.80 GB of weights and 8.2 GFLOP an image, so 417 us at 4.3 TB/s at
B=1; partial sums are 2.4 MB an image. What it saves that a compiler cannot: seven launches of a convolution library
become one stream that never ends between them, no weight is laid out anew, and no column matrix is written.

Numerics and schedule are apart. The splits (SPLIT_CELLS) and the order of additions are the numerics: fixed for
B <= 64, so that an image's spatial tokens do not depend on its batch. Tiles and program order are the schedule.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from sp_fast.kernels.device import chip_of
from sp_fast.kernels.launch import Launch
from sp_fast.kernels.tiles import WindowedTiles, is_swapped, reduce_tile, split_cells, windowed_tiles
from sp_fast.kernels.window import Window
from sp_fast.kernels.windowed_plan_triton import (
    FEW_WINDOWS,
    FIRST,
    OUTPUTS,
    SLOT,
    SPLITS,
    Plan,
    count_units,
    find_window,
    interleave,
    partial_rows,
    plan_windows,
)


@triton.jit
def _product(
    unit,
    rows_ptr,  # [B, R, C], rows contiguous, images stride_b apart
    weight0_ptr,  # [cells, C, D]
    weight1_ptr,  # [cells, C, D]
    partial_ptr,  # [partial rows * B, D] float32
    batch,
    stride_b,
    WINDOWS: tl.constexpr,
    SPLIT: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    SWAPPED: tl.constexpr,
    EVICTION: tl.constexpr,
):
    """One unit. The tiles of rows of a weight tile are neighbours, so that all but the first find it in the L2."""
    D_TILES: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    K_BLOCKS: tl.constexpr = (C + BLOCK_K - 1) // BLOCK_K
    EVEN_K: tl.constexpr = C % BLOCK_K == 0
    EVEN_D: tl.constexpr = D % BLOCK_D == 0
    window = find_window(unit, batch, WINDOWS, D_TILES, BLOCK_M)
    outputs, out_width, step, origin, width, row_stride, cell, cells, weight, slot, _, place = window
    weight_ptr = tl.where(weight == 0, weight0_ptr, weight1_ptr)

    m = batch * outputs
    m_tiles = (m + BLOCK_M - 1) // BLOCK_M
    rest = place // m_tiles
    offs_m = place % m_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    split = rest // D_TILES
    offs_d = rest % D_TILES * BLOCK_D + tl.arange(0, BLOCK_D)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m = offs_m < m
    mask_d = offs_d < D

    image = offs_m // outputs
    output = offs_m % outputs
    source = origin + (output // out_width * row_stride + output % out_width) * step
    q0 = split * SPLIT
    x_base = rows_ptr + image.to(tl.int64) * stride_b + (source + q0) * C
    w_base = weight_ptr + (cell + q0).to(tl.int64) * (C * D)
    jump = (row_stride - width) * C

    acc = tl.zeros((BLOCK_D, BLOCK_M) if SWAPPED else (BLOCK_M, BLOCK_D), tl.float32)
    # A float32 product is a chain of additions: cell by cell, as long as those of plain torch, and then summed.
    CELL_BY_CELL: tl.constexpr = weight0_ptr.dtype.element_ty == tl.float32
    total = tl.zeros((BLOCK_D, BLOCK_M) if SWAPPED else (BLOCK_M, BLOCK_D), tl.float32)
    for t in tl.range(0, tl.minimum(SPLIT, cells - q0) * K_BLOCKS, num_stages=STAGES):
        # Computed, never looked up: an index load in this loop would take the pipeline's stages.
        q = t // K_BLOCKS
        k0 = t % K_BLOCKS * BLOCK_K
        k = t * BLOCK_K if EVEN_K else q * C + k0  # along a window row K is contiguous
        x_offset = k + (q0 + q) // width * jump
        w_ptrs = w_base + (k + offs_k[:, None]) * D + offs_d[None, :]
        if EVEN_K and EVEN_D:
            w = tl.load(w_ptrs, eviction_policy=EVICTION)
        else:
            w = tl.load(w_ptrs, mask=(k0 + offs_k < C)[:, None] & mask_d[None, :], other=0.0)
        if SWAPPED:
            x_mask = mask_m[None, :] if EVEN_K else mask_m[None, :] & (k0 + offs_k < C)[:, None]
            x = tl.load(x_base[None, :] + x_offset + offs_k[:, None], mask=x_mask, other=0.0)
            acc = tl.dot(tl.trans(w), x, acc, input_precision="ieee")
        else:
            x_mask = mask_m[:, None] if EVEN_K else mask_m[:, None] & (k0 + offs_k < C)[None, :]
            x = tl.load(x_base[:, None] + x_offset + offs_k[None, :], mask=x_mask, other=0.0)
            acc = tl.dot(x, w, acc, input_precision="ieee")
        if CELL_BY_CELL:
            last = k0 + BLOCK_K >= C
            total += tl.where(last, acc, 0.0)
            acc = tl.where(last, 0.0, acc)
    if CELL_BY_CELL:
        acc = total

    offs_row = (slot + split * outputs).to(tl.int64) * batch + offs_m
    if SWAPPED:
        p_ptrs = partial_ptr + offs_row[None, :] * D + offs_d[:, None]
        tl.store(p_ptrs, acc, mask=mask_m[None, :] & mask_d[:, None])
    else:
        p_ptrs = partial_ptr + offs_row[:, None] * D + offs_d[None, :]
        tl.store(p_ptrs, acc, mask=mask_m[:, None] & mask_d[None, :])


@triton.jit
def _windowed_matmul_fwd_kernel(
    rows_ptr,
    weight0_ptr,
    weight1_ptr,
    partial_ptr,
    batch,
    stride_b,
    SINGLE: tl.constexpr,
    MANY: tl.constexpr,
    SPLIT_SINGLE: tl.constexpr,
    SPLIT_MANY: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
    BLOCK_SINGLE: tl.constexpr,
    BLOCK_MANY: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES_SINGLE: tl.constexpr,
    STAGES_MANY: tl.constexpr,
    SWAPPED: tl.constexpr,
    EVICT_SINGLE: tl.constexpr,
    EVICT_MANY: tl.constexpr,
):
    """One unit a program."""
    D_TILES: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    is_many, unit = interleave(batch, SINGLE, MANY, D_TILES, BLOCK_SINGLE, BLOCK_MANY)
    if is_many:
        if len(MANY) > 0:
            _product(
                unit, rows_ptr, weight0_ptr, weight1_ptr, partial_ptr, batch, stride_b, MANY, SPLIT_MANY, C, D,
                BLOCK_MANY, BLOCK_D, BLOCK_K, STAGES_MANY, SWAPPED, EVICT_MANY,
            )  # fmt: skip
    else:
        if len(SINGLE) > 0:
            _product(
                unit, rows_ptr, weight0_ptr, weight1_ptr, partial_ptr, batch, stride_b, SINGLE, SPLIT_SINGLE, C, D,
                BLOCK_SINGLE, BLOCK_D, BLOCK_K, STAGES_SINGLE, SWAPPED, EVICT_SINGLE,
            )  # fmt: skip


@triton.jit
def _windowed_matmul_reduce_kernel(
    partial_ptr,  # [partial rows * B, D] float32
    out_ptr,  # [B, O, D]
    batch,
    WINDOWS: tl.constexpr,
    O: tl.constexpr,  # noqa: E741
    D: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """One output of a tile of images, and a tile of D, a program: its partial sums, one after the other. A tree over
    splits would be shaped by the tile, and with it by the batch."""
    output = tl.program_id(0) % O
    outputs, splits, slot, first = 1, 0, 0, 0
    for i in tl.static_range(len(WINDOWS)):
        here = (output >= WINDOWS[i][FIRST]) & (output < WINDOWS[i][FIRST] + WINDOWS[i][OUTPUTS])
        outputs = tl.where(here, WINDOWS[i][OUTPUTS], outputs)
        splits = tl.where(here, WINDOWS[i][SPLITS], splits)
        slot = tl.where(here, WINDOWS[i][SLOT], slot)
        first = tl.where(here, WINDOWS[i][FIRST], first)
    image = tl.program_id(0) // O * BLOCK_B + tl.arange(0, BLOCK_B)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = (image < batch)[:, None] & (offs_d < D)[None, :]
    row = slot.to(tl.int64) * batch + image * outputs + output - first
    p_ptrs = partial_ptr + row[:, None] * D + offs_d[None, :]
    stride_s = (batch * outputs).to(tl.int64) * D
    acc = tl.zeros((BLOCK_B, BLOCK_D), tl.float32)
    for s0 in range(0, splits, UNROLL):
        for s in tl.static_range(UNROLL):  # unrolled, so that many loads are on their way together
            acc += tl.load(p_ptrs + s * stride_s, mask=mask & (s0 + s < splits), other=0.0)
        p_ptrs += UNROLL * stride_s
    out_ptrs = out_ptr + (image.to(tl.int64) * O + output)[:, None] * D + offs_d[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask)


def windowed_matmul_triton(
    rows: Tensor, weights: Sequence[Tensor], windows: Sequence[Window], tiles: WindowedTiles | None = None
) -> Tensor:
    """The forward on a GPU; ``tiles`` overrides the launch table.

    Args:
        rows: ``[B, R, C]``, copied where channels or rows are not contiguous; any stride between images.
        weights: one or two packed weights, contiguous; 16-byte alignment is fast, any is right.
    Raises:
        ValueError: a weight that is not contiguous: a silent copy of it would be gigabytes.
    """
    batch, _, width = rows.shape
    depth = weights[0].shape[2]
    for weight in weights:
        if not weight.is_contiguous():
            raise ValueError(
                f"the Triton kernels need contiguous packed weights, not strides {weight.stride()} for the shape "
                f"{tuple(weight.shape)}: call .contiguous() once, or use backend='torch'"
            )
    rows = rows if rows.stride(2) == 1 and rows.stride(1) == width else rows.contiguous()
    cells = split_cells(batch, rows.dtype)
    single, many = plan_windows(windows, cells)
    outputs = sum(w.outputs for w in windows)
    out = rows.new_empty(batch, outputs, depth)
    if not batch:
        return out
    chip = chip_of(rows.device)
    tiles = tiles or windowed_tiles(chip, rows.dtype, batch, width, depth)
    partial = rows.new_empty(partial_rows(single + many) * batch, depth, dtype=torch.float32)
    kinds = ((single, tiles.block_single), (many, tiles.block_many))
    d_tiles = triton.cdiv(depth, tiles.block_d)
    units = sum(count_units(plan, batch, block_m, d_tiles) for plan, block_m in kinds)
    # A weight tile that a single program reads need not stay in the L2.
    evict = ["evict_first" if all(batch * w[OUTPUTS.value] <= n for w in plan) else "" for plan, n in kinds]
    constants = {
        "SINGLE": single, "MANY": many, "SPLIT_SINGLE": cells[0], "SPLIT_MANY": cells[1], "C": width, "D": depth,
        "BLOCK_SINGLE": tiles.block_single, "BLOCK_MANY": tiles.block_many, "BLOCK_D": tiles.block_d,
        "BLOCK_K": tiles.block_k, "STAGES_SINGLE": tiles.stages_single, "STAGES_MANY": tiles.stages_many,
        "SWAPPED": is_swapped(chip, rows.dtype), "EVICT_SINGLE": evict[0], "EVICT_MANY": evict[1],
    }  # fmt: skip
    # Left to itself, ptxas spills in the tiles of one image, to win a block that shared memory has no room for.
    crowded = batch == 1 and (rows.dtype == torch.float32 or len(windows) > FEW_WINDOWS)
    registers = 255 if tiles.warps == 8 else 168 if crowded else None
    stream = Launch(_windowed_matmul_fwd_kernel, (units,), constants, tiles.warps, registers)
    stream(rows, weights[0], weights[-1], partial, batch, rows.stride(0))
    reduce_partials(partial, out, single + many)
    return out


def reduce_partials(partial: Tensor, out: Tensor, plan: Plan) -> None:
    """Adds the partial sums ``[partial rows * B, D]`` of a plan's windows into ``out`` ``[B, O, D]``."""
    batch, outputs, depth = out.shape
    block_b, block_d = reduce_tile(batch, depth)
    constants = {
        "WINDOWS": plan, "O": outputs, "D": depth, "BLOCK_B": block_b, "BLOCK_D": block_d,
        "UNROLL": 32 if block_b == 1 else 16,
    }  # fmt: skip
    programs = (outputs * triton.cdiv(batch, block_b), triton.cdiv(depth, block_d))
    Launch(_windowed_matmul_reduce_kernel, programs, constants, warps=max(1, block_b // 2))(partial, out, batch)
