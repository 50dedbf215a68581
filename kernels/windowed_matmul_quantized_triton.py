"""Windowed matmul on quantised weights, in Triton: the weight stream at a half or a quarter of its bytes.

    partial[w, s, (b, o), d] = sum_q sum_g scale[q, g, d] * sum_k rows[b, source(o, q), k] * value[q, d, k]     (k of g)

Values are widened in registers on their way into the product, which is exact in every type of features: by moving bits
(``_widened``), in instructions that every chip has, and not only those from sm_89 on. Scales, one a (cell, output) or
one a group of channels, multiply the product's float32 sums. Windows, splits, partial sums and their
reduction are the unquantised forward's. Weights lie on the M side, as they are stored: in registers, where they were
widened, and not once more in shared memory.

Counts at the published widths (crop-dfi, one image): 0.90 GB (int8, fp8) or 0.48 GB (int4) of values and scales and
8.2 GFLOP, so 210 or 111 us at 4.3 TB/s, where bfloat16 weights take 417. What it saves that a compiler cannot: a
widened copy of the weights would be written and read again, three times the bytes of what it replaces.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from sp_fast.kernels.device import chip_of
from sp_fast.kernels.launch import Launch
from sp_fast.kernels.quantized import SCHEMES
from sp_fast.kernels.tiles import WindowedTiles, quantized_tiles, split_cells
from sp_fast.kernels.window import Window
from sp_fast.kernels.windowed_matmul_triton import reduce_partials
from sp_fast.kernels.windowed_plan_triton import (
    OUTPUTS,
    count_units,
    find_window,
    interleave,
    partial_rows,
    plan_windows,
)


@triton.jit
def _widened(stored, SCHEME: tl.constexpr, dtype: tl.constexpr):
    """Stored bytes, or half bytes of int4, as numbers of the features' type."""
    if SCHEME == "int4":  # the last bits of 128 or 1024, where they count ones
        if dtype == tl.bfloat16:
            return (stored.to(tl.uint16) | 0x4300).to(tl.bfloat16, bitcast=True) - 136.0
        if dtype == tl.float16:
            return (stored.to(tl.uint16) | 0x6400).to(tl.float16, bitcast=True) - 1032.0
        return stored.to(dtype) - 8.0
    if SCHEME == "fp8":  # moved to where a wider type has sign, exponent and mantissa
        wide = stored.to(tl.int8, bitcast=True).to(tl.int16)
        if dtype == tl.bfloat16:
            return ((wide << 4) & -30736).to(tl.bfloat16, bitcast=True) * 1.329227995784916e36  # 2**120
        return ((wide << 7) & -16512).to(tl.float16, bitcast=True).to(dtype) * 256.0
    return stored.to(dtype)


