"""A contact sheet of the spatial task: images with a question (or a pair) and its answer each."""

from __future__ import annotations

import json
from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from sp_fast.errors import DataError, first_line
from sp_fast.training.task.scoring import read_box
from sp_fast.training.task.words import BOX, TYPES

_ACROSS, _INCHES, _LETTERS = 6, 2.0, 30  # images in a row, of one, and in a line under it


def draw_sheet(folder: Path, path: Path, count: int = 12) -> None:
    """Draws held-out images of a made task, the types of question in turn, to a PNG or SVG file: ``count``, or as many
    as there are. Expected boxes are drawn in. An older file is replaced.

    Raises:
        DataError: the folder holds no task, or the file cannot be written.
    """
    try:
        rows = json.loads((folder / "held_out.json").read_text(encoding="utf-8"))
        asked: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for row in rows:
            asked.setdefault((row["image"], row["type"]), []).append(row)
        images = list(dict.fromkeys(row["image"] for row in rows))[:count]
        chosen = [asked[image, TYPES[i % len(TYPES)]] for i, image in enumerate(images)]
        lines = -(-len(chosen) // _ACROSS)
        figure = Figure(figsize=(_ACROSS * _INCHES, lines * _INCHES * 1.3), layout="constrained")
        axes = figure.subplots(lines, _ACROSS, squeeze=False).ravel()
        for axis in axes:
            axis.set_axis_off()
        for axis, some in zip(axes, chosen, strict=False):
            _draw(axis, folder, some)
        with matplotlib.rc_context({"svg.hashsalt": "sp_fast"}):  # the same task gives the same file
            figure.savefig(path, dpi=120, metadata={"Date": None} if path.suffix == ".svg" else None)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"the images of {folder} cannot be drawn to {path} ({type(error).__name__}: {first_line(error)}): give a "
            "folder that make-task has made, and a file that can be written"
        ) from error


def _draw(axis: Axes, folder: Path, rows: list[dict[str, Any]]) -> None:
    """Questions of one type about one image."""
    with Image.open(folder / rows[0]["image"]) as image:
        pixels = np.asarray(image)
    axis.imshow(pixels, interpolation="nearest")
    said = []
    for row in rows:
        if row["type"] == BOX:
            # imshow's pixels lie around whole numbers
            left, top, right, bottom = read_box(row["answer"]) * len(pixels) - 0.5
            axis.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor="white"))
        said += [fill(row["conversations"][0]["value"].removeprefix("<image>\n"), _LETTERS), row["answer"]]
    axis.set_title("\n".join(said), y=0, va="top", pad=-4, fontsize=8)
