"""Geometry of the compact extractors: geometry.py's windows in the pieces that each kind multiplies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from sp_fast import geometry
from sp_fast.compact_config import narrows
from sp_fast.config import SPProjectorConfig
from sp_fast.kernels.window import Window


def full_windows(config: SPProjectorConfig) -> list[Window]:
    """Those of the full extractor: one a spatial token, then one a detail convolution."""
    return [*geometry.spatial_windows(config), *geometry.detail_windows(config)]


def row_count(config: SPProjectorConfig) -> int:
    """Rows of an image: patches, and the pooled maps' cells."""
    return config.patch_tokens + sum(side * side for side in geometry.pooled_levels(config))


def extent(w: Window) -> tuple[int, int]:
    """Rows and columns of the map that all outputs of a window read together."""
    return (w.out_height - 1) * w.step + w.height, (w.out_width - 1) * w.step + w.width


def grouped_windows(config: SPProjectorConfig) -> list[Window]:
    """Every window once a group; rows and cells of a group follow those of the one before."""
    windows, rows = full_windows(config), row_count(config)
    cells = [sum(w.cells for w in windows if w.weight == i) for i in range(2)]
    return [
        replace(w, origin=w.origin + group * rows, cell=w.cell + group * cells[w.weight])
        for group in range(config.groups)
        for w in windows
    ]


def separable_windows(config: SPProjectorConfig) -> tuple[list[Window], list[Window]]:
    """The pass across and the pass down, which reads what the first gave.

    One window a column of outputs: the pass across gives a row each for every row of the map, one under the other, so
    that the pass down reads neighbours. The outputs of a detail come column by column.
    """
    across: list[Window] = []
    down: list[Window] = []
    cells, middle = {0: (0, 0), 1: (0, 0)}, 0
    for w in full_windows(config):
        first, second = cells[w.weight]
        rows, _ = extent(w)
        for column in range(w.out_width):
            origin = w.origin + column * w.step
            across.append(Window(w.weight, first, origin, w.width, 1, w.row_stride, 1, rows, 1))
            down.append(Window(w.weight, second, middle, w.height, 1, rows, w.out_height, 1, w.step))
            middle += rows
        cells[w.weight] = (first + w.width, second + w.height)
    return across, down


@dataclass(frozen=True)
class Rectangle:
    """A part of a ring of the nest: its first cell in the packed weight, and where it lies in the ring's square."""

    cell: int
    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True)
class Ring:
    """What a level adds around the one inside it, and how large both are together."""

    height: int
    width: int
    parts: tuple[Rectangle, ...]


def rings(config: SPProjectorConfig) -> list[Ring]:
    """The nest from the centre outwards: a square, then up to four rectangles a level, top, bottom, left, right.

    Squares share the centre ``side // 2``, as crops do, so that crops meet a cell at the same patch.
    """
    found: list[Ring] = []
    inner, cell = 0, 0
    for height, width in dict.fromkeys(config.levels):
        before = height // 2 - inner // 2
        after = height - inner - before
        parts = [(0, 0, height, width)]
        if found:
            parts = [
                (0, 0, before, width), (height - after, 0, after, width),
                (before, 0, inner, before), (before, width - after, inner, after),
            ]  # fmt: skip
        ring = []
        for top, left, rows, columns in parts:
            if rows and columns:
                ring.append(Rectangle(cell, top, left, rows, columns))
                cell += rows * columns
        found.append(Ring(height, width, tuple(ring)))
        inner = height
    return found


def nest_order(config: SPProjectorConfig, height: int, width: int) -> list[int]:
    """For each cell of the nest's centre of that size, in row-major order, its place in the packed weight."""
    order = [0] * (height * width)
    for ring in _inside(rings(config), height):
        for part in ring.parts:
            for i in range(part.height * part.width):
                down, right = divmod(i, part.width)
                row, column = (
                    height // 2 - ring.height // 2 + part.top + down,
                    width // 2 - ring.width // 2 + part.left + right,
                )
                order[row * width + column] = part.cell + i
    return order


