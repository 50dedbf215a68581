"""Results for people: tables on a terminal."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table

from sp_fast.bench.accuracy import Comparison
from sp_fast.bench.verify import Direction, Report


def print_report(report: Report, console: Console) -> None:
    """Errors level by level, then time and memory, then the verdict."""
    request = report.request
    console.print(f"[bold]LLaVA-SP projector, {report.variant}[/], {report.parameters / 1e6:,.1f} M parameters")
    console.print(
        f"{request.dtype}, {request.device}, {report.threads} threads, batch {request.batch}; "
        f"{report.environment['machine']}, torch {report.environment['torch']}"
    )
    for label, value in report.source.items():
        console.print(f"{label.replace('_', ' ')}: {value}", highlight=False, markup=False, soft_wrap=True)
    _print_errors("Error against float64", report.forward.comparisons, console)
    if report.backward:
        _print_errors("Error of the gradients against float64 (sampled)", report.backward.comparisons, console)
    columns = ("", "official form", "sp_fast", "ratio")
    table = Table(*columns, box=box.SIMPLE, title="Time and memory", title_justify="left")
    for label, direction in (("forward, ms", report.forward), ("forward + backward, ms", report.backward)):
        if direction:
            table.add_row(label, *_times(direction))
    reference, fast = report.memory["reference_mib"], report.memory["fast_mib"]
    table.add_row("peak memory, MiB", f"{reference:,.0f}", f"{fast:,.0f}", f"{reference / fast:.2f}x")
    console.print(table)
    verdict = "[green]The results agree[/]" if report.agrees else "[red]The results disagree[/]"
    console.print(f"{verdict}: sp_fast's error at most 1.5 times the official form's, plus one ulp")


def _print_errors(title: str, comparisons: list[Comparison], console: Console) -> None:
    table = Table(box=box.SIMPLE, title=f"{title}: relative norm, and largest difference", title_justify="left")
    for column in ("", "norm: official", "sp_fast", "largest: official", "sp_fast", ""):
        table.add_column(column, no_wrap=True)
    for c in comparisons:
        errors = (c.reference_error, c.fast_error, c.reference_largest, c.fast_largest)
        table.add_row(c.name, *(f"{error:.1e}" for error in errors), "" if c.passed else "[red]disagrees[/]")
    console.print(table)


def _times(direction: Direction) -> tuple[str, str, str]:
    reference, fast = direction.median("reference"), direction.median("fast")
    return f"{reference:,.0f}", f"{fast:,.0f}", f"{reference / fast:.1f}x"
