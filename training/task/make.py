"""The folder of the spatial task: PNG files, data in LLaVA's format, and what the task is."""

from __future__ import annotations

import json
import signal
from collections import Counter
from collections.abc import Callable, Generator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from itertools import starmap
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from sp_fast.errors import DataError
from sp_fast.llava_sp.new_folder import new_folder
from sp_fast.training.task.sample import CAPTIONS, HELD_OUT, SPLITS, TRAIN, Question, image_name, write_sample
from sp_fast.training.task.scoring import Said, summary
from sp_fast.training.task.sheet import draw_sheet
from sp_fast.training.task.words import ANSWERS, TYPES, vocabulary
from sp_fast.version import __version__

_FORMAT = 4  # of what a seed means: another one draws other images
_SIZES = (64, 1024)
_TOGETHER = 32  # images that a process is given at a time

#: Of images drawn and images there will be.
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Task:
    """What is to be made: the numbers of images of each split, and the pixels of a side.

    96 pixels are 24x24 patches of 4, the published grid. The first images of a split are the same however many follow.

    Raises:
        DataError: a number out of its bounds.
    """

    seed: int = 0
    train: int = 8000
    held_out: int = 1000
    captions: int = 8000
    size: int = 96

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise DataError(f"seed={self.seed} must be 0 or more")
        for name in SPLITS:
            if getattr(self, name) < 1:
                raise DataError(f"{name}={getattr(self, name)} must be 1 image or more")
        if not _SIZES[0] <= self.size <= _SIZES[1]:
            raise DataError(
                f"size={self.size} must be {_SIZES[0]} to {_SIZES[1]} pixels: shapes in smaller images lose their form"
            )


def make_task(task: Task, out: Path, workers: int = 0, progress: Progress | None = None) -> dict[str, Any]:
    """Writes a folder that appears whole or not at all, and returns what its ``task.json`` holds.

    ``images/<split>/000000.png``; ``captions.json`` (the first stage's), ``train.json`` (the second's: a row an image,
    a question of each type in any order); ``held_out.json`` (a row a question, with its ``type`` and ``answer`` for
    ``scoring.summary``; presence is asked in pairs); ``samples.png``. No image is in two splits. Paths in the data
    begin at ``out``. With the same versions of numpy and Pillow the files are the same, bit for bit, for any
    ``workers``.

    Args:
        workers: processes that draw; 0: this one.

    Raises:
        DataError: ``out`` is there already, a negative number of workers, or a worker that was killed.
        CheckpointError: the folder cannot be written.
        ResourceError: the disk is too small.
    """
    if out.exists() or out.is_symlink():
        raise DataError(f"{out} is there already: write to another folder, or remove it first")
    if workers < 0:
        raise DataError(f"workers={workers} must be 0 or more")
    counts = {split: getattr(task, split) for split in SPLITS}
    places = [(split, index) for split, count in counts.items() for index in range(count)]
    with new_folder(out, 3 * task.size**2 * len(places)) as made:
        for split in SPLITS:
            (made / "images" / split).mkdir(parents=True)
        rows: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
        write = partial(write_sample, made, task.seed, task.size)
        with closing(_mapped(write, places, workers)) as asked:  # nobody draws any more when the folder is removed
            for done, ((split, index), questions) in enumerate(zip(places, asked, strict=True), 1):
                rows[split] += (_rows_of_questions if split == HELD_OUT else _row_of_image)(split, index, questions)
                if progress:
                    progress(done, len(places))
        for split in SPLITS:
            _write_json(made / f"{split}.json", rows[split])
        described = _describe(task, rows[HELD_OUT])
        _write_json(made / "task.json", described)
        draw_sheet(made, made / "samples.png")
    return described


def _mapped(
    write: Callable[[str, int], tuple[Question, ...]], places: list[tuple[str, int]], workers: int
) -> Generator[tuple[Question, ...], None, None]:
    """In order, whoever draws."""
    if not workers:
        yield from starmap(write, places)
        return
    # Spawned, because a fork would not survive threads of torch; they leave Ctrl-C to this process.
    ignore = {"initializer": signal.signal, "initargs": (signal.SIGINT, signal.SIG_IGN)}
    with ProcessPoolExecutor(workers, get_context("spawn"), **ignore) as pool:
        try:
            yield from pool.map(write, *zip(*places, strict=True), chunksize=_TOGETHER)
        except BrokenProcessPool as error:
            raise DataError("a process that draws was killed: free memory, or draw with fewer --workers") from error


def _row_of_image(split: str, index: int, questions: tuple[Question, ...]) -> list[dict[str, Any]]:
    return [_row(f"{split}-{index:06}", split, index, questions)]


def _rows_of_questions(split: str, index: int, questions: tuple[Question, ...]) -> list[dict[str, Any]]:
    """One by one, so that no other question helps. Those of one type are numbered, in an order of chance."""
    rows = []
    for one in questions:
        alike = [other for other in questions if other.type == one.type]
        number = f"-{alike.index(one) + 1}" if len(alike) > 1 else ""
        row = _row(f"{split}-{index:06}-{one.type}{number}", split, index, (one,))
        rows.append(row | {"type": one.type, "answer": one.answer})
    return rows


def _row(name: str, split: str, index: int, questions: tuple[Question, ...]) -> dict[str, Any]:
    turns = [turn for one in questions for turn in (("human", one.text), ("gpt", one.answer))]
    turns[0] = ("human", f"<image>\n{turns[0][1]}")
    said = [{"from": side, "value": text} for side, text in turns]
    return {"id": name, "image": image_name(split, index), "conversations": said}


def _describe(task: Task, held_out: list[dict[str, Any]]) -> dict[str, Any]:
    answers = {kind: Counter(row["answer"] for row in held_out if row["type"] == kind) for kind in TYPES}
    guessed = summary(Said(row["type"], row["image"], row["answer"], "") for row in held_out)
    return {
        "format": _FORMAT,
        "version": __version__,
        **asdict(task),
        "types": {
            kind: {
                TRAIN: task.train,
                HELD_OUT: guessed[kind].n,
                "together": answers[kind].total() // guessed[kind].n,  # questions that count as one
                "answers": {one: answers[kind][one] for one in sorted(ANSWERS[kind])} if kind in ANSWERS else None,
                "chance": guessed[kind].chance._asdict(),
            }
            for kind in TYPES
        },
        "vocabulary": vocabulary(),
    }


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def print_task(described: dict[str, Any]) -> None:
    """A table of types on stdout: questions, possible answers and how often the held-out ones have each, and what
    guessing scores on them."""
    from rich.console import Console
    from rich.table import Table

    title = f"{described[CAPTIONS]:,} captions, {len(described['vocabulary'])} words and marks; chance on held-out"
    table = Table(title=title, title_justify="left")
    for column in ("type", "train", "held out", "answers", "of each", "uniform guess", "best constant"):
        table.add_column(column, justify="left" if column == "type" else "right")
    for kind, found in described["types"].items():
        uniform, constant = found["chance"].values()
        held_out = f"{found[HELD_OUT]:,}" + (f" x {found['together']}" if found["together"] > 1 else "")
        answers, each = ("-", "-") if found["answers"] is None else (len(ANSWERS[kind]), _range(found["answers"]))
        shown = "-" if uniform is None else f"{uniform:.1%}"
        table.add_row(kind, f"{found[TRAIN]:,}", held_out, str(answers), each, shown, f"{constant:.1%}")
    Console().print(table)


def _range(counts: dict[str, int]) -> str:
    fewest, most = min(counts.values()), max(counts.values())
    return f"{most:,}" if fewest == most else f"{fewest:,}-{most:,}"
