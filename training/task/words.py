"""What the spatial task says: its words, phrasings and possible answers. Everything else is made of these."""

from __future__ import annotations

import re
from typing import NamedTuple

COLOURS = ("red", "yellow", "green", "cyan", "blue", "purple")
SHAPES = ("circle", "square", "triangle", "cross")
#: Thirds of the image, in reading order.
PLACES = ("top left", "top", "top right", "left", "centre", "right", "bottom left", "bottom", "bottom right")
PRESENCE = {True: "yes", False: "no"}
BOX = "box"
#: Of every type of question but boxes, what can be answered, each as often as the others.
ANSWERS = {
    "position": PLACES,
    "relation": ("left", "right", "above", "below"),
    "side": ("left", "right", "top", "bottom"),
    "count": ("1", "2", "3", "4", "5"),
    "colour": COLOURS,
    "presence": tuple(PRESENCE.values()),
}
TYPES = (*ANSWERS, BOX)
QUESTIONS = {
    "position": (
        "Where is the {kind}?",
        "Where in the image is the {kind}?",
        "In which part of the image is the {kind}?",
    ),
    "relation": (
        "Where is the {kind} relative to the {other}?",
        "On which side of the {other} is the {kind}?",
        "Seen from the {other}, where is the {kind}?",
    ),
    "side": (
        "Which side of the image is the fullest?",
        "Where is the image the fullest?",
        "Name the fullest side of the image.",
    ),
    "count": (
        "How many {kinds} are there?",
        "How many {kinds} are in the image?",
        "Count the {kinds}.",
    ),
    "colour": (
        "What colour is the {shape} at the {place}?",
        "Which colour has the {shape} at the {place} of the image?",
        "Name the colour of the {shape} at the {place}.",
    ),
    "presence": (
        "Is there a {kind}?",
        "Is there a {kind} in the image?",
        "Does the image have a {kind}?",
    ),
    BOX: (
        "Give the box of the {kind}.",
        "What is the box of the {kind}?",
        "Which box holds the {kind}?",
    ),
}
CAPTION_REQUESTS = ("Describe the image.", "What is in the image?", "Name the shapes and where they are.")
_PLURALS = {"circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses", None: "shapes"}
_CAPTION_PART = "a {kind} at the {place}"


class Kind(NamedTuple):
    """A colour and a shape; None stands for any, where kinds are counted."""

    colour: str | None
    shape: str | None

    def __str__(self) -> str:
        return f"{self.colour} {self.shape}"

    @property
    def plural(self) -> str:
        """Of one or both: "red shapes", "circles", "red circles"."""
        return " ".join(filter(None, (self.colour, _PLURALS[self.shape])))

    def covers(self, other: Kind) -> bool:
        """Whether another one is of this kind."""
        return self.colour in (None, other.colour) and self.shape in (None, other.shape)


def caption(parts: list[tuple[Kind, str]]) -> str:
    """Of kinds and their places: "a red circle at the top and a blue cross at the left"."""
    *before, last = (_CAPTION_PART.format(kind=kind, place=place) for kind, place in parts)
    return f"{', '.join(before)} and {last}" if before else last


def box_text(box: tuple[int, int, int, int], size: int) -> str:
    """As LLaVA writes boxes: left, top, right and bottom edge in shares of the image, ``[0.10, 0.25, 0.30, 0.45]``."""
    return f"[{', '.join(f'{edge / size:.2f}' for edge in box)}]"


def words_of(text: str) -> list[str]:
    """Words, single digits and marks, which a small tokenizer may take as its tokens; spaces are left out."""
    return re.findall(r"[^\W\d]+|\d|[^\w\s]", text)


def vocabulary() -> list[str]:
    """Every word that the task can say, sorted."""
    phrasings = [phrasing for some in QUESTIONS.values() for phrasing in some]
    frames = [re.sub(r"{\w+}", " ", text) for text in (*phrasings, *CAPTION_REQUESTS, _CAPTION_PART)]
    answers = [answer for some in ANSWERS.values() for answer in some]
    said = [*frames, *answers, *SHAPES, *_PLURALS.values(), "[0.,]", "0123456789"]
    return sorted({word for text in said for word in words_of(text)})


def phrases() -> list[str]:
    """What the task's sentences are put together from, spaces included: what stands between the blanks of a phrasing,
    and what fills them."""
    phrasings = [phrasing for some in QUESTIONS.values() for phrasing in some]
    frames = [part for text in (*phrasings, _CAPTION_PART) for part in re.split(r"{\w+}", text) if part]
    kinds = [Kind(colour, shape) for colour in (*COLOURS, None) for shape in (*SHAPES, None) if colour or shape]
    named = [*SHAPES, *(str(kind) for kind in kinds if None not in kind)]
    answers = [answer for some in ANSWERS.values() for answer in some]
    tenths = [f"{i / 10:.1f}" for i in range(11)]  # of a box's edges, each followed by one digit
    joints = [", ", " and ", "[", "]", "\n"]
    return sorted({*frames, *CAPTION_REQUESTS, *named, *(kind.plural for kind in kinds), *answers, *tenths, *joints})
