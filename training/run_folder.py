"""The folder of a run: which checkpoints it has, which of them is whole, and what does not belong there any more."""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path
from typing import NamedTuple

from sp_fast.errors import TrainingError
from sp_fast.training.manifest import verify

logger = logging.getLogger("sp_fast")

_CHECKPOINT = re.compile(r"checkpoint-(0|[1-9][0-9]*)")
_LEFT_OVER = re.compile(rf"\.(saving|removing)-{_CHECKPOINT.pattern}")


class Found(NamedTuple):
    """The newest whole checkpoint (None in a run without any), and those after it that are not, with the reason."""

    folder: Path | None
    step: int
    rejected: tuple[tuple[Path, str], ...]


def newest_complete(run: Path) -> Found:
    """Which checkpoint of a run to resume from. Reads all of it, and changes nothing.

    Raises:
        TrainingError: there are checkpoints, and none is whole: beginning anew is for the user to decide.
    """
    rejected: list[tuple[Path, str]] = []
    for step, folder in sorted(checkpoints_of(run).items(), reverse=True):
        try:
            verify(folder)
        except TrainingError as error:
            rejected.append((folder, str(error)))
        else:
            return Found(folder, step, tuple(rejected))
    if rejected:
        reasons = "; ".join(reason for _, reason in rejected)
        raise TrainingError(f"no checkpoint of {run} is whole ({reasons}): begin anew in another folder")
    return Found(None, 0, ())


def staging(checkpoint: Path) -> Path:
    """Where a checkpoint is written, before it gets its name."""
    return checkpoint.with_name(f".saving-{checkpoint.name}")


def remove(checkpoint: Path) -> None:
    """All of it at once, as half of a checkpoint would be a damaged one. Raises OSError."""
    away = checkpoint.with_name(f".removing-{checkpoint.name}")
    checkpoint.rename(away)
    shutil.rmtree(away)


def remove_leftovers(run: Path) -> None:
    """Removes what killed saves and removals left behind: folders that only this module names so. Raises OSError."""
    for path in run.iterdir() if run.is_dir() else ():
        if _LEFT_OVER.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)


def checkpoints_of(run: Path) -> dict[int, Path]:
    """Whatever has a checkpoint's name, by step; what it is worth, ``verify`` says."""
    names = ((_CHECKPOINT.fullmatch(path.name), path) for path in (run.iterdir() if run.is_dir() else ()))
    return {int(name[1]): path for name, path in names if name}


def set_aside(final: Path) -> None:
    """Moves what already has a checkpoint's name out of its way, under a new one. Raises OSError.

    It is damaged, or the run was resumed from before it.
    """
    if not final.is_symlink() and not final.exists():
        return
    number = 1
    while (aside := final.with_name(f"replaced-{number}-{final.name}")).exists():
        number += 1
    logger.warning("%s was there and was not resumed from; it is %s now", final, aside.name)
    final.rename(aside)
