"""The order of samples: batches of one modality and of similar length, the same in every run with the same seed."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

BATCHES_SORTED_TOGETHER = 50  # as in transformers; more would pad less and be less random


class OrderSampler(Sampler[int]):
    """Every sample once an epoch, in an order that follows from seed and epoch and from nothing else.

    As in the official code every ``global_batch`` consecutive samples have images, or none has; what is left of both
    makes up the end of the epoch. The official code draws each such batch at random and evens out what the processes
    get of it. Here 50 of them are sorted by length together, so that a batch has samples of similar length, the
    longest first, and little padding. The batches come in random order, after the one with the longest sample.

    Args:
        sizes: ``[samples]``, about how many tokens each has.
        has_images: ``[samples]`` bool.
        global_batch: samples of one step of the optimizer, over all processes.
        group: False for a plain shuffle.
    """

    def __init__(
        self, sizes: np.ndarray, has_images: np.ndarray, global_batch: int, seed: int, group: bool = True
    ) -> None:
        self._sizes, self._has_images, self._batch = sizes, has_images, global_batch
        self._seed, self._group, self._epoch = seed, group, 0

    def __len__(self) -> int:
        return len(self._sizes)

    def set_epoch(self, epoch: int) -> None:
        """Which epoch the next iteration is of, counted from 0."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        random = np.random.default_rng((self._seed, self._epoch))
        shuffled = random.permutation(len(self))
        return iter((self._grouped(shuffled, random) if self._group else shuffled).tolist())

    def _grouped(self, shuffled: np.ndarray, random: np.random.Generator) -> np.ndarray:
        batches, rest = [], []
        for modality in (True, False):
            found = shuffled[self._has_images[shuffled] == modality]
            whole = len(found) // self._batch * self._batch
            batches.append(self._sorted(found[:whole]).reshape(-1, self._batch))
            rest.append(found[whole:])
        order = random.permutation(np.concatenate(batches))
        if len(order):  # what does not fit into memory shows at once
            longest = int(self._sizes[order].max(axis=1).argmax())
            order[[0, longest]] = order[[longest, 0]]
        return np.concatenate([order.reshape(-1), *rest])

    def _sorted(self, found: np.ndarray) -> np.ndarray:
        """By length, the longest first, within each run of 50 batches."""
        run = np.arange(len(found)) // (self._batch * BATCHES_SORTED_TOGETHER)
        return found[np.lexsort((-self._sizes[found].astype(np.int64), run))]
