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
from sp_fast.training.task.words import BOX, CAPTION_REQUESTS, QUESTIONS, box_text, caption

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
    """Image number ``index`` of a split: one question of each type in any order, or a caption, in ``captions``."""
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
        questions = _questions(rng, scene, wanted, size)
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


def _questions(rng: Random, scene: Scene, wanted: dict[str, str], size: int) -> list[Question]:
    fields = {
        "position": {"kind": scene.located.kind},
        "relation": {"kind": scene.first.kind, "other": scene.second.kind},
        "count": {"kinds": scene.counted.plural},
        "colour": {"place": scene.coloured_at},
        "presence": {"kind": scene.asked},
        BOX: {"kind": scene.boxed.kind},
    }
    answers = wanted | {BOX: box_text(scene.boxed.box, size)}
    asked = [Question(kind, rng.choice(QUESTIONS[kind]).format(**fields[kind]), answers[kind]) for kind in fields]
    return rng.sample(asked, len(asked))
