"""Results for people and for scripts: a table on a terminal, Markdown, CSV, JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from dataclasses import asdict, fields

from rich import box
from rich.table import Table

from sp_fast.bench import field_formats, model_formats, projector_formats, train_formats
from sp_fast.bench.compare import BAD, Change
from sp_fast.bench.record import Record
from sp_fast.bench.summary import LABELS, withheld
from sp_fast.bench.tables import figure, markdown_lines, rich_table, string_console, where

BENCHMARKS = {
    "projector": projector_formats,
    "model": model_formats,
    "train": train_formats,
    "projectors": field_formats,
}
ALL_LABELS = {**LABELS, **model_formats.LABELS, **train_formats.LABELS, **field_formats.LABELS}


def _by_benchmark(records: list[Record]) -> list[tuple]:
    """How the records of each benchmark are shown, and those records."""
    found = [(shown, [r for r in records if r.benchmark == name]) for name, shown in BENCHMARKS.items()]
    return [(shown, part) for shown, part in found if part]


def to_table(records: list[Record]) -> str:
    """For a terminal."""
    console = string_console()
    for line in where(records):
        console.print(line, highlight=False, markup=False)
    for shown, part in _by_benchmark(records):
        for section in shown.long_sections(part):
            if section.lines:
                console.print(rich_table(section))
        for note in shown.notes(part):
            console.print(note, highlight=False, markup=False, soft_wrap=True)
    for what, why in withheld(records, ALL_LABELS):
        console.print(f"withheld: {what}: {why}", style="red", highlight=False, markup=False, soft_wrap=True)
    return console.file.getvalue()


def to_markdown(records: list[Record]) -> str:
    """For a README."""
    lines = [f"{line}  " for line in where(records)]
    for shown, part in _by_benchmark(records):
        for title, columns, rows in shown.wide_sections(part):
            if rows:
                lines += ["", title, "", *markdown_lines(columns, rows)]
        for note in shown.notes(part):
            lines += ["", note]
    lines += [f"- withheld: {what}: {why}" for what, why in withheld(records, ALL_LABELS)]
    return "\n".join(lines) + "\n"


def to_csv(records: list[Record]) -> str:
    """One line a record, without what is the same everywhere."""
    columns = [f.name for f in fields(Record) if f.name not in ("environment", "peaks", "format")]
    text = io.StringIO()
    writer = csv.DictWriter(text, [*columns, "commit"], extrasaction="ignore")
    writer.writeheader()
    writer.writerows({**asdict(r), "commit": r.environment.get("commit")} for r in records)
    return text.getvalue()


def to_json(records: list[Record]) -> str:
    """One object: the records, and what each case of them comes to."""
    found = [json.loads(record.to_json()) for record in records]
    cases = [case for shown, part in _by_benchmark(records) for case in shown.cases(part)]
    return json.dumps({"records": found, "cases": cases}) + "\n"


FORMATS: dict[str, Callable[[list[Record]], str]] = {
    "table": to_table,
    "json": to_json,
    "csv": to_csv,
    "md": to_markdown,
}


_CHANGE_COLUMNS = ["case", "implementation", "before, ms", "after, ms", "ratio", "before, MiB", "after, MiB", ""]


def _change_rows(changes: list[Change]) -> list[list[str]]:
    def mib(value: float | None) -> str:
        return "-" if value is None else f"{value:,.0f}"

    return [
        [c.case, ALL_LABELS[c.implementation], figure(c.a_ms), figure(c.b_ms),
         "-" if c.ratio is None else f"{c.ratio:.3f}", mib(c.a_peak_mib), mib(c.b_peak_mib), c.verdict]
        for c in changes
    ]  # fmt: skip


def _changes_to_table(changes: list[Change]) -> str:
    console = string_console()
    table = Table(*_CHANGE_COLUMNS, box=box.SIMPLE)
    for change, line in zip(changes, _change_rows(changes), strict=True):
        table.add_row(*line, style={"faster": "green"}.get(change.verdict, "red" if change.verdict in BAD else None))
    console.print(table)
    return console.file.getvalue()


def _changes_to_csv(changes: list[Change]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, [f.name for f in fields(Change)])
    writer.writeheader()
    writer.writerows(change.to_dict() for change in changes)
    return text.getvalue()


CHANGE_FORMATS: dict[str, Callable[[list[Change]], str]] = {
    "table": _changes_to_table,
    "json": lambda changes: json.dumps({"changes": [change.to_dict() for change in changes]}) + "\n",
    "csv": _changes_to_csv,
    "md": lambda changes: "\n".join(markdown_lines(_CHANGE_COLUMNS, _change_rows(changes))) + "\n",
}
