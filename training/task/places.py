"""Where things lie in an image of the spatial task: its thirds, and the sides of things. Units: pixels, y down."""

from __future__ import annotations

from collections.abc import Iterable
from math import ceil, floor

from sp_fast.training.task.words import PLACES

#: Left, top, right and bottom edge; right and bottom are the first pixel outside.
Box = tuple[int, int, int, int]
_CLEAR = 1 / 96  # share of the image by which a centre keeps away from the next third: a pixel of the smallest task
_STEEPNESS = 2  # so many times further along one axis than along the other is a side
_LEANING = 1 / 32  # share of the image by which things lie towards a side at least
_SIDES = {"left": "left", "right": "right", "above": "top", "below": "bottom"}


def third(place: str, size: int) -> tuple[float, float, float, float]:
    """The edges of a third."""
    row, column = divmod(PLACES.index(place), 3)
    return column * size / 3, row * size / 3, (column + 1) * size / 3, (row + 1) * size / 3


def starts(place: str, extent: int, size: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """First and last left edge, and first and last top edge, of a thing of this extent whose centre is inside of a
    third, with a pixel of the image around it."""
    left, top, right, bottom = third(place, size)
    clear, half = _CLEAR * size, extent / 2
    return tuple(
        (max(1, ceil(first + clear - half)), min(size - extent - 1, floor(last - clear - half)))
        for first, last in ((left, right), (top, bottom))
    )


def reaches(box: Box, place: str, size: int) -> bool:
    """Whether a box has a pixel in a third."""
    left, top, right, bottom = third(place, size)
    return box[0] < right and box[2] > left and box[1] < bottom and box[3] > top


def apart(box: Box, other: Box, gap: int) -> bool:
    """Whether there are at least ``gap`` pixels between two boxes, along a row or a column."""
    return box[2] + gap <= other[0] or other[2] + gap <= box[0] or box[3] + gap <= other[1] or other[3] + gap <= box[1]


def side_of(box: Box, other: Box) -> str | None:
    """On which side of another box a box is; None where it could be called another side too. Both are squares that
    have nothing in common: what is far enough along an axis is then beyond the other's edge."""
    (x, y), (other_x, other_y) = _centre(box), _centre(other)
    return _direction(x - other_x, y - other_y)


def fullest_side(boxes: Iterable[Box], size: int) -> str | None:
    """The side of the image that boxes lie towards on average, each weighing what its area is; None where it is not
    clear."""
    weighed = [
        ((right - left) * (bottom - top), _centre((left, top, right, bottom))) for left, top, right, bottom in boxes
    ]
    total = sum(weight for weight, _ in weighed)
    across, down = (sum(weight * centre[axis] for weight, centre in weighed) / total - size / 2 for axis in (0, 1))
    if max(abs(across), abs(down)) < _LEANING * size:
        return None
    return _SIDES.get(_direction(across, down))


def _direction(across: float, down: float) -> str | None:
    """Where so many pixels lead; None where it could be called another way too."""
    if abs(across) >= _STEEPNESS * abs(down):
        return "left" if across < 0 else "right"
    if abs(down) >= _STEEPNESS * abs(across):
        return "above" if down < 0 else "below"
    return None


def _centre(box: Box) -> tuple[float, float]:
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
