"""The accuracy gate: no figure without results that were judged in the same run, on the function that is timed.

Ours must keep to the accuracy rule (accuracy.py), with the official form as its yardstick. A baseline only has to
compute the same function: half of its dtype's digits agree with float64, or it is about as exact as the official form.
Held to the rule, F.linear in float32 would drop out, which is a strong opponent and less exact than a convolution.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from sp_fast.bench.accuracy import FACTOR, compare, relative_error
from sp_fast.bench.cases import DTYPES
from sp_fast.bench.implementations import OURS, YARDSTICK
from sp_fast.bench.worker import Worker
from sp_fast.errors import SPFastError

Results = dict[str, Tensor]
NOISE = 0.5  # relative error beyond which a gradient is noise for the most part


class GateError(SPFastError):
    """Results that cannot be judged."""


@dataclass(frozen=True)
class Verdict:
    """Largest relative error of any result, and of the official form's; what is wrong, if anything."""

    error: float | None  # None where there is no float64 to hold it against
    reference_error: float | None
    withheld: str | None
    note: str | None = None  # what else there is to say


class Gate:
    """Results of the cases on one set of weights."""

    def __init__(self, dtype: str, ours: tuple[str, ...] = (OURS,), yardstick: str = YARDSTICK) -> None:
        self._ours, self._yardstick_name = ours, yardstick
        self._dtype = DTYPES[dtype]
        self._half = math.sqrt(torch.finfo(self._dtype).eps)
        self._expected: dict[Any, Results | Exception] = {}
        self._yardstick: dict[Any, Results] = {}
        self._verdicts: dict[tuple[str, Any], Verdict] = {}

    def expect(self, case: Any, exact: Results | Exception) -> None:
        """Takes the float64 results, or why there are none."""
        self._expected[case.exact] = exact

    def expects(self, case: Any) -> bool:
        """Whether float64 was asked for this case: not where the deadline came first."""
        return case.exact in self._expected

    def judge(self, name: str, case: Any, worker: Worker) -> Verdict:
        """The verdict on a worker's results; the official form has to be judged before the others.

        Raises:
            GateError: nothing to judge by, because float64 or the official form failed at this case.
        """
        case = case.gate
        if (name, case) not in self._verdicts:
            self._verdicts[name, case] = self._judge(name, case, results(case, worker))
        return self._verdicts[name, case]

    def _judge(self, name: str, case: Any, found: Results) -> Verdict:
        expected = self._expected[case.exact]
        if isinstance(expected, Exception):
            raise GateError(f"not judged: float64 failed here ({expected})")
        if found.keys() != expected.keys():
            return Verdict(math.nan, math.nan, f"results differ in kind: {sorted(found.keys() ^ expected.keys())}")
        errors = {key: relative_error(found[key], expected[key]) for key in expected}
        if name == self._yardstick_name:
            if wrong := self._noise(errors):
                return Verdict(_largest(errors), _largest(errors), wrong)
            self._yardstick[case] = found
        elif case not in self._yardstick:
            raise GateError("not judged: the official form gave no results here, or wrong ones")
        yardstick = self._yardstick[case]
        reference_errors = {key: relative_error(yardstick[key], expected[key]) for key in expected}
        if name in self._ours:
            wrong = self._outside(found, yardstick, expected)
        else:
            wrong = self._unlike(errors, reference_errors)
        return Verdict(_largest(errors), _largest(reference_errors), wrong)

    def _outside(self, found: Results, yardstick: Results, expected: Results) -> str | None:
        """What breaks the accuracy rule."""
        for key in expected:
            c = compare(key, found[key], yardstick[key], expected[key], self._dtype)
            if not c.passed:
                return (
                    f"accuracy: {key} has an error of {c.fast_error:.1e} (largest {c.fast_largest:.1e}), the official "
                    f"form {c.reference_error:.1e} (largest {c.reference_largest:.1e}); 1.5 times that and 1 ulp are "
                    "allowed"
                )
        return None

    def _noise(self, errors: dict[str, float]) -> str | None:
        """What is wrong with the yardstick itself: outputs keep half their digits; a gradient in half precision may be
        nearly noise, but not for the most part."""
        for key, error in errors.items():
            bound = NOISE if key.startswith("grad.") else self._half
            if not error <= bound:  # NaN, too
                return f"accuracy: {key} has an error of {error:.1e}, above {bound:.1e}: it judges nothing"
        return None

    def _unlike(self, errors: dict[str, float], reference_errors: dict[str, float]) -> str | None:
        """What is no longer the same function; where the official form itself is inexact, so may a baseline be."""
        for key, error in errors.items():
            bound = max(self._half, FACTOR * reference_errors[key])
            if not error <= bound:  # NaN, too
                return f"accuracy: {key} has an error of {error:.1e}, above {bound:.1e}, half the digits of its dtype"
        return None


def _largest(errors: dict[str, float]) -> float:
    """The largest, or NaN where there is one."""
    return math.nan if any(map(math.isnan, errors.values())) else max(errors.values())


def results(case: Any, worker: Worker) -> Results:
    """What a worker computes at a case, by name."""
    path = Path(worker.ask("results", case))
    found = load_file(path)
    path.unlink()
    return found
