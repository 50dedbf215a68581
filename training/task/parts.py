"""The parts that a small LLaVA-SP model for the spatial task begins with: a vision tower and a language model."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sp_fast.errors import DataError
from sp_fast.llava_sp.new_folder import new_folder
from sp_fast.training.task import fit
from sp_fast.training.task.fit import Lessons
from sp_fast.training.task.language import make_language_model, teach_reading
from sp_fast.training.task.tokenizer import make_tokenizer
from sp_fast.training.task.tower import make_tower, teach_seeing
from sp_fast.version import __version__

TOWER, BLIND, LANGUAGE = PARTS = ("vision-tower", "blind-tower", "language-model")
#: Of a part's name, steps that it has taken, all of them, and the last loss.
Progress = Callable[[str, int, int, float], None]


@dataclass(frozen=True)
class Scale:
    """Sizes of both parts and how long they are taught: pixels of a patch; width, layers and heads of each; images that
    are drawn for the tower."""

    patch: int
    tower: tuple[int, int, int]
    images: int
    seeing: Lessons
    language: tuple[int, int, int]
    reading: Lessons


SCALES = {
    "tiny": Scale(8, (64, 4, 4), 10_000, Lessons(1500, 16, 2e-3), (128, 4, 4), Lessons(2000, 48, 1e-3)),
    "small": Scale(4, (128, 6, 4), 20_000, Lessons(6000, 32, 1e-3), (256, 6, 8), Lessons(4000, 64, 5e-4)),
}
_CONTEXT = 1024


def make_parts(
    out: Path, scale: str = "tiny", size: int = 96, seed: int = 0, progress: Progress | None = None
) -> dict[str, Any]:
    """Teaches both parts and writes a folder that appears whole or not at all; returns what its ``parts.json`` holds.

    ``vision-tower/`` is a CLIP for images of ``size`` pixels, ``blind-tower/`` one whose patches do not say where they
    lie, ``language-model/`` a Qwen2 with its tokenizer.

    Args:
        scale: a name of ``SCALES``.

    Raises:
        DataError: no such scale, a ``size`` that is not a multiple of its patch, or ``out`` is there already.
        CheckpointError: the folder cannot be written.
    """
    if out.exists() or out.is_symlink():
        raise DataError(f"{out} is there already: write to another folder, or remove it first")
    if scale not in SCALES:
        raise DataError(f"scale={scale!r} must be one of {', '.join(SCALES)}")
    sizes = SCALES[scale]
    if size < sizes.patch or size % sizes.patch:
        raise DataError(f"size={size} must be a multiple of the patch's {sizes.patch} pixels")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with new_folder(out, 0) as made:
        accuracy: dict[str, dict[str, float]] = {}
        for name in (TOWER, BLIND):
            tower = make_tower(*sizes.tower, sizes.patch, size, seed).to(device)
            lessons = tower, sizes.images, sizes.seeing, seed, _named(name, progress)
            accuracy[name] = teach_seeing(*lessons, places=name == TOWER)
            tower.save_pretrained(made / name)
        tokenizer = make_tokenizer()
        model = make_language_model(tokenizer, *sizes.language, _CONTEXT, seed).to(device)
        accuracy[LANGUAGE] = teach_reading(model, tokenizer, sizes.reading, seed, _named(LANGUAGE, progress))
        model.save_pretrained(made / LANGUAGE)
        tokenizer.save_pretrained(made / LANGUAGE)
        described = {
            "version": __version__,
            "scale": scale,
            "seed": seed,
            "size": size,
            **asdict(sizes),
            "accuracy": accuracy,
        }
        (made / "parts.json").write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
    return described


def _named(part: str, progress: Progress | None) -> fit.Progress | None:
    return None if progress is None else partial(progress, part)
