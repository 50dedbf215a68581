"""Parts of the GPU measurement at work: what is left of each, and how it goes on until the call's time is over."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sp_fast.bench.cases import DTYPES
from sp_fast.bench.execute import blank_record, execute, peaks_of
from sp_fast.bench.gpu import NEEDS, SHARE_VARIABLE, TURN_SECONDS, AnyPart, Checks, Part, Setting, Tuning
from sp_fast.bench.record import Sink, finished, read_records
from sp_fast.bench.roofline import Peaks
from sp_fast.bench.run import Plan
from sp_fast.bench.suite import AnyCase
from sp_fast.bench.worker import PATIENCE_SECONDS
from sp_fast.errors import ConfigError
from sp_fast.kernels.tiles import TABLE

ROOT = Path(__file__).resolve().parent.parent
SAME = ("machine", "source")  # of the environment, for a result to count as done
ENDING_SECONDS = 5.0  # that are left for what has to be ended at the call's end


@dataclass
class Call:
    """One call of the command: it begins no case that would not end in time, by its estimate."""

    setting: Setting
    environment: dict[str, Any]
    console: Any
    end: float  # time.monotonic()
    again: bool = False  # nothing is new: what failed is tried once more
    peaks: Peaks | None = None  # measured once

    def has(self, seconds: float) -> bool:
        """Whether that many are left."""
        return time.monotonic() + seconds <= self.end

    @property
    def left(self) -> float:
        """Seconds."""
        return self.end - time.monotonic()

    def earlier(self, path: Path) -> list[dict[str, Any]]:
        """Lines of tests and tuning that these sources gave on this machine."""
        lines = map(json.loads, path.read_text().splitlines()) if path.is_file() else []
        return [line for line in lines if all(line["environment"].get(k) == self.environment[k] for k in SAME)]


@dataclass
class Outcome:
    """Of a part in one call: result records to be shown, and whether something failed or Ctrl-C came."""

    records: list = field(default_factory=list)
    failed: bool = False
    interrupted: bool = False


class Job:
    """A part, and its result file."""

    def __init__(self, name: str, part: AnyPart) -> None:
        self.name, self.part = name, part

    def path(self, setting: Setting) -> Path:
        return setting.folder / f"{self.name}.jsonl"

    def left(self, call: Call) -> tuple:
        """Cases without a result of these sources on this machine; with ``again``, also those whose result is none."""
        raise NotImplementedError

    def least(self, call: Call) -> float:
        """Seconds that it takes to get anywhere, by estimate."""
        return self.part.estimate.of(1)

    def run(self, call: Call) -> Outcome:
        """Goes on with it, as far as the call's time allows."""
        raise NotImplementedError


class Measured(Job):
    """Cases of a benchmark, whose rows may be withheld."""

    def left(self, call: Call) -> tuple[AnyCase, ...]:
        path, plan = self.path(call.setting), self._plan(call, self.part.cases)
        earlier = read_records(path) if path.is_file() and path.stat().st_size else []
        same = [r for r in earlier if all(r.environment.get(key) == call.environment[key] for key in SAME)]
        done = finished(same) if call.again else {r.identity for r in same}
        return tuple(case for case in self.part.cases if not self._identities(case, plan) <= done)

    def run(self, call: Call) -> Outcome:
        plan = self._plan(call, self.left(call))
        if plan.turns and call.peaks is None:
            call.peaks = peaks_of(plan, tuple(DTYPES), call.setting.tiny)
        sink = Sink(self.path(call.setting), append=True)
        done = execute(plan, sink, call.console, call.environment, call.setting.tiny, call.peaks)
        return Outcome(done.records, any(r.withheld for r in done.records), done.interrupted)

    def _plan(self, call: Call, cases: tuple[AnyCase, ...]) -> Plan:
        part, setting = self.part, call.setting
        turns, seconds = (min(part.turns, 1), 0.02) if setting.tiny else (part.turns, TURN_SECONDS)
        patience = PATIENCE_SECONDS if setting.device == "cpu" else part.patience
        return Plan(
            cases, part.implementations, setting.device, setting.threads, turns, seconds,
            deadline=call.end - part.estimate.case, patience=patience, suite=part.suite,
        )  # fmt: skip

    def _identities(self, case: AnyCase, plan: Plan) -> set[tuple[str, ...]]:
        """Of the records that the case will give."""
        blank, fields = blank_record(plan, {}), plan.suite.fields
        return {replace(blank, implementation=name, **fields(case, name)).identity for name in plan.implementations}


