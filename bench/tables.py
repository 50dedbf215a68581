"""Tables for a terminal and for Markdown, and the rows that every benchmark has: memory, energy, the machine."""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

from sp_fast.bench.record import Record

Named = Iterable[tuple[str, str, Record]]  # a case and an implementation, as a reader names them


class Section(NamedTuple):
    """One table."""

    title: str
    columns: list[str]
    lines: list[list[str]]


def figure(value: float | None) -> str:
    """Three significant digits."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def percent(share: float | None) -> str:
    """Of a share."""
    return "-" if share is None else f"{share:.0%}"


def spread(record: Record | None) -> str:
    """p20 to p80, ms."""
    return f"{figure(record.ms_p20)}-{figure(record.ms_p80)}" if record and record.ms_p50 else "-"


def memory(title: str, records: Named) -> Section:
    """MiB, of what was measured."""
    lines = []
    for case, label, r in records:
        if r.peak_mib is not None:
            parts = (r.weights_mib, r.saved_mib, r.gradients_mib, r.temporary_mib, r.peak_mib)
            lines.append([case, label, *(f"{mib:,.0f}" for mib in parts)])
    columns = ["", "", "weights", "saved", "gradients", "temporary", "peak"]
    return Section(f"{title}: memory, MiB", columns, lines)


def energy(title: str, records: Named) -> Section:
    """Where the driver gives it."""
    words = {True: "yes", False: "no", None: "-"}
    lines = [
        [case, label, f"{r.energy_mj:,.1f}", figure(r.power_w), str(r.sm_mhz or "-"), words[r.throttled]]
        for case, label, r in records
        if r.energy_mj is not None
    ]
    return Section(f"{title}: energy", ["", "", "mJ a run", "W", "SM MHz", "throttled"], lines)


def where(records: list[Record]) -> list[str]:
    """Machine, versions, shapes and the measured peaks: what the figures stand on."""
    lines = list(dict.fromkeys(map(_machine, records)))
    widths = dict.fromkeys((r.vision_width, r.spatial_width, r.text_width) for r in records)
    lines += [f"widths C={c}, D={d}, H={h}" for c, d, h in widths]
    for peaks in list({r.run: r.peaks for r in records if r.peaks}.values())[:3]:
        products = ", ".join(f"{dtype} product {rate:.3g} TFLOP/s" for dtype, rate in peaks["tflops"].items())
        lines.append(
            f"measured peaks: read {peaks['read_gbps']:.4g} GB/s, copy {peaks['copy_gbps']:.4g} GB/s, {products}"
        )
    return lines


def _machine(record: Record) -> str:
    found, threads = record.environment, f", {record.threads} threads" if record.device == "cpu" else ""
    return f"{found.get('machine')}{threads}, torch {found.get('torch')}, commit {found.get('commit')}"


def rich_table(section: Section) -> Table:
    """Each case is named once, and parted from the next."""
    title, columns, lines = section
    table = Table(box=box.SIMPLE, title=title, title_justify="left")
    for column in columns:
        table.add_column(column, no_wrap=True)
    for line, before in zip(lines, [None, *lines], strict=False):
        same = before is not None and line[0] == before[0]
        if before is not None and not same:
            table.add_section()
        table.add_row("" if same else line[0], *line[1:])
    return table


def string_console() -> Console:
    """Renders into a string as stdout would show it; wide where nobody's terminal sets a width."""
    terminal = Console()
    if terminal.is_terminal:
        return Console(file=io.StringIO(), width=terminal.width, force_terminal=True)
    return Console(file=io.StringIO(), width=200)


def markdown_lines(columns: list[str], rows: list[list[str]]) -> list[str]:
    """A table of Markdown."""
    return [f"| {' | '.join(line)} |" for line in (columns, ["---"] * len(columns), *rows)]
