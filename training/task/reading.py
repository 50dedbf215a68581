"""Scenes that nobody draws, and questions about them, from which the spatial task's language model learns to answer.

They are none of the data's: one thing at most in each third of an image.
"""

from __future__ import annotations

from random import Random

from sp_fast.training.task.places import side_of, third
from sp_fast.training.task.words import (
    CAPTION_REQUESTS,
    COLOURS,
    PLACES,
    PRESENCE,
    QUESTIONS,
    SHAPES,
    Kind,
    caption,
)

_KINDS = tuple(Kind(colour, shape) for colour in COLOURS for shape in SHAPES)
_MOST_COUNTED = 5


#: Kinds of things by their places.
Scene = dict[str, Kind]


def make_scene(rng: Random) -> Scene:
    """One to nine things, in any order."""
    places = rng.sample(PLACES, rng.randint(1, len(PLACES)))
    return dict(zip(places, rng.choices(_KINDS, k=len(places)), strict=True))


def questions(rng: Random, scene: Scene, count: int) -> list[tuple[str, str]]:
    """Up to so many questions with their answers: fewer where one comes up that the scene does not answer."""
    asked = (rng.choice(_ASKING)(rng, scene) for _ in range(count))
    return [found for found in asked if found]


def _position(rng: Random, scene: Scene) -> tuple[str, str] | None:
    place, kind = rng.choice(list(scene.items()))
    if list(scene.values()).count(kind) > 1:
        return None
    return rng.choice(QUESTIONS["position"]).format(kind=kind), place


def _relation(rng: Random, scene: Scene) -> tuple[str, str] | None:
    kinds = list(scene.values())
    if len(kinds) < 2:
        return None
    first, second = rng.sample(list(scene), 2)
    side = side_of(third(first, 1), third(second, 1))
    if side is None or kinds.count(scene[first]) > 1 or kinds.count(scene[second]) > 1:
        return None
    return rng.choice(QUESTIONS["relation"]).format(kind=scene[first], other=scene[second]), side


def _count(rng: Random, scene: Scene) -> tuple[str, str] | None:
    kind = rng.choice(list(scene.values()))
    kind = rng.choice((kind, kind._replace(colour=None), kind._replace(shape=None)))
    found = sum(map(kind.covers, scene.values()))
    return (rng.choice(QUESTIONS["count"]).format(kinds=kind.plural), str(found)) if found <= _MOST_COUNTED else None


def _colour(rng: Random, scene: Scene) -> tuple[str, str]:
    place = rng.choice(list(scene))
    return rng.choice(QUESTIONS["colour"]).format(place=place), scene[place].colour


def _presence(rng: Random, scene: Scene) -> tuple[str, str]:
    kinds = list(scene.values())
    kind = rng.choice((rng.choice(kinds), Kind(rng.choice(kinds).colour, rng.choice(kinds).shape), rng.choice(_KINDS)))
    return rng.choice(QUESTIONS["presence"]).format(kind=kind), PRESENCE[kind in kinds]


def _description(rng: Random, scene: Scene) -> tuple[str, str]:
    """As the captions have it: in reading order."""
    return rng.choice(CAPTION_REQUESTS), caption([(scene[place], place) for place in PLACES if place in scene])


_ASKING = (_position, _relation, _count, _colour, _presence, _description)
