"""The measurements for a machine with a GPU, in parts that each fit into minutes and go on where they stopped."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sp_fast.bench import summary
from sp_fast.bench.cases import DTYPES, STAGES, Case
from sp_fast.bench.implementations import OURS, YARDSTICK
from sp_fast.bench.plan import TINY, implementations, projector_cases
from sp_fast.bench.record import Record, read_records
from sp_fast.bench.run import Plan
from sp_fast.variants import OFFICIAL, SHORT

PART_SECONDS = 420.0  # after which no further case is begun; the one that runs may take a minute more
FORWARD_BATCHES = (1, 8, 32, 256)
TRAINING_BATCHES = (1, 8, 16, 32)
DTYPE = "bfloat16"
HEADLINE = "crop-dfi"
TURNS = 5
REHEARSED = ("crop-dfi", "conv336_adptive_pooling_multifuse_q")


@dataclass(frozen=True)
class Setting:
    """Where a part runs; ``tiny`` rehearses it with shapes of milliseconds."""

    device: str
    threads: int
    folder: Path
    tiny: bool = False


def part_file(part: str, setting: Setting) -> Path:
    """Where a part's records go."""
    return setting.folder / f"{part}.jsonl"


def part_plan(part: str, setting: Setting, commit: str | None) -> Plan:
    """What is left to do of a part: cases that this commit has not measured yet."""
    cases, names, turns = PARTS[part](setting)
    turns = min(turns, 1) if setting.tiny else turns
    path = part_file(part, setting)
    done = [r for r in read_records(path) if r.environment.get("commit") == commit] if _has_records(path) else []
    left = tuple(case for case in cases if {(case.key, name) for name in names} - {_key(r) for r in done})
    seconds = 0.02 if setting.tiny else 0.2
    deadline = time.monotonic() + PART_SECONDS
    return Plan(left, names, setting.device, setting.threads, turns, turn_seconds=seconds, deadline=deadline)


def _key(record: Record) -> tuple[str, str]:
    return record.case, record.implementation


def _has_records(path: Path) -> bool:
    return path.is_file() and b"\n" in path.read_bytes()


def _timed_cases(setting: Setting, variants: Sequence[str], stages: Sequence[str]) -> tuple[Case, ...]:
    """What matters most first: the whole projector, forward and then training, then the stages."""
    forward, training = ((1, 2), (2,)) if setting.tiny else (FORWARD_BATCHES, TRAINING_BATCHES)
    overrides = TINY if setting.tiny else {}
    cases: list[Case] = []
    for variant in variants:
        for group in (stages[:1], stages[1:]):
            for direction, batches in (("forward", forward), ("both", training)):
                if group:
                    cases += projector_cases([variant], group, [direction], batches, [DTYPE], overrides)
    return tuple(cases)


def _baselines(setting: Setting) -> tuple[tuple[Case, ...], tuple[str, ...], int]:
    names = tuple(name for name in implementations(setting.device, ()) if name != OURS)
    return _timed_cases(setting, (HEADLINE,), ("whole", "spatial", "detail")), names, TURNS


def _projector(setting: Setting) -> tuple[tuple[Case, ...], tuple[str, ...], int]:
    """Ours beside the baselines that were the strongest at some case of the part before, or beside all of them."""
    names = implementations(setting.device, ())
    earlier = part_file("baselines", setting)
    if _has_records(earlier):
        strongest = {row.best for row in summary.rows(read_records(earlier)) if row.best}
        names = tuple(name for name in names if name in {OURS, YARDSTICK} | strongest)
    variants = REHEARSED if setting.tiny else (HEADLINE, "pool", "pool-dfi")
    return _timed_cases(setting, variants, STAGES), names, TURNS


def _accuracy(setting: Setting) -> tuple[tuple[Case, ...], tuple[str, ...], int]:
    """Every variant and dtype, outputs and gradients; nothing is timed."""
    variants = REHEARSED if setting.tiny else (*OFFICIAL, *(name for name in SHORT if name.startswith("sliding")))
    overrides = TINY if setting.tiny else {}
    found = [projector_cases(variants, ["whole"], ["both"], [2], [dtype], overrides) for dtype in (DTYPE, *DTYPES)]
    return tuple(dict.fromkeys(case for cases in found for case in cases)), (OURS, YARDSTICK), 0


PARTS: dict[str, Callable[[Setting], tuple[tuple[Case, ...], tuple[str, ...], int]]] = {
    "baselines": _baselines,
    "accuracy": _accuracy,
    "projector": _projector,
}
