"""Least squares of a compact extractor's parameters on features: whatever is linear, one factor after the other.

z is linear in each factor of the weights while the others stand still, so J p, what a factor p gives, is one forward,
and J^T r one backward. CGLS solves ``min ||J p - z||^2`` with these two alone: no matrix of the normal equations is
ever made (K is 589,824 at the published widths). Its steps are the ridge: it begins at the weights' own solution,
finds what the features show most first, and stops where images that it does not fit become worse.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call

from sp_fast.compress.full import BATCH

STEPS, PATIENCE = 60, 5  # of CGLS for a factor; steps without a better result
Split = Callable[[Tensor], list[Tensor]]


def refine(
    extractor: nn.Module, fitted: tuple[Tensor, Tensor], deciding: tuple[Tensor, Tensor], split: Split, say: Callable
) -> None:
    """Fits the factors of an extractor's float32 parameters in place: the last, the one before it, the last again.

    Args:
        fitted, deciding: features ``[n, N, C]`` and the z ``[n, T + sum of O, D]`` that they should give.
        split: z convolution by convolution, each of which counts the same.
    """
    found = list(factors(extractor))
    for names in [*found, found[0]] if len(found) > 1 else found:
        say(f"least squares of {' and '.join(names)}")
        _solve(extractor, names, fitted, deciding, split)


def factors(extractor: nn.Module) -> list[list[str]]:
    """Names of the parameters that stand in one factor together; the factor that features meet last comes first."""
    found: dict[str, list[str]] = {}
    for name, _ in extractor.named_parameters():
        found.setdefault("reduce" if name == "reduce_weight" else name.split("_")[1], []).append(name)
    return list(found.values())[::-1]


def _solve(
    extractor: nn.Module,
    names: list[str],
    fitted: tuple[Tensor, Tensor],
    deciding: tuple[Tensor, Tensor],
    split: Split,
) -> None:
    parameters = [extractor.get_parameter(name).data for name in names]
    scale = _scale(fitted[1], split)

    def forward(features: Tensor, point: list[Tensor]) -> Tensor:
        values = dict(zip(names, point, strict=True))
        return torch.cat([functional_call(extractor, values, (batch,)) for batch in features.split(BATCH)]) * scale

    def adjoint(residual: Tensor) -> list[Tensor]:
        point = [p.clone().requires_grad_() for p in parameters]
        for batch, part in zip(fitted[0].split(BATCH), residual.split(BATCH), strict=True):
            with torch.enable_grad():
                z = functional_call(extractor, dict(zip(names, point, strict=True)), (batch,))
            z.backward(part * scale)
        return [p.grad for p in point]

    with torch.no_grad():
        residual, other = ((z * scale) - forward(x, parameters) for x, z in (fitted, deciding))
        best, least, waited = [p.clone() for p in parameters], other.norm(), 0
        gradient = adjoint(residual)
        direction, norm = gradient, _dot(gradient, gradient)
        for _ in range(STEPS):
            step = forward(fitted[0], direction)
            length = norm / step.square().sum()
            if not length.isfinite():
                break
            for p, d in zip(parameters, direction, strict=True):
                p.add_(d * length)
            residual -= length * step
            other -= length * forward(deciding[0], direction)
            if other.norm() < least:
                best, least, waited = [p.clone() for p in parameters], other.norm(), 0
            elif (waited := waited + 1) == PATIENCE:
                break
            gradient = adjoint(residual)
            norm, last = _dot(gradient, gradient), norm
            direction = [g + d * (norm / last) for g, d in zip(gradient, direction, strict=True)]
        for p, found in zip(parameters, best, strict=True):
            p.copy_(found)


def _scale(z: Tensor, split: Split) -> Tensor:
    """``[T + sum of O, 1]``: one over each convolution's norm."""
    parts = [part.new_full((part.shape[1], 1), 1 / max(float(part.norm()), 1e-30)) for part in split(z)]
    return torch.cat(parts)


def _dot(a: list[Tensor], b: list[Tensor]) -> Tensor:
    return sum((x * y).sum(dtype=torch.float64) for x, y in zip(a, b, strict=True)).float()
