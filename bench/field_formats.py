"""The field as tables: a line a projector, with what it gives, holds and takes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sp_fast.bench.field_projectors import PROJECTORS
from sp_fast.bench.field_rows import Published
from sp_fast.bench.field_subject import BUILT
from sp_fast.bench.memory import MIB
from sp_fast.bench.record import Record
from sp_fast.bench.tables import Section, energy, figure, percent, spread

LABELS = {BUILT: "projector"}
COLUMNS = [
    "", "tokens", "parameters", "weights, MiB", "GFLOP", "p50, ms", "p20-p80", "of roof", "bound", "peak, MiB",
    "error",
]  # fmt: skip
JUDGED = (
    "Each projector is measured alone, in its process; none takes turns with another. Errors are against float64 on "
    "the same weights: ours keep to the accuracy rule with the official form as its yardstick, the others to half of "
    "their digits."
)


def label(name: str) -> str:
    """As a reader knows it; a name that is no longer in the field stands for itself."""
    return PROJECTORS[name].label if name in PROJECTORS else name


def long_sections(records: list[Record]) -> list[Section]:
    """For a terminal."""
    found = []
    for title, group in groups(records):
        timed = [r for r in group if r.ms_p50]
        named = [(label(r.variant), "", r) for r in timed]
        found += [Section(f"{title}: the field", COLUMNS, [_line(r) for r in timed]), energy(title, named)]
    return found


def wide_sections(records: list[Record]) -> list[Section]:
    """For a README: the same, a projector has one line."""
    return long_sections(records)


def notes(records: list[Record]) -> list[str]:
    """What judges, and what others print of the same projectors."""
    shown = [name for name in dict.fromkeys(r.variant for r in records) if name in PROJECTORS]
    said = [f"{label(name)}: {source(name)}" for name in shown]
    return [JUDGED, *said, *(f"{r.case}: {r.note}" for r in records if r.note)]


def source(name: str) -> str:
    """Where its shapes are from, and the counts that are printed of it."""
    row = PROJECTORS[name]
    counts = [f"{_printed(p)} printed in {p.source}" for p in row.published]
    return "; ".join(part for part in (f"shapes from {row.source}", *counts, row.remark) if part)


def cases(records: list[Record]) -> list[dict[str, Any]]:
    """Each projector's figures, and where they come from."""
    return [
        {
            "case": r.case, "projector": r.variant, "label": label(r.variant), "tokens": r.image_tokens,
            "parameters": r.parameters, "weight_bytes": r.weight_bytes, "ms_p50": r.ms_p50 and round(r.ms_p50, 4),
            "source": source(r.variant) if r.variant in PROJECTORS else None,
        }
        for r in records
    ]  # fmt: skip


def groups(records: Iterable[Record]) -> list[tuple[str, list[Record]]]:
    """Projectors on the same features, with a title."""
    found: dict[str, list[Record]] = {}
    for r in records:
        found.setdefault(f"{r.direction}, batch {r.batch}, {r.dtype}", []).append(r)
    return list(found.items())


def _line(r: Record) -> list[str]:
    return [
        label(r.variant), str(r.image_tokens), f"{r.parameters / 1e6:,.2f} M", figure(r.weight_bytes / MIB),
        figure(r.flop / 1e9), figure(r.ms_p50), spread(r), percent(r.roof_share), r.bound or "-", figure(r.peak_mib),
        "-" if r.error is None else f"{r.error:.1e}",
    ]  # fmt: skip


def _printed(published: Published) -> str:
    """To its own last digit."""
    return f"{published.count / 1e6:.0f} M" if published.unit <= 1e6 else f"{published.count / 1e9:.2f} B"
