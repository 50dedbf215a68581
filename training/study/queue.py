"""Runs in the order that they are given, one after another or several at a time, each in a process of its own."""

from __future__ import annotations

import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Protocol

import torch

from sp_fast.errors import SPFastError
from sp_fast.training.study.run import Tell
from sp_fast.training.study.study import Job

#: What a run does; its result can be sent from one process to another.
Work = Callable[[Job, Tell], dict[str, Any]]


class Watcher(Protocol):
    """Is told, in the calling process, how runs are getting on."""

    def started(self, job: Job) -> None:
        """It begins."""

    def told(self, job: Job, what: str, done: int, total: int) -> None:
        """What it does, how much of that is done, and how much there is."""

    def finished(self, job: Job, line: dict[str, Any]) -> None:
        """It has ended with a result."""

    def failed(self, job: Job, reason: str) -> None:
        """It has ended without one."""


def run_jobs(jobs: Iterable[Job], work: Work, workers: int, output: Callable[[Job], Path], watcher: Watcher) -> None:
    """Runs all; one that fails, or whose process dies, does not keep the others from running.

    Args:
        work: what can be pickled, where there are workers.
        workers: processes at a time, which divide the cores among them; 0: all in this one.
        output: the file that what a run's process prints goes to.
    """
    if not workers:
        for job in jobs:
            watcher.started(job)
            name, said = _outcome(partial(work, job, partial(watcher.told, job)))
            getattr(watcher, name)(job, said)
        return
    waiting, running = deque(jobs), _Running(work, workers, output)
    try:
        while waiting or running.processes:
            while waiting and len(running.processes) < workers:
                watcher.started(waiting[0])
                running.start(waiting.popleft())
            for job, (name, *said) in running.messages():
                getattr(watcher, name)(job, *said)
    finally:
        running.stop()


class _Running:
    """Processes of runs, by the connection that each of them talks to us on."""

    def __init__(self, work: Work, workers: int, output: Callable[[Job], Path]) -> None:
        self._work, self._output = work, output
        self._threads = max(1, len(os.sched_getaffinity(0)) // workers)
        self._context = get_context("spawn")  # a fork would not survive threads of torch
        self.processes: dict[Connection, tuple[Job, Any]] = {}
        self._ended: set[Job] = set()

    def start(self, job: Job) -> None:
        ours, theirs = self._context.Pipe(duplex=False)
        path = self._output(job)
        path.parent.mkdir(parents=True, exist_ok=True)
        process = self._context.Process(target=_in_process, args=(self._work, job, theirs, self._threads, path))
        with _undisturbed():
            process.start()
        theirs.close()  # so that its end shows
        self.processes[ours] = job, process

    def messages(self) -> Iterator[tuple[Job, tuple[Any, ...]]]:
        """What came since, after waiting until something does."""
        for connection in wait(list(self.processes)):
            job, process = self.processes[connection]
            try:
                message = connection.recv()
            except EOFError:
                process.join()
                del self.processes[connection]
                if job not in self._ended:
                    reason = f"its process ended with exit code {process.exitcode}; what it said is in "
                    yield job, ("failed", reason + str(self._output(job)))
                continue
            if message[0] != "told":
                self._ended.add(job)
            yield job, message

    def stop(self) -> None:
        """Ends those that still run; their checkpoints stay."""
        for _, process in self.processes.values():
            process.terminate()
        for _, process in self.processes.values():
            process.join()


def _outcome(work: Callable[[], dict[str, Any]]) -> tuple[str, Any]:
    """For the watcher: which of its methods, and what it is told."""
    try:
        return "finished", work()
    except SPFastError as error:
        return "failed", str(error)


def _in_process(work: Work, job: Job, connection: Connection, threads: int, output: Path) -> None:
    torch.set_num_threads(threads)
    with output.open("a", buffering=1) as file:  # else it would be printed across a progress bar
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    connection.send(_outcome(partial(work, job, lambda *progress: connection.send(("told", *progress)))))


@contextmanager
def _undisturbed() -> Iterator[None]:
    """A process that starts in here leaves Ctrl-C to this one, which is told of it right after."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
