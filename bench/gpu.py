"""The measurements for a machine with a GPU, in parts that each fit into minutes and go on where they stopped."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sp_fast.bench.cases import DTYPES, STAGES, Case
from sp_fast.bench.implementations import OURS, YARDSTICK
from sp_fast.bench.plan import TINY, implementations, projector_cases
from sp_fast.bench.record import finished, read_records
from sp_fast.bench.run import Plan
from sp_fast.variants import OFFICIAL, SHORT

PART_SECONDS = 420.0  # after which no further case is begun; the one that runs may take a minute more
SAME = ("machine", "source")  # of the environment, for a result to count as done
DTYPE = "bfloat16"
HEADLINE = "crop-dfi"
TURNS, TURN_SECONDS = 5, 0.1
PATIENCE_SECONDS = 120.0  # for one answer of a process, a compilation included
Part = tuple[tuple[Case, ...], tuple[str, ...], int]  # cases, implementations, turns
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


def part_plan(part: str, setting: Setting, environment: dict[str, Any]) -> Plan:
    """What is left to do of a part: cases that these sources have not measured on this machine, or not rightly."""
    cases, names, turns = PARTS[part](setting)
    path = part_file(part, setting)
    earlier = read_records(path) if path.is_file() and path.stat().st_size else []
    done = finished(r for r in earlier if all(r.environment.get(key) == environment[key] for key in SAME))
    plan = Plan(
        cases,
        names,
        setting.device,
        setting.threads,
        min(turns, 1) if setting.tiny else turns,
        0.02 if setting.tiny else TURN_SECONDS,
        deadline=time.monotonic() + PART_SECONDS,
        patience=PATIENCE_SECONDS,
    )
    return replace(plan, cases=tuple(case for case in cases if not _identities(case, plan) <= done))


def _identities(case: Case, plan: Plan) -> set[tuple[str, ...]]:
    """Of the records that the case will give."""
    config = case.config
    widths = map(str, (config.grid, config.vision_width, config.spatial_width, config.text_width))
    rest = (plan.device.partition(":")[0], *widths)
    return {("projector", case.key, name, *rest) for name in plan.implementations}


def _timed_cases(
    setting: Setting, variant: str, stages: Sequence[str], forward: Sequence[int], training: Sequence[int]
) -> list[Case]:
    """What matters most first: forward, then training, at these batches."""
    overrides, found = (TINY if setting.tiny else {}), []
    for direction, batches in (("forward", forward), ("both", training)):
        if batches:
            found += projector_cases(
                [variant], stages, [direction], batches[:2] if setting.tiny else batches, [DTYPE], overrides
            )
    return found


def _baselines(setting: Setting) -> Part:
    """The headline: the whole projector beside every baseline."""
    cases = _timed_cases(setting, HEADLINE, ("whole",), (1, 8, 32, 256), (1, 8, 16, 32))
    return tuple(cases), implementations(setting.device, ()), TURNS


def _projector(setting: Setting) -> Part:
    """Where the time goes: the projector stage by stage."""
    return (
        tuple(_timed_cases(setting, HEADLINE, STAGES[1:], (1, 32), (1, 32))),
        implementations(setting.device, ()),
        TURNS,
    )


def _variants(setting: Setting) -> Part:
    """The pooling pyramid, without and with the detail integrator."""
    cases = [
        *_timed_cases(setting, "pool", ("whole",), (1, 8, 32), ()),
        *_timed_cases(setting, "pool-dfi", ("whole",), (1, 8, 32), (1, 32)),
    ]
    return tuple(cases), implementations(setting.device, ()), TURNS


def _accuracy(setting: Setting) -> Part:
    """Every variant and dtype, outputs and gradients; nothing is timed."""
    variants = REHEARSED if setting.tiny else (*OFFICIAL, *(name for name in SHORT if name.startswith("sliding")))
    overrides = TINY if setting.tiny else {}
    found = [projector_cases(variants, ["whole"], ["both"], [2], [dtype], overrides) for dtype in (DTYPE, *DTYPES)]
    return tuple(dict.fromkeys(case for cases in found for case in cases)), (OURS, YARDSTICK), 0


PARTS: dict[str, Callable[[Setting], Part]] = {
    "baselines": _baselines,
    "accuracy": _accuracy,
    "projector": _projector,
    "variants": _variants,
}
