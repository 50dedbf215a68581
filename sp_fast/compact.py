"""Compact spatial extractors: the full one's convolutions with fewer parameters. One interface, one class a kind.

    extractor(patch_features [B, N, C], backend) -> z [B, T + sum of O, D], as every extractor

Each is linear in the patch features, and so equals a full extractor whose weights have a structure. ``dense_weights``
gives those, ``shapes`` the parameters, which a packed weight of the windowed matmul each are, or 1x1 convolutions.
Parameters begin such that the dense weights are about as large as those that the full extractor begins with.

Parameters, and multiply-adds an image, at the published widths (crop-dfi; the full one: 897.6 M and 4.12 G):
    bottleneck  rank 64       56.2 M    0.30 G
    depthwise                  5.4 M    0.02 G
    grouped     8 groups     112.2 M    0.51 G
    separable                 78.6 M    1.90 G    rank 64:  9.8 M, 0.24 G
    nested                   302.0 M    3.66 G    rank 64: 18.9 M, 0.27 G
    resampled   8x8           67.1 M    1.04 G    rank 64:  4.3 M, 0.10 G
All stream their weights as the full one does, on the same kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sp_fast import compact_geometry, geometry
from sp_fast.compact_base import CompactExtractor, Shapes, by_weight, packed_shapes, reduce_shape, region_of, uniform_
from sp_fast.compact_shared import NestedExtractor, ResampledExtractor
from sp_fast.config import SPProjectorConfig
from sp_fast.kernels.window import Window, encode_windows
from sp_fast.kernels.windowed_matmul import windowed_matmul
from sp_fast.quantize import packed_matmul


class BottleneckExtractor(CompactExtractor):
    """A shared 1x1 convolution C -> rank, and the full extractor on what it gives. It comes before pooling, with which
    it commutes.

    ``reduce_weight`` ``[rank, C]``, ``spatial_weight`` and ``detail_weight`` ``[cells, rank, D]``. The 1x1 convolution
    is one product of all patches, which is the BLAS's on every backend.
    """

    packed = ("spatial_weight", "detail_weight")

    def __init__(self, config: SPProjectorConfig, **factory: object) -> None:
        super().__init__(config, **factory)
        self._encoded = encode_windows(self.windows)

    @staticmethod
    def shapes(config: SPProjectorConfig) -> Shapes:
        cells = geometry.spatial_cells(config), geometry.detail_cells(config)
        return reduce_shape(config) | packed_shapes(
            config, *((n, config.rank, config.spatial_width) for n in cells), "weight"
        )

    def reset_parameters(self) -> None:
        uniform_(self.reduce_weight, 1 / self.config.vision_width)
        weights = self._weights("weight")
        for w in self.windows:
            uniform_(weights[w.weight][w.cell : w.cell + w.cells], 1 / (3 * self.config.rank * w.cells))

    def forward(self, patch_features: Tensor, backend: str = "torch") -> Tensor:
        rows = self._rows(self._narrowed(patch_features), backend)
        return packed_matmul(rows, self._weights("weight"), self._encoded, backend)

    def dense_weights(self) -> list[Tensor]:
        return [self._widened(weight) for weight in self._weights("weight")]


class DepthwiseExtractor(CompactExtractor):
    """A weight for every cell and channel, summed over the window, and then a 1x1 convolution C -> D a level and a
    detail.

    ``spatial_depth`` and ``detail_depth`` ``[cells, C]``, ``spatial_point`` ``[T, C, D]`` and ``detail_point``
    ``[details, C, D]``. The sums are plain torch on every backend: they read 1.2 MB of features and 3.5 MB of weights,
    and multiply too little to pay for a kernel. A detail's are taken one kernel row at a time, so that nothing as
    large as its columns is kept.
    """

    def __init__(self, config: SPProjectorConfig, **factory: object) -> None:
        super().__init__(config, **factory)
        self._encoded = encode_windows(compact_geometry.pointwise_windows(config))

    @staticmethod
    def shapes(config: SPProjectorConfig) -> Shapes:
        c, d = config.vision_width, config.spatial_width
        cells = geometry.spatial_cells(config), geometry.detail_cells(config)
        counts = len(config.levels), len(config.detail_kernels)
        depth = packed_shapes(config, *((n, c) for n in cells), "depth")
        return depth | packed_shapes(config, *((n, c, d) for n in counts), "point")

    def reset_parameters(self) -> None:
        for w, depth in zip(self.windows, self._depths(), strict=True):
            uniform_(depth, 1 / w.cells)
        for point in self._weights("point"):
            uniform_(point, 1 / (3 * self.config.vision_width))

    def _depths(self) -> list[Tensor]:
        """Of each window, ``[height, width, C]``."""
        found = []
        for i, depth in enumerate(self._weights("depth")):
            mine = [w for w in self.windows if w.weight == i]
            parts = depth.split([w.cells for w in mine])
            found += [part.unflatten(0, (w.height, w.width)) for w, part in zip(mine, parts, strict=True)]
        return found

    def forward(self, patch_features: Tensor, backend: str = "torch") -> Tensor:
        rows = self._rows(patch_features, backend)
        sums = [
            _full_sum(region_of(rows, w, self.config), depth) if w.outputs == 1 else
            _strided_sums(region_of(rows, w, self.config), depth, w)
            for w, depth in zip(self.windows, self._depths(), strict=True)
        ]  # fmt: skip
        return windowed_matmul(torch.cat(sums, dim=1), self._weights("point"), self._encoded, backend)

    def dense_weights(self) -> list[Tensor]:
        points = [point for weight in self._weights("point") for point in weight]
        dense = [d.flatten(0, 1)[:, :, None] * p for d, p in zip(self._depths(), points, strict=True)]
        return by_weight(self.windows, dense)


class GroupedExtractor(CompactExtractor):
    """Channels in equal groups that do not mix: group i of C gives group i of D.

    ``spatial_weight`` and ``detail_weight`` ``[groups, cells, C / groups, D / groups]``. Groups are further rows of
    the same windows, which takes a copy of the features, 1.2 MB an image.
    """

    def __init__(self, config: SPProjectorConfig, **factory: object) -> None:
        super().__init__(config, **factory)
        self._encoded = encode_windows(compact_geometry.grouped_windows(config))

    @staticmethod
    def shapes(config: SPProjectorConfig) -> Shapes:
        groups = config.groups
        cells = geometry.spatial_cells(config), geometry.detail_cells(config)
        shape = config.vision_width // groups, config.spatial_width // groups
        return packed_shapes(config, *((groups, n, *shape) for n in cells), "weight")

    def reset_parameters(self) -> None:
        weights = self._weights("weight")
        for w in self.windows:
            part = weights[w.weight][:, w.cell : w.cell + w.cells]
            uniform_(part, 1 / (3 * part.shape[2] * w.cells))

    def forward(self, patch_features: Tensor, backend: str = "torch") -> Tensor:
        groups = self.config.groups
        rows = self._rows(patch_features, backend).unflatten(2, (groups, -1)).transpose(1, 2).flatten(1, 2)
        weights = [weight.flatten(0, 1) for weight in self._weights("weight")]
        z = windowed_matmul(rows, weights, self._encoded, backend)
        return z.unflatten(1, (groups, -1)).transpose(1, 2).flatten(2)

    def dense_weights(self) -> list[Tensor]:
        found = []
        for weight in self._weights("weight"):
            one = torch.eye(len(weight), dtype=weight.dtype, device=weight.device)
            found.append(torch.einsum("gncd,gh->ngchd", weight, one).flatten(3, 4).flatten(1, 2))
        return found


class SeparableExtractor(CompactExtractor):
    """Every kernel as a pass across, 1 x width and C -> rank, and a pass down, height x 1 and rank -> D.

    ``spatial_across`` ``[sum of widths, C, rank]``, ``spatial_down`` ``[sum of heights, rank, D]``; ``detail_across``,
    ``detail_down`` alike.
    """

    packed = ("spatial_across", "detail_across", "spatial_down", "detail_down")

    def __init__(self, config: SPProjectorConfig, **factory: object) -> None:
        super().__init__(config, **factory)
        self._encoded = [encode_windows(windows) for windows in compact_geometry.separable_windows(config)]

    @staticmethod
    def shapes(config: SPProjectorConfig) -> Shapes:
        heights, widths = (sum(sides) for sides in zip(*config.levels, strict=True)) if config.levels else (0, 0)
        details = sum(config.detail_kernels)
        first, second = (config.vision_width, config.rank), (config.rank, config.spatial_width)
        across = packed_shapes(config, (widths, *first), (details, *first), "across")
        return across | packed_shapes(config, (heights, *second), (details, *second), "down")

    def reset_parameters(self) -> None:
        for w, across, down in self._passes():
            uniform_(across, 1 / (self.config.vision_width * w.width))
            uniform_(down, 1 / (3 * self.config.rank * w.height))

    def _passes(self) -> list[tuple[Window, Tensor, Tensor]]:
        """Of each convolution, its window and its two kernels."""
        found = []
        for i, (across, down) in enumerate(zip(self._weights("across"), self._weights("down"), strict=True)):
            mine = [w for w in self.windows if w.weight == i]
            parts = across.split([w.width for w in mine]), down.split([w.height for w in mine])
            found += zip(mine, *parts, strict=True)
        return found

    def forward(self, patch_features: Tensor, backend: str = "torch") -> Tensor:
        first, second = self._encoded
        middle = packed_matmul(self._rows(patch_features, backend), self._weights("across"), first, backend)
        z = packed_matmul(middle, self._weights("down"), second, backend)
        sides = self.config.detail_sides
        spatial, *details = z.split([len(self.config.levels), *(side * side for side in sides)], dim=1)
        by_row = [
            part.unflatten(1, (n, n)).transpose(1, 2).flatten(1, 2) for part, n in zip(details, sides, strict=True)
        ]
        return torch.cat([spatial, *by_row], dim=1)

    def dense_weights(self) -> list[Tensor]:
        windows, *kernels = zip(*self._passes(), strict=True)
        dense = [torch.einsum("wcm,hmd->hwcd", *pair).flatten(0, 1) for pair in zip(*kernels, strict=True)]
        return by_weight(windows, dense)


def _full_sum(region: Tensor, depth: Tensor) -> Tensor:
    """Of a region ``[B, height, width, C]`` and a kernel that covers it: ``[B, 1, C]``, a product for each channel."""
    return torch.einsum("bhwc,hwc->bc", region, depth).unsqueeze(1)


def _strided_sums(region: Tensor, depth: Tensor, w: Window) -> Tensor:
    """Of a map and a kernel that moves over it: ``[B, outputs, C]``; kernel rows are added in float32 at least."""
    sums = []
    for down, weight in enumerate(depth):
        rows = region[:, down : down + (w.out_height - 1) * w.step + 1 : w.step].unfold(2, w.width, w.step)
        sums.append(torch.einsum("bijcw,wc->bijc", rows, weight))
    wide = torch.promote_types(region.dtype, torch.float32)
    return torch.stack(sums).sum(0, dtype=wide).to(region.dtype).flatten(1, 2)


COMPACT_EXTRACTORS = {
    "bottleneck": BottleneckExtractor,
    "depthwise": DepthwiseExtractor,
    "grouped": GroupedExtractor,
    "separable": SeparableExtractor,
    "nested": NestedExtractor,
    "resampled": ResampledExtractor,
}
