"""What a compression costs: relative errors on features that nothing was fitted to, by level and of the tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sp_fast.compress.full import BATCH, Full
from sp_fast.projector import SPProjector


@dataclass(frozen=True)
class Error:
    """``||a - b|| / ||b||`` in Frobenius norm, and the same over what varies in b from image to image: a mean that all
    images share makes the first small. None where a single image is judged."""

    name: str
    relative: float
    of_variation: float | None


@torch.no_grad()
def errors(
    full: Full, z: Tensor, tokens: Tensor, extractor: nn.Module, head: SPProjector, features: Tensor
) -> list[Error]:
    """Of each convolution's z, and of the spatial tokens.

    Args:
        z, tokens: what the full projector gives, ``[n, T + sum of O, D]`` and ``[n, T, H]``.
        extractor, head: to be judged, on features in float32; of the head the layers after its own extractor.
        features: ``[n, N, C]`` float32.
    """
    found = torch.cat([extractor(batch) for batch in features.split(BATCH)])
    pairs = zip(full.names, full.split(found), full.split(z), strict=True)
    made = integrated(head, found)
    return [*(_error(name, a, b) for name, a, b in pairs), _error("spatial tokens", made, tokens)]


@torch.no_grad()
def integrated(projector: SPProjector, z: Tensor) -> Tensor:
    """The spatial tokens ``[n, T, H]`` of z ``[n, T + sum of O, D]``."""
    return torch.cat([projector.integrate(batch)[0] for batch in z.split(BATCH)])


def _error(name: str, found: Tensor, exact: Tensor) -> Error:
    missed = float((found - exact).norm())
    spread = float((exact - exact.mean(0)).norm()) if len(exact) > 1 else 0.0
    return Error(name, missed / (float(exact.norm()) or 1.0), missed / spread if spread else None)
