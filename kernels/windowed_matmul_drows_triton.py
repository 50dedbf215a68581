"""Windowed matmul, row gradient, in Triton: the weight stream once more, and a fold.

    columns[w, q, (b, o), :] = dout[b, o, :] @ weight[cell + q]^T                       (products)
    drows[b, r, :] = sum of columns[w, q, (b, o), :] over all w, o, q with source(o, q) = r     (fold, in a fixed order)

Only an unfrozen vision tower asks for it. Counts at the published widths (crop-dfi, bf16): 1.80 GB of weights, read
once, and 8.2 GFLOP an image; the columns are 32 MB an image in float32, 26 of them of the detail convolution, whose 25
outputs overlap. Gathered instead, by the row, every detail weight would be read for each of 25 outputs: 6.7 GB
from the L2; classes of the stride's parity keep those reads in the L2 but do not lessen them. So up to B=100 the
columns are less traffic, and they take neither an atomic addition nor a second shape of product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from sp_fast.kernels.device import chip_of
from sp_fast.kernels.launch import Launch
from sp_fast.kernels.tiles import is_swapped, power_of_two, windowed_tiles
from sp_fast.kernels.window import Window
from sp_fast.kernels.windowed_plan_triton import (
    CELLS,
    FEW_WINDOWS,
    ORIGIN,
    OUT_WIDTH,
    OUTPUTS,
    ROW_STRIDE,
    SLOT,
    STEP,
    WIDTH,
    count_units,
    find_window,
    interleave,
    partial_rows,
    plan_windows,
)

COLUMNS_BYTES = 2**30  # at a time; more images take further rounds


@triton.jit
def _column_product(
    unit,
    grad_ptr,  # [B, O, D]
    weight0_ptr,  # [cells, C, D]
    weight1_ptr,  # [cells, C, D]
    columns_ptr,  # [column rows * B, C] float32
    batch,
    WINDOWS: tl.constexpr,
    O: tl.constexpr,  # noqa: E741
    C: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    SWAPPED: tl.constexpr,
):
    """One unit: (cell, tile of C, tile of rows)."""
    C_TILES: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    EVEN_K: tl.constexpr = D % BLOCK_K == 0
    EVEN_C: tl.constexpr = C % BLOCK_C == 0
    window = find_window(unit, batch, WINDOWS, C_TILES, BLOCK_M)
    outputs, _, _, _, _, _, cell, _, weight, slot, first, place = window
    m = batch * outputs
    m_tiles = (m + BLOCK_M - 1) // BLOCK_M
    rest = place // m_tiles
    q = rest // C_TILES
    offs_m = place % m_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_c = rest % C_TILES * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m = offs_m < m
    mask_c = offs_c < C
    g_base = grad_ptr + ((offs_m // outputs).to(tl.int64) * O + first + offs_m % outputs) * D
    w_base = tl.where(weight == 0, weight0_ptr, weight1_ptr) + (cell + q).to(tl.int64) * (C * D)

    acc = tl.zeros((BLOCK_C, BLOCK_M) if SWAPPED else (BLOCK_M, BLOCK_C), tl.float32)
    for k0 in tl.range(0, D, BLOCK_K, num_stages=STAGES):
        mask_k = k0 + offs_k < D
        w_ptrs = w_base + offs_c[:, None] * D + k0 + offs_k[None, :]
        if EVEN_K and EVEN_C:
            w = tl.load(w_ptrs)
        else:
            w = tl.load(w_ptrs, mask=mask_c[:, None] & mask_k[None, :], other=0.0)
        if SWAPPED:
            g_mask = mask_m[None, :] if EVEN_K else mask_m[None, :] & mask_k[:, None]
            g = tl.load(g_base[None, :] + k0 + offs_k[:, None], mask=g_mask, other=0.0)
            acc = tl.dot(w, g, acc, input_precision="ieee")
        else:
            g_mask = mask_m[:, None] if EVEN_K else mask_m[:, None] & mask_k[None, :]
            g = tl.load(g_base[:, None] + k0 + offs_k[None, :], mask=g_mask, other=0.0)
            acc = tl.dot(g, tl.trans(w), acc, input_precision="ieee")

    # A round's columns fit an int32: addresses of 64 bits for every element would not fit the registers.
    base = columns_ptr + (slot + q * outputs).to(tl.int64) * batch * C
    if SWAPPED:
        tl.store(base + offs_m[None, :] * C + offs_c[:, None], acc, mask=mask_m[None, :] & mask_c[:, None])
    else:
        tl.store(base + offs_m[:, None] * C + offs_c[None, :], acc, mask=mask_m[:, None] & mask_c[None, :])


@triton.jit
def _windowed_matmul_columns_kernel(
    grad_ptr,
    weight0_ptr,
    weight1_ptr,
    columns_ptr,
    batch,
    SINGLE: tl.constexpr,
    MANY: tl.constexpr,
    O: tl.constexpr,  # noqa: E741
    C: tl.constexpr,
    D: tl.constexpr,
    BLOCK_SINGLE: tl.constexpr,
    BLOCK_MANY: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES_SINGLE: tl.constexpr,
    STAGES_MANY: tl.constexpr,
    SWAPPED: tl.constexpr,
):
    """One unit a program."""
    C_TILES: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    is_many, unit = interleave(batch, SINGLE, MANY, C_TILES, BLOCK_SINGLE, BLOCK_MANY)
    if is_many:
        if len(MANY) > 0:
            _column_product(
                unit, grad_ptr, weight0_ptr, weight1_ptr, columns_ptr, batch, MANY, O, C, D, BLOCK_MANY, BLOCK_C,
                BLOCK_K, STAGES_MANY, SWAPPED,
            )  # fmt: skip
    else:
        if len(SINGLE) > 0:
            _column_product(
                unit, grad_ptr, weight0_ptr, weight1_ptr, columns_ptr, batch, SINGLE, O, C, D, BLOCK_SINGLE, BLOCK_C,
                BLOCK_K, STAGES_SINGLE, SWAPPED,
            )  # fmt: skip


@triton.jit
def _windowed_matmul_fold_kernel(
    columns_ptr,  # [column rows * B, C] float32
    out_ptr,  # [B, R, C]
    batch,
    most,  # outputs of any window, a number that the compiler does not know
    WINDOWS: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    UNROLLED: tl.constexpr,
):
    """A few rows of an image and a tile of channels a program. A row is met by at most one cell of an output."""
    R_TILES: tl.constexpr = (R + BLOCK_R - 1) // BLOCK_R
    image = tl.program_id(0) // R_TILES
    row = tl.program_id(0) % R_TILES * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (row < R)[:, None] & (offs_c < C)[None, :]
    acc = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for i in tl.static_range(len(WINDOWS)):
        # Loops of a known length are unrolled, and of many windows all their loads at once would spill.
        for output in range(WINDOWS[i][OUTPUTS] if UNROLLED else tl.minimum(WINDOWS[i][OUTPUTS], most)):
            above = output // WINDOWS[i][OUT_WIDTH]
            beside = output % WINDOWS[i][OUT_WIDTH]
            shift = row - WINDOWS[i][ORIGIN] - (above * WINDOWS[i][ROW_STRIDE] + beside) * WINDOWS[i][STEP]
            column = shift % WINDOWS[i][ROW_STRIDE]
            q = shift // WINDOWS[i][ROW_STRIDE] * WINDOWS[i][WIDTH] + column
            met = (shift >= 0) & (column < WINDOWS[i][WIDTH]) & (q < WINDOWS[i][CELLS])
            place = (WINDOWS[i][SLOT] + q * WINDOWS[i][OUTPUTS]).to(tl.int64) * batch
            place += image * WINDOWS[i][OUTPUTS] + output
            acc += tl.load(columns_ptr + place[:, None] * C + offs_c[None, :], mask=mask & met[:, None], other=0.0)
    out_ptrs = out_ptr + (image.to(tl.int64) * R + row)[:, None] * C + offs_c[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask)


def windowed_matmul_drows_triton(
    grad: Tensor, rows: Tensor, weights: Sequence[Tensor], windows: Sequence[Window]
) -> Tensor:
    """The row gradient ``[B, R, C]`` on a GPU; ``rows`` are here for their shape.

    Args:
        grad: ``[B, O, D]``, contiguous.
        weights: one or two packed weights, contiguous.
    """
    batch, outputs, depth = grad.shape
    _, count, width = rows.shape
    single, many = plan_windows(windows, (1, 1))
    column_rows = partial_rows(single + many)
    images = max(1, min(batch, COLUMNS_BYTES // (4 * column_rows * width)))
    out = grad.new_empty(batch, count, width)
    columns = grad.new_empty(column_rows * images, width, dtype=torch.float32)
    chip = chip_of(grad.device)
    tiles = windowed_tiles(chip, grad.dtype, images, depth, width)  # here D is summed over, and C made
    tiles = replace(
        tiles,
        block_many=min(tiles.block_many, 16 * tiles.warps),  # whose sums fit the registers
        block_k=min(tiles.block_k, max(16, power_of_two(depth) // 2)),  # two turns at least, or nothing is pipelined
    )
    constants = {
        "SINGLE": single, "MANY": many, "O": outputs, "C": width, "D": depth, "BLOCK_SINGLE": tiles.block_single,
        "BLOCK_MANY": tiles.block_many, "BLOCK_C": tiles.block_d, "BLOCK_K": tiles.block_k,
        "STAGES_SINGLE": tiles.stages_single, "STAGES_MANY": tiles.stages_many,
        "SWAPPED": is_swapped(chip, grad.dtype),
    }  # fmt: skip
    block_c = min(64, power_of_two(width))
    few, most = len(windows) <= FEW_WINDOWS, max(w.outputs for w in windows)
    block_r, fold_registers = (16, 128) if few else (4, 255)
    folding = {
        "WINDOWS": single + many, "R": count, "C": width, "BLOCK_R": block_r, "BLOCK_C": block_c, "UNROLLED": few,
    }  # fmt: skip
    for part, made in zip(grad.split(images), out.split(images), strict=True):
        n = len(part)
        programs = sum(
            count_units(plan, n, block_m, triton.cdiv(width, tiles.block_d))
            for plan, block_m in ((single, tiles.block_single), (many, tiles.block_many))
        )
        registers = 255 if tiles.warps == 8 or grad.dtype == torch.float32 else 168
        if width <= 64:  # half a tile: with more, ptxas keeps the addresses of all turns at once, and spills
            registers = 128
        Launch(_windowed_matmul_columns_kernel, (programs,), constants, tiles.warps, registers)(
            part, weights[0], weights[-1], columns, n
        )
        programs = (n * triton.cdiv(count, folding["BLOCK_R"]), triton.cdiv(width, block_c))
        Launch(_windowed_matmul_fold_kernel, programs, folding, registers=fold_registers)(columns, made, n, most)
    return out
