"""The gate of a whole model: no figure without results that were judged in the same run.

LLaVA-SP's image tokens and the logits of several steps of generation are held against float64 on the same weights, ours
by the accuracy rule with the official form in the same dtype as its yardstick. Float64 runs one layer at a time in the
memory that the dtype itself takes (model_exact.py), so there is no size at which another rule would begin. In float32
the tokens that both choose have to be equal; in lower precision, where two logits can be closer than rounding, a
difference is told in a note and no fault.

LLaVA-1.5 is another model and has no float64 here: its results have to be finite and of the right shape, no more.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sp_fast.bench.gate import Gate, GateError, Results, Verdict
from sp_fast.bench.model_cases import LLAVA, SP_FAST, SP_REFERENCE

COMPUTED = ("spatial_tokens", "patch_tokens", "logits")


class ModelGate(Gate):
    """Results of the cases on one set of weights."""

    def __init__(self, dtype: str) -> None:
        super().__init__(dtype, (SP_FAST,), SP_REFERENCE)
        self._chosen: dict[Any, Tensor] = {}  # tokens of the yardstick

    def expect(self, case: Any, exact: Results | Exception) -> None:
        """In the order in which they are computed, so that the first that is wrong is named."""
        if not isinstance(exact, Exception):
            exact = {key: exact[key] for key in COMPUTED if key in exact}
        super().expect(case, exact)

    def _judge(self, name: str, case: Any, found: Results) -> Verdict:
        tokens = found.pop("greedy", None)
        if tokens is None:
            raise GateError(f"not judged: {name} has generated nothing")
        if name == LLAVA:
            return Verdict(None, None, _not_finite(found))
        verdict = super()._judge(name, case, found)
        if name == SP_REFERENCE:
            self._chosen[case] = tokens
        elif verdict.withheld is None and (different := _first_difference(tokens, self._chosen[case])) is not None:
            said = f"greedy tokens differ from the official form's, first at new token {different + 1}"
            if self._dtype == torch.float32:
                return Verdict(verdict.error, verdict.reference_error, f"accuracy: {said}")
            return Verdict(verdict.error, verdict.reference_error, None, f"{said}: a choice within rounding")
        return verdict


def _not_finite(found: Results) -> str | None:
    wrong = [name for name, tensor in found.items() if not tensor.isfinite().all()]
    return f"accuracy: {', '.join(wrong)} are not finite" if wrong else None


def _first_difference(tokens: Tensor, others: Tensor) -> int | None:
    """The first step, in any prompt, at which ``[B, N]`` tokens differ."""
    steps = (tokens != others).any(dim=0).nonzero()
    return int(steps[0]) if len(steps) else None
