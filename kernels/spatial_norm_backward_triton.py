"""The LayerNorms of the spatial tail, backward, in Triton, and with them all of dz.

    dx = (g - mean g - x^ mean(g x^)) / s  with  g = d normed * gain
    d gain = sum d normed x^;   d shift = sum d normed
    dz = dx + GELU'(z) d fused, and 0 where nan_to_num replaced z

x^ is the row without its mean and divided by its standard deviation s, from the forward's statistics.
spatial_tail_backward_triton.py has the whole, and the counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from sp_fast.kernels.gelu_rows_triton import gelu_slope
from sp_fast.kernels.launch import Launch
from sp_fast.kernels.spatial_tail import pick
from sp_fast.kernels.spatial_tail_triton import finite_or_largest, load_normed
from sp_fast.kernels.tiles import power_of_two

NORM_ROWS = 4  # of dz, a program
COLUMN_ROWS, COLUMNS = 64, 32  # rows at a time, and columns, of the gains' and shifts' gradients


@triton.jit
def _norm_rows(
    pid,
    z_ptr,
    statistics_ptr,
    q_norm_weight_ptr,
    k_norm_weight_ptr,
    v_norm_weight_ptr,
    dfused_ptr,
    dnormed_ptr,
    dz_ptr,
    batch,
    ROWS: tl.constexpr,
    FIRST: tl.constexpr,
    T: tl.constexpr,
    O: tl.constexpr,  # noqa: E741
    D: tl.constexpr,
    P: tl.constexpr,
    START: tl.constexpr,
    F: tl.constexpr,
    FINITE_SPATIAL: tl.constexpr,
    FINITE_DETAIL: tl.constexpr,
    LARGEST: tl.constexpr,
    NORM_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A few rows of dz: of the spatial rows, which every detail adds to, and of this detail's own."""
    offs_m = pid * NORM_ROWS + tl.arange(0, NORM_ROWS)
    mask_m = offs_m < batch * (T + O)
    image = (offs_m // (T + O)).to(tl.int64)
    r = offs_m % (T + O)
    spatial = r < T
    z_rows = image * ROWS + tl.where(spatial, r, r + FIRST)
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    mask = mask_m[:, None] & (offs_d < D)
    spatial_mask = mask & spatial[:, None]
    raw = tl.load(z_ptr + z_rows[:, None] * D + offs_d, mask=mask, other=0.0).to(tl.float32)
    finite = tl.where(spatial, FINITE_SPATIAL, FINITE_DETAIL)[:, None]
    x = tl.where(finite, finite_or_largest(raw, LARGEST), raw)
    dz = tl.zeros((NORM_ROWS, BLOCK_D), tl.float32)
    if O > 0:
        mean = tl.load(statistics_ptr + z_rows * 2, mask=mask_m, other=0.0)[:, None]
        rstd = tl.load(statistics_ptr + z_rows * 2 + 1, mask=mask_m, other=0.0)[:, None]
        normed = (x - mean) * rstd
        # A spatial row is one query; a detail's is a key and, O rows further on, a value.
        rows = (image * P + START + r)[:, None] * D + offs_d
        q_gain = tl.load(q_norm_weight_ptr + offs_d, mask=offs_d < D, other=0.0).to(tl.float32)
        k_gain = tl.load(k_norm_weight_ptr + offs_d, mask=offs_d < D, other=0.0).to(tl.float32)
        v_gain = tl.load(v_norm_weight_ptr + offs_d, mask=offs_d < D, other=0.0).to(tl.float32)
        of_key = tl.load(dnormed_ptr + rows, mask=mask, other=0.0).to(tl.float32)
        of_value = tl.load(dnormed_ptr + rows + O * D, mask=mask & (r >= T)[:, None], other=0.0).to(tl.float32)
        g = of_key * tl.where(spatial[:, None], q_gain, k_gain) + of_value * v_gain
        along = tl.sum(tl.where(mask, g * normed, 0.0), axis=1)[:, None] / D
        dz = (g - tl.sum(g, axis=1)[:, None] / D - normed * along) * rstd
    dz_ptrs = dz_ptr + z_rows[:, None] * D + offs_d
    if FIRST == 0:
        dfused_ptrs = dfused_ptr + (image * T + r)[:, None] * F + offs_d
        dfused = tl.load(dfused_ptrs, mask=spatial_mask, other=0.0).to(tl.float32)
        dz += tl.where(spatial_mask, dfused * gelu_slope(x), 0.0)
    else:
        dz += tl.load(dz_ptrs, mask=spatial_mask, other=0.0).to(tl.float32)
    dz = tl.where(finite, tl.where(tl.abs(raw) <= LARGEST, dz, 0.0), dz)  # false for NaN
    tl.store(dz_ptrs, dz.to(dz_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _norm_columns(
    pid,
    z_ptr,
    statistics_ptr,
    dnormed_ptr,
    dgain_ptr,
    dshift_ptr,
    first,
    finite,
    start,
    rows,
    batch,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    P: tl.constexpr,
    LARGEST: tl.constexpr,
    COLUMN_ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A few columns of one LayerNorm's gain and shift."""
    offs_c = pid * COLUMNS + tl.arange(0, COLUMNS)
    mask_c = offs_c < D
    dgain = tl.zeros((COLUMN_ROWS, COLUMNS), tl.float32)
    dshift = tl.zeros((COLUMN_ROWS, COLUMNS), tl.float32)
    for m0 in range(0, batch * rows, COLUMN_ROWS):
        offs_m = m0 + tl.arange(0, COLUMN_ROWS)
        mask_m = offs_m < batch * rows
        mask = mask_m[:, None] & mask_c[None, :]
        image = (offs_m // rows).to(tl.int64)
        z_rows = image * ROWS + first + offs_m % rows
        g_rows = image * P + start + offs_m % rows
        z = load_normed(z_ptr, statistics_ptr, z_rows, offs_c, mask_m, mask, finite, D, LARGEST)
        g = tl.load(dnormed_ptr + g_rows[:, None] * D + offs_c[None, :], mask=mask, other=0.0).to(tl.float32)
        dgain += tl.where(mask, g * z, 0.0)
        dshift += g
    tl.store(dgain_ptr + offs_c, tl.sum(dgain, axis=0).to(dgain_ptr.dtype.element_ty), mask=mask_c)
    tl.store(dshift_ptr + offs_c, tl.sum(dshift, axis=0).to(dshift_ptr.dtype.element_ty), mask=mask_c)


@triton.jit
def _spatial_norm_bwd_kernel(
    z_ptr,  # [B, ROWS, D]
    statistics_ptr,  # [B, ROWS, 2]
    q_norm_weight_ptr,
    k_norm_weight_ptr,
    v_norm_weight_ptr,
    dfused_ptr,  # [B, T, F]; its first D columns are of the spatial features
    dnormed_ptr,  # [B, P, D]
    dz_ptr,  # [B, ROWS, D]
    dq_norm_weight_ptr,
    dq_norm_bias_ptr,
    dk_norm_weight_ptr,
    dk_norm_bias_ptr,
    dv_norm_weight_ptr,
    dv_norm_bias_ptr,
    batch,
    ROWS: tl.constexpr,
    FIRST: tl.constexpr,
    T: tl.constexpr,
    O: tl.constexpr,  # noqa: E741
    D: tl.constexpr,
    P: tl.constexpr,
    START: tl.constexpr,
    F: tl.constexpr,
    FINITE_SPATIAL: tl.constexpr,
    FINITE_DETAIL: tl.constexpr,
    LARGEST: tl.constexpr,
    NORM_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    COLUMN_ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """First the rows of dz, then columns of query's, key's and value's LayerNorm."""
    pid = tl.program_id(0)
    row_programs = (batch * (T + O) + NORM_ROWS - 1) // NORM_ROWS
    if pid < row_programs:
        _norm_rows(
            pid, z_ptr, statistics_ptr, q_norm_weight_ptr, k_norm_weight_ptr, v_norm_weight_ptr, dfused_ptr,
            dnormed_ptr, dz_ptr, batch, ROWS, FIRST, T, O, D, P, START, F, FINITE_SPATIAL, FINITE_DETAIL, LARGEST,
            NORM_ROWS, BLOCK_D,
        )  # fmt: skip
    else:
        if O > 0:
            TILES: tl.constexpr = (D + COLUMNS - 1) // COLUMNS
            which = (pid - row_programs) // TILES
            is_query, is_key = which == 0, which == 1
            dgain_ptr = tl.where(is_query, dq_norm_weight_ptr, tl.where(is_key, dk_norm_weight_ptr, dv_norm_weight_ptr))
            dshift_ptr = tl.where(is_query, dq_norm_bias_ptr, tl.where(is_key, dk_norm_bias_ptr, dv_norm_bias_ptr))
            _norm_columns(
                (pid - row_programs) % TILES, z_ptr, statistics_ptr, dnormed_ptr, dgain_ptr, dshift_ptr,
                tl.where(is_query, 0, T + FIRST), tl.where(is_query, FINITE_SPATIAL, FINITE_DETAIL),
                START + tl.where(is_query, 0, tl.where(is_key, T, T + O)), tl.where(is_query, T, O), batch, ROWS, D, P,
                LARGEST, COLUMN_ROWS, COLUMNS,
            )  # fmt: skip


def spatial_norm_backward(
    z: Tensor,
    statistics: Tensor,
    parameters: Sequence[Tensor],
    dfused: Tensor,
    dnormed: Tensor,
    dz: Tensor,
    found: Sequence[Tensor],
    place: Mapping[str, Any],
) -> None:
    """Writes the detail's rows of ``dz``, writes its spatial rows or adds to them; and gains and shifts as above."""
    batch, width = z.shape[0], z.shape[2]
    columns = min(COLUMNS, power_of_two(width))
    constants = {
        **pick(place, _spatial_norm_bwd_kernel), "NORM_ROWS": NORM_ROWS, "BLOCK_D": power_of_two(width),
        "COLUMN_ROWS": COLUMN_ROWS, "COLUMNS": columns,
    }  # fmt: skip
    programs = triton.cdiv(batch * (place["T"] + place["O"]), NORM_ROWS)
    programs += 3 * triton.cdiv(width, columns) if found else 0
    gains = [parameters[i] for i in (0, 4, 8)] if parameters else [z] * 3
    gradients = [t for i, t in enumerate(found) if i % 4 < 2] or [dz] * 6
    Launch(_spatial_norm_bwd_kernel, (programs,), constants, registers=168)(
        z, statistics, *gains, dfused, dnormed, dz, *gradients, batch
    )
