"""The compact extractors as ReferenceSPProjector has them: plain torch layers, one convolution at a time.

bottleneck      Conv2d(C, rank, 1), then every convolution on what it gives
depthwise       Conv2d(C, C, k, groups=C), Conv2d(C, D, 1)
grouped         Conv2d(C, D, k, groups=groups)
separable       Conv2d(C, rank, (1, k)), Conv2d(rank, D, (k, 1))
nested          every level a convolution with the centre of one kernel
resampled       every region AdaptiveAvgPool2d(K), then one convolution
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sp_fast.compact_config import narrowed_width
from sp_fast.compact_geometry import rings
from sp_fast.config import SPProjectorConfig


def depthwise(config: SPProjectorConfig, size: tuple[int, int], stride: int, **factory: object) -> nn.Module:
    """A convolution of each channel alone, and a 1x1 convolution."""
    c = config.vision_width
    first = nn.Conv2d(c, c, size, stride=stride, groups=c, bias=False, **factory)
    return nn.Sequential(first, nn.Conv2d(c, config.spatial_width, 1, bias=False, **factory))


def separable(config: SPProjectorConfig, size: tuple[int, int], stride: int, **factory: object) -> nn.Module:
    """A pass across and a pass down."""
    rank = config.rank
    first = nn.Conv2d(config.vision_width, rank, (1, size[1]), stride=(1, stride), bias=False, **factory)
    second = nn.Conv2d(rank, config.spatial_width, (size[0], 1), stride=(stride, 1), bias=False, **factory)
    return nn.Sequential(first, second)


def plain(config: SPProjectorConfig, size: tuple[int, int], stride: int, **factory: object) -> nn.Module:
    """One convolution, on narrowed channels where there is a 1x1 convolution before it."""
    depth = narrowed_width(config)
    return nn.Conv2d(depth, config.spatial_width, size, stride=stride, bias=False, **factory)


class GroupedConv2d(nn.Module):
    """``F.conv2d`` in groups; ``weight`` ``[groups, D / groups, C / groups, height, width]``, a group at a time."""

    def __init__(self, config: SPProjectorConfig, size: tuple[int, int], stride: int, **factory: object) -> None:
        super().__init__()
        groups, self.stride = config.groups, stride
        shape = groups, config.spatial_width // groups, config.vision_width // groups, *size
        self.weight = nn.Parameter(torch.empty(shape, **factory))
        nn.init.kaiming_uniform_(self.weight.flatten(0, 1), a=5**0.5)  # as Conv2d begins

    def forward(self, maps: Tensor) -> Tensor:
        """``[B, C, h, w]`` to ``[B, D, h', w']``."""
        return F.conv2d(maps, self.weight.flatten(0, 1), stride=self.stride, groups=len(self.weight))


class NestedKernel(nn.Module):
    """One kernel, whose centre is that of every smaller convolution. ``parts`` are its rectangles ``[D, C, h, w]`` from
    the centre outwards, of each ring top, bottom, left and right."""

    def __init__(self, config: SPProjectorConfig, **factory: object) -> None:
        super().__init__()
        self.rings = rings(config)
        depth = narrowed_width(config)
        self.parts = nn.ParameterList(
            torch.empty(config.spatial_width, depth, part.height, part.width, **factory)
            for ring in self.rings
            for part in ring.parts
        )
        for part in self.parts:
            nn.init.kaiming_uniform_(part, a=5**0.5)

    def forward(self, maps: Tensor, size: tuple[int, int], stride: int = 1) -> Tensor:
        """``[B, C, h, w]`` to ``[B, D, h', w']`` with the centre of that size."""
        whole = self._assembled()
        top, left = (side // 2 - small // 2 for side, small in zip(whole.shape[2:], size, strict=True))
        return F.conv2d(maps, whole[:, :, top : top + size[0], left : left + size[1]], stride=stride)

    def _assembled(self) -> Tensor:
        """``[D, C, K, K]``."""
        parts, outer = iter(self.parts), self.rings[-1]
        whole = self.parts[0].new_zeros(*self.parts[0].shape[:2], outer.height, outer.width)
        for ring in self.rings:
            above, beside = outer.height // 2 - ring.height // 2, outer.width // 2 - ring.width // 2
            for part in ring.parts:
                top, left = above + part.top, beside + part.left
                whole[:, :, top : top + part.height, left : left + part.width] = next(parts)
        return whole


class ResampledKernel(nn.Conv2d):
    """A K x K convolution of regions that are averaged to K x K first."""

    def __init__(self, config: SPProjectorConfig, **factory: object) -> None:
        depth = narrowed_width(config)
        super().__init__(depth, config.spatial_width, config.base_kernel, bias=False, **factory)

    def forward(self, maps: Tensor, size: tuple[int, int], stride: int = 1) -> Tensor:
        """``[B, C, h, w]`` to ``[B, D, h', w']``: of every region of that size, one output."""
        regions = maps.unfold(2, size[0], stride).unfold(3, size[1], stride)  # [B, C, h', w', height, width]
        batch, channels, rows, columns = regions.shape[:4]
        regions = regions.permute(0, 2, 3, 1, 4, 5).reshape(-1, channels, *size)
        outputs = super().forward(F.adaptive_avg_pool2d(regions, self.kernel_size))
        return outputs.view(batch, rows, columns, -1).permute(0, 3, 1, 2)


#: Kinds whose convolutions have parameters of their own, and those whose share one kernel.
CONVOLUTIONS = {"bottleneck": plain, "depthwise": depthwise, "grouped": GroupedConv2d, "separable": separable}
SHARED_KERNELS = {"nested": NestedKernel, "resampled": ResampledKernel}
