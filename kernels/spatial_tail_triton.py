"""The spatial tail, forward, in Triton: detail attention and output layer, written into the token buffer.

    q = LN(z_small) Wq^T + bq;  k, v likewise of a detail map                  one launch a detail (_project)
    a = softmax(nan_to_num(q k^T / sqrt(D)));  fused = GELU([z_small, a v])    one launch a detail (_attend)
    tokens[:, :T] = fused Wo^T + bo                                            one launch (_output)

nan_to_num is applied where z is read; statistics, softmax and sums are float32; what the reference rounds to its type
between layers is rounded here too, but for the logits. A launch for every dependence between rows, and no more.

Counts at the published widths (bf16, B=1): 10.0 MB of weights, 2.3 us at 4.3 TB/s, and 46 MFLOP an image: launches
decide, 3 here against 18 of the plain form. At B=256 it is 12 GFLOP beside 8,400 of the rest, so a library product
would gain nothing there. What it saves that a compiler cannot: LayerNorm inside the products, and both concatenations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import triton
import triton.language as tl
from torch import Tensor

from sp_fast.kernels.device import chip_of
from sp_fast.kernels.gelu_rows_triton import gelu
from sp_fast.kernels.launch import Launch
from sp_fast.kernels.spatial_tail import SpatialTail, detail_constants, pick
from sp_fast.kernels.tiles import attend_tiles, power_of_two, product_tiles


@triton.jit
def finite_or_largest(x, LARGEST: tl.constexpr):  # noqa: ANN201
    """nan_to_num: NaN to 0, infinities to the type's largest numbers."""
    return tl.minimum(tl.maximum(tl.where(x == x, x, 0.0), -LARGEST), LARGEST)


@triton.jit
def load_normed(z_ptr, statistics_ptr, rows, offs_d, mask_m, mask, finite, D: tl.constexpr, LARGEST: tl.constexpr):  # noqa: ANN201
    """Rows of z, finite where asked, without their mean and divided by their standard deviation, in float32."""
    mean = tl.load(statistics_ptr + rows * 2, mask=mask_m, other=0.0)[:, None]
    rstd = tl.load(statistics_ptr + rows * 2 + 1, mask=mask_m, other=0.0)[:, None]
    z = tl.load(z_ptr + rows[:, None] * D + offs_d[None, :], mask=mask, other=0.0).to(tl.float32)
    return (tl.where(finite, finite_or_largest(z, LARGEST), z) - mean) * rstd