@triton.jit
def _quantized_product(
    unit,
    rows_ptr,  # [B, R, C], rows contiguous, images stride_b apart
    values0_ptr,  # [cells, D, C], or [cells, D, C / 2] bytes of two channels, k and C / 2 + k
    values1_ptr,
    scales0_ptr,  # [cells, groups, D] float32
    scales1_ptr,
    partial_ptr,  # [partial rows * B, D] float32
    batch,
    stride_b,
    WINDOWS: tl.constexpr,
    SPLIT: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
    SCHEME: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    EVICTION: tl.constexpr,
):
    """One unit, as of the unquantised forward; lengths along K count stored bytes."""
    D_TILES: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    K_BLOCKS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    GROUPS: tl.constexpr = (K + GROUP - 1) // GROUP
    EVEN_K: tl.constexpr = K % BLOCK_K == 0
    EVEN_D: tl.constexpr = D % BLOCK_D == 0
    dtype: tl.constexpr = rows_ptr.dtype.element_ty
    window = find_window(unit, batch, WINDOWS, D_TILES, BLOCK_M)
    outputs, out_width, step, origin, width, row_stride, cell, cells, weight, slot, _, place = window
    values_ptr = tl.where(weight == 0, values0_ptr, values1_ptr)
    scales_ptr = tl.where(weight == 0, scales0_ptr, scales1_ptr)

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
    w_base = values_ptr + (cell + q0).to(tl.int64) * (D * K)
    s_base = scales_ptr + (cell + q0).to(tl.int64) * (GROUPS * D)
    jump = (row_stride - width) * C

    acc = tl.zeros((BLOCK_D, BLOCK_M), tl.float32)
    for t in tl.range(0, tl.minimum(SPLIT, cells - q0) * K_BLOCKS, num_stages=STAGES):
        q = t // K_BLOCKS
        k0 = t % K_BLOCKS * BLOCK_K
        w_ptrs = w_base + q * (D * K) + offs_d[:, None] * K + k0 + offs_k[None, :]
        s_ptrs = s_base + (q * GROUPS + k0 // GROUP) * D + offs_d
        x_ptrs = x_base[None, :] + (q * C + (q0 + q) // width * jump + k0) + offs_k[:, None]
        x_mask = mask_m[None, :] if EVEN_K else mask_m[None, :] & (k0 + offs_k < K)[:, None]
        if EVEN_K and EVEN_D:
            w = tl.load(w_ptrs, eviction_policy=EVICTION)
        else:
            w = tl.load(w_ptrs, mask=mask_d[:, None] & (k0 + offs_k < K)[None, :], other=0)
        scale = tl.load(s_ptrs) if EVEN_D else tl.load(s_ptrs, mask=mask_d, other=0.0)
        x = tl.load(x_ptrs, mask=x_mask, other=0.0)
        if SCHEME == "int4":
            high = tl.load(x_ptrs + K, mask=x_mask, other=0.0)
            part = tl.dot(_widened(w & 15, SCHEME, dtype), x, input_precision="ieee")
            part = tl.dot(_widened(w >> 4, SCHEME, dtype), high, part, input_precision="ieee")
        else:
            part = tl.dot(_widened(w, SCHEME, dtype), x, input_precision="ieee")
        acc += part * scale[:, None]

    offs_row = (slot + split * outputs).to(tl.int64) * batch + offs_m
    p_ptrs = partial_ptr + offs_row[None, :] * D + offs_d[:, None]
    tl.store(p_ptrs, acc, mask=mask_m[None, :] & mask_d[:, None])


@triton.jit
def _windowed_matmul_quantized_kernel(
    rows_ptr,
    values0_ptr,
    values1_ptr,
    scales0_ptr,
    scales1_ptr,
    partial_ptr,
    batch,
    stride_b,
    SINGLE: tl.constexpr,
    MANY: tl.constexpr,
    SPLIT_SINGLE: tl.constexpr,
    SPLIT_MANY: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
    SCHEME: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_SINGLE: tl.constexpr,
    BLOCK_MANY: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES_SINGLE: tl.constexpr,
    STAGES_MANY: tl.constexpr,
    EVICT_SINGLE: tl.constexpr,
    EVICT_MANY: tl.constexpr,
):
    """One unit a program."""
    D_TILES: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    is_many, unit = interleave(batch, SINGLE, MANY, D_TILES, BLOCK_SINGLE, BLOCK_MANY)
    if is_many:
        if len(MANY) > 0:
            _quantized_product(
                unit, rows_ptr, values0_ptr, values1_ptr, scales0_ptr, scales1_ptr, partial_ptr, batch, stride_b,
                MANY, SPLIT_MANY, C, D, SCHEME, K, GROUP, BLOCK_MANY, BLOCK_D, BLOCK_K, STAGES_MANY, EVICT_MANY,
            )  # fmt: skip
    else:
        if len(SINGLE) > 0:
            _quantized_product(
                unit, rows_ptr, values0_ptr, values1_ptr, scales0_ptr, scales1_ptr, partial_ptr, batch, stride_b,
                SINGLE, SPLIT_SINGLE, C, D, SCHEME, K, GROUP, BLOCK_SINGLE, BLOCK_D, BLOCK_K, STAGES_SINGLE,
                EVICT_SINGLE,
            )  # fmt: skip


def windowed_matmul_quantized_triton(
    rows: Tensor,
    values: Sequence[Tensor],
    scales: Sequence[Tensor],
    windows: Sequence[Window],
    tiles: WindowedTiles | None = None,
) -> Tensor:
    """The forward on a GPU; ``tiles`` overrides the launch choice.

    Args:
        rows: ``[B, R, C]``, copied where channels or rows are not contiguous; any stride between images.
        values, scales: of one or two packed weights, contiguous.
    """
    batch, _, width = rows.shape
    depth, stored = values[0].shape[1:]
    scheme = SCHEMES[values[0].dtype]
    rows = rows if rows.stride(2) == 1 and rows.stride(1) == width else rows.contiguous()
    cells = split_cells(batch, rows.dtype)
    single, many = plan_windows(windows, cells)
    out = rows.new_empty(batch, sum(w.outputs for w in windows), depth)
    if not batch:
        return out
    chip = chip_of(rows.device)
    group = scheme.group_bytes(stored)
    tiles = tiles or quantized_tiles(chip, rows.dtype, batch, depth, group, scheme.channels)
    partial = rows.new_empty(partial_rows(single + many) * batch, depth, dtype=torch.float32)
    kinds = ((single, tiles.block_single), (many, tiles.block_many))
    d_tiles = triton.cdiv(depth, tiles.block_d)
    units = sum(count_units(plan, batch, block_m, d_tiles) for plan, block_m in kinds)
    evict = ["evict_first" if all(batch * w[OUTPUTS.value] <= n for w in plan) else "" for plan, n in kinds]
    constants = {
        "SINGLE": single, "MANY": many, "SPLIT_SINGLE": cells[0], "SPLIT_MANY": cells[1], "C": width, "D": depth,
        "SCHEME": scheme.name, "K": stored, "GROUP": group,
        "BLOCK_SINGLE": tiles.block_single, "BLOCK_MANY": tiles.block_many, "BLOCK_D": tiles.block_d,
        "BLOCK_K": tiles.block_k, "STAGES_SINGLE": tiles.stages_single, "STAGES_MANY": tiles.stages_many,
        "EVICT_SINGLE": evict[0], "EVICT_MANY": evict[1],
    }  # fmt: skip
    stream = Launch(_windowed_matmul_quantized_kernel, (units,), constants, tiles.warps, registers=255)
    # As integers: the compiler refuses fp8 on sm_80 and 86, even where it is never computed with.
    stored_bytes = [v if v.dtype == torch.int8 else v.view(torch.uint8) for v in values]
    stream(rows, stored_bytes[0], stored_bytes[-1], scales[0], scales[-1], partial, batch, rows.stride(0))
    reduce_partials(partial, out, single + many)
    return out
