"""The projector's results as tables: a line an implementation for a terminal, a column each for Markdown."""

from __future__ import annotations

from typing import Any

from sp_fast.bench import summary
from sp_fast.bench.implementations import OURS, YARDSTICK
from sp_fast.bench.record import Record
from sp_fast.bench.summary import LABELS, Row
from sp_fast.bench.tables import Section, energy, figure, memory, percent, spread


def long_sections(records: list[Record]) -> list[Section]:
    """For a terminal."""
    found = []
    for title, rows in _groups(records):
        found += [
            Section(f"{title}: time, ms", ["", "", "p50", "p20-p80", "clock", "of roof", ""], _long_rows(rows)),
            Section(
                f"{title}: error against float64, largest of all results", ["", LABELS[OURS], LABELS[YARDSTICK], ""],
                _error_rows(rows),
            ),
            memory(title, _named(rows)),
            energy(title, _named(rows)),
        ]  # fmt: skip
    return found


def wide_sections(records: list[Record]) -> list[Section]:
    """For a README."""
    found = []
    for title, rows in _groups(records):
        names = summary.present(rows)
        time = Section(f"{title}: time, ms (p50)", _time_columns(names), _time_rows(rows, names))
        found += [time, memory(title, _named(rows)), energy(title, _named(rows))]
    return found


def notes(records: list[Record]) -> list[str]:
    """Nothing beyond the tables."""
    return []


def cases(records: list[Record]) -> list[dict[str, Any]]:
    """Each case's best baseline and speed-up."""
    return [row.to_dict() for row in summary.rows(records)]


def _case(record: Record) -> str:
    return f"{record.stage} {record.direction} b{record.batch}"


def _named(rows: list[Row]) -> list[tuple[str, str, Record]]:
    return [(_case(r), LABELS[name], r) for row in rows for name, r in row.records.items()]


def _time_columns(names: list[str]) -> list[str]:
    measured = [LABELS[name] for name in names]
    return ["stage", "direction", "batch", *measured, "p20-p80", "roof", "share of roof", "best baseline", "speed-up"]


def _time_rows(rows: list[Row], names: list[str]) -> list[list[str]]:
    lines = []
    for row in rows:
        r, our = row.any, row.our
        times = [row.records[name].ms_p50 if name in row.records else None for name in names]
        lines.append([
            r.stage, r.direction, str(r.batch), *map(figure, times), spread(our),
            figure(next((x.roof_ms for x in row.records.values() if x.roof_ms), None)),
            percent(our.roof_share if our else None),
            LABELS[row.best] if row.best else "-",
            "-" if row.speedup is None else f"{row.speedup:.2f}x",
        ])  # fmt: skip
    return lines


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
            line = [LABELS[name], figure(r.ms_p50), spread(r), r.timer or "", percent(r.roof_share), note]
            lines.append([_case(r), *line])
        if lines and (roof := next((r for r in row.records.values() if r.roof_ms), None)):
            lines.append([_case(roof), f"roof ({roof.bound})", figure(roof.roof_ms), "", "", "100%", ""])
    return lines


def _error_rows(rows: list[Row]) -> list[list[str]]:
    """Only of what was judged and not timed: elsewhere a figure stands for its passed gate."""
    judged = [row.our for row in rows if row.our and row.our.ms_p50 is None and row.our.error is not None]
    return [
        [_case(r), f"{r.error:.1e}", f"{r.reference_error:.1e}", "wrong" if r.withheld else "agrees"] for r in judged
    ]


def _groups(records: list[Record]) -> list[tuple[str, list[Row]]]:
    """Rows by variant and dtype, with a title."""
    rows = summary.rows(records)
    keys = dict.fromkeys((row.any.variant, row.any.dtype) for row in rows)
    return [(f"{v}, {d}", [row for row in rows if (row.any.variant, row.any.dtype) == (v, d)]) for v, d in keys]
