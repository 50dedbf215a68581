"""The spatial task's questions answered again, slowly, from the pixels of a PNG file and nothing else.

Things are connected regions of strong colour; their shape is told by how they fill their box. It shares no code with what
draws and asks. What could be answered in two ways is an AssertionError.
"""

import colorsys
import re
from collections import deque
from typing import NamedTuple

import numpy as np
from PIL import Image

HUES = {"red": 0, "yellow": 54, "green": 125, "cyan": 184, "blue": 233, "purple": 287}
ROWS, COLUMNS = ("top ", "", "bottom "), ("left", "", "right")
KIND = re.compile(rf"({'|'.join(HUES)}) (circle|square|triangle|cross)")


class Region(NamedTuple):
    colour: str
    shape: str
    left: int
    top: int
    right: int
    bottom: int
    pixels: frozenset  # of (y, x)

    @property
    def centre(self):
        return (self.left + self.right) / 2, (self.top + self.bottom) / 2


def regions(path):
    """``[n]`` Regions of an image, and its size."""
    with Image.open(path) as image:
        assert image.mode == "RGB"
        assert image.width == image.height
        pixels = np.asarray(image).astype(int)
    strong = np.ptp(pixels, -1) > 70
    left = set(map(tuple, np.argwhere(strong).tolist()))
    found = []
    while left:
        found.append(_region(pixels, _flood(left)))
    return found, len(pixels)


def _flood(left):
    """Takes one connected region (corners count) out of a set of pixels."""
    start = left.pop()
    region, border = {start}, deque([start])
    while border:
        y, x = border.popleft()
        near = {at for i in (-1, 0, 1) for j in (-1, 0, 1) if (at := (y + i, x + j)) in left}
        left -= near
        region |= near
        border.extend(near)
    return frozenset(region)


def _region(pixels, region):
    ys, xs = np.array(sorted(region)).T
    top, left, bottom, right = int(ys.min()), int(xs.min()), int(ys.max()) + 1, int(xs.max()) + 1
    colours = {_colour(*pixel) for pixel in set(map(tuple, pixels[ys, xs].tolist()))}
    assert len(colours) == 1, f"a region of {colours}: two things have grown together"
    assert right - left == bottom - top
    mask = np.zeros((bottom - top, right - left), bool)
    mask[ys - top, xs - left] = True
    return Region(colours.pop(), _shape(mask), left, top, right, bottom, region)


def _colour(red, green, blue):
    hue = 360 * colorsys.rgb_to_hsv(red / 255, green / 255, blue / 255)[0]
    away = {name: min(abs(hue - other), 360 - abs(hue - other)) for name, other in HUES.items()}
    name = min(away, key=away.get)
    assert away[name] < 20, f"hue {hue} is like none"
    return name


def _shape(mask):
    if mask.all():
        return "square"
    if mask[-1].all() and not mask[0].all():
        return "triangle"
    return "cross" if mask.mean() < 0.6 else "circle"


def answer(kind, text, things, size):
    """A question's answer; of the box, its edges in pixels."""
    return ANSWERS[kind](text, things, size)


def only(things, colour, shape):
    (found,) = [thing for thing in things if (thing.colour, thing.shape) == (colour, shape)]
    return found


def place_of(thing, size):
    column, row = (_third(value, size) for value in thing.centre)
    return (ROWS[row] + COLUMNS[column]).strip() or "centre"


def _third(value, size):
    borders = (size / 3, 2 * size / 3)
    assert all(abs(value - border) >= size / 100 for border in borders), "too near to the next third"
    return sum(value > border for border in borders)


def position(text, things, size):
    ((colour, shape),) = KIND.findall(text)
    return place_of(only(things, colour, shape), size)


def relation(text, things, size):
    first, second = (only(things, *kind) for kind in KIND.findall(text))
    if not text.startswith("Where"):
        first, second = second, first
    across, down = (a - b for a, b in zip(first.centre, second.centre, strict=True))
    assert max(abs(across), abs(down)) >= 2 * min(abs(across), abs(down)), "between two sides"
    sides = {
        "left": first.right <= second.left,
        "right": first.left >= second.right,
        "above": first.bottom <= second.top,
        "below": first.top >= second.bottom,
    }
    names = ("left", "right") if abs(across) > abs(down) else ("above", "below")
    (side,) = [name for name in names if sides[name]]
    return side


def side(text, things, size):
    """Of the middle of all things' boxes."""
    weights = [(t.right - t.left) * (t.bottom - t.top) for t in things]
    across, down = (
        sum(w * t.centre[axis] for w, t in zip(weights, things, strict=True)) / sum(weights) - size / 2
        for axis in (0, 1)
    )
    assert max(abs(across), abs(down)) >= size / 32, "towards no side"
    assert max(abs(across), abs(down)) >= 2 * min(abs(across), abs(down)), "between two sides"
    sides = {"left": -across, "right": across, "top": -down, "bottom": down}
    return max(sides, key=sides.get)


def counted(text):
    """Colour and shape of what is counted, None for any."""
    colour, plural = re.search(rf"(?:({'|'.join(HUES)}) )?(circles|squares|triangles|crosses|shapes)\b", text).groups()
    return colour, {"shapes": None, "crosses": "cross"}.get(plural, plural[:-1])


def count(text, things, size):
    colour, shape = counted(text)
    if colour and shape:  # others have one of the two
        assert any(thing.colour == colour and thing.shape != shape for thing in things)
        assert any(thing.colour != colour and thing.shape == shape for thing in things)
    return str(sum(colour in (None, thing.colour) and shape in (None, thing.shape) for thing in things))


def coloured(text, things, size):
    """Of the three things that have pixels in the third that is named, the one whose shape is; they are unlike."""
    row, _, column = re.search(r"at the (top|bottom)?( ?)(left|right|centre)?", text).groups()
    rows = {"top": 0, "bottom": 2}.get(row, 1)
    columns = {"left": 0, "right": 2}.get(column, 1)
    inside = [
        t for t in things if any(int(3 * y // size) == rows and int(3 * x // size) == columns for y, x in t.pixels)
    ]
    assert len({t.colour for t in inside}) == len({t.shape for t in inside}) == len(inside) == 3
    assert {place_of(thing, size) for thing in inside} == {(ROWS[rows] + COLUMNS[columns]).strip() or "centre"}
    (found,) = [thing for thing in inside if thing.shape in text]
    return found


def colour(text, things, size):
    return coloured(text, things, size).colour


def presence(text, things, size):
    ((colour, shape),) = KIND.findall(text)
    # Whether or not it is there, its colour is and its shape is, on other things.
    assert any(thing.colour == colour and thing.shape != shape for thing in things)
    assert any(thing.colour != colour and thing.shape == shape for thing in things)
    return "yes" if any((thing.colour, thing.shape) == (colour, shape) for thing in things) else "no"


def box(text, things, size):
    ((colour, shape),) = KIND.findall(text)
    thing = only(things, colour, shape)
    return thing.left, thing.top, thing.right, thing.bottom


ANSWERS = {
    "position": position,
    "relation": relation,
    "side": side,
    "count": count,
    "colour": colour,
    "presence": presence,
    "box": box,
}
