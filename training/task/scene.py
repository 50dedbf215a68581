"""Which things an image of the spatial task shows, and where, so that each question has the answer it should have.

The answers are decided first, in turn, which balances them exactly. An image can be asked a question of each type,
about different things: no question's words tell another's answer. Whatever a question names is drawn independently of
its answer, so that the words alone tell nothing:

- count: of a colour, a shape, or both, where others have one of the two;
- presence: two kinds are drawn alike, and one of them is put into the image. Others have the colour and the shape of
  either (POPE's adversarial negatives);
- position, relation, box: kinds that only one thing has;
- side: the one that all things together lie towards;
- colour: of a shape in a third of the image that has three small things, of different shapes and colours, and no pixel
  of more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

from sp_fast.training.task.places import Box, apart, fullest_side, reaches, side_of, starts
from sp_fast.training.task.words import ANSWERS, COLOURS, PLACES, PRESENCE, SHAPES, Kind

_KINDS = tuple(Kind(colour, shape) for colour in COLOURS for shape in SHAPES)
_COUNTED = (tuple(Kind(colour, None) for colour in COLOURS), tuple(Kind(None, shape) for shape in SHAPES), _KINDS)
#: Smallest and largest extent of things as shares of the image, and how many of ten are so: the small ones have about a
#: patch and a half a side at 12x12 patches, three at 24x24.
_EXTENTS, _OF_TEN = ((10 / 96, 13 / 96), (14 / 96, 18 / 96), (19 / 96, 24 / 96)), (4, 4, 2)
_GAP = 2  # pixels between things, so that they never grow together
_TRIES = 300  # places that are tried for a thing before the scene is given up
_MOST_EXTRA = 3  # things beyond those in question, so that their total says nothing about how many are counted
_CAPTIONED = (2, 5)  # fewest and most things of a caption


@dataclass(frozen=True)
class Thing:
    """A shape: its left and top pixel, and its extent in pixels, the same across and down."""

    kind: Kind
    x: int
    y: int
    extent: int

    @property
    def box(self) -> Box:
        """Tight."""
        return self.x, self.y, self.x + self.extent, self.y + self.extent


@dataclass(frozen=True)
class Scene:
    """Things in the order they are drawn, and what the questions are about."""

    things: tuple[Thing, ...]
    located: Thing
    first: Thing  # whose side is asked for,
    second: Thing  # as seen from this one
    boxed: Thing
    coloured: Thing
    coloured_at: str
    counted: Kind
    asked: dict[str, Kind]  # by the answer: one that is there, and one that is not


class _Cast(NamedTuple):
    """Kinds that an image shows, by what they are there for."""

    unique: tuple[Kind, ...]  # located, first, second, boxed
    coloured: Kind
    beside: tuple[Kind, Kind]  # the others in its third
    counted: Kind
    asked: dict[str, Kind]
    others: list[Kind]


class _Crowded(Exception):
    """There was no place for a thing, or no kind of thing was left for one."""


def goals(seed: int, split: str, index: int) -> dict[str, str]:
    """By type, the answer that an image's question has; every run of as many images as answers has each once. (Where
    presence is asked twice, there is a question for either answer.)"""
    found = {}
    for kind, answers in ANSWERS.items():
        block, place = divmod(index, len(answers))
        found[kind] = Random(f"{seed}/{split}/{kind}/{block}").sample(answers, len(answers))[place]
    return found


def compose(rng: Random, goals: Mapping[str, str], size: int) -> Scene:
    """A scene whose questions have these answers, in an image of ``size`` pixels a side."""
    while True:
        try:
            scene = _place(rng, _cast(rng, goals), goals, size)
        except _Crowded:
            continue
        if fullest_side((thing.box for thing in scene.things), size) == goals["side"]:
            return scene


def compose_caption(rng: Random, size: int) -> list[tuple[Thing, str]]:
    """A few things in different thirds of the image, in reading order, each with its place."""
    while True:
        board = _Board(rng, size)
        places = sorted(rng.sample(PLACES, rng.randint(*_CAPTIONED)), key=PLACES.index)
        try:
            return [(board.put(rng.choice(_KINDS), place=p), p) for p in places]
        except _Crowded:
            continue


def compose_crowd(rng: Random, size: int, most: int) -> list[Thing]:
    """Things of any kind anywhere, up to so many."""
    board = _Board(rng, size)
    with suppress(_Crowded):
        for _ in range(most):
            board.put(rng.choice(_KINDS))
    return board.things


def _cast(rng: Random, goals: Mapping[str, str]) -> _Cast:
    counted = rng.choice(rng.choice(_COUNTED))
    there, absent = rng.sample([kind for kind in _KINDS if not counted.covers(kind)], 2)
    asked = {PRESENCE[True]: there, PRESENCE[False]: absent}
    free = [kind for kind in _KINDS if not counted.covers(kind) and kind not in (there, absent)]
    while True:
        unique = rng.sample(free, 4)
        fits = [k for k in _KINDS if k.colour == goals["colour"] and k not in (there, absent, *unique)]
        to_resemble = [there, absent] if None in counted else [there, absent, counted]
        if fits and all(_resembled(kind, unique) for kind in to_resemble):
            break
    coloured = rng.choice(fits)  # may be one of the counted: what is counted does not say what colour it has not
    to_count = [kind for kind in _KINDS if counted.covers(kind)]
    fillers = [kind for kind in free if kind not in unique]
    beside: list[Kind] = []
    for _ in range(2):
        unlike = [kind for kind in fillers if not any(set(kind) & set(other) for other in (coloured, *beside))]
        if not unlike:
            raise _Crowded
        beside.append(rng.choice(unlike))
    others = [there]
    others += [rng.choice(to_count) for _ in range(int(goals["count"]) - counted.covers(coloured))]
    others += [rng.choice(fillers) for _ in range(rng.randint(0, _MOST_EXTRA))]
    return _Cast(tuple(unique), coloured, tuple(beside), counted, asked, others)


def _resembled(kind: Kind, others: Sequence[Kind]) -> bool:
    """Whether some have its colour and some its shape."""
    return kind.colour in {other.colour for other in others} and kind.shape in {other.shape for other in others}


def _place(rng: Random, cast: _Cast, goals: Mapping[str, str], size: int) -> Scene:
    board = _Board(rng, size)
    place = rng.choice([place for place in PLACES if place != goals["position"]])
    coloured, *_ = [board.put(kind, place=place, small=True) for kind in (cast.coloured, *cast.beside)]
    board.keep_free(place)
    located = board.put(cast.unique[0], place=goals["position"])
    first = board.put(cast.unique[1])
    second = board.put(cast.unique[2], lambda box: side_of(first.box, box) == goals["relation"])
    boxed = board.put(cast.unique[3])
    for kind in cast.others:
        board.put(kind)
    return Scene(tuple(board.things), located, first, second, boxed, coloured, place, cast.counted, cast.asked)


class _Board:
    """An image that fills up."""

    def __init__(self, rng: Random, size: int) -> None:
        self._rng, self._size = rng, size
        self._free: str | None = None
        self.things: list[Thing] = []

    def keep_free(self, place: str) -> None:
        """Nothing more reaches into this third."""
        self._free = place

    def put(
        self,
        kind: Kind,
        fits: Callable[[Box], bool] = lambda box: True,
        place: str | None = None,
        small: bool = False,
    ) -> Thing:
        """A thing of any extent, or a small one, where it fits, with its centre inside of a third, if one is named.
        Raises _Crowded where no place is found."""
        least, most = _EXTENTS[0] if small else self._rng.choices(_EXTENTS, _OF_TEN)[0]
        extent = self._rng.randint(round(least * self._size), round(most * self._size))
        last = self._size - extent - 1  # a pixel of background stays around everything
        across, down = (1, last), (1, last)
        if place is not None:
            across, down = starts(place, extent, self._size)
        for _ in range(_TRIES):
            thing = Thing(kind, self._rng.randint(*across), self._rng.randint(*down), extent)
            kept = self._free is not None and reaches(thing.box, self._free, self._size)
            if not kept and fits(thing.box) and all(apart(thing.box, other.box, _GAP) for other in self.things):
                self.things.append(thing)
                return thing
        raise _Crowded
