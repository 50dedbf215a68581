"""The pooling pyramid in Triton, forward and backward: every level in one launch, a few rows and a tile of channels a
program. The backward gathers: each patch adds up the bins that hold it, in a fixed order."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from sp_fast.kernels.launch import Launch
from sp_fast.kernels.tiles import power_of_two

BLOCK_R = 8  # output rows a program
TILE_BYTES = 8192  # of a row of each bin and its channels, in registers


@triton.jit
def _pooled_rows_fwd_kernel(
    x_ptr,  # [B, GRID * GRID, C], any strides
    out_ptr,  # [B, ROWS, C], ROWS = GRID * GRID + sum of k * k
    stride_b,
    stride_n,
    stride_c,
    GRID: tl.constexpr,
    ORIGIN: tl.constexpr,
    SIDE: tl.constexpr,
    LEVELS: tl.constexpr,
    ROWS: tl.constexpr,
    C: tl.constexpr,
    BIN: tl.constexpr,  # the longest bin's side
    BLOCK_R: tl.constexpr,
    BLOCK_BIN: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Patch rows are bins of one patch. Bins overlap where SIDE % k is not 0; each has its own count."""
    R_TILES: tl.constexpr = (ROWS + BLOCK_R - 1) // BLOCK_R
    image = tl.program_id(0) // R_TILES
    row = tl.program_id(0) % R_TILES * BLOCK_R + tl.arange(0, BLOCK_R)
    # Each bin's first map row and column, and the ones after its last.
    top, left = row // GRID, row % GRID
    bottom, right = top + 1, left + 1
    first = GRID * GRID
    for i in tl.static_range(len(LEVELS)):
        k = LEVELS[i]
        here = (row >= first) & (row < first + k * k)
        down, beside = (row - first) // k, (row - first) % k
        top = tl.where(here, ORIGIN // GRID + down * SIDE // k, top)
        bottom = tl.where(here, ORIGIN // GRID + ((down + 1) * SIDE + k - 1) // k, bottom)
        left = tl.where(here, ORIGIN % GRID + beside * SIDE // k, left)
        right = tl.where(here, ORIGIN % GRID + ((beside + 1) * SIDE + k - 1) // k, right)
        first += k * k
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    columns = left[:, None] + tl.arange(0, BLOCK_BIN)[None, :]
    mask = ((row < ROWS)[:, None] & (columns < right[:, None]))[:, :, None] & (offs_c < C)[None, None, :]
    base = x_ptr + image.to(tl.int64) * stride_b + offs_c[None, None, :].to(tl.int64) * stride_c
    acc = tl.zeros((BLOCK_R, BLOCK_BIN, BLOCK_C), tl.float32)
    for down in tl.static_range(BIN):  # unrolled, so that all rows of the bins are on their way together
        patches = ((top + down) * GRID)[:, None] + columns
        inside = mask & (top + down < bottom)[:, None, None]
        x = tl.load(base + patches[:, :, None].to(tl.int64) * stride_n, mask=inside, other=0.0)
        acc += x.to(tl.float32)
    mean = tl.sum(acc, axis=1) / ((bottom - top) * (right - left)).to(tl.float32)[:, None]
    out_ptrs = out_ptr + (image.to(tl.int64) * ROWS + row)[:, None] * C + offs_c[None, :]
    tl.store(out_ptrs, mean.to(out_ptr.dtype.element_ty), mask=(row < ROWS)[:, None] & (offs_c < C)[None, :])


def pooled_rows_triton(patch_features: Tensor, grid: int, origin: int, side: int, levels: Sequence[int]) -> Tensor:
    """The forward on a GPU, any strides."""
    batch, _, width = patch_features.shape
    rows = grid * grid + sum(k * k for k in levels)
    out = patch_features.new_empty(batch, rows, width)
    longest = max(-(-(i + 1) * side // k) - i * side // k for k in levels for i in range(k))
    block_bin = power_of_two(longest, least=1)
    elements = TILE_BYTES // patch_features.itemsize
    block_c = min(power_of_two(width), max(16, elements // (BLOCK_R * block_bin)))
    constants = {
        "GRID": grid, "ORIGIN": origin, "SIDE": side, "LEVELS": tuple(levels), "ROWS": rows, "C": width,
        "BIN": longest, "BLOCK_R": BLOCK_R, "BLOCK_BIN": block_bin, "BLOCK_C": block_c,
    }  # fmt: skip
    if batch:
        programs = (batch * triton.cdiv(rows, BLOCK_R), triton.cdiv(width, block_c))
        Launch(_pooled_rows_fwd_kernel, programs, constants, registers=128)(
            patch_features, out, *patch_features.stride()
        )
    return out


@triton.jit
def _pooled_rows_bwd_kernel(
    grad_ptr,  # [B, ROWS, C], ROWS = GRID * GRID + sum of k * k
    out_ptr,  # [B, GRID * GRID, C]
    GRID: tl.constexpr,
    ORIGIN: tl.constexpr,
    SIDE: tl.constexpr,
    LEVELS: tl.constexpr,
    COVERS: tl.constexpr,  # of each level: how many bins of an axis hold a patch, at most
    ROWS: tl.constexpr,
    C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The bins that hold patch y, [i * SIDE // k, ceil((i + 1) * SIDE / k)), begin with i = y * k // SIDE."""
    R_TILES: tl.constexpr = (GRID * GRID + BLOCK_R - 1) // BLOCK_R
    image = (tl.program_id(0) // R_TILES).to(tl.int64)
    row = tl.program_id(0) % R_TILES * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    mask = (row < GRID * GRID)[:, None] & (offs_c < C)
    base = grad_ptr + image * (ROWS * C) + offs_c
    acc = tl.load(base + row[:, None] * C, mask=mask, other=0.0).to(tl.float32)
    y, x = row // GRID - ORIGIN // GRID, row % GRID - ORIGIN % GRID
    in_square = (y >= 0) & (y < SIDE) & (x >= 0) & (x < SIDE)
    first = GRID * GRID
    for i in tl.static_range(len(LEVELS)):
        k = LEVELS[i]
        for bin in tl.static_range(COVERS[i] * COVERS[i]):
            down, beside = y * k // SIDE + bin // COVERS[i], x * k // SIDE + bin % COVERS[i]
            top, left = down * SIDE // k, beside * SIDE // k
            count = (((down + 1) * SIDE + k - 1) // k - top) * (((beside + 1) * SIDE + k - 1) // k - left)
            held = in_square & (down < k) & (beside < k) & (top <= y) & (left <= x)
            pooled = (first + down * k + beside)[:, None] * C
            g = tl.load(base + pooled, mask=mask & held[:, None], other=0.0).to(tl.float32)
            acc += g / tl.where(held, count, 1).to(tl.float32)[:, None]
        first += k * k
    out_ptrs = out_ptr + (image * (GRID * GRID) + row[:, None]) * C + offs_c
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask)


def pooled_rows_backward_triton(grad: Tensor, grid: int, origin: int, side: int, levels: Sequence[int]) -> Tensor:
    """The patch features' gradient ``[B, grid * grid, C]`` from that of all rows, contiguous ``[B, ROWS, C]``."""
    batch, rows, width = grad.shape
    out = grad.new_empty(batch, grid * grid, width)
    block_r, block_c = 16, min(64, power_of_two(width))
    covers = tuple(
        max(sum(i * side // k <= y < -(-(i + 1) * side // k) for i in range(k)) for y in range(side)) for k in levels
    )
    constants = {
        "GRID": grid, "ORIGIN": origin, "SIDE": side, "LEVELS": tuple(levels), "COVERS": covers, "ROWS": rows,
        "C": width, "BLOCK_R": block_r, "BLOCK_C": block_c,
    }  # fmt: skip
    if batch:
        programs = (batch * triton.cdiv(grid * grid, block_r), triton.cdiv(width, block_c))
        Launch(_pooled_rows_bwd_kernel, programs, constants, registers=168)(grad, out)
    return out
