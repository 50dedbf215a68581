"""Records gathered by case: who is the strongest baseline, and how much faster we are than it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sp_fast.bench.cases import DIRECTIONS, STAGES
from sp_fast.bench.implementations import BASELINES, IMPLEMENTATIONS, OURS
from sp_fast.bench.record import Record

LABELS = {
    OURS: "sp_fast",
    "reference": "official form",
    "reference_benchmark": "official, cudnn.benchmark",
    "channels_last": "channels last",
    "channels_last_benchmark": "channels last, cudnn.benchmark",
    "linear": "F.linear [D, K]",
    "matmul": "matmul [K, D]",
    "compiled": "torch.compile",
}


@dataclass(frozen=True)
class Row:
    """One case: a record of every baseline, and ours of each run and heat."""

    baselines: dict[str, Record]
    ours: dict[tuple[str, int], Record]

    @property
    def any(self) -> Record:
        return next(iter([*self.ours.values(), *self.baselines.values()]))

    @property
    def speedups(self) -> dict[str, float]:
        """How many times our time each baseline takes, taken within its heat; only where both have a figure."""
        ratios = {}
        for name, baseline in self.baselines.items():
            ours = self.ours.get((baseline.run, baseline.heat))
            if ours and ours.ms_p50 and baseline.ms_p50:
                ratios[name] = baseline.ms_p50 / ours.ms_p50
        return ratios

    @property
    def best(self) -> str | None:
        """The strongest baseline: beside ours where we have a figure, else by its own time."""
        if self.speedups:
            return min(self.speedups, key=self.speedups.__getitem__)
        timed = {name: record.ms_p50 for name, record in self.baselines.items() if record.ms_p50}
        return min(timed, key=timed.__getitem__) if timed else None

    @property
    def speedup(self) -> float | None:
        """Against the strongest baseline: the only speed-up that is quoted."""
        return self.speedups.get(self.best) if self.best else None

    @property
    def our(self) -> Record | None:
        """Ours, as it ran beside the strongest baseline."""
        best = self.baselines.get(self.best or "")
        beside = self.ours.get((best.run, best.heat)) if best else None
        return beside or next(iter(self.ours.values()), None)

    @property
    def records(self) -> dict[str, Record]:
        """One record for each implementation, in the order of a table: baselines, then ours."""
        found = {name: self.baselines[name] for name in BASELINES if name in self.baselines}
        return {**found, **({OURS: self.our} if self.our else {})}

    def to_dict(self) -> dict[str, Any]:
        speedup = self.speedup
        return {
            "case": self.any.case,
            "best_baseline": self.best,
            "speedup": None if speedup is None else round(speedup, 3),
            "speedups": {name: round(ratio, 3) for name, ratio in self.speedups.items()},
        }


def rows(records: Iterable[Record]) -> list[Row]:
    """One row a case and shape, in a reader's order: by variant and dtype as they came, stage, direction, batch."""
    records = list(records)
    found: dict[tuple, Row] = {}
    for record in records:
        row = found.setdefault(_shape(record), Row({}, {}))
        if record.implementation == OURS:
            row.ours[record.run, record.heat] = record
        else:
            row.baselines[record.implementation] = record
    groups = list(dict.fromkeys((r.variant, r.dtype) for r in records))

    def place(row: Row) -> tuple:
        r = row.any
        return groups.index((r.variant, r.dtype)), STAGES.index(r.stage), DIRECTIONS.index(r.direction), r.batch

    return sorted(found.values(), key=place)


def _shape(record: Record) -> tuple:
    """The case with its widths, on its device."""
    return record.case, record.device, record.grid, record.vision_width, record.spatial_width, record.text_width


def present(found: Iterable[Row]) -> list[str]:
    """The implementations of any row, in the order of a table."""
    names = {name for row in found for name in row.records}
    return [name for name in (*BASELINES, OURS) if name in names and name in IMPLEMENTATIONS]


def withheld(records: Iterable[Record], labels: Mapping[str, str] = LABELS) -> list[tuple[str, str]]:
    """What has no figure, and why; each once."""
    found = {(f"{r.case}, {labels[r.implementation]}", r.withheld): None for r in records if r.withheld}
    return list(found)
