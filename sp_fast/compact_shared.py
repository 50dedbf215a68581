"""The compact extractors whose levels share one kernel: nested in each other, or averaged to one size."""

from __future__ import annotations

import math
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from sp_fast import compact_geometry, geometry
from sp_fast.compact_base import CompactExtractor, Shapes, by_weight, packed_shapes, reduce_shape, region_of, uniform_
from sp_fast.compact_config import narrowed_width
from sp_fast.config import SPProjectorConfig
from sp_fast.kernels.window import Window, encode_windows
from sp_fast.quantize import packed_matmul


class NestedExtractor(CompactExtractor):
    """One kernel of the largest level's size; every other level's is its centre, and so is a detail's.

    ``shared_weight`` ``[K * K, C or rank, D]`` is packed from the centre outwards, so that a level is its first cells
    and a ring four windows; ``reduce_weight`` ``[rank, C]`` where there is a rank. Crops multiply each ring once: their
    tokens are running sums. The sums of pieces are taken in float32 at least.
    """

    packed = ("shared_weight",)

    def __init__(self, config: SPProjectorConfig, **factory: object) -> None:
        super().__init__(config, **factory)
        windows, self._counts = compact_geometry.nested_windows(config)
        self._encoded = encode_windows(windows)

    @staticmethod
    def shapes(config: SPProjectorConfig) -> Shapes:
        height, width = config.levels[-1]
        shape = height * width, narrowed_width(config), config.spatial_width
        return reduce_shape(config) | {"shared_weight": shape}

    def reset_parameters(self) -> None:
        """A ring begins as the level that it completes."""
        if self.reduce_weight is not None:
            uniform_(self.reduce_weight, 1 / self.config.vision_width)
        depth, first = self.shared_weight.shape[1], 0
        for height, width in dict.fromkeys(self.config.levels):
            uniform_(self.shared_weight[first : height * width], 1 / (3 * depth * height * width))
            first = height * width

    def forward(self, patch_features: Tensor, backend: str = "torch") -> Tensor:
        rows = self._rows(self._narrowed(patch_features), backend)
        z = packed_matmul(rows, [self.shared_weight], self._encoded, backend)
        tokens = len(self.config.levels)
        outputs = [1] * tokens + [side * side for side in self.config.detail_sides]
        parts = z.split([n * count for n, count in zip(outputs, self._counts, strict=True)], dim=1)
        wide = torch.promote_types(z.dtype, torch.float32)
        sums = [part.unflatten(1, (-1, n)).sum(1, dtype=wide) for part, n in zip(parts, outputs, strict=True)]
        if self.config.pyramid == "crop":
            sums[:tokens] = accumulate(sums[:tokens])
        return torch.cat(sums, dim=1).to(z.dtype)

    def dense_weights(self) -> list[Tensor]:
        config, shared = self.config, self._widened(self.shared_weight)
        sizes = config.levels, [(kernel, kernel) for kernel in config.detail_kernels]
        orders = [[i for size in part for i in compact_geometry.nest_order(config, *size)] for part in sizes]
        return [shared[torch.tensor(order, device=shared.device)] for order in orders if order]


class ResampledExtractor(CompactExtractor):
    """One K x K kernel for all levels: every region is averaged to K x K first, as adaptive average pooling does.

    ``spatial_weight`` ``[K * K, C or rank, D]``, ``detail_weight`` ``[details * K * K, C or rank, D]``,
    ``reduce_weight`` ``[rank, C]`` where there is a rank. The dense weights are piecewise constant: averaging's adjoint
    spreads each weight over its bin. A detail's regions are laid out before they are averaged, 13 MB an image without
    a rank and 0.8 MB at a rank of 64. Averaging is torch's own on every backend.
    """

    packed = ("spatial_weight", "detail_weight")

    def __init__(self, config: SPProjectorConfig, **factory: object) -> None:
        super().__init__(config, **factory)
        self._encoded = encode_windows(compact_geometry.resampled_windows(config))

    @staticmethod
    def shapes(config: SPProjectorConfig) -> Shapes:
        area, shape = config.base_kernel**2, (narrowed_width(config), config.spatial_width)
        return reduce_shape(config) | packed_shapes(
            config, (area, *shape), (len(config.detail_kernels) * area, *shape), "weight"
        )

    def reset_parameters(self) -> None:
        """As large as the full one's over all levels together, and over all details."""
        if self.reduce_weight is not None:
            uniform_(self.reduce_weight, 1 / self.config.vision_width)
        for i, weight in enumerate(self._weights("weight")):
            mine = [w for w in self.windows if w.weight == i]
            bins = [geometry.pooling_bins(side, self.config.base_kernel) for w in mine for side in (w.height, w.width)]
            norms = [sum(1 / (b - a) for a, b in one) for one in bins]  # of the averaging along an axis, squared
            spread = sum(map(math.prod, zip(norms[::2], norms[1::2], strict=True))) / len(mine)
            uniform_(weight, 1 / (3 * weight.shape[1] * spread))

    def forward(self, patch_features: Tensor, backend: str = "torch") -> Tensor:
        rows = self._rows(self._narrowed(patch_features), backend)
        averaged = [self._resample(rows, w) for w in self.windows]
        return packed_matmul(torch.cat(averaged, dim=1), self._weights("weight"), self._encoded, backend)

    def _resample(self, rows: Tensor, w: Window) -> Tensor:
        """The window's regions averaged, ``[B, outputs * K * K, channels]``."""
        regions = region_of(rows, w, self.config).unfold(1, w.height, w.step).unfold(2, w.width, w.step)
        averaged = F.adaptive_avg_pool2d(regions.flatten(0, 2), self.config.base_kernel)
        return averaged.permute(0, 2, 3, 1).reshape(
            rows.shape[0], w.outputs * self.config.base_kernel**2, rows.shape[2]
        )

    def dense_weights(self) -> list[Tensor]:
        dense, area = [], self.config.base_kernel**2
        for i, weight in enumerate(self._weights("weight")):
            mine = [w for w in self.windows if w.weight == i]
            kernels = self._widened(weight).split(area)
            for w, kernel in zip(mine, kernels if i or not self.config.levels else kernels * len(mine), strict=True):
                wide = kernel.to(torch.promote_types(kernel.dtype, torch.float32))
                dense.append(torch.einsum("kn,kcd->ncd", self.averaging(w).to(wide), wide).to(kernel.dtype))
        return by_weight(self.windows, dense)

    def averaging(self, w: Window) -> Tensor:
        """The window's averaging as a matrix ``[K * K, cells]``."""
        axes = []
        for side in (w.height, w.width):
            bins = geometry.pooling_bins(side, self.config.base_kernel)
            rows = [[(a <= i < b) / (b - a) for i in range(side)] for a, b in bins]
            axes.append(torch.tensor(rows, dtype=torch.float64, device="cpu"))
        return torch.kron(*axes)
