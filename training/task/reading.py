"""Scenes that nobody draws, and questions about them, from which the spatial task's language model learns to answer.

They are none of the data's: things lie in thirds of an image, and nowhere else.
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


_MOST_BESIDE = 2  # things in thirds that have one already

#: Places and kinds of things.
Scene = list[tuple[str, Kind]]


def make_scene(rng: Random) -> Scene:
    """One to nine things in thirds of their own, and up to two more, in any order."""
    places = rng.sample(PLACES, rng.randint(1, len(PLACES)))
    places += rng.sample(places, rng.randint(0, min(_MOST_BESIDE, len(places))))
    return [(place, rng.choice(_KINDS)) for place in places]


def questions(rng: Random, scene: Scene, count: int) -> list[tuple[str, str]]:
    """Up to so many questions with their answers: fewer where one comes up that the scene does not answer."""
    asked = (rng.choice(_ASKING)(rng, scene) for _ in range(count))
    return [found for found in asked if found]


def _position(rng: Random, scene: Scene) -> tuple[str, str] | None:
    place, kind = rng.choice(scene)
    if _times(scene, kind) > 1:
        return None
    return rng.choice(QUESTIONS["position"]).format(kind=kind), place


def _relation(rng: Random, scene: Scene) -> tuple[str, str] | None:
    (place, kind), (other_place, other) = rng.choice(scene), rng.choice(scene)
    side = side_of(third(place, 1), third(other_place, 1)) if place != other_place else None
    if side is None or _times(scene, kind) > 1 or _times(scene, other) > 1:
        return None
    return rng.choice(QUESTIONS["relation"]).format(kind=kind, other=other), side


def _count(rng: Random, scene: Scene) -> tuple[str, str] | None:
    _, kind = rng.choice(scene)
    kind = rng.choice((kind, kind._replace(colour=None), kind._replace(shape=None)))
    found = sum(kind.covers(other) for _, other in scene)
    return (rng.choice(QUESTIONS["count"]).format(kinds=kind.plural), str(found)) if found <= _MOST_COUNTED else None


def _colour(rng: Random, scene: Scene) -> tuple[str, str] | None:
    place, kind = rng.choice(scene)
    if sum(there == place and other.shape == kind.shape for there, other in scene) > 1:
        return None
    return rng.choice(QUESTIONS["colour"]).format(shape=kind.shape, place=place), kind.colour


def _presence(rng: Random, scene: Scene) -> tuple[str, str]:
    kinds = [kind for _, kind in scene]
    kind = rng.choice((rng.choice(kinds), Kind(rng.choice(kinds).colour, rng.choice(kinds).shape), rng.choice(_KINDS)))
    return rng.choice(QUESTIONS["presence"]).format(kind=kind), PRESENCE[kind in kinds]


def _description(rng: Random, scene: Scene) -> tuple[str, str] | None:
    """As the captions have it: in reading order, a thing for each third."""
    if len({place for place, _ in scene}) < len(scene):
        return None
    listed = sorted(scene, key=lambda thing: PLACES.index(thing[0]))
    return rng.choice(CAPTION_REQUESTS), caption([(kind, place) for place, kind in listed])


def _times(scene: Scene, kind: Kind) -> int:
    return sum(other == kind for _, other in scene)


_ASKING = (_position, _relation, _count, _colour, _presence, _description)
