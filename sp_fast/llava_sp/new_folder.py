"""A folder that appears whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from sp_fast.errors import CheckpointError, ResourceError


def check_target(target: Path, force: bool, sources: Sequence[Path]) -> None:
    """Raises CheckpointError where a folder may not be written: it is there, it is a source, or it is no model's."""
    place = target.resolve()
    for source in sources:
        if place == source.resolve() or place in source.resolve().parents:
            raise CheckpointError(f"{target} holds {source}, which is read: write to another folder")
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise CheckpointError(f"{target} is there and is no folder: write to another one")
    if not target.exists() or not any(target.iterdir()):
        return
    if not force:
        raise CheckpointError(f"{target} is not empty: write to another folder, or replace this one with --force")
    if not (target / "config.json").is_file():
        raise CheckpointError(
            f"{target} has no config.json, so it is no model that --force may replace: remove it first"
        )


@contextlib.contextmanager
def new_folder(target: Path, size: int) -> Iterator[Path]:
    """A hidden folder beside ``target``, which takes its place (and its name) at the end; removed on any error.

    Args:
        target: what was there is removed once the new folder stands in its place; see ``check_target``.
        size: bytes that will be written.

    Raises:
        ResourceError: the disk has not as many.
        CheckpointError: the folder cannot be made.
    """
    parent = target.resolve().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(parent).free
        if free < size:
            raise ResourceError(
                f"{parent} has {free / 1e9:,.1f} GB free, but {size / 1e9:,.1f} GB are needed: choose another disk"
            )
        made = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=parent))
    except OSError as error:
        raise CheckpointError(f"{target} cannot be written ({error.strerror}): choose another place") from error
    try:
        yield made
        made.chmod(0o777 & ~_umask())  # mkdtemp's is for its owner only
        _take_place(made, target)
    except OSError as error:
        raise CheckpointError(f"{target} was not written ({error}): mend that, and start again") from error
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _take_place(made: Path, target: Path) -> None:
    if not target.exists():
        made.rename(target)
        return
    aside = made.with_name(f"{made.name}.old")
    try:
        target.rename(aside)
        made.rename(target)
    except BaseException:
        if not target.exists():
            aside.rename(target)
        raise
    shutil.rmtree(aside)


def _umask() -> int:
    """Which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
