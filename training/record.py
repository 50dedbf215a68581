"""What stands in a run's folder beside its checkpoints, and whose folder it is."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from sp_fast.errors import TrainingError, first_line
from sp_fast.training.recipe import Recipe
from sp_fast.training.settings import settings

if TYPE_CHECKING:
    from sp_fast.training.examples import BadSample

RECIPE, LEFT_OUT, FINISHED, LOCK = "recipe.yaml", "left_out.jsonl", "finished.json", ".lock"


def check_output(run: Path) -> None:
    """Raises TrainingError for a folder that is no run's to go on with."""
    if run.exists() and not run.is_dir():
        raise TrainingError(f"{run} is there and is no folder: give another output")
    if (run / FINISHED).exists():
        raise TrainingError(f"{run} holds a run that has finished: give another output")
    names = {path.name for path in run.iterdir()} - {LOCK} if run.is_dir() else set()
    if names and RECIPE not in names:
        raise TrainingError(f"{run} is not empty, and holds no run to go on with: give another output")


@contextmanager
def the_only_one(run: Path) -> Iterator[None]:
    """Makes the folder, and keeps another process from training in it. The system forgets it with this process, and
    those that it forks to read data do not have it.

    Raises:
        TrainingError: another one does, or the folder cannot be written.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
        file = (run / LOCK).open("w")
    except OSError as error:
        raise TrainingError(f"{run} cannot be written ({error.strerror}): give another output") from error
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise TrainingError(
                f"another process is training in {run} ({error.strerror}): wait for it, or give another output"
            ) from error
        yield


def write_recipe(stage: str, recipe: Recipe) -> None:
    """Into the run's folder, what it was started with; ``read_run`` reads it. Paths become absolute."""
    values = {"stage": stage, **recipe.absolute().to_dict()}
    replace_text(recipe.output / RECIPE, yaml.safe_dump(values, sort_keys=False))


def read_run(run: Path) -> tuple[str, Recipe]:
    """The stage and the recipe of a run's folder. Raises TrainingError where there is none."""
    path = run / RECIPE
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        stage = values.pop("stage")
    except (OSError, yaml.YAMLError, AttributeError, KeyError) as error:
        raise TrainingError(f"{path} cannot be read ({first_line(error)}): give the folder of a run") from error
    return stage, Recipe(**settings(stage, values, str(path)))


def write_left_out(run: Path, bad: Sequence[BadSample]) -> None:
    """The samples that a run begins without, a line each."""
    replace_text(run / LEFT_OUT, "".join(_line(asdict(one)) for one in bad))


def add_left_out(run: Path, said: str, step: int) -> None:
    """A sample that could not be used when it was read, of any process."""
    with (run / LEFT_OUT).open("a", encoding="utf-8", errors="backslashreplace") as file:
        file.write(_line({"step": step, "reason": said}))


def replace_text(path: Path, text: str) -> None:
    """Whole or not at all, and on the disk."""
    aside = path.with_name(f".{path.name}.part")
    with aside.open("w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def _line(values: dict[str, Any]) -> str:
    return json.dumps(values, ensure_ascii=False) + "\n"
