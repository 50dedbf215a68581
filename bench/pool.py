"""Worker processes, and which of them can be alive at once."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch

from sp_fast.bench.memory import available_mib
from sp_fast.bench.suite import PROJECTOR, AnyCase, Suite
from sp_fast.bench.worker import Job, Worker
from sp_fast.errors import ResourceError

SHARE = 0.9  # of the free memory; the rest is the system's


class Pool:
    """Processes by name, reused from one set of weights to the next: starting one costs seconds."""

    def __init__(self, threads: int, patience: float) -> None:
        self._threads, self._patience = threads, patience
        self._workers: dict[str, Worker] = {}
        self._fresh: set[str] = set()  # processes that have built nothing yet

    def build(self, job: Job) -> Worker:
        """The process of the job's implementation, with its subject; a dead one is replaced."""
        name = job.implementation
        if name in self._workers and not self._workers[name].alive:
            self._workers.pop(name).close()
        self.start(name)
        self._fresh.discard(name)
        return self._workers[name].build(job)

    def start(self, *names: str) -> None:
        """Their processes, side by side: each imports for seconds before it can answer."""
        for name in names:
            if name not in self._workers:
                self._workers[name] = Worker(name, self._threads, self._patience)
                self._fresh.add(name)

    def keep(self, *names: str) -> None:
        """The others give their memory back."""
        for name, worker in self._workers.items():
            if name not in (*names, *self._fresh) and worker.alive:
                with contextlib.suppress(ResourceError):  # it has died, and holds nothing
                    worker.forget()

    def close(self) -> None:
        for worker in self._workers.values():
            worker.close()


def heats_of(
    cases: Sequence[AnyCase], implementations: tuple[str, ...], device: str, suite: Suite = PROJECTOR
) -> list[tuple[str, ...]]:
    """The implementations in groups that fit into memory; ours is in each, the yardstick of the gate in the first.
    Where two do not fit and may be built anew for every turn, all are one group, of which ``side_by_side`` is False.

    Raises:
        ResourceError: not even one fits beside ours.
    """
    needs, available = suite.needs(cases, implementations), SHARE * available_mib(torch.device(device))
    others = [name for name in implementations if name != suite.ours]
    if suite.yardstick not in others:
        others.insert(0, suite.yardstick)
    ours = [suite.ours] if suite.ours in implementations else []
    room = int((available - needs.running_mib) / needs.idle_mib) - len(ours)
    if room < 1 and needs.rebuilt and available >= max(needs.idle_mib + needs.running_mib, needs.exact_mib):
        return [(*ours, *others)]
    required = max((1 + len(ours)) * needs.idle_mib + needs.running_mib, needs.exact_mib)
    if room < 1 or available < required:
        raise ResourceError(
            f"{needs.what} needs about {required:,.0f} MiB, but {available:,.0f} MiB are available: {needs.way_out}"
        )
    return [(*ours, *others[i : i + room]) for i in range(0, len(others), room)]


def side_by_side(cases: Sequence[AnyCase], names: tuple[str, ...], device: str, suite: Suite = PROJECTOR) -> bool:
    """Whether the implementations of a heat are all alive at once; else each gives its memory back after its turn."""
    needs = suite.needs(cases, names)
    available = SHARE * available_mib(torch.device(device))
    return not needs.rebuilt or len(names) * needs.idle_mib + needs.running_mib <= available
