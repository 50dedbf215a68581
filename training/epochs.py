"""The order of the samples, which a resumed run has to draw again."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback, TrainerState

from sp_fast.errors import TrainingError

_BATCHES = 64  # that decide whether two orders are one


class SamplersOfTheEpoch(TrainerCallback):
    """Tells every sampler of the training data which epoch begins.

    The Trainer and accelerate do, except where a run of several ranks resumes in the middle of an epoch: the batches
    are wrapped once more to skip the first ones, a sampler of one's own is not reached any more, and would draw the
    order of the first epoch again.
    """

    def on_epoch_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Whichever of them can be told."""
        _set_epoch(kwargs["train_dataloader"], int(state.epoch))


def check_order(loader: Any) -> None:
    """Raises TrainingError where the order of the samples follows from more than the sampler's own seed and the epoch.

    A sampler that draws from the global generators orders a resumed epoch in another way: samples would come twice, or
    not at all. Ours do not; of the Trainer's, group_by_length and unseeded samplers do.
    """
    states = random.getstate(), np.random.get_state()
    orders = []
    with torch.random.fork_rng(devices=[]):
        for seed in range(2):
            random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
            _set_epoch(loader, 0)
            orders.append([list(batch) for batch in islice(iter(loader.batch_sampler or ()), _BATCHES)])
    random.setstate(states[0]), np.random.set_state(states[1])
    if orders[0] != orders[1]:
        raise TrainingError(
            "the order of the samples is drawn from the global random numbers, so that a resumed run would have "
            "another: use a sampler with a seed of its own"
        )


def _set_epoch(loader: Any, epoch: int) -> None:
    for sampler in _samplers(loader):
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(epoch)


def _samplers(loader: Any) -> Iterator[Any]:
    """From the loader's batches down to single samples."""
    inner = loader
    while (inner := getattr(inner, "batch_sampler", getattr(inner, "sampler", None))) is not None:
        yield inner
