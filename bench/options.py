"""What the benchmark commands' options share: their words, and what they come to."""

from __future__ import annotations

import enum
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer


class Format(enum.StrEnum):
    """Of what is printed."""

    table = "table"
    json = "json"
    csv = "csv"
    md = "md"


FormatOption = Annotated[Format, typer.Option("--format", help="table, json, csv or md (Markdown).")]
JsonOption = Annotated[bool, typer.Option("--json", help="The same as --format json.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Overwrite files that are there.")]
PlotOption = Annotated[
    Path | None, typer.Option(help="Folder for figures, PNG and SVG: latency against batch, memory, roofline.")
]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda, cuda:N, or auto: a GPU where there is one.")]
ThreadsOption = Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: every core.")]


def show_records(records: list, format_: str, plot: Path | None, force: bool, console: Any) -> None:
    """Prints records and draws their figures."""
    from sp_fast.bench.formats import FORMATS

    if not records:
        console.print("no row was finished", style="yellow")
        return
    sys.stdout.write(FORMATS[format_](records))
    if plot is not None:
        from sp_fast.bench import field_plots, plots

        field = [r for r in records if r.benchmark == "projectors"]
        drawn = field_plots.plot(field, plot, force) if field else []
        projector = [r for r in records if r.benchmark == "projector"]
        drawn += plots.plot(projector, plot, force) if projector or not field else []
        for path in drawn:
            console.print(f"wrote {path}", highlight=False)


def format_name(format_: Format, as_json: bool) -> str:
    """Of formats.FORMATS."""
    return "json" if as_json else format_.value


def thread_count(threads: int | None) -> int:
    """Every core, unless it is said."""
    return threads or len(os.sched_getaffinity(0))


def usable_device(name: str) -> str:
    """Raises ConfigError for one that torch does not know or cannot reach."""
    import torch

    from sp_fast.bench.environment import check_device

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    check_device(name)
    return name
