"""An image of the spatial task with its questions, or with its caption: a function of the seed, the split and a number.

It imports nothing heavy: processes that draw begin with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image

from sp_fast.training.task.drawing import draw
from sp_fast.training.task.scene import Scene, compose, compose_caption, goals
from sp_fast.training.task.words import BOX, CAPTION_REQUESTS, PRESENCE, QUESTIONS, box_text, caption

TRAIN, HELD_OUT, CAPTIONS = SPLITS = ("train", "held_out", "captions")


@dataclass(frozen=True)
class Question:
    """Of a type of ``words.TYPES``, or None for what is no question but asks for a caption."""

    type: str | None
    text: str
    answer: str


@dataclass(frozen=True)
class Sample:
    """``[size, size, 3]`` uint8 pixels and what is said about them."""

    pixels: np.ndarray
    questions: tuple[Question, ...]


def make_sample(seed: int, split: str, index: int, size: int) -> Sample:
    """Image number ``index`` of a split: a caption, in ``captions``, else a question of each type, in any order.

    A held-out image has two about presence, one about a kind that is there and one about a kind that is not. In
    ``train``, where questions share a conversation, one would tell the other's answer.
    """
    rng = Random(f"{seed}/{split}/{index}")
    if split == CAPTIONS:
        found = compose_caption(rng, size)
        things = [thing for thing, _ in found]
        said = caption([(thing.kind, place) for thing, place in found])
        questions = [Question(None, rng.choice(CAPTION_REQUESTS), said)]
    else:
        wanted = goals(seed, split, index)
        scene = compose(rng, wanted, size)
        things = scene.things
        presence = tuple(PRESENCE.values()) if split == HELD_OUT else (wanted["presence"],)
        questions = _questions(rng, scene, wanted, presence, size)
    pixels = draw(things, size, np.random.default_rng(rng.getrandbits(64)))
    return Sample(pixels, tuple(questions))


def write_sample(folder: Path, seed: int, size: int, split: str, index: int) -> tuple[Question, ...]:
    """Writes the image's file, and returns what is said about it."""
    sample = make_sample(seed, split, index, size)
    Image.fromarray(sample.pixels).save(folder / image_name(split, index))
    return sample.questions


def image_name(split: str, index: int) -> str:
    """Of an image's file, from the task's folder."""
    return f"images/{split}/{index:06}.png"


def _questions(
    rng: Random, scene: Scene, wanted: dict[str, str], presence: tuple[str, ...], size: int
) -> list[Question]:
    """Of each type one; of presence, one for each of these answers."""
    fields = [
        ("position", wanted["position"], {"kind": scene.located.kind}),
        ("relation", wanted["relation"], {"kind": scene.first.kind, "other": scene.second.kind}),
        ("side", wanted["side"], {}),
        ("count", wanted["count"], {"kinds": scene.counted.plural}),
        ("colour", wanted["colour"], {"shape": scene.coloured.kind.shape, "place": scene.coloured_at}),
        *(("presence", said, {"kind": scene.asked[said]}) for said in presence),
        (BOX, box_text(scene.boxed.box, size), {"kind": scene.boxed.kind}),
    ]
    asked = [Question(kind, rng.choice(QUESTIONS[kind]).format(**named), said) for kind, said, named in fields]
    return rng.sample(asked, len(asked))
