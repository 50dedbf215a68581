"""The plain training loop of the spatial task's own parts, which are small and trained once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_WARMUP, _DECAY = 0.03, 0.4  # shares of the steps: the rate rises, and falls to nothing
_MAX_NORM = 1.0
_BETAS = (0.9, 0.98)

#: Of steps taken, of all of them, and the last loss.
Progress = Callable[[int, int, float], None]


@dataclass(frozen=True)
class Lessons:
    """Steps of the optimizer, samples of each, and the highest learning rate."""

    steps: int
    batch: int
    rate: float


def fit(
    module: nn.Module, loss_of: Callable[[int], Tensor], lessons: Lessons, progress: Progress | None = None
) -> None:
    """AdamW on the loss of each step, computed in bfloat16 under autocast.

    Args:
        loss_of: a step's loss, by the step's number.
    """
    steps, rate = lessons.steps, lessons.rate
    optimizer = torch.optim.AdamW(module.parameters(), lr=rate, betas=_BETAS, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / (_WARMUP * steps), (1 - step / steps) / _DECAY)
    )
    device = next(module.parameters()).device
    module.train()
    for step in range(steps):
        with torch.autocast(device.type, torch.bfloat16):
            loss = loss_of(step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), _MAX_NORM)
        optimizer.step()
        schedule.step()
        if progress:
            progress(step + 1, steps, loss.item())
    module.eval()
