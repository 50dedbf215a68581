"""Scores of the spatial task, and what guessing would score."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import NamedTuple

import numpy as np

from sp_fast.errors import DataError
from sp_fast.training.task.words import ANSWERS, BOX, TYPES

_IOU = 0.5  # from which a box counts as found, as for RefCOCO
_STEP = 0.02  # between the constant boxes that are tried
_MARKS = ".,;:!?\"'()[]"


class Said(NamedTuple):
    """What was expected of a question of this type about an image (a name), and what a model said."""

    type: str
    image: str
    expected: str
    said: str


class Chance(NamedTuple):
    """Shares from 0 to 1 that need no image: of ``uniform`` guesses among the possible answers (None for boxes, which
    are not a few), and of the best ``constant`` answer."""

    uniform: float | None
    constant: float


class Accuracy(NamedTuple):
    """Of ``n`` questions, or pairs of them: the share that was answered rightly, and what guessing would have had."""

    accuracy: float
    chance: Chance
    n: int


def score(type: str, expected: str, said: str) -> float:
    """1.0 for a right answer, else 0.0.

    Words are compared whole, without capitals, marks around them and repeated spaces: "Top  left." is "top left", "it
    is left" is not "left". A box is right if its IoU with the expected one is at least 0.5; what is said must hold
    exactly four numbers, left < right and top < bottom.

    Raises:
        DataError: no such type, or an expected box that is none.
    """
    if type not in TYPES:
        raise DataError(f"{type!r} is no type of question: it can be {', '.join(TYPES)}")
    if type != BOX:
        return float(_plain(expected) == _plain(said))
    found = _box(said)
    return float(found is not None and iou(read_box(expected), found) >= _IOU)


def chance(type: str, expected: Sequence[Sequence[str]]) -> Chance:
    """What guessing scores on questions of a type, which count as one where they stand together.

    The best constant box is searched among squares of the extents that are expected, in steps of 0.02 of the image: the
    task's boxes are squares.

    Args:
        expected: for each image, at least one, the answers to its questions; to one, for boxes.

    Raises:
        DataError: as ``score``, or two boxes of an image.
    """
    if type == BOX:
        if together := next((some for some in expected if len(some) != 1), None):
            raise DataError(f"the boxes {', '.join(together)} are of one image: ask for one box of each")
        return Chance(None, _best_constant_box(np.array([read_box(text) for (text,) in expected])))
    if type not in ANSWERS:
        raise DataError(f"{type!r} is no type of question: it can be {', '.join(TYPES)}")
    uniform = fmean(len(ANSWERS[type]) ** -len(some) for some in expected)
    alike = Counter(answers.pop() for some in expected if len(answers := set(map(_plain, some))) == 1)
    return Chance(uniform, max(alike.values(), default=0) / len(expected))


def summary(rows: Iterable[Said]) -> dict[str, Accuracy]:
    """By type, in the order of ``words.TYPES``; a type that was not asked is left out.

    Questions of a type about the same image count as one, which is right where all of them are.

    Raises:
        DataError: as ``score`` and ``chance``.
    """
    by_image: dict[str, dict[str, list[tuple[str, float]]]] = {kind: {} for kind in TYPES}
    for row in rows:
        scored = row.expected, score(row.type, row.expected, row.said)
        by_image[row.type].setdefault(row.image, []).append(scored)
    return {kind: _accuracy(kind, list(images.values())) for kind, images in by_image.items() if images}


def _accuracy(type: str, images: list[list[tuple[str, float]]]) -> Accuracy:
    right = sum(all(scored for _, scored in image) for image in images)
    expected = [[answer for answer, _ in image] for image in images]
    return Accuracy(right / len(images), chance(type, expected), len(images))


def iou(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """``[..., 4]`` left, top, right, bottom, broadcast: the shared area over the area of both together."""
    low, high = np.maximum(boxes[..., :2], others[..., :2]), np.minimum(boxes[..., 2:], others[..., 2:])
    shared = (high - low).clip(0).prod(-1)
    areas = [(some[..., 2:] - some[..., :2]).prod(-1) for some in (boxes, others)]
    return shared / (areas[0] + areas[1] - shared)


def read_box(text: str) -> np.ndarray:
    """``[4]`` float64 of an expected box. Raises DataError where it is none."""
    box = _box(text)
    if box is None:
        raise DataError(f"the expected box {text!r} is none: give four numbers, left, top, right, bottom")
    return box


def _plain(text: str) -> str:
    return " ".join(word.strip(_MARKS) for word in text.casefold().split())


def _box(text: str) -> np.ndarray | None:
    """``[4]`` float64, or None."""
    numbers = re.findall(r"-?\d+(?:\.\d+)?", text)
    if len(numbers) != 4:
        return None
    box = np.array(numbers, dtype=float)
    return box if box[0] < box[2] and box[1] < box[3] else None


def _best_constant_box(boxes: np.ndarray) -> float:
    """Of ``[n, 4]`` boxes, the largest share that one square finds."""
    best = 0
    for extent in np.unique((boxes[:, 2:] - boxes[:, :2]).round(2)):
        corners = np.arange(0, 1 - extent + 1e-9, _STEP)
        for left in corners:
            squares = np.stack(np.broadcast_arrays(left, corners, left + extent, corners + extent), -1)
            near = boxes[abs(boxes[:, 0] - left) < extent]  # the others' IoU is below one half
            found = iou(squares[:, None], near) >= _IOU
            best = max(best, int(found.sum(1).max(initial=0)))
    return best / len(boxes)
