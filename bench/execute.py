"""Runs a plan for a command: peaks, a progress bar on stderr, records to a file, and Ctrl-C that loses nothing."""

from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from sp_fast.bench.environment import environment
from sp_fast.bench.record import Record, Sink
from sp_fast.bench.roofline import Peaks
from sp_fast.bench.run import Bench, Plan, Progress
from sp_fast.bench.worker import Worker

REHEARSAL_SHRINK = 64  # of the streams and products behind the peaks


@dataclass(frozen=True)
class Outcome:
    """What a run left."""

    records: list[Record]
    unfinished: int  # cases that the deadline cut off
    interrupted: bool

    @property
    def code(self) -> int:
        """130 after Ctrl-C, 1 where a row was withheld or cut off, else 0."""
        if self.interrupted:
            return 130
        return int(self.unfinished > 0 or any(r.withheld for r in self.records))


def blank_record(plan: Plan, found: dict[str, Any]) -> Record:
    """What every record of a run shares."""
    return Record(
        benchmark="", case="", implementation="", variant="", stage="", direction="", batch=0, dtype="",
        grid=0, vision_width=0, spatial_width=0, text_width=0, device=plan.device, threads=plan.threads,
        run=f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())}-{os.getpid()}", heat=0, environment=found,
    )  # fmt: skip


def peaks_of(plan: Plan, dtypes: tuple[str, ...], rehearsal: bool) -> Peaks:
    """The limits of the plan's machine, measured in a process of their own; ``rehearsal`` takes small ones."""
    with Worker("peaks", plan.threads, plan.patience) as worker:
        return worker.ask("peaks", plan.device, dtypes, REHEARSAL_SHRINK if rehearsal else 1)


def execute(
    plan: Plan,
    sink: Sink,
    console: Console,
    found: dict[str, Any] | None = None,
    rehearsal: bool = False,
    peaks: Peaks | None = None,
) -> Outcome:
    """Measures the plan; ``found`` is the environment, ``rehearsal`` takes small peaks for small shapes, and ``peaks``
    are those of this run, where they were measured already."""
    found = found or environment(torch.device(plan.device))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    unfinished = 0
    try:
        with Bar(*columns, console=console, transient=True) as bar:
            task = bar.add_task("measured peaks", total=None)

            def say(text: str, done: int, total: int) -> None:
                bar.update(task, description=text, completed=done, total=total)

            def add(record: Record) -> None:
                sink.add(record)
                if not console.is_terminal:  # where no bar can be seen
                    figure = record.withheld or (f"{record.ms_p50:.4g} ms" if record.ms_p50 else "judged")
                    console.print(f"{record.case} {record.implementation}: {figure}", highlight=False, soft_wrap=True)

            if peaks is None and plan.turns and plan.cases:
                dtypes = tuple(dict.fromkeys([*(case.dtype for case in plan.cases), "bfloat16"]))
                peaks = peaks_of(plan, dtypes, rehearsal)
            blank = replace(blank_record(plan, found), peaks=asdict(peaks) if peaks else {})
            bench = Bench(plan, peaks, blank, add, Progress(0, say))
            bench.run()
            unfinished = len(bench.unfinished)
    except KeyboardInterrupt:
        console.print(f"interrupted: {len(sink.records)} finished rows are kept", style="yellow")
        return Outcome(sink.records, unfinished, interrupted=True)
    return Outcome(sink.records, unfinished, interrupted=False)
