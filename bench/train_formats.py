"""Training steps as tables: a line an implementation, with the parts of a step and where its memory goes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from sp_fast.bench.implementations import BASELINES, OURS, YARDSTICK
from sp_fast.bench.model_cases import SP_FAST, SP_REFERENCE
from sp_fast.bench.record import Record
from sp_fast.bench.summary import LABELS as PROJECTOR_LABELS
from sp_fast.bench.tables import Section, energy, figure, percent, spread
from sp_fast.bench.train_cases import FACTORED

LABELS = {
    **PROJECTOR_LABELS,
    FACTORED: "sp_fast, factored AdamW",
    SP_FAST: "sp_fast",
    SP_REFERENCE: "official form",
}
OFFICIAL = (YARDSTICK, SP_REFERENCE)
PLAIN = (*BASELINES, SP_REFERENCE)  # what is there without this package
OWN = (OURS, FACTORED, SP_FAST)
OPTIMIZER = (
    "A step lets the last gradients go, runs forward and backward, and updates with torch's fused AdamW (lr 1e-3, no "
    "decay); parameters, gradients and states are of the row's dtype. The optimizer's time is the first and the last."
)


@dataclass(frozen=True)
class TrainRow:
    """One case: every record of it, in the order in which it was measured."""

    records: list[Record]

    @property
    def official(self) -> Record | None:
        return next((r for r in self.records if r.implementation in OFFICIAL), None)

    def shown(self) -> list[Record]:
        """One of each implementation, the baselines first: that which took turns with the official form, if any did."""
        found: dict[str, Record] = {}
        for record in self.records:
            if record.implementation not in found or self._beside(record, self.official):
                found[record.implementation] = record
        return [found[name] for name in LABELS_IN_ORDER if name in found]

    def speedup(self, name: str, over: str) -> float | None:
        """Time of ``over`` in that of ``name``, where they took turns."""
        pairs = [
            (other.ms_p50, record.ms_p50)
            for record in self.records
            for other in self.records
            if (record.implementation, other.implementation) == (name, over) and self._beside(record, other)
        ]
        return next((theirs / ours for theirs, ours in pairs if theirs and ours), None)

    def over_official(self, name: str) -> float | None:
        return self.speedup(name, self.official.implementation) if self.official else None

    def over_strongest(self, name: str) -> tuple[float, str] | None:
        """The least of the speed-ups over what is there without this package, and over what."""
        found = {other: self.speedup(name, other) for other in PLAIN}
        return min(((ratio, other) for other, ratio in found.items() if ratio), default=None)

    def to_dict(self) -> dict[str, Any]:
        """Of ours."""
        found: dict[str, Any] = {"case": self.records[0].case, "mfu": {r.implementation: mfu(r) for r in self.shown()}}
        for name in {r.implementation: None for r in self.records if r.implementation in OWN}:
            strongest, official = self.over_strongest(name), self.over_official(name)
            found[name] = {
                "speedup_over_official_form": official and round(official, 3),
                "speedup": strongest and round(strongest[0], 3),
                "best_baseline": strongest and strongest[1],
            }
        return found

    def _beside(self, record: Record, other: Record | None) -> bool:
        return other is not None and (record.run, record.heat) == (other.run, other.heat)


LABELS_IN_ORDER = (*PLAIN, *OWN)


def rows(records: Iterable[Record]) -> list[TrainRow]:
    """One row a case and its widths, as they came."""
    found: dict[tuple, TrainRow] = {}
    for r in records:
        key = (r.case, r.device, r.vision_width, r.spatial_width, r.text_width)
        found.setdefault(key, TrainRow([])).records.append(r)
    return list(found.values())


def mfu(record: Record) -> float | None:
    """The FLOP that a step needs over its time, as a share of the matrix products' rate in the same run."""
    peak = record.peaks.get("tflops", {}).get(record.dtype)
    return record.tflops / peak if record.tflops and peak else None


def long_sections(records: list[Record]) -> list[Section]:
    """For a terminal."""
    return [section for row in rows(records) for section in _sections(row)]


def wide_sections(records: list[Record]) -> list[Section]:
    """For a README: the same, a step has one line an implementation."""
    return long_sections(records)


def notes(records: list[Record]) -> list[str]:
    """What the tables do not say by themselves."""
    return [OPTIMIZER, *dict.fromkeys(f"{r.case}, {LABELS[r.implementation]}: {r.note}" for r in records if r.note)]


def cases(records: list[Record]) -> list[dict[str, Any]]:
    """Each case's speed-ups."""
    return [row.to_dict() for row in rows(records)]


def _sections(row: TrainRow) -> list[Section]:
    title, shown = _title(row.records[0]), row.shown()
    columns = [
        "", "", "a step, ms", "p20-p80", "forward", "backward", "optimizer", "its share", "tokens/s", "of roof", "MFU",
        "over the official form", "over the strongest",
    ]  # fmt: skip
    times = Section(f"{title}: time", columns, [_time(row, r) for r in shown if r.ms_p50])
    columns = ["", "", "weights", "gradients", "optimizer's states", "saved", "beyond, at the peak", "peak"]
    memory = Section(f"{title}: memory, MiB", columns, [_memory(r) for r in shown if r.peak_mib is not None])
    return [times, memory, energy(title, [(f"b{r.batch}", LABELS[r.implementation], r) for r in shown])]


def _time(row: TrainRow, r: Record) -> list[str]:
    official = None if r is row.official else row.over_official(r.implementation)
    strongest = row.over_strongest(r.implementation) if r.implementation in OWN else None
    share = r.optimizer_ms_p50 / r.ms_p50 if r.optimizer_ms_p50 else None
    return [
        f"b{r.batch}", LABELS[r.implementation], figure(r.ms_p50), spread(r), figure(r.forward_ms_p50),
        figure(r.backward_ms_p50), figure(r.optimizer_ms_p50), percent(share),
        figure(r.tokens_per_second), percent(r.roof_share), percent(mfu(r)),
        "-" if official is None else f"{official:.2f}x",
        "-" if strongest is None else f"{strongest[0]:.2f}x ({LABELS[strongest[1]]})",
    ]  # fmt: skip


def _memory(r: Record) -> list[str]:
    parts = (r.weights_mib, r.gradients_mib, r.optimizer_mib, r.saved_mib, r.temporary_mib, r.peak_mib)
    return [f"b{r.batch}", LABELS[r.implementation], *("-" if mib is None else f"{mib:,.0f}" for mib in parts)]


def _title(r: Record) -> str:
    what = f"projector's step, {r.variant}, {r.dtype}, batch {r.batch}"
    if r.llm is None:
        return what
    length = f"{r.image_tokens} image and {r.prompt_tokens} text tokens a prompt"
    return (
        f"LoRA step (rank {r.lora_rank}), {r.llm}, {r.tower}, {r.variant}, {r.dtype}, {r.attention} attention, "
        f"{r.mode}, batch {r.batch}, {length}"
    )
