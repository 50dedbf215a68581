"""Pooled rows: the pooling pyramid, appended to the patch features as further rows.

    out = [patch rows; pool_1 rows; pool_2 rows; ...],  pool_k = AdaptiveAvgPool2d(k) of the map, row-major

so that a pooled level is one more window on the same rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def pooled_rows(patch_features: Tensor, grid: int, origin: int, side: int, levels: Sequence[int]) -> Tensor:
    """The patch features, followed by their adaptive average pools.

    Args:
        patch_features: ``[B, grid * grid, C]``, row-major.
        origin: row of the patch features where the pooled square begins.
        side: its side, in patches.
        levels: sides of the pooled maps.
    Returns:
        ``[B, grid * grid + sum(k * k), C]``, in the input's dtype; with no levels, the input itself.
    """
    if not levels:
        return patch_features
    top, left = divmod(origin, grid)
    square = patch_features.unflatten(1, (grid, grid))[:, top : top + side, left : left + side].permute(0, 3, 1, 2)
    pools = [F.adaptive_avg_pool2d(square, k).permute(0, 2, 3, 1).flatten(1, 2) for k in levels]
    return torch.cat([patch_features, *pools], dim=1)
