"""How much memory a measurement needs, before it starts; estimates."""

from __future__ import annotations

import math

from sp_fast import SPProjectorConfig
from sp_fast.bench.cases import DTYPES
from sp_fast.bench.memory import MIB
from sp_fast.checkpoint import official_shapes

PROCESS_MIB = 500  # python, torch and the other imports of one process


def idle_mib(config: SPProjectorConfig, dtype: str) -> float:
    """A process that holds its weights and waits."""
    return sum(_elements(config)) * DTYPES[dtype].itemsize / MIB + PROCESS_MIB


def running_mib(config: SPProjectorConfig, dtype: str, batch: int, backward: bool, compiled: bool = False) -> float:
    """What the one that runs takes beyond that: gradients, weights laid out anew, activations.

    torch.compile's backward keeps every convolution's weights once more, in the layout that it chose.
    """
    counts = _elements(config)
    gradients = sum(counts) * DTYPES[dtype].itemsize * (backward + compiled * backward)
    return (gradients + max(counts) * 4 * 3 + _activations(config, batch)) / MIB


def exact_mib(config: SPProjectorConfig, dtype: str, batch: int, backward: bool) -> float:
    """The float64 yardstick: one convolution widened at a time."""
    widened = max(_elements(config)) * 8 * (3 if backward else 2)
    return idle_mib(config, dtype) + (widened + 2 * _activations(config, batch)) / MIB


def _elements(config: SPProjectorConfig) -> list[int]:
    return [math.prod(shape) for shape in official_shapes(config).values()]


def _activations(config: SPProjectorConfig, batch: int) -> int:
    columns = sum(side * side * k * k for side, k in zip(config.detail_sides, config.detail_kernels, strict=True))
    return (
        batch
        * 4
        * (config.patch_tokens * (config.vision_width + 4 * config.text_width) + columns * config.vision_width)
    )
