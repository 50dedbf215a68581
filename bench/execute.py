"""Runs a plan for a command: peaks, a progress bar on stderr, records to a file, and Ctrl-C that loses nothing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from sp_fast.bench.environment import environment
from sp_fast.bench.record import Record, Sink
from sp_fast.bench.roofline import measure_peaks
from sp_fast.bench.run import Bench, Plan, Progress

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


def execute(plan: Plan, sink: Sink, console: Console, rehearsal: bool = False) -> Outcome:
    """Measures the plan; ``rehearsal`` takes small peaks for small shapes."""
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

            peaks = None
            if plan.turns and plan.cases:
                dtypes = dict.fromkeys([*(case.dtype for case in plan.cases), "bfloat16"])
                peaks = measure_peaks(plan.device, plan.threads, dtypes, REHEARSAL_SHRINK if rehearsal else 1)
            bench = Bench(plan, peaks, environment(torch.device(plan.device)), add, Progress(0, say))
            bench.run()
            unfinished = len(bench.unfinished)
    except KeyboardInterrupt:
        console.print(f"interrupted: {len(sink.records)} finished rows are kept", style="yellow")
        return Outcome(sink.records, unfinished, interrupted=True)
    return Outcome(sink.records, unfinished, interrupted=False)
