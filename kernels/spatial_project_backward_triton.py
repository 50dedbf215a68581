"""The projections of the spatial tail, backward, in Triton: products of query, key and value.

    d normed = dq Wq;   dWq = dq^T normed;   dbq = sum dq;   k and v likewise

spatial_tail_backward_triton.py has the whole, and the counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from sp_fast.kernels.device import chip_of
from sp_fast.kernels.launch import Launch
from sp_fast.kernels.spatial_tail import pick
from sp_fast.kernels.spatial_tail_triton import load_normed
from sp_fast.kernels.tiles import power_of_two, product_tiles

WEIGHT_ROWS = 32  # at a time
WEIGHT_SIDE = {2: 64, 4: 32}  # of the square of a weight's gradient, by the bytes of a type


@triton.jit
def _dnormed_tile(
    weight_ptr,  # [D, D]
    dprojected_ptr,
    dnormed_ptr,
    start,
    rows,
    batch,
    D: tl.constexpr,
    P: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A tile of the gradient of what a LayerNorm gave: rows of one projection times its weight."""
    N_TILES: tl.constexpr = (D + BLOCK_N - 1) // BLOCK_N
    offs_m = tl.program_id(0) // N_TILES * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(0) % N_TILES * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m = (offs_m < batch * rows)[:, None]
    mask_n = (offs_n < D)[None, :]
    row = ((offs_m // rows).to(tl.int64) * P + start + offs_m % rows)[:, None] * D
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k0 in tl.range(0, D, BLOCK_K, num_stages=STAGES):
        mask_k = k0 + offs_k < D
        g = tl.load(dprojected_ptr + row + (k0 + offs_k)[None, :], mask=mask_m & mask_k[None, :], other=0.0)
        w_ptrs = weight_ptr + (k0 + offs_k)[:, None] * D + offs_n[None, :]
        w = tl.load(w_ptrs, mask=mask_k[:, None] & mask_n, other=0.0)
        acc = tl.dot(g, w, acc, input_precision="ieee")
    tl.store(dnormed_ptr + row + offs_n[None, :], acc.to(dnormed_ptr.dtype.element_ty), mask=mask_m & mask_n)


@triton.jit
def _dweight_tile(
    z_ptr,
    statistics_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    dprojected_ptr,
    dweight_ptr,  # [D, D]
    dbias_ptr,  # [D]
    first,
    finite,
    start,
    rows,
    batch,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    P: tl.constexpr,
    LARGEST: tl.constexpr,
    WEIGHT_ROWS: tl.constexpr,
    WEIGHT_SIDE: tl.constexpr,
):
    """A square of one projection's weight gradient; the squares of the first column also sum its bias's."""
    TILES: tl.constexpr = (D + WEIGHT_SIDE - 1) // WEIGHT_SIDE
    offs_n = tl.program_id(0) // TILES * WEIGHT_SIDE + tl.arange(0, WEIGHT_SIDE)
    offs_c = tl.program_id(0) % TILES * WEIGHT_SIDE + tl.arange(0, WEIGHT_SIDE)
    mask_n, mask_c = (offs_n < D)[None, :], (offs_c < D)[None, :]
    gain = tl.load(norm_weight_ptr + offs_c, mask=offs_c < D, other=0.0).to(tl.float32)[None, :]
    shift = tl.load(norm_bias_ptr + offs_c, mask=offs_c < D, other=0.0).to(tl.float32)[None, :]
    acc = tl.zeros((WEIGHT_SIDE, WEIGHT_SIDE), tl.float32)
    total = tl.zeros((WEIGHT_ROWS, WEIGHT_SIDE), tl.float32)
    for m0 in range(0, batch * rows, WEIGHT_ROWS):
        offs_m = m0 + tl.arange(0, WEIGHT_ROWS)
        mask_m = offs_m < batch * rows
        image = (offs_m // rows).to(tl.int64)
        z_rows = image * ROWS + first + offs_m % rows
        g_rows = image * P + start + offs_m % rows
        mask_z = mask_m[:, None] & mask_c
        z = load_normed(z_ptr, statistics_ptr, z_rows, offs_c, mask_m, mask_z, finite, D, LARGEST)
        g_ptrs = dprojected_ptr + g_rows[:, None] * D + offs_n[None, :]
        g = tl.load(g_ptrs, mask=mask_m[:, None] & mask_n, other=0.0)
        normed = tl.where(mask_z, z * gain + shift, 0.0).to(g.dtype)
        acc = tl.dot(tl.trans(g), normed, acc, input_precision="ieee")
        total += g.to(tl.float32)
    out_ptrs = dweight_ptr + offs_n[:, None] * D + offs_c[None, :]
    tl.store(out_ptrs, acc.to(dweight_ptr.dtype.element_ty), mask=(offs_n < D)[:, None] & mask_c)
    if tl.program_id(0) % TILES == 0:
        tl.store(dbias_ptr + offs_n, tl.sum(total, axis=0).to(dbias_ptr.dtype.element_ty), mask=offs_n < D)


@triton.jit
def _spatial_project_bwd_kernel(
    z_ptr,  # [B, ROWS, D]
    statistics_ptr,  # [B, ROWS, 2]
    q_norm_weight_ptr,
    q_norm_bias_ptr,
    q_weight_ptr,
    k_norm_weight_ptr,
    k_norm_bias_ptr,
    k_weight_ptr,
    v_norm_weight_ptr,
    v_norm_bias_ptr,
    v_weight_ptr,
    dprojected_ptr,  # [B, P, D]
    dnormed_ptr,  # [B, P, D]
    dq_weight_ptr,
    dq_bias_ptr,
    dk_weight_ptr,
    dk_bias_ptr,
    dv_weight_ptr,
    dv_bias_ptr,
    batch,
    ROWS: tl.constexpr,
    FIRST: tl.constexpr,
    T: tl.constexpr,
    O: tl.constexpr,  # noqa: E741
    D: tl.constexpr,
    P: tl.constexpr,
    START: tl.constexpr,
    FINITE_SPATIAL: tl.constexpr,
    FINITE_DETAIL: tl.constexpr,
    LARGEST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    WEIGHT_ROWS: tl.constexpr,
    WEIGHT_SIDE: tl.constexpr,
):
    """Axis 0: a tile; axis 1: the rows of query, key, value, then their weights."""
    which = tl.program_id(1) % 3
    is_query, is_key = which == 0, which == 1
    rows = tl.where(is_query, T, O)
    start = START + tl.where(is_query, 0, tl.where(is_key, T, T + O))
    weight_ptr = tl.where(is_query, q_weight_ptr, tl.where(is_key, k_weight_ptr, v_weight_ptr))
    if tl.program_id(1) < 3:
        N_TILES: tl.constexpr = (D + BLOCK_N - 1) // BLOCK_N
        if tl.program_id(0) // N_TILES * BLOCK_M < batch * rows:
            _dnormed_tile(
                weight_ptr, dprojected_ptr, dnormed_ptr, start, rows, batch, D, P, BLOCK_M, BLOCK_N, BLOCK_K, STAGES
            )
    else:
        TILES: tl.constexpr = (D + WEIGHT_SIDE - 1) // WEIGHT_SIDE
        if tl.program_id(0) < TILES * TILES:
            first = tl.where(is_query, 0, T + FIRST)
            finite = tl.where(is_query, FINITE_SPATIAL, FINITE_DETAIL)
            gain_ptr = tl.where(is_query, q_norm_weight_ptr, tl.where(is_key, k_norm_weight_ptr, v_norm_weight_ptr))
            shift_ptr = tl.where(is_query, q_norm_bias_ptr, tl.where(is_key, k_norm_bias_ptr, v_norm_bias_ptr))
            dweight_ptr = tl.where(is_query, dq_weight_ptr, tl.where(is_key, dk_weight_ptr, dv_weight_ptr))
            dbias_ptr = tl.where(is_query, dq_bias_ptr, tl.where(is_key, dk_bias_ptr, dv_bias_ptr))
            _dweight_tile(
                z_ptr, statistics_ptr, gain_ptr, shift_ptr, dprojected_ptr, dweight_ptr, dbias_ptr, first, finite,
                start, rows, batch, ROWS, D, P, LARGEST, WEIGHT_ROWS, WEIGHT_SIDE,
            )  # fmt: skip


def spatial_project_backward(
    z: Tensor,
    statistics: Tensor,
    parameters: Sequence[Tensor],
    dprojected: Tensor,
    dnormed: Tensor,
    found: Sequence[Tensor],
    place: Mapping[str, Any],
) -> None:
    """Writes ``dnormed`` and, where ``found`` holds a detail's twelve gradients, those of linear weights and biases."""
    batch, width = z.shape[0], z.shape[2]
    tiles = product_tiles(chip_of(z.device), z.dtype, batch, width)
    side = min(WEIGHT_SIDE[z.dtype.itemsize], power_of_two(width))
    constants = {
        **pick(place, _spatial_project_bwd_kernel), **tiles.constants, "WEIGHT_ROWS": WEIGHT_ROWS, "WEIGHT_SIDE": side,
    }  # fmt: skip
    row_tiles = triton.cdiv(batch * max(place["T"], place["O"]), tiles.block_m) * triton.cdiv(width, tiles.block_n)
    programs = (max(row_tiles, triton.cdiv(width, side) ** 2), 6) if found else (row_tiles, 3)
    norms_and_weights = [t for i, t in enumerate(parameters) if i % 4 != 3]
    gradients = [t for i, t in enumerate(found) if i % 4 > 1] or [dnormed] * 6
    registers = 168 if z.dtype.itemsize == 2 else 255
    Launch(_spatial_project_bwd_kernel, programs, constants, tiles.warps, registers)(
        z, statistics, *norms_and_weights, dprojected, dnormed, *gradients, batch
    )
