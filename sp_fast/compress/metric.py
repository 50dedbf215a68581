"""How much an error of a weight counts: alike everywhere, or by what the features are."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sp_fast import geometry
from sp_fast.config import SPProjectorConfig
from sp_fast.errors import ConfigError

#: of the mean variance, added to every channel's: directions that the features never show keep a weight
SHARE = 1e-3


@dataclass(frozen=True)
class Metric:
    """The features' second moment over patches, and its roots, ``[C, C]`` float64.

    An error E ``[C, D]`` of a cell's weight makes E^T x of a patch x, on average ``||moment^(1/2) E||^2`` large. That
    neglects what neighbouring patches have in common, which least squares on the features themselves then see.
    """

    moment: Tensor
    root: Tensor
    inverse_root: Tensor


def plain_metric(width: int) -> Metric:
    """That of weights alone: every channel alike, none like another."""
    return Metric(*(torch.eye(width, dtype=torch.float64),) * 3)


def metric_of(features: Tensor, config: SPProjectorConfig) -> Metric:
    """Of features ``[n, N, C]`` float32, in the square that the convolutions see.

    Raises:
        ConfigError: features that are zero there, or too large to be squared.
    """
    start, size = geometry.crop_start(config.grid, config.map_size), config.map_size
    width = config.vision_width
    moment = torch.zeros(width, width, dtype=torch.float64)
    for image in features.unflatten(1, (config.grid, config.grid)):
        patches = image[start : start + size, start : start + size].flatten(0, 1)
        moment += (patches.t() @ patches).double() / (size * size * len(features))
    mean = float(moment.diagonal().mean())
    if not 0 < mean < math.inf:
        raise ConfigError(
            f"patch features whose mean square is {mean:g} tell nothing to fit to: give those that a vision tower has "
            "of images like the ones that the model will see"
        )
    moment += SHARE * mean * torch.eye(width, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(moment)
    roots = [vectors * values.clamp(min=values[-1] * 1e-12) ** power @ vectors.t() for power in (0.5, -0.5)]
    return Metric(moment, *roots)
