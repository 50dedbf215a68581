"""The gate of training steps: gradients against float64, updates against AdamW on the same gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from sp_fast.bench.accuracy import compare, relative_error
from sp_fast.bench.gate import Gate, Results, Verdict

FOUND, EXPECTED = "update.", "adamw."


class TrainGate(Gate):
    """Results of one case. Outputs and gradients are judged as everywhere; of an update, ours keeps to the accuracy
    rule with the official form's as its yardstick, and all others to half of their digits."""

    def __init__(self, dtype: str, ours: tuple[str, ...], yardstick: str) -> None:
        super().__init__(dtype, ours, yardstick)
        self._updates: dict[Any, Results] = {}  # of the yardstick

    def expect(self, case: Any, exact: Results | Exception) -> None:
        """Outputs before gradients, so that the first that is wrong is named."""
        if not isinstance(exact, Exception):
            exact = {key: exact[key] for key in sorted(exact, key=lambda key: key.startswith("grad."))}
        super().expect(case, exact)

    def _judge(self, name: str, case: Any, found: Results) -> Verdict:
        updates = {key: found.pop(key) for key in list(found) if key.startswith((FOUND, EXPECTED))}
        verdict = super()._judge(name, case, found)
        if name == self._yardstick_name:
            self._updates[case] = updates
        if verdict.withheld is None and (wrong := self._wrong_update(name, case, updates)):
            return replace(verdict, withheld=wrong)
        return verdict

    def _wrong_update(self, name: str, case: Any, updates: Results) -> str | None:
        places = [key.removeprefix(EXPECTED) for key in updates if key.startswith(EXPECTED)]
        if not places:
            return "accuracy: no parameter was updated"
        for place in places:
            found, expected = updates[FOUND + place], updates[EXPECTED + place]
            error = relative_error(found, expected)
            if not error <= self._half:  # NaN, too
                return f"accuracy: AdamW's update of {place} has an error of {error:.1e}, above {self._half:.1e}"
            if name in self._ours and (said := self._outside_update(place, found - expected, case)):
                return said
        return None

    def _outside_update(self, place: str, error: Tensor, case: Any) -> str | None:
        """What breaks the accuracy rule. Each side has its own gradients, to rounding, and so an expectation of its
        own: our error is laid on the yardstick's."""
        yardstick, exact = self._updates[case][FOUND + place], self._updates[case][EXPECTED + place]
        c = compare(place, exact + error, yardstick, exact, self._dtype)
        if c.passed:
            return None
        return (
            f"accuracy: AdamW's update of {place} has an error of {c.fast_error:.1e} (largest {c.fast_largest:.1e}), "
            f"the official form's {c.reference_error:.1e} (largest {c.reference_largest:.1e}); 1.5 times that and 1 "
            "ulp are allowed"
        )
