"""Measures a plan: gate first, then memory, then the implementations in turns, then energy; a record for each.

Every implementation lives in a process of its own. Ours takes turns with the baselines, as many at a time as memory
holds (a heat), so that a ratio is between neighbours in time. Each record is handed on as soon as it is there.
"""

from __future__ import annotations

import contextlib
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sp_fast.bench import budget
from sp_fast.bench.cases import DTYPES, Case, stages_of
from sp_fast.bench.counts import count
from sp_fast.bench.energy import Energy
from sp_fast.bench.gate import Gate, Verdict, results
from sp_fast.bench.implementations import EXACT, OURS, YARDSTICK
from sp_fast.bench.memory import available_mib
from sp_fast.bench.record import Record
from sp_fast.bench.roofline import Peaks
from sp_fast.bench.subject import ProjectorJob
from sp_fast.bench.worker import Worker
from sp_fast.errors import ResourceError, SPFastError

ENERGY_SECONDS = 0.5


@dataclass(frozen=True)
class Plan:
    """What to measure, and how."""

    cases: tuple[Case, ...]
    implementations: tuple[str, ...]
    device: str = "cpu"
    threads: int = 2
    turns: int = 5  # of each implementation; 0 judges results and measures nothing
    turn_seconds: float = 0.25  # of a turn, which is one run at least
    turn_runs: int = 50  # of a turn, at most
    seed: int = 0
    deadline: float | None = None  # time.monotonic() after which no further case is begun


@dataclass
class Progress:
    """Told what is going on: ``say(text, done, total)``."""

    total: int
    say: Callable[[str, int, int], None]
    done: int = 0

    def step(self, text: str, steps: int = 0) -> None:
        self.done += steps
        self.say(text, self.done, self.total)


@dataclass
class Bench:
    """One run of a plan."""

    plan: Plan
    peaks: Peaks | None
    environment: dict[str, Any]
    add: Callable[[Record], None]
    progress: Progress
    unfinished: list[Case] = field(default_factory=list)

    def run(self) -> None:
        """Raises ResourceError where not even one implementation beside ours fits into memory."""
        groups = itertools.groupby(self.plan.cases, key=lambda case: (case.config, case.dtype))
        planned = [(group, heats_of(group, self.plan)) for group in (list(cases) for _, cases in groups)]
        self.progress.total = sum(len(cases) * len(heat) for cases, heats in planned for heat in heats)
        with contextlib.ExitStack() as stack, tempfile.TemporaryDirectory(prefix="sp_fast-bench-") as name:
            pool = Pool(self.plan.threads, stack)
            for cases, heats in planned:
                self._group(cases, heats, pool, Path(name))

    def _group(self, cases: list[Case], heats: list[tuple[str, ...]], pool: Pool, folder: Path) -> None:
        """All cases on one set of weights."""
        first = cases[0]
        job = ProjectorJob(EXACT, first.config, DTYPES[first.dtype], self.plan.device, self.plan.seed, folder)
        gate = Gate(first.dtype)
        if not self._late():
            self.progress.step(f"{first.variant} {first.dtype}: float64")
            with pool.only(EXACT):
                exact = pool.worker(EXACT).build(job)
                for case in dict.fromkeys(case.gate for case in cases):
                    self.progress.step(f"float64: {case.key}")
                    gate.expect(case, self._tried(lambda c=case: results(c, exact)))
        for number, heat in enumerate(heats):
            with pool.only(*heat):
                if not self._late():
                    self._heat(number, heat, cases, job, gate, pool)
                    continue
            self.unfinished += [case for case in cases if case not in self.unfinished]

    def _heat(
        self, number: int, heat: tuple[str, ...], cases: list[Case], job: ProjectorJob, gate: Gate, pool: Pool
    ) -> None:
        workers: dict[str, Worker] = {}
        for name in heat:
            self.progress.step(f"building {name}")
            worker = pool.worker(name)
            built = self._tried(lambda n=name, w=worker: w.build(replace(job, implementation=n)))
            if built is worker:
                workers[name] = worker
            elif name in self.plan.implementations:
                for case in cases:
                    self.add(self._record(number, case, name, built))
        for case in cases:
            if self._late():
                self.unfinished += [case] if case not in self.unfinished else []
                continue
            self._case(number, case, workers, gate)

    def _case(self, heat: int, case: Case, workers: dict[str, Worker], gate: Gate) -> None:
        """The gate, memory, the turns, energy."""
        verdicts: dict[str, Any] = {}
        for name in sorted(workers, key=lambda name: name != YARDSTICK):
            self.progress.step(f"{case.key}: {name}, accuracy", 1)
            verdicts[name] = self._tried(lambda n=name: gate.judge(n, case, workers[n]))
        taking_part: dict[str, Record] = {}
        for name in (name for name in workers if name in self.plan.implementations):
            record = self._record(heat, case, name, verdicts[name])
            if record.withheld is None and self.plan.turns:
                taking_part[name] = record
            else:
                self.add(record)
        memory = {name: self._tried(lambda n=name: workers[n].ask("memory", case)) for name in taking_part}
        times: dict[str, list] = {name: [] for name in taking_part}
        for turn in range(self.plan.turns):
            for name in times:
                self.progress.step(f"{case.key}: {name}, turn {turn + 1} of {self.plan.turns}")
                arguments = (case, self.plan.turn_seconds, self.plan.turn_runs)
                times[name].append(self._tried(lambda n=name, a=arguments: workers[n].ask("time", *a)))
        for name, record in taking_part.items():
            energy = Energy()
            if case.stage == "whole":
                energy = self._tried(lambda n=name: workers[n].ask("energy", case, ENERGY_SECONDS))
            self.add(self._measured(case, record, memory[name], times[name], energy))

    def _tried(self, ask: Callable[[], Any]) -> Any:
        """The answer, or the error of the one implementation that it concerns."""
        try:
            return ask()
        except (RuntimeError, SPFastError) as error:
            return error

    def _record(self, heat: int, case: Case, name: str, verdict: Verdict | Exception) -> Record:
        plan = self.plan
        record = Record(
            "projector", case.key, name, case.variant, case.stage, case.direction, case.batch, case.dtype, plan.device,
            plan.threads, heat, environment=self.environment, peaks=asdict(self.peaks) if self.peaks else {},
        )  # fmt: skip
        if isinstance(verdict, Exception):
            return replace(record, withheld=_first_line(verdict))
        return replace(record, error=verdict.error, reference_error=verdict.reference_error, withheld=verdict.withheld)

    def _measured(self, case: Case, record: Record, memory: Any, times: list, energy: Any) -> Record:
        for answer in (memory, *times, energy):
            if isinstance(answer, Exception):
                return replace(record, withheld=_first_line(answer))
        ms = [value for turn in times for value in turn.ms]
        p20, p50, p80 = (float(value) for value in np.percentile(ms, (20, 50, 80)))
        needed = count(case)
        figures = {
            "runs": len(ms), "timer": times[-1].timer, "ms_p20": p20, "ms_p50": p50, "ms_p80": p80,
            "flop": needed.flop, "bytes": needed.bytes, "tflops": needed.flop / p50 / 1e9,
            "gbps": needed.bytes / p50 / 1e6, **asdict(memory), **asdict(energy),
        }  # fmt: skip
        if self.peaks:
            roof = self.peaks.roof_ms(needed, case.dtype)
            parts = [stage for stage in stages_of(case.config) if stage != "whole"] if case.stage == "whole" else []
            serial = [self.peaks.roof_ms(count(replace(case, stage=stage)), case.dtype) for stage in parts]
            figures |= {"roof_ms": roof, "roof_share": roof / p50, "bound": self.peaks.bound(needed, case.dtype)}
            figures["serial_ms"] = sum(serial) if serial else roof
        return replace(record, **figures)

    def _late(self) -> bool:
        return self.plan.deadline is not None and time.monotonic() > self.plan.deadline


