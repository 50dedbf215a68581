"""The spatial tail, backward, in Triton: from the output layer's input to z.

    d attended = d fused GELU'(attended);   da = d attended v^T;   dlogits = a (da - sum a da)
    dq = dlogits k / sqrt(D);   dk = dlogits^T q / sqrt(D);   dv = a^T d attended           here
    d normed = dq Wq;   dWq = dq^T normed;   dbq = sum dq;   k and v likewise               spatial_project_backward
    dz = LayerNorm'(d normed) + GELU'(z) d fused, 0 where nan_to_num replaced z             spatial_norm_backward

Each is one launch a detail.

Statistics come from the forward in float32; logits are multiplied anew (0.15 MFLOP an image), which is cheaper than a
mask of those that were replaced. What the reference rounds to its type between layers is rounded here too, but for the
gradients of logits and of a LayerNorm's two inputs.

Counts at the published widths (bf16, B=1): 1.6 MB of weights read and 1.6 MB of gradients written, 1 us at 4.3 TB/s,
and 0.1 GFLOP an image: launches decide, 3 here against some 45 of the plain form. What it saves that a compiler cannot:
LayerNorm inside the products, both ways, and every gradient of a split or a concatenation.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from sp_fast.kernels.device import chip_of
from sp_fast.kernels.gelu_rows_triton import gelu_slope
from sp_fast.kernels.launch import Launch
from sp_fast.kernels.spatial_norm_backward_triton import spatial_norm_backward
from sp_fast.kernels.spatial_project_backward_triton import spatial_project_backward
from sp_fast.kernels.spatial_tail import SpatialTail, detail_constants, pick
from sp_fast.kernels.spatial_tail_triton import finite_or_largest
from sp_fast.kernels.tiles import attend_tiles, power_of_two


@triton.jit
def _spatial_attend_bwd_kernel(
    dfused_ptr,  # [B, T, F], after GELU; this detail's columns begin at COLUMN
    attended_ptr,  # [B, T, F - D], before GELU
    projected_ptr,  # [B, P, D]: from START on, this detail's T queries, O keys, O values
    dattention_ptr,  # [B, T, KEYS]; this detail's columns begin at FIRST
    dprojected_ptr,  # [B, P, D]
    scale,
    T: tl.constexpr,
    O: tl.constexpr,  # noqa: E741
    D: tl.constexpr,
    P: tl.constexpr,
    START: tl.constexpr,
    KEYS: tl.constexpr,
    FIRST: tl.constexpr,
    F: tl.constexpr,
    COLUMN: tl.constexpr,
    HAS_DATTENTION: tl.constexpr,
    FINITE_LOGITS: tl.constexpr,
    LARGEST: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Axis 0: an image; axis 1: a tile of D. Every tile computes the few logits and their gradients anew."""
    image = tl.program_id(0).to(tl.int64)
    offs_t = tl.arange(0, BLOCK_T)
    offs_o = tl.arange(0, BLOCK_O)
    offs_k = tl.arange(0, BLOCK_K)
    mask_t = (offs_t < T)[:, None]
    mask_o = (offs_o < O)[:, None]
    q_rows = ((image * P + START + offs_t) * D)[:, None]
    k_rows = ((image * P + START + T + offs_o) * D)[:, None]
    dfused_rows = dfused_ptr + ((image * T + offs_t) * F)[:, None] + COLUMN
    attended_rows = attended_ptr + ((image * T + offs_t) * (F - D))[:, None] + COLUMN - D

    logits = tl.zeros((BLOCK_T, BLOCK_O), tl.float32)
    dattention = tl.zeros((BLOCK_T, BLOCK_O), tl.float32)
    for k0 in tl.range(0, D, BLOCK_K, num_stages=STAGES):
        offs = (k0 + offs_k)[None, :]
        mask_k = offs < D
        q = tl.load(projected_ptr + q_rows + offs, mask=mask_t & mask_k, other=0.0)
        k = tl.load(projected_ptr + k_rows + offs, mask=mask_o & mask_k, other=0.0)
        v = tl.load(projected_ptr + k_rows + O * D + offs, mask=mask_o & mask_k, other=0.0)
        x = tl.load(attended_rows + offs, mask=mask_t & mask_k, other=0.0).to(tl.float32)
        dout = tl.load(dfused_rows + offs, mask=mask_t & mask_k, other=0.0).to(tl.float32)
        dout = (dout * gelu_slope(x)).to(v.dtype)
        logits = tl.dot(q, tl.trans(k), logits, input_precision="ieee")
        dattention = tl.dot(dout, tl.trans(v), dattention, input_precision="ieee")

    keys = (offs_o < O)[None, :]
    logits *= scale
    kept = tl.abs(logits) <= LARGEST  # false for NaN
    if FINITE_LOGITS:
        logits = finite_or_largest(logits, LARGEST)
    logits = tl.where(keys, logits, float("-inf"))
    weights = tl.exp(logits - tl.max(logits, axis=1)[:, None])
    weights = weights / tl.sum(weights, axis=1)[:, None]
    if HAS_DATTENTION:
        a_ptrs = dattention_ptr + ((image * T + offs_t) * KEYS)[:, None] + FIRST + offs_o[None, :]
        dattention += tl.load(a_ptrs, mask=mask_t & keys, other=0.0).to(tl.float32)
    dlogits = weights * (dattention - tl.sum(weights * dattention, axis=1)[:, None])
    if FINITE_LOGITS:
        dlogits = tl.where(kept, dlogits, 0.0)

    offs = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
    mask_d = offs < D
    q = tl.load(projected_ptr + q_rows + offs, mask=mask_t & mask_d, other=0.0)
    k = tl.load(projected_ptr + k_rows + offs, mask=mask_o & mask_d, other=0.0)
    x = tl.load(attended_rows + offs, mask=mask_t & mask_d, other=0.0).to(tl.float32)
    dout = tl.load(dfused_rows + offs, mask=mask_t & mask_d, other=0.0).to(tl.float32)
    dout = (dout * gelu_slope(x)).to(q.dtype)
    dlogits = dlogits.to(q.dtype)
    dq = tl.dot(dlogits, k, input_precision="ieee") * scale
    dk = tl.dot(tl.trans(dlogits), q, input_precision="ieee") * scale
    dv = tl.dot(tl.trans(weights.to(q.dtype)), dout, input_precision="ieee")
    tl.store(dprojected_ptr + q_rows + offs, dq.to(q.dtype), mask=mask_t & mask_d)
    tl.store(dprojected_ptr + k_rows + offs, dk.to(q.dtype), mask=mask_o & mask_d)
    tl.store(dprojected_ptr + k_rows + O * D + offs, dv.to(q.dtype), mask=mask_o & mask_d)


