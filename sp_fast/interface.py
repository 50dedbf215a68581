"""What every projector takes and gives, fast or reference."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from sp_fast.config import SPProjectorConfig
from sp_fast.kernels.autocast import autocast_dtype


class ProjectorOutput(NamedTuple):
    """Everything that a forward computes.

    B images, T spatial tokens, N patch tokens, O outputs of a detail map, D spatial width, H text width.
    """

    tokens: Tensor  # [B, T + N, H], spatial tokens first
    z_small: Tensor  # [B, T, D], spatial features after nan_to_num, before GELU
    z_big: tuple[Tensor, ...]  # [B, O, D] a detail, after nan_to_num; () without a DFI
    attention: tuple[Tensor, ...]  # [B, T, O] a detail, rows sum to 1


def check_dtype(patch_features: Tensor, weight: Tensor) -> None:
    """Raises ValueError where features and weights are of different types and autocast does not settle it."""
    if patch_features.dtype != weight.dtype and autocast_dtype(patch_features.device) is None:
        raise ValueError(
            f"the features are {patch_features.dtype} but the weights {weight.dtype}: cast one of them "
            "(features.to(weight.dtype) or projector.to(features.dtype)), or run under torch.autocast"
        )


def check_patch_features(patch_features: Tensor, config: SPProjectorConfig) -> None:
    """Raises ValueError where the features are not ``[B, grid * grid, vision_width]``, with what would mend it."""
    shape = tuple(patch_features.shape)
    if len(shape) != 3:
        raise ValueError(
            f"patch features must be [batch, {config.patch_tokens}, {config.vision_width}], not of shape {shape}; "
            "a single image needs a batch dimension: features.unsqueeze(0)"
        )
    if shape[2] != config.vision_width:
        raise ValueError(
            f"patch features of width {shape[2]} do not fit vision_width={config.vision_width}: "
            "use the vision tower that the projector was built for, or another SPProjectorConfig(vision_width=...)"
        )
    if shape[1] != config.patch_tokens:
        raise ValueError(_wrong_count(shape[1], config.grid))


def _wrong_count(count: int, grid: int) -> str:
    expected = f"{grid * grid} patches an image were expected ({grid}x{grid}), not {count}"
    side = math.isqrt(count)
    if count == grid * grid + 1:
        return f"{expected}: one too many, so drop the CLS token first: features[:, 1:]"
    if side * side == count:
        return f"{expected}: that is a {side}x{side} map, for a projector with grid={side}"
    return f"{expected}: and {count} is no square"