def nested_windows(config: SPProjectorConfig) -> tuple[list[Window], list[int]]:
    """A window for every piece of the nest that something reads, and how many belong together.

    Crops read each ring once, in the largest: the n-th token is the sum of n groups. Else every token is a group of
    its own, as its map or window is. Then come the details.
    """
    nest, spatial = rings(config), geometry.spatial_windows(config)
    if config.pyramid == "crop":
        groups = [_pieces(spatial[-1], [ring]) for ring in nest]
    else:
        groups = [_pieces(w, _inside(nest, w.height)) for w in spatial]
    groups += [_pieces(w, _inside(nest, w.height)) for w in geometry.detail_windows(config)]
    return [piece for group in groups for piece in group], [len(group) for group in groups]


def _inside(nest: Sequence[Ring], height: int) -> list[Ring]:
    return [ring for ring in nest if ring.height <= height]


def _pieces(w: Window, nest: Sequence[Ring]) -> list[Window]:
    """The window cut along the rings that are named."""
    pieces = []
    for ring in nest:
        above, beside = w.height // 2 - ring.height // 2, w.width // 2 - ring.width // 2
        for part in ring.parts:
            origin = w.origin + (above + part.top) * w.row_stride + beside + part.left
            shape = {"width": part.width, "height": part.height}
            pieces.append(replace(w, weight=0, cell=part.cell, origin=origin, **shape))
    return pieces


def pointwise_windows(config: SPProjectorConfig) -> list[Window]:
    """One cell for each output of the full windows, outputs one after the other."""
    windows: list[Window] = []
    cells, row = [0, 0], 0
    for w in full_windows(config):
        windows.append(Window(w.weight, cells[w.weight], row, 1, 1, w.outputs, w.outputs, 1, 1))
        cells[w.weight] += 1
        row += w.outputs
    return windows


def resampled_windows(config: SPProjectorConfig) -> list[Window]:
    """All levels meet one kernel, the outputs of a detail one of its own; regions follow each other."""
    windows: list[Window] = []
    area, levels, row = config.base_kernel**2, len(config.levels), 0
    if levels:
        windows.append(Window(0, 0, 0, area, 1, area, levels, 1, area))
        row = levels * area
    for detail, w in enumerate(geometry.detail_windows(config)):
        windows.append(Window(w.weight, detail * area, row, area, 1, area, w.outputs, 1, area))
        row += w.outputs * area
    return windows


@dataclass(frozen=True)
class CompactProduct:
    """A product ``[rows, depth] @ [depth, width]`` of one image; ``first`` where it reads the patch features, whose
    gradient nothing trained needs."""

    rows: int
    depth: int
    width: int
    first: bool

    @property
    def multiply_adds(self) -> int:
        """Of the forward."""
        return self.rows * self.depth * self.width


def compact_products(config: SPProjectorConfig) -> list[CompactProduct]:
    """All products of a compact extractor, averages not counted."""
    c, d, narrow = config.vision_width, config.spatial_width, narrows(config)
    found = [CompactProduct(config.patch_tokens, c, config.rank, True)] if narrow else []
    for windows, depth, width, first in _steps(config, config.rank if narrow else c, d):
        found += [CompactProduct(w.outputs, w.cells * depth, width, first and not narrow) for w in windows]
    return found


def _steps(config: SPProjectorConfig, c: int, d: int) -> list[tuple[list[Window], int, int, bool]]:
    """Windows that are multiplied, by what of their channels, to what, and whether it comes first."""
    full = full_windows(config)

    def passes() -> list[tuple[list[Window], int, int, bool]]:
        across, down = separable_windows(config)
        return [(across, c, config.rank, True), (down, config.rank, d, False)]

    return {
        "separable": passes,
        "depthwise": lambda: [(full, 1, c, True), (pointwise_windows(config), c, d, False)],
        "grouped": lambda: [(full, c // config.groups, d, True)],
        "nested": lambda: [(nested_windows(config)[0], c, d, True)],
        "resampled": lambda: [(resampled_windows(config), c, d, True)],
        "bottleneck": lambda: [(full, c, d, True)],
    }[config.extractor]()
