"""Results for people and for scripts: a table on a terminal, Markdown, CSV, JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from dataclasses import asdict, fields

from rich import box
from rich.console import Console
from rich.table import Table

from sp_fast.bench import summary
from sp_fast.bench.compare import BAD, Change
from sp_fast.bench.implementations import OURS, YARDSTICK
from sp_fast.bench.record import Record
from sp_fast.bench.summary import LABELS, Row


def _ms(value: float | None) -> str:
    """Three significant digits."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _time_rows(rows: list[Row], names: list[str]) -> list[list[str]]:
    lines = []
    for row in rows:
        r, our = row.any, row.our
        times = [row.records[name].ms_p50 if name in row.records else None for name in names]
        share = our.roof_share if our else None
        spread = f"{_ms(our.ms_p20)}-{_ms(our.ms_p80)}" if our and our.ms_p50 else "-"
        lines.append([
            r.stage, r.direction, str(r.batch), *map(_ms, times), spread,
            _ms(next((x.roof_ms for x in row.records.values() if x.roof_ms), None)),
            "-" if share is None else f"{share:.0%}",
            LABELS[row.best] if row.best else "-",
            "-" if row.speedup is None else f"{row.speedup:.2f}x",
        ])  # fmt: skip
    return lines


def _time_columns(names: list[str]) -> list[str]:
    measured = [LABELS[name] for name in names]
    return ["stage", "direction", "batch", *measured, "p20-p80", "roof", "share of roof", "best baseline", "speed-up"]


def _case(record: Record) -> str:
    return f"{record.stage} {record.direction} b{record.batch}"


def _long_rows(rows: list[Row]) -> list[list[str]]:
    """One line an implementation: what a terminal is wide enough for."""
    lines = []
    for row in rows:
        for name, r in row.records.items():
            if r.ms_p50 is None:
                continue
            ratio = row.speedups.get(name)
            note = f"{row.speedup:.2f}x against {LABELS[row.best]}" if name == OURS and row.speedup else ""
            if ratio is not None:
                note = f"{ratio:.2f}x our time"
            share = "-" if r.roof_share is None else f"{r.roof_share:.0%}"
            spread = f"{_ms(r.ms_p20)}-{_ms(r.ms_p80)}"
            lines.append([_case(r), LABELS[name], _ms(r.ms_p50), spread, r.timer or "", share, note])
        if lines and (roof := next((r for r in row.records.values() if r.roof_ms), None)):
            lines.append([_case(roof), f"roof ({roof.bound})", _ms(roof.roof_ms), "", "", "100%", ""])
    return lines


_LONG_COLUMNS = ["", "", "p50", "p20-p80", "clock", "of roof", ""]


def _error_rows(rows: list[Row]) -> list[list[str]]:
    """Only of what was judged and not timed: elsewhere a figure stands for its passed gate."""
    judged = [row.our for row in rows if row.our and row.our.ms_p50 is None and row.our.error is not None]
    return [
        [_case(r), f"{r.error:.1e}", f"{r.reference_error:.1e}", "wrong" if r.withheld else "agrees"] for r in judged
    ]


_ERROR_COLUMNS = ["", LABELS[OURS], LABELS[YARDSTICK], ""]


def _memory_rows(rows: list[Row]) -> list[list[str]]:
    lines = []
    for row in rows:
        for name, r in row.records.items():
            if r.peak_mib is not None:
                parts = (r.weights_mib, r.saved_mib, r.gradients_mib, r.temporary_mib, r.peak_mib)
                lines.append([_case(r), LABELS[name], *(f"{mib:,.0f}" for mib in parts)])
    return lines


_MEMORY_COLUMNS = ["", "", "weights", "saved", "gradients", "temporary", "peak"]


def _energy_rows(rows: list[Row]) -> list[list[str]]:
    words = {True: "yes", False: "no", None: "-"}
    return [
        [_case(r), LABELS[name], f"{r.energy_mj:,.1f}", _ms(r.power_w), str(r.sm_mhz or "-"), words[r.throttled]]
        for row in rows
        for name, r in row.records.items()
        if r.energy_mj is not None
    ]


_ENERGY_COLUMNS = ["", "", "mJ a run", "W", "SM MHz", "throttled"]


