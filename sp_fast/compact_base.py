"""What the compact extractors share: parameters, rows, the regions that windows read, how a parameter begins."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sp_fast import compact_geometry, geometry
from sp_fast.compact_config import narrows
from sp_fast.config import SPProjectorConfig
from sp_fast.interface import check_dtype
from sp_fast.kernels.pooled_rows import pooled_rows
from sp_fast.kernels.window import Window

Shapes = dict[str, tuple[int, ...]]


class CompactExtractor(nn.Module):
    """What the kinds share: parameters by ``shapes``, rows, and how a parameter begins."""

    def __init__(self, config: SPProjectorConfig, **factory: object) -> None:
        super().__init__()
        self.config = config
        self.register_parameter("reduce_weight", None)
        for name, shape in self.shapes(config).items():
            setattr(self, name, nn.Parameter(torch.empty(shape, **factory)))
        self.windows = compact_geometry.full_windows(config)
        self._origin = geometry.map_origin(config)
        self._pooled = geometry.pooled_levels(config)
        self.reset_parameters()

    @staticmethod
    def shapes(config: SPProjectorConfig) -> Shapes:
        """Every parameter by name; pure arithmetic, nothing is allocated."""
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Uniform; see the module's docstring."""
        raise NotImplementedError

    def dense_weights(self) -> list[Tensor]:
        """The equal full extractor's packed weights ``[cells, C, D]``, spatial and then detail where there are such,
        in the parameters' dtype; differentiable."""
        raise NotImplementedError

    def _weights(self, suffix: str) -> list[Tensor]:
        """The spatial and the detail parameter of a name, those that there are."""
        parts = [("spatial", self.config.levels), ("detail", self.config.detail_kernels)]
        return [getattr(self, f"{part}_{suffix}") for part, present in parts if present]

    def _check_dtype(self, features: Tensor) -> None:
        """Against the parameters; where all are quantised, features of any type will do."""
        if (own := next(self.parameters(), None)) is not None:
            check_dtype(features, own)

    def _rows(self, features: Tensor, backend: str) -> Tensor:
        """``[B, R, channels]``: features and their pools, as geometry's windows read them."""
        self._check_dtype(features)
        config = self.config
        return pooled_rows(features, config.grid, self._origin, config.map_size, self._pooled, backend)

    def _narrowed(self, patch_features: Tensor) -> Tensor:
        """Through the shared 1x1 convolution, where there is one, to ``[B, N, rank]``."""
        self._check_dtype(patch_features)
        return patch_features if self.reduce_weight is None else F.linear(patch_features, self.reduce_weight)

    def _widened(self, weight: Tensor) -> Tensor:
        """A weight ``[cells, rank, D]`` with the shared 1x1 convolution multiplied in, ``[cells, C, D]``."""
        return weight if self.reduce_weight is None else self.reduce_weight.t() @ weight


def packed_shapes(config: SPProjectorConfig, spatial: tuple[int, ...], detail: tuple[int, ...], suffix: str) -> Shapes:
    """The two parameters of a name, without the one that nothing reads."""
    found = {f"spatial_{suffix}": spatial} if config.levels else {}
    return found | ({f"detail_{suffix}": detail} if config.detail_kernels else {})


def reduce_shape(config: SPProjectorConfig) -> Shapes:
    """The shared 1x1 convolution's, where there is one."""
    return {"reduce_weight": (config.rank, config.vision_width)} if narrows(config) else {}


def uniform_(weight: Tensor, variance: float) -> None:
    """Fills in place, around 0."""
    bound = math.sqrt(3 * variance)
    nn.init.uniform_(weight, -bound, bound)


def by_weight(windows: Sequence[Window], dense: Sequence[Tensor]) -> list[Tensor]:
    """Dense kernels ``[cells, C, D]`` of the windows as packed weights."""
    packed: dict[int, list[Tensor]] = {}
    for w, kernel in zip(windows, dense, strict=True):
        packed.setdefault(w.weight, []).append(kernel)
    return [torch.cat(kernels) for kernels in packed.values()]


def region_of(rows: Tensor, w: Window, config: SPProjectorConfig) -> Tensor:
    """What a window's outputs read together, a view ``[B, height, width, channels]`` of the patches or a pooled map."""
    height, width = compact_geometry.extent(w)
    if w.origin >= config.patch_tokens:
        return rows[:, w.origin : w.origin + height * width].unflatten(1, (height, width))
    top, left = divmod(w.origin, config.grid)
    patch_map = rows[:, : config.patch_tokens].unflatten(1, (config.grid, config.grid))
    return patch_map[:, top : top + height, left : left + width]
