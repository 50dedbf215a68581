"""What a model scored on the spatial task: a table, JSON, and a file of its answers."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sp_fast.errors import DataError
from sp_fast.training.task.answers import Row
from sp_fast.training.task.scoring import Accuracy, score


def print_scores(found: Mapping[str, Accuracy]) -> None:
    """A table of types on stdout: accuracy, what guessing scores, and of how many questions or pairs."""
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for column in ("type", "accuracy", "uniform guess", "best constant", "n"):
        table.add_column(column, justify="left" if column == "type" else "right")
    for kind, (accuracy, (uniform, constant), n) in found.items():
        shares = ["-" if share is None else f"{share:.1%}" for share in (accuracy, uniform, constant)]
        table.add_row(kind, *shares, f"{n:,}")
    Console().print(table)


def scores_to_dict(found: Mapping[str, Accuracy]) -> dict[str, dict[str, Any]]:
    """For JSON, by type: ``accuracy``, ``chance`` (``uniform``, ``constant``) and ``n``."""
    return {kind: one._asdict() | {"chance": one.chance._asdict()} for kind, one in found.items()}


def check_free(path: Path, force: bool) -> None:
    """Raises DataError where a file of answers may not be written, or could not be: it shows before the model is
    asked."""
    if path.is_dir():
        raise DataError(f"{path} is a folder: name a file in it")
    if path.exists() and not force:
        raise DataError(f"{path} is there already: write to another file, or overwrite it with --force")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise DataError(f"{path} cannot be written ({error.strerror}): choose a folder that can") from error


def write_answers(path: Path, rows: Iterable[Row], said: Iterable[str]) -> None:
    """JSON lines, a question each: ``id``, ``type``, ``expected``, ``said``, ``right``. An older file is replaced.

    Raises:
        DataError: it cannot be written.
    """
    lines = (
        {
            "id": row["id"],
            "type": row["type"],
            "expected": row["answer"],
            "said": text,
            "right": bool(score(row["type"], row["answer"], text)),
        }
        for row, text in zip(rows, said, strict=True)
    )
    aside = path.with_name(f".{path.name}")
    try:
        aside.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        aside.replace(path)
    except OSError as error:
        raise DataError(f"{path} cannot be written ({error.strerror}): choose a folder that can") from error
