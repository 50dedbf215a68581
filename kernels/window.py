"""A window: where one product of the windowed matmul reads its rows, and which weight cells it meets.

This is the only description of geometry that an op receives. Every convolution of LLaVA-SP is a list of windows:

    out[b, o, :] = sum_q rows[b, source(o, q), :] @ weights[w.weight][w.cell + q]
    source(o, q) = origin(o) + (q // width) * row_stride + q % width
    origin(o)    = w.origin + ((o // out_width) * row_stride + o % out_width) * step

Along a window row the cells are neighbours both in ``rows`` and in the weight, so K is contiguous there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass


@dataclass(frozen=True)
class Window:
    """One product. All lengths count rows (cells) of a row-major map, never bytes or elements."""

    weight: int  # which packed weight of the op's list
    cell: int  # first cell in that weight
    origin: int  # row of the first cell, for output 0
    width: int  # cells in a window row
    height: int  # window rows
    row_stride: int  # rows from a cell to the one below it
    out_width: int  # outputs side by side (1 for a full-cover convolution)
    out_height: int  # outputs one above the other
    step: int  # cells between neighbouring outputs, both ways (the convolution's stride)

    @property
    def cells(self) -> int:
        return self.width * self.height

    @property
    def outputs(self) -> int:
        return self.out_width * self.out_height

    def source(self, output: int, q: int) -> int:
        """Row of ``rows`` that cell ``q`` of output ``output`` reads."""
        above, beside = divmod(output, self.out_width)
        down, right = divmod(q, self.width)
        return self.origin + (above * self.step + down) * self.row_stride + beside * self.step + right

    @property
    def last_source(self) -> int:
        """The largest row that the window reads."""
        return self.source(self.outputs - 1, self.cells - 1)


FIELDS = 9


def encode_windows(windows: Iterable[Window]) -> list[int]:
    """Flattens windows to the integers that a registered op can take."""
    return [value for window in windows for value in astuple(window)]


def decode_windows(values: Sequence[int]) -> list[Window]:
    """The inverse of ``encode_windows``."""
    if len(values) % FIELDS:
        raise ValueError(f"a window has {FIELDS} integers, so {len(values)} of them are no list of windows")
    return [Window(*values[i : i + FIELDS]) for i in range(0, len(values), FIELDS)]
