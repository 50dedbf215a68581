"""Findings for people: tables on a terminal, and the ways out below them, in lines that can be copied."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sp_fast.doctor.findings import Report, State

STYLES = {State.OK: "green", State.NOTE: "yellow", State.PROBLEM: "red"}


def print_report(report: Report, console: Console) -> None:
    """A table for each topic, then what mends each problem or note, then the verdict."""
    width = max(len(row.name) for row in report.findings)  # the same in every table
    for topic, rows in report.topics.items():
        table = Table(box=box.SIMPLE, title=topic, title_justify="left", show_header=False)
        table.add_column(no_wrap=True, min_width=width)
        table.add_column(no_wrap=True, min_width=len(State.PROBLEM))
        table.add_column(overflow="fold")
        for row in rows:
            table.add_row(Text(row.name), Text(row.state, STYLES[row.state]), Text(row.found))
        console.print(table)
    for row in report.findings:
        if row.remedy is not None:
            console.print(Text.assemble((f"{row.name}: ", STYLES[row.state]), row.remedy), soft_wrap=True)
    problems = [row.name for row in report.findings if row.state is State.PROBLEM]
    verdict = f"[red]Needed here, but missing or wrong: {', '.join(problems)}[/]"
    console.print(verdict if problems else "[green]Nothing needed is missing[/]", soft_wrap=True)