def spatial_tail_backward_triton(
    dfused: Tensor,
    dattention: Tensor | None,
    tail: SpatialTail,
    z: Tensor,
    details: Sequence[int],
    projections: Sequence[Tensor],
    wanted: Sequence[bool],
    concat: bool,
    finite: Sequence[bool],
) -> tuple[Tensor, list[Tensor | None]]:
    """Gradients of z and, by detail, of the ``wanted`` projections: all twelve of one or none.

    Args:
        dfused: of the output layer's input, ``[B, T, F]``, contiguous.
        dattention: of the attention, ``[B, T, sum of O]``, contiguous, or None.
        tail: what the forward left.
        z, details, projections, concat, finite: as the forward had them.
        wanted: for every tensor of ``projections``.
    """
    batch, rows, width = z.shape
    spatial, fused_width = rows - sum(details), dfused.shape[2]
    projections = [t.contiguous() for t in projections]
    chip = chip_of(z.device)
    dz, dprojections = torch.empty_like(z), []
    dprojected, dnormed = torch.empty_like(tail.projected), torch.empty_like(tail.projected)
    for i, outputs in enumerate(details or [0]):
        place = detail_constants(i, z, details, fused_width, concat, finite)
        parameters, asked = projections[12 * i : 12 * (i + 1)], any(wanted[12 * i : 12 * (i + 1)])
        found = [torch.empty_like(t) for t in parameters] if asked else []
        if outputs:
            tiles = attend_tiles(chip, z.dtype, 2 * spatial, 2 * outputs, width)  # twice as many operands
            constants = {
                **pick(place, _spatial_attend_bwd_kernel), **tiles.constants, "BLOCK_T": power_of_two(spatial),
                "BLOCK_O": power_of_two(outputs), "HAS_DATTENTION": dattention is not None,
            }  # fmt: skip
            programs = (batch, triton.cdiv(width, tiles.block_d))
            attend = Launch(_spatial_attend_bwd_kernel, programs, constants, registers=255)
            upstream = dfused if dattention is None else dattention
            attend(dfused, tail.attended, tail.projected, upstream, dprojected, width**-0.5)
            spatial_project_backward(z, tail.statistics, parameters, dprojected, dnormed, found, place)
        spatial_norm_backward(z, tail.statistics, parameters, dfused, dnormed, dz, found, place)
        dprojections += found or [None] * len(parameters)
    return dz, dprojections