def _groups(records: list[Record]) -> list[tuple[str, list[Row]]]:
    """Rows by variant and dtype, with a title."""
    rows = summary.rows(records)
    keys = dict.fromkeys((row.any.variant, row.any.dtype) for row in rows)
    return [(f"{v}, {d}", [row for row in rows if (row.any.variant, row.any.dtype) == (v, d)]) for v, d in keys]


def _where(records: list[Record]) -> list[str]:
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


def to_table(records: list[Record]) -> str:
    """For a terminal."""
    console = _console()
    for line in _where(records):
        console.print(line, highlight=False, markup=False)
    for title, rows in _groups(records):
        for kind, columns, lines in (
            ("time, ms", _LONG_COLUMNS, _long_rows(rows)),
            ("error against float64, largest of all results", _ERROR_COLUMNS, _error_rows(rows)),
            ("memory, MiB", _MEMORY_COLUMNS, _memory_rows(rows)),
            ("energy", _ENERGY_COLUMNS, _energy_rows(rows)),
        ):
            if lines:
                console.print(_rich(columns, lines, f"{title}: {kind}"))
    for what, why in summary.withheld(records):
        console.print(f"withheld: {what}: {why}", style="red", highlight=False, markup=False, soft_wrap=True)
    return console.file.getvalue()


def _rich(columns: list[str], lines: list[list[str]], title: str) -> Table:
    """Each case is named once, and parted from the next."""
    table = Table(box=box.SIMPLE, title=title, title_justify="left")
    for column in columns:
        table.add_column(column, no_wrap=True)
    for line, before in zip(lines, [None, *lines], strict=False):
        same = before is not None and line[0] == before[0]
        if before is not None and not same:
            table.add_section()
        table.add_row("" if same else line[0], *line[1:])
    return table


def _console() -> Console:
    """Renders into a string as stdout would show it; wide where nobody's terminal sets a width."""
    terminal = Console()
    if terminal.is_terminal:
        return Console(file=io.StringIO(), width=terminal.width, force_terminal=True)
    return Console(file=io.StringIO(), width=200)


def to_markdown(records: list[Record]) -> str:
    """For a README."""
    lines = [f"{line}  " for line in _where(records)]
    for title, rows in _groups(records):
        names = summary.present(rows)
        lines += ["", f"{title}: time, ms (p50)", "", *_markdown(_time_columns(names), _time_rows(rows, names))]
        if memory := _memory_rows(rows):
            lines += ["", f"{title}: memory, MiB", "", *_markdown(_MEMORY_COLUMNS, memory)]
        if energy := _energy_rows(rows):
            lines += ["", f"{title}: energy", "", *_markdown(_ENERGY_COLUMNS, energy)]
    lines += [f"- withheld: {what}: {why}" for what, why in summary.withheld(records)]
    return "\n".join(lines) + "\n"


def _markdown(columns: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (columns, ["---"] * len(columns), *rows)]


def to_csv(records: list[Record]) -> str:
    """One line a record, without what is the same everywhere."""
    columns = [f.name for f in fields(Record) if f.name not in ("environment", "peaks", "format")]
    text = io.StringIO()
    writer = csv.DictWriter(text, [*columns, "commit"], extrasaction="ignore")
    writer.writeheader()
    writer.writerows({**asdict(r), "commit": r.environment.get("commit")} for r in records)
    return text.getvalue()


def to_json(records: list[Record]) -> str:
    """One object: the records, and each case's best baseline and speed-up."""
    found = [json.loads(record.to_json()) for record in records]
    return json.dumps({"records": found, "cases": [row.to_dict() for row in summary.rows(records)]}) + "\n"


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
        [c.case, LABELS[c.implementation], _ms(c.a_ms), _ms(c.b_ms), "-" if c.ratio is None else f"{c.ratio:.3f}",
         mib(c.a_peak_mib), mib(c.b_peak_mib), c.verdict]
        for c in changes
    ]  # fmt: skip


def _changes_to_table(changes: list[Change]) -> str:
    console = _console()
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
    "md": lambda changes: "\n".join(_markdown(_CHANGE_COLUMNS, _change_rows(changes))) + "\n",
}
