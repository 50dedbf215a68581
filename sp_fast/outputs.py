"""What a projector computes on the way, for tests, plots and verification."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class ProjectorOutput(NamedTuple):
    """Shapes: B images, T spatial tokens, N patch tokens, O outputs of a detail map, D spatial and H text width."""

    tokens: Tensor  # [B, T + N, H], spatial tokens first
    z_small: Tensor  # [B, T, D], spatial features after nan_to_num, before GELU
    z_big: tuple[Tensor, ...]  # [B, O, D] a detail, after nan_to_num; () without a DFI
    attention: tuple[Tensor, ...]  # [B, T, O] a detail, rows sum to 1
