"""A full projector seen as a list of convolutions, each read alone and in float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from sp_fast import compact_geometry
from sp_fast.kernels.window import encode_windows
from sp_fast.kernels.windowed_matmul import windowed_matmul
from sp_fast.projector import SPProjector

BATCH = 16  # images that are computed together
Say = Callable[[str], object]


class Full:
    """Of a projector with the full extractor, in any floating-point type, on the CPU.

    ``names`` are "4x4", ..., "detail 16x16", in the order of ``windows``, and so of z.
    """

    def __init__(self, projector: SPProjector, say: Say = lambda text: None) -> None:
        self.projector, self.config, self._say = projector, projector.config, say
        self.windows = compact_geometry.full_windows(self.config)
        details = len(self.windows) - len(self.config.levels)
        self.names = [f"{w.height}x{w.width}" for w in self.windows]
        self.names[len(self.names) - details :] = [f"detail {name}" for name in self.names[len(self.names) - details :]]

    def kernels(self) -> Iterator[Tensor]:
        """``[cells, C, D]`` float32, one convolution after the other; a view where the projector is float32."""
        extractor = self.projector.extractor
        weights = [w for w in (extractor.spatial_weight, extractor.detail_weight) if w is not None]
        for i, w in enumerate(self.windows, 1):
            self._say(f"convolution {i} of {len(self.windows)}")
            yield weights[w.weight].detach()[w.cell : w.cell + w.cells].float()

    def z(self, features: Tensor) -> Tensor:
        """``[n, T + sum of O, D]`` float32 of features ``[n, N, C]`` float32: what the extractor gives."""
        parts = []
        for w, kernel in zip(self.windows, self.kernels(), strict=True):
            window = encode_windows([replace(w, weight=0, cell=0)])
            rows = map(self.projector.extractor.rows, features.split(BATCH))
            parts.append(torch.cat([windowed_matmul(batch, [kernel], window, "torch") for batch in rows]))
        return torch.cat(parts, dim=1)

    def split(self, z: Tensor) -> list[Tensor]:
        """z ``[n, T + sum of O, D]`` convolution by convolution."""
        return list(z.split([w.outputs for w in self.windows], dim=1))
