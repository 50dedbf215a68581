"""A study from its arms and seeds to its results: what is left to run, how far it is, and what could not be run."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from statistics import fmean
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from sp_fast.errors import TrainingError
from sp_fast.training.command import say
from sp_fast.training.record import replace_text, the_only_one
from sp_fast.training.study.arms import Arm
from sp_fast.training.study.queue import Work, run_jobs
from sp_fast.training.study.results import Results
from sp_fast.training.study.run import run_one, tidy
from sp_fast.training.study.study import Job, Study

RESULTS, DESCRIPTION, OUTPUT = "results.jsonl", "study.json", "output.txt"
GIB = 2**30


def conduct(study: Study, arms: Sequence[Arm], seeds: int, workers: int, console: Console) -> dict[Job, str]:
    """Runs what ``results.jsonl`` does not have yet, and returns the reasons of runs that failed.

    Seeds are outermost, so that every arm has one early. What was interrupted goes on where it was.

    Raises:
        TrainingError: results of another study, or another process that runs this one.
        SPFastError: a task, parts or recipes that cannot be used.
    """
    jobs = jobs_of(arms, seeds)
    described = study.describe(jobs, workers)
    with the_only_one(study.out):
        results = Results(study.out / RESULTS, described["fingerprint"])
        _check_projectors(study, results)
        replace_text(study.out / DESCRIPTION, json.dumps(described, indent=1) + "\n")
        for job in results.done:  # a process may have been killed before it could
            tidy(study, job)
        needed, free = described["disk_bytes"] / GIB, shutil.disk_usage(study.out).free / GIB
        say(console, f"at most {needed:,.1f} GiB of disk are needed, {free:,.1f} are free")
        return run_the_rest(study, jobs, results, workers, partial(run_one, study), partial(tidy, study), console)


def jobs_of(arms: Sequence[Arm], seeds: int) -> list[Job]:
    """Seeds outermost."""
    return [Job(arm.name, seed) for seed in range(seeds) for arm in arms]


def run_the_rest(
    study: Study, jobs: Sequence[Job], results: Results, workers: int, work: Work, ended: Callable[[Job], None],
    console: Console,
) -> dict[Job, str]:  # fmt: skip
    """Runs those that have no result, and returns the reasons of those that failed.

    Args:
        ended: is called for each whose result is on the disk.
    """
    left = [job for job in jobs if job not in results.done]
    say(console, f"{len(left)} of {len(jobs)} runs to go")
    with Progressing(results, len(jobs), len(left), workers, console, ended) as watcher:
        run_jobs(left, work, workers, lambda job: study.run_folder(job) / OUTPUT, watcher)
    return watcher.failures


def _check_projectors(study: Study, results: Results) -> None:
    """Arms may be another release's."""
    for line in results.lines:
        if line["projector"] != study.config(line["arm"]).to_dict():
            raise TrainingError(
                f"{study.out / RESULTS} has the arm {line['arm']!r} with another projector than it has now: give "
                "another --out"
            )


class Progressing:
    """Runs done of all, what the present ones are at, and the time left; writes the results down.

    A bar on a terminal, elsewhere a line for each run that begins or ends.

    Args:
        jobs: all of them.
        left: those that have no result yet.
        ended: is called for each whose result is on the disk.
    """

    def __init__(
        self, results: Results, jobs: int, left: int, workers: int, console: Console, ended: Callable[[Job], None]
    ) -> None:
        self._results, self._left, self._workers, self._ended = results, left, max(1, workers), ended
        self._console = console
        self._running: dict[Job, tuple[float, TaskID]] = {}
        self.failures: dict[Job, str] = {}
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[at]}"))
        self._bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._all = self._bar.add_task("runs", total=jobs, completed=jobs - left, at="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()

    def started(self, job: Job) -> None:
        """A line of its own in the bar."""
        self._running[job] = time.monotonic(), self._bar.add_task(str(job), total=None, at="starting")
        self._say(f"{job} begins")

    def told(self, job: Job, what: str, done: int, total: int) -> None:
        """Moves it."""
        self._bar.update(self._running[job][1], completed=done, total=total, at=what)
        self._bar.update(self._all, at=self.time_left())

    def finished(self, job: Job, line: dict[str, Any]) -> None:
        """Writes the result down; only then does the run's folder go."""
        self._results.add(line)
        self._ended(job)
        self._close(job)
        self._say(f"{job} is done; {self.time_left()}")

    def failed(self, job: Job, reason: str) -> None:
        """Says so at once; the others go on."""
        self.failures[job] = reason
        self._close(job)
        text = f"{job} failed: {reason}"
        self._bar.console.print(text, style="red", markup=False, highlight=False, soft_wrap=True)

    def time_left(self) -> str:
        """By the runs that have finished, of this study and whenever it was."""
        known = [sum(line["seconds"].values()) for line in self._results.lines]
        if not known:
            return ""
        begun = sum(min(fmean(known), time.monotonic() - start) for start, _ in self._running.values())
        return f"{timedelta(seconds=round((fmean(known) * self._left - begun) / self._workers))} left"

    def _close(self, job: Job) -> None:
        self._left -= 1
        self._bar.remove_task(self._running.pop(job)[1])
        self._bar.update(self._all, advance=1, at=self.time_left())

    def _say(self, text: str) -> None:
        if not self._console.is_terminal:
            say(self._console, text)