class Checked(Job):
    """Shares of the tests, each in a process of its own, side by side: accuracy needs no quiet machine. Each has a log,
    and a line in a result file once it has come to its end."""

    def left(self, call: Call) -> tuple[str, ...]:
        lines = call.earlier(self.path(call.setting))
        done = {line["share"] for line in lines if line["passed"] or not call.again}
        return tuple(s for s in (f"{i}/{self.part.shares}" for i in range(self.part.shares)) if s not in done)

    def least(self, call: Call) -> float:
        return self.part.estimate.of(len(self.left(call)))

    def run(self, call: Call) -> Outcome:
        shares, folder, outcome = self.left(call), call.setting.folder, Outcome()
        files = sorted(itertools.chain.from_iterable(ROOT.glob(pattern) for pattern in self.part.files))
        if not files:
            raise ConfigError(f"{ROOT} has no {' '.join(self.part.files)}: run it from a checkout")
        command = [
            sys.executable, "-m", "pytest", "-q", "-m", self.part.marker, "-p", "sp_fast.bench.share_plugin", "-p",
            "no:cacheprovider", *map(str, files),
        ]  # fmt: skip
        logs = {share: folder / f"{self.name}-{share.partition('/')[0]}.log" for share in shares}
        running = {}
        try:
            for share, log in logs.items():
                with log.open("w") as out:
                    running[share] = subprocess.Popen(
                        command, cwd=ROOT, env={**os.environ, SHARE_VARIABLE: share}, stdout=out, stderr=out
                    )
            for share, process in running.items():
                process.wait(max(0.0, call.left - ENDING_SECONDS))
                outcome.failed |= self._record(call, share, process.returncode, logs[share])
        except subprocess.TimeoutExpired:
            call.console.print(f"{self.name}: time is over; shares that did not end begin anew", style="yellow")
        except KeyboardInterrupt:
            outcome.interrupted = True
        finally:
            for process in running.values():
                process.kill()
                process.wait()
        return outcome

    def _record(self, call: Call, share: str, code: int, log: Path) -> bool:
        """Whether it failed. Pytest's code 1: tests failed; others: it did not run."""
        lines = log.read_text().splitlines() or ["it said nothing"]
        failures = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
        found = {"share": share, "passed": code == 0, "said": lines[-1].strip("= "), "failures": failures}
        _append(self.path(call.setting), {**found, "environment": call.environment})
        for text in (f"{self.name} {share}: {found['said']}", *failures):
            call.console.print(text, highlight=False, markup=False, soft_wrap=True, style="red" if code else None)
        return code != 0


class Tuned(Job):
    """Buckets of the launch table, each tuned in a process of its own, whose GPU context a candidate may break."""

    def left(self, call: Call) -> tuple[int, ...]:
        done = {line["buckets"][0]["batch"] for line in call.earlier(self.path(call.setting))}
        return tuple(batch for batch in self.part.batches if batch not in done)

    def run(self, call: Call) -> Outcome:
        outcome, table = Outcome(), call.setting.folder / TABLE.name
        if not table.is_file():
            shutil.copyfile(TABLE, table)
        for batch in self.left(call):
            if not call.has(self.part.estimate.case):
                break
            command = [
                sys.executable, "-m", "sp_fast.bench", "tune", "--batch", str(batch), "--device", call.setting.device,
                "--table", str(table.resolve()), "--json",
            ]  # fmt: skip
            patience = max(1.0, call.left - ENDING_SECONDS)
            try:
                done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=patience)
                code, said = done.returncode, done.stderr.strip()
            except subprocess.TimeoutExpired:
                code, said = 1, f"it took more than {patience:.0f} s"
            except KeyboardInterrupt:
                outcome.interrupted = True
                break
            call.console.print(f"{self.name} B={batch}: {said}", highlight=False, markup=False, soft_wrap=True)
            outcome.failed |= code != 0
            if code == 0:
                _append(self.path(call.setting), {**json.loads(done.stdout), "environment": call.environment})
        return outcome


KINDS = {Part: Measured, Checks: Checked, Tuning: Tuned}


def job_of(name: str, part: AnyPart) -> Job:
    """What runs the part."""
    return KINDS[type(part)](name, part)


def missing_modules(name: str) -> list[str]:
    """Of a part, those that cannot be imported; nothing is imported to find out."""
    return [module for module in NEEDS.get(name, ()) if importlib.util.find_spec(module) is None]


def _append(path: Path, line: dict[str, Any]) -> None:
    """Whole or not at all."""
    aside = path.with_suffix(".new")
    aside.write_text((path.read_text() if path.is_file() else "") + json.dumps(line) + "\n")
    aside.replace(path)
