"""Two sets of results, case by case: what became slower or larger, beyond a threshold and the runs' own spread."""

from __future__ import annotations

import io
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from sp_fast.bench.environment import COMMIT_VARIABLE
from sp_fast.bench.record import Record, RecordError, read_records

ROUNDS = 2  # in turns, where two checkouts are measured
DEFAULT_OPTIONS = ("--implementation", "fast", "--direction", "forward", "--direction", "both", "--batch", "1")
BAD = ("slower", "larger", "lost")


@dataclass(frozen=True)
class Change:
    """One case and implementation, in both. Times are p50, memory is the peak."""

    case: str
    implementation: str
    a_ms: float | None
    b_ms: float | None
    ratio: float | None  # b_ms / a_ms
    a_peak_mib: float | None
    b_peak_mib: float | None
    verdict: str  # same, faster, slower, unclear (beyond the threshold, but within the spread), larger, lost, no figure

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def changes(a: Sequence[Record], b: Sequence[Record], threshold: float) -> list[Change]:
    """What both hold, compared.

    Raises:
        RecordError: they have no case in common.
    """
    others = {record.identity: record for record in b}
    pairs = [(record, others[record.identity]) for record in a if record.identity in others]
    if not pairs:
        raise RecordError("the two have no case in common: measure the same cases in both")
    return [_change(x, y, threshold) for x, y in pairs]


def _change(a: Record, b: Record, threshold: float) -> Change:
    ratio = b.ms_p50 / a.ms_p50 if a.ms_p50 and b.ms_p50 else None
    figures = (a.case, a.implementation, a.ms_p50, b.ms_p50, ratio, a.peak_mib, b.peak_mib)
    return Change(*figures, _verdict(a, b, ratio, threshold))


def _verdict(a: Record, b: Record, ratio: float | None, threshold: float) -> str:
    if ratio is None:
        return "lost" if a.ms_p50 else "no figure"
    if ratio > 1 + threshold and b.ms_p20 > a.ms_p80:
        return "slower"
    if a.peak_mib and b.peak_mib and b.peak_mib > a.peak_mib * (1 + threshold):
        return "larger"
    if ratio < 1 / (1 + threshold) and b.ms_p80 < a.ms_p20:
        return "faster"
    return "unclear" if not 1 / (1 + threshold) <= ratio <= 1 + threshold else "same"


def missing(a: Sequence[Record], b: Sequence[Record]) -> list[str]:
    """Cases and implementations that only one of the two holds."""
    return sorted({f"{r.case} {r.implementation}" for r in a} ^ {f"{r.case} {r.implementation}" for r in b})


def machines_differ(a: Sequence[Record], b: Sequence[Record]) -> str | None:
    """A warning where the two do not come from the same machine, threads and torch."""
    kinds = [(r[0].environment.get("machine"), r[0].threads, r[0].environment.get("torch")) for r in (a, b)]
    return None if kinds[0] == kinds[1] else f"measured on different machines or releases: {kinds[0]} and {kinds[1]}"


def load(a: str, b: str, options: Sequence[str], say: Callable[[str], None]) -> tuple[list[Record], list[Record]]:
    """Records of both sources: result files or folders; checkouts and git revisions are measured, in turns.

    Raises:
        RecordError: neither a file, a folder nor a revision, or a measurement that failed.
    """
    with tempfile.TemporaryDirectory(prefix="sp_fast-compare-") as name:
        sources = [_source(source, Path(name) / side) for source, side in ((a, "a"), (b, "b"))]
        found = [[read_records(s)] if isinstance(s, Path) else [] for s in sources]
        for turn in range(ROUNDS):
            for i, source in enumerate(sources):
                if isinstance(source, Checkout):
                    say(f"measuring {source.name}, round {turn + 1} of {ROUNDS}")
                    found[i].append(source.measure(options or DEFAULT_OPTIONS, Path(name) / f"{i}-{turn}.jsonl"))
    return merged(found[0]), merged(found[1])


def merged(rounds: Sequence[Sequence[Record]]) -> list[Record]:
    """One record a case and implementation: the median of the rounds' and heats' p50, their outer p20 and p80."""
    found: dict[tuple, list[Record]] = {}
    for records in rounds:
        for record in records:
            found.setdefault(record.identity, []).append(record)
    return [_merge(records) for records in found.values()]


def _merge(records: list[Record]) -> Record:
    timed = [r for r in records if r.ms_p50]
    if len(timed) < len(records):
        return next(r for r in records if not r.ms_p50)
    return replace(
        records[0],
        ms_p20=min(r.ms_p20 for r in timed),
        ms_p50=statistics.median(r.ms_p50 for r in timed),
        ms_p80=max(r.ms_p80 for r in timed),
        peak_mib=min((r.peak_mib for r in timed if r.peak_mib), default=None),
    )


@dataclass(frozen=True)
class Checkout:
    """Sources that can be measured: ``python -m sp_fast.bench`` runs in their root."""

    name: str
    root: Path

    def measure(self, options: Sequence[str], out: Path) -> list[Record]:
        command = [sys.executable, "-m", "sp_fast.bench", "projector", "--out", str(out), "--format", "json", *options]
        environment = {**os.environ, COMMIT_VARIABLE: self.name}
        result = subprocess.run(command, cwd=self.root, env=environment, capture_output=True, text=True)
        if result.returncode not in (0, 1) or not out.is_file():  # 1: a row was withheld, which its record says
            last = (result.stderr.strip().splitlines() or ["no message"])[-1]
            raise RecordError(f"{self.name} could not be measured: {last}")
        return read_records(out)


def _source(source: str, folder: Path) -> Path | Checkout:
    path = Path(source)
    if path.is_dir() and (path / "sp_fast" / "__init__.py").is_file():
        return Checkout(source, path.resolve())
    if path.exists():
        return path
    result = subprocess.run(["git", "archive", source], capture_output=True)
    if result.returncode:
        raise RecordError(f"{source} is no result file, no folder and no git revision of this checkout")
    with tarfile.open(fileobj=io.BytesIO(result.stdout)) as archive:
        archive.extractall(folder, filter="data")
    if not (folder / "bench" / "compare.py").is_file():
        raise RecordError(f"{source} is from before `sp-fast bench`: it cannot be measured; compare with a later one")
    return Checkout(source, folder)
