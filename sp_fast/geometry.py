"""Geometry: a configuration becomes windows on the rows that an op reads.

``rows`` are the patch features in row-major order, ``grid * grid`` of them, followed, where the pyramid is "pool", by
the pooled maps in level order (``pooled_levels``). A crop is another origin on the same rows: nothing is copied.
"""

from __future__ import annotations

from sp_fast.config import SPProjectorConfig
from sp_fast.kernels.window import Window


def crop_start(grid: int, size: int) -> int:
    """First row and column of the centred crop: official ``c - size // 2`` with ``c = int(grid / 2)``, half-open.

    On an odd grid an even crop therefore lies half a patch up and to the left of the true centre.
    """
    return grid // 2 - size // 2


def map_origin(config: SPProjectorConfig) -> int:
    """Row of ``rows`` where the centred square of side ``config.map_size`` begins."""
    return crop_start(config.grid, config.map_size) * (config.grid + 1)


def pooled_levels(config: SPProjectorConfig) -> tuple[int, ...]:
    """Sides of the maps that adaptive pooling makes."""
    return tuple(k for level, k in enumerate(config.kernel_sizes) if is_pooled(config, level))


def is_pooled(config: SPProjectorConfig, level: int) -> bool:
    """True where the level reads pooled rows; a pool as large as the map would change nothing, and is none."""
    return config.pyramid == "pool" and config.kernel_sizes[level] != config.map_size


def pooling_bins(size: int, bins: int) -> list[tuple[int, int]]:
    """Half-open bins of adaptive average pooling from ``size`` to ``bins`` along one axis; they overlap where
    ``size % bins`` is not 0."""
    return [(i * size // bins, -(-(i + 1) * size // bins)) for i in range(bins)]


def spatial_cells(config: SPProjectorConfig) -> int:
    """Cells of the packed spatial weight."""
    return sum(height * width for height, width in config.levels)


def detail_cells(config: SPProjectorConfig) -> int:
    """Cells of the packed detail weight."""
    return sum(k * k for k in config.detail_kernels)


def spatial_windows(config: SPProjectorConfig) -> list[Window]:
    """One window a spatial token (paper, SFE): the convolution covers its whole crop, pooled map or sliding window."""
    windows: list[Window] = []
    cell, pooled = 0, config.patch_tokens
    for token, (height, width) in enumerate(config.levels):
        origin, row_stride = _level_origin(config, token, height, width), config.grid
        if is_pooled(config, token):
            origin, row_stride = pooled, width
            pooled += height * width
        windows.append(Window(0, cell, origin, width, height, row_stride, 1, 1, 1))
        cell += height * width
    return windows


def _level_origin(config: SPProjectorConfig, token: int, height: int, width: int) -> int:
    """Row of ``rows`` where the level's region of the patch map begins."""
    if config.pyramid == "crop":
        return crop_start(config.grid, height) * (config.grid + 1)
    if config.pyramid == "sliding":
        row, column = divmod(token, config.sliding_windows[1])
        return map_origin(config) + row * height * config.grid + column * width
    return map_origin(config)


def detail_windows(config: SPProjectorConfig) -> list[Window]:
    """One window a detail convolution (paper, DFI), its outputs in row-major order: strided, no padding.

    They meet the packed detail weight, which is the second where there are spatial convolutions too.
    """
    windows: list[Window] = []
    weight, cell = (1 if config.levels else 0), 0
    for kernel, side in zip(config.detail_kernels, config.detail_sides, strict=True):
        shape = (kernel, kernel, config.grid, side, side, config.detail_stride)
        windows.append(Window(weight, cell, map_origin(config), *shape))
        cell += kernel * kernel
    return windows
