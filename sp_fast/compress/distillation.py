"""Distillation: a compact projector's extractor and output layer, trained to give the full one's spatial tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sp_fast.compress.full import BATCH
from sp_fast.projector import SPProjector

RATE = 1e-2  # of a parameter's own root mean square, a step at most; falls to 0 along a cosine
_CHECKS = 20  # looks at the deciding images
_SEED = 0


def distil(
    projector: SPProjector,
    fitted: tuple[Tensor, Tensor],
    deciding: tuple[Tensor, Tensor],
    steps: int,
    say: Callable[[str], Any],
) -> None:
    """Trains in place; what was best on the deciding images stays, which may be what there was.

    Args:
        projector: in float32, on the CPU.
        fitted, deciding: features ``[n, N, C]`` and the full projector's spatial tokens ``[n, T, H]``.
    """
    trained = [*projector.extractor.parameters(), *projector.output.parameters()]
    groups = [{"params": [p], "lr": RATE * float(p.detach().square().mean().sqrt())} for p in trained]
    groups = [group for group in groups if group["lr"] > 0]
    if not groups:  # zeros alone, which are what a projector of zeros has
        return
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(_SEED)
    best, least = _copies(trained), _error(projector, *deciding)
    every = max(1, steps // _CHECKS)
    for step in range(1, steps + 1):
        chosen = torch.randperm(len(fitted[0]), generator=generator)[:BATCH]
        target = fitted[1][chosen]
        optimizer.zero_grad()
        tokens = spatial_tokens(projector, fitted[0][chosen])
        ((tokens - target).square().sum() / target.square().sum()).backward()
        optimizer.step()
        schedule.step()
        if step % every == 0 or step == steps:
            error = _error(projector, *deciding)
            say(f"distillation, step {step} of {steps}: relative error {error:.3g}")
            if error < least:
                best, least = _copies(trained), error
    with torch.no_grad():
        for parameter, value in zip(trained, best, strict=True):
            parameter.copy_(value)
            parameter.grad = None


def spatial_tokens(projector: SPProjector, features: Tensor) -> Tensor:
    """``[n, T, H]``, without the patch tokens."""
    return projector.integrate(projector.extractor(features))[0]


@torch.no_grad()
def _error(projector: SPProjector, features: Tensor, target: Tensor) -> float:
    tokens = torch.cat([spatial_tokens(projector, batch) for batch in features.split(BATCH)])
    return float((tokens - target).norm() / target.norm())


def _copies(parameters: list[Tensor]) -> list[Tensor]:
    return [p.detach().clone() for p in parameters]
