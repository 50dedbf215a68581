"""A study's results as tables, for a terminal or in Markdown."""

from __future__ import annotations

from sp_fast.bench.tables import Section, markdown_lines, rich_table
from sp_fast.training.study.arms import BASELINE
from sp_fast.training.study.summary import Spread, Summary

_WIDTH = 130  # of the widest table: a terminal may wrap its lines, but no figure is cut


def sections(summary: Summary) -> list[Section]:
    """Shares of right answers by type, and how far they are beyond those of the baseline, paired by seed; in %."""
    columns = ["", *summary.columns, "seeds", "parameters", "spatial"]
    chance = ["guessing", *(f"{summary.chance[column]:.1%}"[:-1] for column in summary.columns), "-", "-", "-"]
    lines = []
    for row in summary.rows:
        figures = [_text(row.spread(column)) for column in summary.columns]
        counts = (len(row.seeds), row.parameters["projector"], row.parameters["spatial"])
        lines.append([row.arm, *figures, *(f"{count:,}" for count in counts)])
    found = [Section("right answers, %: mean and sample standard deviation over seeds", columns, [chance, *lines])]
    if (baseline := summary.baseline) is not None and len(summary.rows) > 1:
        beyond = [
            [row.arm, *(_text(row.beyond(baseline, column), "+") for column in summary.columns)]
            for row in summary.rows
            if row is not baseline
        ]
        title = f"beyond {BASELINE}, percentage points, paired by seed"
        found.append(Section(title, ["", *summary.columns], beyond))
    return found


def check_lines(summary: Summary) -> list[str]:
    """A sentence for each of the two checks."""
    return [
        f"{'yes' if check.holds else 'NO'}: {check.name} ({', '.join(f'{k} {v}' for k, v in check.by_type.items())})"
        for check in summary.checks()
    ]


def print_study(summary: Summary) -> None:
    """On stdout."""
    from rich.console import Console

    console = Console()
    console.width = max(console.width, _WIDTH)
    for section in sections(summary):
        console.print(rich_table(section))
    for line in check_lines(summary):
        console.print(line, highlight=False, soft_wrap=True)


def markdown(summary: Summary) -> str:
    """For a README."""
    parts = [
        "\n".join([f"{section.title}:", "", *markdown_lines(section.columns, section.lines)])
        for section in sections(summary)
    ]
    return "\n\n".join([*parts, "\n".join(f"* {line}" for line in check_lines(summary))])


def _text(spread: Spread | None, sign: str = "") -> str:
    """In hundredths."""
    if spread is None:
        return "-"
    mean = f"{100 * spread.mean:{sign}.1f}"
    return mean if spread.deviation is None else f"{mean} ± {100 * spread.deviation:.1f}"
