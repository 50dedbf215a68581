"""Measures a plan: gate first, then memory, then the implementations in turns, then energy; a record for each.

Every implementation lives in a process of its own. Ours takes turns with the baselines, as many at a time as memory
holds (a heat), so that a ratio is between neighbours in time. Each record is handed on as soon as it is there.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from sp_fast.bench.counts import Count
from sp_fast.bench.energy import Energy
from sp_fast.bench.gate import Gate, Verdict, results
from sp_fast.bench.memory import Memory
from sp_fast.bench.pool import Pool, heats_of, side_by_side
from sp_fast.bench.record import Record
from sp_fast.bench.roofline import Peaks
from sp_fast.bench.suite import PROJECTOR, AnyCase, Suite
from sp_fast.bench.timing import Times
from sp_fast.bench.worker import PATIENCE_SECONDS, Job, Worker
from sp_fast.errors import SPFastError, first_line

ENERGY_SECONDS = 0.5


@dataclass(frozen=True)
class Plan:
    """What to measure, and how."""

    cases: tuple[AnyCase, ...]
    implementations: tuple[str, ...]
    device: str = "cpu"
    threads: int = 2
    turns: int = 5  # of each implementation; 0 judges results and measures nothing
    turn_seconds: float = 0.25  # of a turn, which is one run at least
    turn_runs: int = 50  # of a turn, at most
    seed: int = 0
    deadline: float | None = None  # time.monotonic() after which no further case is begun
    patience: float = PATIENCE_SECONDS  # that one answer of a process may take
    suite: Suite = PROJECTOR  # what the cases are of


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
class Heat:
    """Implementations that take turns, on one set of weights."""

    number: int
    names: tuple[str, ...]
    job: Job  # of any of them
    gate: Gate
    alive: bool  # all at once; else one at a time, built anew for each turn


@dataclass
class Bench:
    """One run of a plan. ``blank`` holds what all of its records share."""

    plan: Plan
    peaks: Peaks | None
    blank: Record
    add: Callable[[Record], None]
    progress: Progress
    unfinished: list[AnyCase] = field(default_factory=list)

    def run(self) -> None:
        """Raises ResourceError where nothing of the plan fits into memory; else what does not fit is withheld."""
        plan, suite = self.plan, self.plan.suite
        groups = [list(g) for _, g in itertools.groupby(plan.cases, key=suite.weights)]
        heats = [_tried(lambda g=g: heats_of(g, plan.implementations, plan.device, suite)) for g in groups]
        if groups and all(isinstance(found, Exception) for found in heats):
            raise heats[0]
        fitting = [(g, found) for g, found in zip(groups, heats, strict=True) if not isinstance(found, Exception)]
        self.progress.total = sum(len(group) * len(names) for group, found in fitting for names in found)
        with tempfile.TemporaryDirectory(prefix="sp_fast-bench-", ignore_cleanup_errors=True) as folder:
            pool = Pool(plan.threads, plan.patience)
            try:
                pool.start(suite.exact, *plan.implementations)
                for group, found in zip(groups, heats, strict=True):
                    if isinstance(found, Exception):
                        self._withhold(group, plan.implementations, 0, found)
                    else:
                        self._group(group, found, pool, Path(folder))
            finally:
                pool.close()

    def _group(self, cases: list[AnyCase], heats: list[tuple[str, ...]], pool: Pool, folder: Path) -> None:
        """All cases on one set of weights."""
        suite = self.plan.suite
        job = suite.job(cases[0], self.plan.device, self.plan.seed, folder)
        gate = suite.gate(cases[0])
        pool.keep()
        alive = [side_by_side(cases, names, self.plan.device, suite) for names in heats]
        self._expect(cases, job, gate, pool)
        for number, names in enumerate(heats):
            pool.keep(*names)
            heat = Heat(number, names, job, gate, alive[number])
            for case in cases:
                if self._late() or not gate.expects(case):
                    self.unfinished += [case] if case not in self.unfinished else []
                else:
                    self._case(case, heat, pool)

    def _expect(self, cases: list[AnyCase], job: Job, gate: Gate, pool: Pool) -> None:
        """The float64 results of every case, by a process that is alone meanwhile."""
        pool.keep(self.plan.suite.exact)
        for case in dict.fromkeys(case.exact for case in cases):
            if self._late():
                return
            self.progress.step(f"{case.key}: float64")
            gate.expect(case, _tried(lambda c=case: results(c, pool.build(job))))

    def _case(self, case: AnyCase, heat: Heat, pool: Pool) -> None:
        """The gate, memory, the turns, energy."""
        workers, verdicts = self._judge(case, heat, pool)
        taking_part: dict[str, Record] = {}
        for name in (name for name in heat.names if name in self.plan.implementations):
            record = self._record(case, name, heat.number, verdicts[name])
            if record.withheld is None and self.plan.turns:
                taking_part[name] = record
            else:
                self.add(record)
        if not taking_part:
            return

        def each(*questions: tuple[Any, ...]) -> list[dict[str, Any]]:
            """Every process is asked all of them before the next is."""
            found: list[dict[str, Any]] = [{} for _ in questions]
            for name in taking_part:
                worker = workers[name] if heat.alive else _tried(lambda n=name: self._built(n, heat, pool))
                for answers, (question, *more) in zip(found, questions, strict=True):
                    answers[name] = _answer(worker, question, case, *more)
            return found

        def turn(number: int, *before: tuple[Any, ...], graph: bool = False) -> list[dict[str, Any]]:
            self.progress.step(f"{case.key}: turn {number + 1} of {self.plan.turns}")
            return each(*before, ("time", self.plan.turn_seconds, self.plan.turn_runs, graph))

        suite, energy = self.plan.suite, {}
        if heat.alive:
            memory, *captured = each(("memory",), *([("capture",)] if suite.captured(case) else []))
            graph = bool(captured) and all(found is True for found in captured[0].values())
            turns = [turn(number, graph=graph)[0] for number in range(self.plan.turns)]
            if suite.metered(case):
                [energy] = each(("energy", ENERGY_SECONDS, graph))
        else:  # what was captured, or is warm, goes with a process's memory
            memory, first = turn(0, ("memory",))
            turns = [first, *(turn(number)[0] for number in range(1, self.plan.turns))]
        for name, record in taking_part.items():
            times = [turn[name] for turn in turns]
            self.add(self._measured(case, record, memory[name], times, energy.get(name, Energy())))

    def _judge(self, case: AnyCase, heat: Heat, pool: Pool) -> tuple[dict[str, Worker], dict[str, Verdict | Exception]]:
        """The processes of a heat, and the verdicts on what they compute: the yardstick first."""
        workers: dict[str, Worker] = {}
        verdicts: dict[str, Verdict | Exception] = {}
        for name in sorted(heat.names, key=lambda name: name != self.plan.suite.yardstick):
            self.progress.step(f"{case.key}: {name}, accuracy", 1)
            built = _tried(lambda n=name: self._built(n, heat, pool))
            if isinstance(built, Exception):
                verdicts[name] = built
            else:
                workers[name] = built
                verdicts[name] = _tried(lambda n=name, w=built: heat.gate.judge(n, case, w))
        return workers, verdicts

    def _built(self, name: str, heat: Heat, pool: Pool) -> Worker:
        """The process of an implementation with its subject, alone where memory has no room for two."""
        if not heat.alive:
            pool.keep(name)
        return pool.build(replace(heat.job, implementation=name))

    def _withhold(self, cases: list[AnyCase], names: tuple[str, ...], heat: int, why: Exception) -> None:
        for case, name in itertools.product(cases, names):
            self.add(self._record(case, name, heat, why))

    def _record(self, case: AnyCase, name: str, heat: int, verdict: Verdict | Exception) -> Record:
        record = replace(self.blank, implementation=name, heat=heat, **self.plan.suite.fields(case, name))
        if isinstance(verdict, Exception):
            return replace(record, withheld=first_line(verdict))
        return replace(
            record, error=verdict.error, reference_error=verdict.reference_error, withheld=verdict.withheld,
            note=verdict.note,
        )  # fmt: skip

    def _measured(
        self, case: AnyCase, record: Record, memory: Memory | Exception, times: list, energy: Energy | Exception
    ) -> Record:
        """With its figures; without a time there is none, the rest may be missing."""
        if failed := next((turn for turn in times if not isinstance(turn, Times)), None):
            return replace(record, withheld=first_line(failed))
        ms = [value for turn in times for value in turn.ms]
        parts = {f"{name}_ms_p50": _p50([v for turn in times for v in turn.parts[name]]) for name in times[0].parts}
        p20, p50, p80 = (float(value) for value in np.percentile(ms, (20, 50, 80)))
        needed = sum(self.plan.suite.steps(case, record.implementation), start=Count(0, 0))
        figures = {
            "runs": len(ms), "timer": times[-1].timer, "ms_p20": p20, "ms_p50": p50, "ms_p80": p80,
            "flop": needed.flop, "bytes": needed.bytes, "tflops": needed.flop / p50 / 1e9,
            "gbps": needed.bytes / p50 / 1e6, **parts, **self.plan.suite.figures(case, p50),
        }  # fmt: skip
        notes = [record.note] if record.note else []
        for answer in (memory, energy):
            if isinstance(answer, Exception):
                notes.append(first_line(answer))
            else:
                figures |= asdict(answer)
        if self.peaks:
            figures |= self._roof(case, record.implementation, needed, p50)
        return replace(record, note="; ".join(notes) or None, **figures)

    def _roof(self, case: AnyCase, name: str, needed: Count, p50: float) -> dict[str, Any]:
        suite, dtype = self.plan.suite, case.dtype
        roof = sum(self.peaks.roof_ms(step, dtype) for step in suite.steps(case, name))
        serial = sum(self.peaks.roof_ms(part, dtype) for part in suite.parts(case, name))
        bound = self.peaks.bound(needed, dtype)
        return {"roof_ms": roof, "serial_ms": serial, "roof_share": roof / p50, "bound": bound}

    def _late(self) -> bool:
        return self.plan.deadline is not None and time.monotonic() > self.plan.deadline


def _answer(worker: Worker | Exception, question: str, *arguments: Any) -> Any:
    return worker if isinstance(worker, Exception) else _tried(lambda: worker.ask(question, *arguments))


def _p50(ms: list[float]) -> float:
    return float(np.percentile(ms, 50))


def _tried(ask: Callable[[], Any]) -> Any:
    """The answer, or the error, which concerns one implementation and not the others."""
    try:
        return ask()
    except (RuntimeError, SPFastError) as error:
        return error
