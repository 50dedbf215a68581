"""A file of results: a line of JSON for each run that has finished, on the disk as soon as it is there."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sp_fast.errors import TrainingError, first_line
from sp_fast.training.study.study import Job


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file, none where there is no file. One that a killed process did not finish is left out.

    Raises:
        TrainingError: it cannot be read, or a line is no result.
    """
    if not path.exists():
        return []
    try:
        whole = path.read_text(encoding="utf-8").split("\n")[:-1]
    except (OSError, UnicodeDecodeError) as error:
        raise TrainingError(f"{path} cannot be read ({first_line(error)}): give the folder of a study") from error
    found = []
    for number, text in enumerate(whole, 1):
        try:
            line = json.loads(text)
            Job(line["arm"], line["seed"]), line["fingerprint"]
        except (ValueError, KeyError, TypeError) as error:
            raise TrainingError(f"{path}, line {number} is no result ({error}): mend or remove that line") from error
        found.append(line)
    return found


class Results:
    """The lines of a file, to which others are added.

    Args:
        fingerprint: what all lines must share; see ``Study.fingerprint``.

    Raises:
        TrainingError: lines of another study, with what differs; or the file cannot be read or written.
    """

    def __init__(self, path: Path, fingerprint: Mapping[str, Any]) -> None:
        self._path, self._fingerprint = path, json.loads(json.dumps(fingerprint))
        self.lines = read_lines(path)
        for line in self.lines:
            if different := _differences(line["fingerprint"], self._fingerprint):
                raise TrainingError(
                    f"{path} holds results of another study: {'; '.join(different)}. Give another --out, or the same "
                    "task, parts, recipe and --images as before"
                )
        self._mend()

    @property
    def done(self) -> set[Job]:
        """Runs that have a line."""
        return {Job(line["arm"], line["seed"]) for line in self.lines}

    def add(self, line: Mapping[str, Any]) -> None:
        """Appends a run's line, and returns once it is on the disk. Raises TrainingError where it cannot be."""
        whole = {**line, "fingerprint": self._fingerprint}
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(whole) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise self._unwritable(error) from error
        self.lines.append(whole)

    def _mend(self) -> None:
        """A line that was cut off would spoil the next one."""
        if not self._path.exists():
            return
        try:
            with self._path.open("r+b") as file:
                file.truncate(file.read().rfind(b"\n") + 1)
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> TrainingError:
        return TrainingError(
            f"{self._path} cannot be written ({error.strerror}): make room, or mend its rights, and start the same "
            "command again, which goes on"
        )


def _differences(found: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    names = [name for name in {**expected, **found} if found.get(name) != expected.get(name)]
    return [f"{name} was {found.get(name)!r} and is {expected.get(name)!r}" for name in names]