@triton.jit
def _spatial_project_fwd_kernel(
    z_ptr,  # [B, ROWS, D]: T spatial rows first; the detail's O rows begin at T + FIRST
    q_norm_weight_ptr,  # [D]
    q_norm_bias_ptr,
    q_weight_ptr,  # [D, D]
    q_bias_ptr,  # [D]
    k_norm_weight_ptr,
    k_norm_bias_ptr,
    k_weight_ptr,
    k_bias_ptr,
    v_norm_weight_ptr,
    v_norm_bias_ptr,
    v_weight_ptr,
    v_bias_ptr,
    projected_ptr,  # [B, P, D]: from START on, this detail's T queries, O keys, O values
    statistics_ptr,  # [B, ROWS, 2] float32: mean, 1 / standard deviation
    batch,
    eps,
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
):
    """Axis 0: a tile of rows and of columns; axis 1: query, key or value."""
    which = tl.program_id(1)
    is_query = which == 0
    rows = tl.where(is_query, T, O)
    n_tiles: tl.constexpr = (D + BLOCK_N - 1) // BLOCK_N
    pid_m = tl.program_id(0) // n_tiles
    if pid_m * BLOCK_M < batch * rows:
        is_key = which == 1
        norm_weight_ptr = tl.where(is_query, q_norm_weight_ptr, tl.where(is_key, k_norm_weight_ptr, v_norm_weight_ptr))
        norm_bias_ptr = tl.where(is_query, q_norm_bias_ptr, tl.where(is_key, k_norm_bias_ptr, v_norm_bias_ptr))
        weight_ptr = tl.where(is_query, q_weight_ptr, tl.where(is_key, k_weight_ptr, v_weight_ptr))
        bias_ptr = tl.where(is_query, q_bias_ptr, tl.where(is_key, k_bias_ptr, v_bias_ptr))
        start = START + tl.where(is_query, 0, tl.where(is_key, T, T + O))
        finite = tl.where(is_query, FINITE_SPATIAL, FINITE_DETAIL)

        offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
        offs_n = tl.program_id(0) % n_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
        offs_k = tl.arange(0, BLOCK_K)
        mask_m = offs_m < batch * rows
        mask_n = offs_n < D
        image = (offs_m // rows).to(tl.int64)
        row = image * ROWS + tl.where(is_query, 0, T + FIRST) + offs_m % rows
        z_ptrs = z_ptr + row[:, None] * D + offs_k[None, :]

        total = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
        for k0 in range(0, D, BLOCK_K):
            z = tl.load(z_ptrs + k0, mask=mask_m[:, None] & (k0 + offs_k < D)[None, :], other=0.0).to(tl.float32)
            total += tl.where(finite, finite_or_largest(z, LARGEST), z)
        mean = tl.sum(total, axis=1) / D
        total = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
        for k0 in range(0, D, BLOCK_K):
            mask_k = (k0 + offs_k < D)[None, :]
            z = tl.load(z_ptrs + k0, mask=mask_m[:, None] & mask_k, other=0.0).to(tl.float32)
            centred = tl.where(mask_k, tl.where(finite, finite_or_largest(z, LARGEST), z) - mean[:, None], 0.0)
            total += centred * centred
        rstd = 1.0 / tl.sqrt(tl.sum(total, axis=1) / D + eps)
        if (tl.program_id(0) % n_tiles == 0) & (which < 2):  # keys and values share theirs
            tl.store(statistics_ptr + row * 2, mean, mask=mask_m)
            tl.store(statistics_ptr + row * 2 + 1, rstd, mask=mask_m)

        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k0 in tl.range(0, D, BLOCK_K, num_stages=STAGES):
            mask_k = k0 + offs_k < D
            z = tl.load(z_ptrs + k0, mask=mask_m[:, None] & mask_k[None, :], other=0.0).to(tl.float32)
            gain = tl.load(norm_weight_ptr + k0 + offs_k, mask=mask_k, other=0.0).to(tl.float32)
            shift = tl.load(norm_bias_ptr + k0 + offs_k, mask=mask_k, other=0.0).to(tl.float32)
            w_ptrs = weight_ptr + offs_n[:, None] * D + k0 + offs_k[None, :]
            w = tl.load(w_ptrs, mask=mask_n[:, None] & mask_k[None, :], other=0.0)
            z = (tl.where(finite, finite_or_largest(z, LARGEST), z) - mean[:, None]) * rstd[:, None]
            z = tl.where(mask_k[None, :], z * gain[None, :] + shift[None, :], 0.0)
            acc = tl.dot(z.to(w.dtype), tl.trans(w), acc, input_precision="ieee")
        acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
        out_ptrs = projected_ptr + ((image * P + start + offs_m % rows) * D)[:, None] + offs_n[None, :]
        tl.store(out_ptrs, acc.to(projected_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


@triton.jit
def _spatial_attend_fwd_kernel(
    z_ptr,  # [B, ROWS, D]: T spatial rows first
    projected_ptr,  # [B, P, D]: from START on, this detail's T queries, O keys, O values
    attention_ptr,  # [B, T, KEYS]; this detail's columns begin at FIRST
    attended_ptr,  # [B, T, F - D]; this detail's columns begin at COLUMN - D
    activated_ptr,  # [B, T, F]: GELU of the spatial features, then of what is attended
    scale,
    ROWS: tl.constexpr,
    T: tl.constexpr,
    O: tl.constexpr,  # noqa: E741
    D: tl.constexpr,
    P: tl.constexpr,
    START: tl.constexpr,
    KEYS: tl.constexpr,
    FIRST: tl.constexpr,
    F: tl.constexpr,
    COLUMN: tl.constexpr,
    ADD: tl.constexpr,
    ACTIVATE: tl.constexpr,
    FINITE_SPATIAL: tl.constexpr,
    FINITE_LOGITS: tl.constexpr,
    LARGEST: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Axis 0: an image; axis 1: a tile of D. The first detail's launch, which may be one of no keys (O = 0), also
    activates the spatial features. Every tile computes the few logits anew."""
    image = tl.program_id(0).to(tl.int64)
    offs_t = tl.arange(0, BLOCK_T)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_t = (offs_t < T)[:, None]
    mask_d = (offs_d < D)[None, :]
    activated_ptrs = activated_ptr + (image * T + offs_t)[:, None] * F + offs_d[None, :]
    if FIRST == 0:
        z_ptrs = z_ptr + (image * ROWS + offs_t)[:, None] * D + offs_d[None, :]
        z = tl.load(z_ptrs, mask=mask_t & mask_d, other=0.0).to(tl.float32)
        if FINITE_SPATIAL:
            z = finite_or_largest(z, LARGEST)
        tl.store(activated_ptrs, gelu(z).to(activated_ptr.dtype.element_ty), mask=mask_t & mask_d)
    if O == 0:
        return

    offs_o = tl.arange(0, BLOCK_O)
    offs_k = tl.arange(0, BLOCK_K)
    mask_o = offs_o < O
    first = image * P + START
    q_ptrs = projected_ptr + (first + offs_t)[:, None] * D + offs_k[None, :]
    k_ptrs = projected_ptr + (first + T + offs_o)[:, None] * D + offs_k[None, :]
    logits = tl.zeros((BLOCK_T, BLOCK_O), tl.float32)
    for k0 in tl.range(0, D, BLOCK_K, num_stages=STAGES):
        mask_k = (k0 + offs_k < D)[None, :]
        q = tl.load(q_ptrs + k0, mask=mask_t & mask_k, other=0.0)
        k = tl.load(k_ptrs + k0, mask=mask_o[:, None] & mask_k, other=0.0)
        logits = tl.dot(q, tl.trans(k), logits, input_precision="ieee")
    logits *= scale
    if FINITE_LOGITS:
        logits = finite_or_largest(logits, LARGEST)
    logits = tl.where(mask_o[None, :], logits, float("-inf"))
    weights = tl.exp(logits - tl.max(logits, axis=1)[:, None])
    weights = weights / tl.sum(weights, axis=1)[:, None]
    attention = weights.to(projected_ptr.dtype.element_ty)
    if tl.program_id(1) == 0:
        a_ptrs = attention_ptr + (image * T + offs_t)[:, None] * KEYS + FIRST + offs_o[None, :]
        tl.store(a_ptrs, attention, mask=mask_t & mask_o[None, :])

    v_ptrs = projected_ptr + (first + T + O + offs_o)[:, None] * D + offs_d[None, :]
    v = tl.load(v_ptrs, mask=mask_o[:, None] & mask_d, other=0.0)
    out = tl.dot(attention, v, input_precision="ieee").to(attention.dtype)
    attended_ptrs = attended_ptr + (image * T + offs_t)[:, None] * (F - D) + COLUMN - D + offs_d[None, :]
    if ADD:
        before = tl.load(attended_ptrs, mask=mask_t & mask_d, other=0.0)
        out = (before.to(tl.float32) + out.to(tl.float32)).to(attention.dtype)
    tl.store(attended_ptrs, out, mask=mask_t & mask_d)
    if ACTIVATE:
        tl.store(activated_ptrs + COLUMN, gelu(out.to(tl.float32)).to(attention.dtype), mask=mask_t & mask_d)


@triton.jit
def _spatial_output_fwd_kernel(
    activated_ptr,  # [B, T, F]
    weight_ptr,  # [H, F]
    bias_ptr,  # [H]
    tokens_ptr,  # [B, T + N, H], images stride_b apart
    batch,
    stride_b,
    T: tl.constexpr,
    F: tl.constexpr,
    H: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One tile of the spatial tokens. Neighbouring programs share their columns' weights."""
    m_tiles = (batch * T + BLOCK_M - 1) // BLOCK_M
    offs_m = tl.program_id(0) % m_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(0) // m_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m = (offs_m < batch * T)[:, None]
    mask_n = offs_n < H
    image = (offs_m // T).to(tl.int64)
    token = offs_m % T
    x_ptrs = activated_ptr + offs_m[:, None].to(tl.int64) * F + offs_k[None, :]
    w_ptrs = weight_ptr + offs_n[:, None].to(tl.int64) * F + offs_k[None, :]

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k0 in tl.range(0, F, BLOCK_K, num_stages=STAGES):
        mask_k = (k0 + offs_k < F)[None, :]
        x = tl.load(x_ptrs + k0, mask=mask_m & mask_k, other=0.0)
        w = tl.load(w_ptrs + k0, mask=mask_n[:, None] & mask_k, other=0.0)
        acc = tl.dot(x, tl.trans(w), acc, input_precision="ieee")
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    t_ptrs = tokens_ptr + (image * stride_b + token * H)[:, None] + offs_n[None, :]
    tl.store(t_ptrs, acc.to(tokens_ptr.dtype.element_ty), mask=mask_m & mask_n[None, :])


def spatial_tail_triton(
    tokens: Tensor,
    tail: SpatialTail,
    z: Tensor,
    details: Sequence[int],
    projections: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    concat: bool,
    finite: Sequence[bool],
    eps: float,
) -> None:
    """Writes the spatial tokens into ``tokens[:, :T]``, and the ``tail``.

    Args:
        tokens: ``[B, T + N, H]``, contiguous; other rows are left alone.
        tail: the attention, and what the backward needs.
        z: ``[B, T + sum of O, D]``, contiguous, as the windowed matmul returns it.
        details: O of each detail map.
        projections: twelve a detail: LayerNorm weight and bias, linear weight and bias, of query, key and value.
        weight, bias: of the output layer, ``[H, F]`` with F = D, or D and the width of what is attended.
        concat: details side by side; else they are added.
        finite: nan_to_num on spatial features, detail maps, logits.
    """
    batch, rows, width = z.shape
    spatial, fused_width = rows - sum(details), weight.shape[1]
    weight, projections = weight.contiguous(), [t.contiguous() for t in projections]
    chip = chip_of(z.device)
    for i, outputs in enumerate(details or [0]):
        place = detail_constants(i, z, details, fused_width, concat, finite)
        if outputs:
            tiles = product_tiles(chip, z.dtype, batch, width)
            constants = {**pick(place, _spatial_project_fwd_kernel), **tiles.constants}
            m_tiles = triton.cdiv(batch * max(spatial, outputs), tiles.block_m)
            programs = (m_tiles * triton.cdiv(width, tiles.block_n), 3)
            project = Launch(_spatial_project_fwd_kernel, programs, constants, tiles.warps, registers=160)
            project(z, *projections[12 * i : 12 * (i + 1)], tail.projected, tail.statistics, batch, eps)
        # Without keys only the tile of D counts.
        tiles = attend_tiles(chip, z.dtype, spatial if outputs else 1, outputs, width)
        tiles = replace(tiles, block_t=power_of_two(spatial))
        constants = {
            **pick(place, _spatial_attend_fwd_kernel), **tiles.constants, "ADD": not concat and i > 0,
            "ACTIVATE": concat or i == len(details) - 1,
        }  # fmt: skip
        programs = (batch, triton.cdiv(width, tiles.block_d))
        attend = Launch(_spatial_attend_fwd_kernel, programs, constants, registers=128)
        attend(z, tail.projected, tail.attention, tail.attended, tail.activated, width**-0.5)
    tiles = product_tiles(chip, z.dtype, batch, fused_width)
    constants = {
        "T": spatial, "F": fused_width, "H": weight.shape[0], "HAS_BIAS": bias is not None, **tiles.constants,
    }  # fmt: skip
    programs = triton.cdiv(batch * spatial, tiles.block_m) * triton.cdiv(weight.shape[0], tiles.block_n)
    output = Launch(_spatial_output_fwd_kernel, (programs,), constants, tiles.warps, registers=128)
    output(tail.activated, weight, weight if bias is None else bias, tokens, batch, tokens.stride(0))
