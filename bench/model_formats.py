"""A model's results as tables: a line an implementation for a terminal, a column each for Markdown."""

from __future__ import annotations

from typing import Any

from sp_fast.bench.model_cases import LLAVA, SP_FAST, SP_REFERENCE
from sp_fast.bench.model_summary import ModelRow, roof_tokens_per_second, rows
from sp_fast.bench.record import Record
from sp_fast.bench.tables import Section, energy, figure, memory, percent, spread

LABELS = {SP_FAST: "sp_fast", SP_REFERENCE: "official form", LLAVA: "LLaVA-1.5"}
STAGES = {"ttft": "TTFT", "decode": "decode (TPOT)", "end_to_end": "E2E"}  # in lmms-eval's words
OTHER_MODEL = (
    "LLaVA-1.5 is another model: it has no spatial tokens, and runs in transformers' own code, which runs every layer "
    "of the tower. LLaVA-SP's time over its time is a cost, never a speed-up. It is judged for being finite alone."
)


def long_sections(records: list[Record]) -> list[Section]:
    """For a terminal."""
    found = []
    columns = ["", "", "p50, ms", "p20-p80", "tokens/s", "roof, ms", "tokens/s there", "of roof", "bound", ""]
    for title, group in _groups(records):
        lines = [_long_row(row, name) for row in group for name, r in row.records.items() if r.ms_p50]
        found += [Section(f"{title}: time", columns, lines), memory(title, _named(group)), energy(title, _named(group))]
    return found


def wide_sections(records: list[Record]) -> list[Section]:
    """For a README."""
    found = []
    for title, group in _groups(records):
        names = [name for name in LABELS if any(name in row.records for row in group)]
        columns = [
            "stage", "batch", *(f"{_label(name, group)}, ms" for name in names), "p20-p80", "tokens/s", "roof, ms",
            "tokens/s there", "of roof", "bound", "speed-up over the official form", "LLaVA-SP / LLaVA-1.5",
        ]  # fmt: skip
        time = Section(f"{title}: time (p50)", columns, [_wide_row(row, names) for row in group])
        found += [time, memory(title, _named(group)), energy(title, _named(group))]
    return found


def notes(records: list[Record]) -> list[str]:
    """What the tables do not say by themselves."""
    said = {f"{r.case}, {LABELS[r.implementation]}: {r.note}": None for r in records if r.note}
    return [*([OTHER_MODEL] if any(r.implementation == LLAVA for r in records) else []), *said]


def cases(records: list[Record]) -> list[dict[str, Any]]:
    """Each case's speed-up over the official form, and its cost over LLaVA-1.5."""
    return [row.to_dict() for row in rows(records)]


def _long_row(row: ModelRow, name: str) -> list[str]:
    r = row.records[name]
    comparisons = {
        SP_FAST: None if row.speedup is None else f"{row.speedup:.2f}x as fast as the official form",
        LLAVA: None if row.cost is None else f"another model: LLaVA-SP takes {row.cost:.2f}x its time",
    }
    return [
        _case(r), f"{LABELS[name]}, {r.image_tokens} image tokens", figure(r.ms_p50), spread(r),
        figure(r.tokens_per_second), figure(r.roof_ms), figure(roof_tokens_per_second(r)), percent(r.roof_share),
        r.bound or "-", comparisons.get(name) or "",
    ]  # fmt: skip


def _wide_row(row: ModelRow, names: list[str]) -> list[str]:
    r, our = row.any, row.our or row.any
    times = [row.records[name].ms_p50 if name in row.records else None for name in names]
    ratios = ["-" if value is None else f"{value:.2f}x" for value in (row.speedup, row.cost)]
    return [
        STAGES.get(r.stage, r.stage), str(r.batch), *map(figure, times), spread(our), figure(our.tokens_per_second),
        figure(our.roof_ms), figure(roof_tokens_per_second(our)), percent(our.roof_share), our.bound or "-", *ratios,
    ]  # fmt: skip


def _case(record: Record) -> str:
    return f"{STAGES.get(record.stage, record.stage)} b{record.batch}"


def _label(name: str, group: list[ModelRow]) -> str:
    tokens = next(row.records[name].image_tokens for row in group if name in row.records)
    return f"{LABELS[name]} ({tokens} image tokens)"


def _named(group: list[ModelRow]) -> list[tuple[str, str, Record]]:
    return [(_case(r), LABELS[name], r) for row in group for name, r in row.records.items()]


def _groups(records: list[Record]) -> list[tuple[str, list[ModelRow]]]:
    """Rows on the same model, dtype, attention and mode, with a title."""
    found: dict[str, list[ModelRow]] = {}
    for row in rows(records):
        r = row.any
        lengths = f"{r.prompt_tokens} text tokens beside the image, {r.new_tokens} new"
        title = f"{r.llm}, {r.tower}, {r.variant}, {r.dtype}, {r.attention} attention, {r.mode}; {lengths}"
        found.setdefault(title, []).append(row)
    return list(found.items())
