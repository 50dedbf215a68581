"""Projector weights for a measurement: a checkpoint's, or seeded random ones that every process makes alike."""

from __future__ import annotations

import math
import zlib

import torch
from torch import Tensor

from sp_fast import SPProjectorConfig
from sp_fast.checkpoint import official_shapes
from sp_fast.stored_tensor import StoredTensor


def random_weights(
    config: SPProjectorConfig, seed: int, dtype: torch.dtype, device: torch.device
) -> dict[str, StoredTensor]:
    """Seeded weights in the official layout, each made on the device when it is read: nothing is 0 or 1 that need
    not be."""
    return {
        key: StoredTensor(shape, dtype, lambda key=key, shape=shape: random_tensor(key, shape, seed, device).to(dtype))
        for key, shape in official_shapes(config).items()
    }


def random_tensor(key: str, shape: tuple[int, ...], seed: int, device: torch.device) -> Tensor:
    """Of a parameter's name and the seed, in float32."""
    generator = torch.Generator(device).manual_seed(zlib.crc32(key.encode()) ^ seed)
    if len(shape) == 1:  # biases around 0, normalisation weights around 1
        centre = 0.0 if key.endswith("bias") else 1.0
        return torch.randn(shape, generator=generator, device=device).mul_(0.1).add_(centre)
    bound = 1 / math.sqrt(math.prod(shape[1:]))
    return torch.empty(shape, device=device).uniform_(-bound, bound, generator=generator)