class Pool:
    """Worker processes, reused from one set of weights to the next: starting one costs seconds."""

    def __init__(self, threads: int, stack: contextlib.ExitStack) -> None:
        self._threads = threads
        self._workers: dict[str, Worker] = {}
        stack.callback(self.close)

    def worker(self, name: str) -> Worker:
        if name in self._workers and not self._workers[name].alive:
            self._workers.pop(name).close()
        if name not in self._workers:
            self._workers[name] = Worker(name, self._threads)
        return self._workers[name]

    @contextlib.contextmanager
    def only(self, *names: str) -> Iterator[None]:
        """The others give their memory back."""
        for name, worker in self._workers.items():
            if name not in names and worker.alive:
                worker.forget()
        yield

    def close(self) -> None:
        for worker in self._workers.values():
            worker.close()


def heats_of(cases: list[Case], plan: Plan) -> list[tuple[str, ...]]:
    """The implementations in groups that fit into memory; ours is in each, the yardstick of the gate in the first."""
    first, device = cases[0], torch.device(plan.device)
    backward = any(case.direction != "forward" for case in cases)
    batch = max(case.batch for case in cases)
    arguments = (first.config, first.dtype, batch, backward)
    available, idle = available_mib(device), budget.idle_mib(first.config, first.dtype)
    running = budget.running_mib(*arguments, compiled="compiled" in plan.implementations)
    others = [name for name in plan.implementations if name != OURS]
    if YARDSTICK not in others:
        others.insert(0, YARDSTICK)
    ours = [OURS] if OURS in plan.implementations else []
    room = int((available - running) / idle) - len(ours)
    required = max((1 + len(ours)) * idle + running, budget.exact_mib(*arguments))
    if room < 1 or available < required:
        raise ResourceError(
            f"{first.variant} in {first.dtype} at batch {batch} needs about {required:,.0f} MiB, but "
            f"{available:,.0f} MiB are available: choose a smaller --spatial-width or --batch, or bfloat16"
        )
    return [(*ours, *others[i : i + room]) for i in range(0, len(others), room)]


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:300]
