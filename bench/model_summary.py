"""A model's records by case: how much faster than the official form, and what LLaVA-SP costs over LLaVA-1.5."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from sp_fast.bench.model_cases import IMPLEMENTATIONS, LLAVA, SP_FAST, SP_REFERENCE, STAGES
from sp_fast.bench.record import Record


@dataclass(frozen=True)
class ModelRow:
    """One case: ours of each run and heat, and a record of each of the others."""

    ours: dict[tuple[str, int], Record]
    others: dict[str, Record]

    @property
    def any(self) -> Record:
        return next(iter([*self.ours.values(), *self.others.values()]))

    @property
    def our(self) -> Record | None:
        """Ours, as it ran beside the official form."""
        return self._beside(SP_REFERENCE) or next(iter(self.ours.values()), None)

    @property
    def records(self) -> dict[str, Record]:
        """One record for each implementation, in the order of a table."""
        found = {**({SP_FAST: self.our} if self.our else {}), **self.others}
        return {name: found[name] for name in IMPLEMENTATIONS if name in found}

    @property
    def speedup(self) -> float | None:
        """Over the official form, which computes the same: its time in ours."""
        return self._ratio(SP_REFERENCE)

    @property
    def cost(self) -> float | None:
        """Of LLaVA-SP over LLaVA-1.5, another model: our time in its."""
        ratio = self._ratio(LLAVA)
        return None if ratio is None else 1 / ratio

    def to_dict(self) -> dict[str, Any]:
        def rounded(value: float | None) -> float | None:
            return None if value is None else round(value, 3)

        return {
            "case": self.any.case, "speedup_over_official_form": rounded(self.speedup),
            "time_over_llava_1_5": rounded(self.cost),
        }  # fmt: skip

    def _beside(self, name: str) -> Record | None:
        """Ours of the heat in which another took turns with it."""
        other = self.others.get(name)
        return self.ours.get((other.run, other.heat)) if other else None

    def _ratio(self, name: str) -> float | None:
        ours, other = self._beside(name), self.others.get(name)
        return other.ms_p50 / ours.ms_p50 if ours and ours.ms_p50 and other.ms_p50 else None


def rows(records: Iterable[Record]) -> list[ModelRow]:
    """One row a case, on its device, as they came; stages in the order of a forward."""
    found: dict[tuple, ModelRow] = {}
    for record in records:
        row = found.setdefault((record.case, record.device, record.text_width, record.spatial_width), ModelRow({}, {}))
        if record.implementation == SP_FAST:
            row.ours[record.run, record.heat] = record
        else:
            row.others[record.implementation] = record
    return sorted(found.values(), key=lambda row: (row.any.batch, STAGES.index(row.any.stage)))


def roof_tokens_per_second(record: Record) -> float | None:
    """What the limit of the machine would give."""
    if record.tokens_per_second is None or not record.roof_share:
        return None
    return record.tokens_per_second / record.roof_share
