"""Worker processes, and which of them can be alive at once."""

from __future__ import annotations

import contextlib

import torch

from sp_fast.bench import budget
from sp_fast.bench.cases import Case
from sp_fast.bench.implementations import OURS, YARDSTICK
from sp_fast.bench.memory import available_mib
from sp_fast.bench.subject import ProjectorJob
from sp_fast.bench.worker import Worker
from sp_fast.errors import ResourceError

SHARE = 0.9  # of the free memory; the rest is the system's


class Pool:
    """Processes by name, reused from one set of weights to the next: starting one costs seconds."""

    def __init__(self, threads: int, patience: float) -> None:
        self._threads, self._patience = threads, patience
        self._workers: dict[str, Worker] = {}

    def build(self, job: ProjectorJob) -> Worker:
        """The process of the job's implementation, with its subject; a dead one is replaced."""
        name = job.implementation
        if name in self._workers and not self._workers[name].alive:
            self._workers.pop(name).close()
        if name not in self._workers:
            self._workers[name] = Worker(name, self._threads, self._patience)
        return self._workers[name].build(job)

    def keep(self, *names: str) -> None:
        """The others give their memory back."""
        for name, worker in self._workers.items():
            if name not in names and worker.alive:
                with contextlib.suppress(ResourceError):  # it has died, and holds nothing
                    worker.forget()

    def close(self) -> None:
        for worker in self._workers.values():
            worker.close()


def heats_of(cases: list[Case], implementations: tuple[str, ...], device: str) -> list[tuple[str, ...]]:
    """The implementations in groups that fit into memory; ours is in each, the yardstick of the gate in the first.

    Raises:
        ResourceError: not even one fits beside ours.
    """
    first = cases[0]
    backward = any(case.direction != "forward" for case in cases)
    batch = max(case.batch for case in cases)
    arguments = (first.config, first.dtype, batch, backward)
    available, idle = SHARE * available_mib(torch.device(device)), budget.idle_mib(first.config, first.dtype)
    running = budget.running_mib(*arguments, compiled="compiled" in implementations)
    others = [name for name in implementations if name != OURS]
    if YARDSTICK not in others:
        others.insert(0, YARDSTICK)
    ours = [OURS] if OURS in implementations else []
    room = int((available - running) / idle) - len(ours)
    required = max((1 + len(ours)) * idle + running, budget.exact_mib(*arguments))
    if room < 1 or available < required:
        raise ResourceError(
            f"{first.variant} in {first.dtype} at batch {batch} needs about {required:,.0f} MiB, but "
            f"{available:,.0f} MiB are available: choose a smaller --spatial-width or --batch, or bfloat16"
        )
    return [(*ours, *others[i : i + room]) for i in range(0, len(others), room)]
