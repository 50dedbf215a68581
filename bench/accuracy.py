"""The accuracy rule: no hand-picked tolerance, but torch's own error in the same dtype as the yardstick.

    error(fast, float64) <= 1.5 * error(plain torch in the same dtype, float64) + 1 ulp

in relative Frobenius norm, and in the largest element (there the ulp is taken at the exact result's largest element).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

FACTOR = 1.5


@dataclass(frozen=True)
class Comparison:
    """Errors of one tensor: relative Frobenius norm, and largest absolute difference."""

    name: str
    reference_error: float
    fast_error: float
    reference_largest: float
    fast_largest: float
    ulp: float  # at the largest element of the exact result
    eps: float  # of the dtype

    @property
    def passed(self) -> bool:
        """NaN never passes."""
        return (
            self.fast_error <= FACTOR * self.reference_error + self.eps
            and self.fast_largest <= FACTOR * self.reference_largest + self.ulp
        )


def compare(name: str, fast: Tensor, reference: Tensor, exact: Tensor, dtype: torch.dtype) -> Comparison:
    """Judges ``fast`` and ``reference``, results in ``dtype``, against ``exact`` in float64."""
    eps = torch.finfo(dtype).eps
    largest = exact.abs().max().item()
    return Comparison(
        name=name,
        reference_error=relative_error(reference, exact),
        fast_error=relative_error(fast, exact),
        reference_largest=(reference.double() - exact).abs().max().item(),
        fast_largest=(fast.double() - exact).abs().max().item(),
        ulp=eps * 2.0 ** math.floor(math.log2(largest)) if largest > 0 else 0.0,
        eps=eps,
    )


def relative_error(got: Tensor, exact: Tensor) -> float:
    """Frobenius norm of the difference over that of the exact result."""
    norm = exact.double().norm().item()
    difference = (got.double() - exact.double()).norm().item()
    return difference / norm if norm else difference
