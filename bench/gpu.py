"""The measurements for a machine with a GPU, in parts that each fit into minutes and go on where they stopped."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sp_fast.bench.cases import DTYPES, STAGES, Case
from sp_fast.bench.execute import blank_record
from sp_fast.bench.implementations import OURS, YARDSTICK
from sp_fast.bench.plan import TINY, implementations, projector_cases
from sp_fast.bench.record import finished, read_records
from sp_fast.bench.run import Plan
from sp_fast.bench.suite import PROJECTOR, AnyCase, Suite
from sp_fast.variants import OFFICIAL, SHORT

PART_SECONDS = 420.0  # after which no further case is begun; the one that runs may take a minute more
SAME = ("machine", "source")  # of the environment, for a result to count as done
DTYPE = "bfloat16"
HEADLINE = "crop-dfi"
TURNS, TURN_SECONDS = 5, 0.1
PATIENCE_SECONDS = 120.0  # for one answer of a process, a compilation included
MODEL_TURNS, MODEL_PATIENCE_SECONDS = 2, 420.0  # a run is seconds, and a compilation minutes
REHEARSED = ("crop-dfi", "conv336_adptive_pooling_multifuse_q")


@dataclass(frozen=True)
class Part:
    """What a part measures, and how often."""

    cases: tuple[AnyCase, ...]
    implementations: tuple[str, ...]
    turns: int
    suite: Suite = PROJECTOR
    patience: float = PATIENCE_SECONDS


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
    chosen = PARTS[part](setting)
    path = part_file(part, setting)
    earlier = read_records(path) if path.is_file() and path.stat().st_size else []
    done = finished(r for r in earlier if all(r.environment.get(key) == environment[key] for key in SAME))
    plan = Plan(
        chosen.cases,
        chosen.implementations,
        setting.device,
        setting.threads,
        min(chosen.turns, 1) if setting.tiny else chosen.turns,
        0.02 if setting.tiny else TURN_SECONDS,
        deadline=time.monotonic() + PART_SECONDS,
        patience=chosen.patience,
        suite=chosen.suite,
    )
    return replace(plan, cases=tuple(case for case in chosen.cases if not _identities(case, plan) <= done))


def _identities(case: AnyCase, plan: Plan) -> set[tuple[str, ...]]:
    """Of the records that the case will give."""
    blank = blank_record(plan, {})
    return {
        replace(blank, implementation=name, **plan.suite.fields(case, name)).identity for name in plan.implementations
    }


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
    return Part(tuple(cases), implementations(setting.device, ()), TURNS)


def _projector(setting: Setting) -> Part:
    """Where the time goes: the projector stage by stage."""
    cases = tuple(_timed_cases(setting, HEADLINE, STAGES[1:], (1, 32), (1, 32)))
    return Part(cases, implementations(setting.device, ()), TURNS)


def _variants(setting: Setting) -> Part:
    """The pooling pyramid, without and with the detail integrator."""
    cases = [
        *_timed_cases(setting, "pool", ("whole",), (1, 8, 32), ()),
        *_timed_cases(setting, "pool-dfi", ("whole",), (1, 8, 32), (1, 32)),
    ]
    return Part(tuple(cases), implementations(setting.device, ()), TURNS)


def _accuracy(setting: Setting) -> Part:
    """Every variant and dtype, outputs and gradients; nothing is timed."""
    variants = REHEARSED if setting.tiny else (*OFFICIAL, *(name for name in SHORT if name.startswith("sliding")))
    overrides = TINY if setting.tiny else {}
    found = [projector_cases(variants, ["whole"], ["both"], [2], [dtype], overrides) for dtype in (DTYPE, *DTYPES)]
    return Part(tuple(dict.fromkeys(case for cases in found for case in cases)), (OURS, YARDSTICK), 0)


def _model(setting: Setting) -> Part:
    """A whole 7B LLaVA-SP, official form and ours, and LLaVA-1.5: eager and compiled, one prompt before eight."""
    from sp_fast.bench.model_cases import IMPLEMENTATIONS, Lengths, attentions_on, model_cases
    from sp_fast.bench.model_shapes import ModelShape
    from sp_fast.bench.model_suite import MODEL

    shape, lengths = ModelShape("7b", "clip-l-336"), Lengths()
    if setting.tiny:
        shape, lengths = ModelShape("tiny", "tiny"), Lengths(8, 4)
    attentions = {DTYPE: tuple(attentions_on(setting.device, DTYPE, ["auto", "sdpa"]))}
    cases: list[AnyCase] = []
    for batch in (1,) if setting.tiny else (1, 8):
        stages = ("ttft", "prefill", "decode", "end_to_end")
        cases += model_cases([shape], stages, [batch], [DTYPE], attentions, ["eager"], lengths)
        # compile_model takes sdpa; a flash package's attention breaks its graphs
        cases += model_cases([shape], stages, [batch], [DTYPE], {DTYPE: ["sdpa"]}, ["compiled"], lengths)
    return Part(tuple(cases), IMPLEMENTATIONS, MODEL_TURNS, MODEL, MODEL_PATIENCE_SECONDS)


def _train(setting: Setting) -> Part:
    """The projector's training step beside every baseline: in the dtype of the other parts, then in float32."""
    from sp_fast.bench.train_cases import projector_implementations, projector_steps
    from sp_fast.bench.train_suite import PROJECTOR_STEP

    batches = (1,) if setting.tiny else (1, 16, 32)
    cases = projector_steps([HEADLINE], batches, [DTYPE, "float32"], TINY if setting.tiny else {})
    return Part(cases, projector_implementations(setting.device, ()), TURNS, PROJECTOR_STEP)


def _train_model(setting: Setting) -> Part:
    """A LoRA step of a whole 7B LLaVA-SP on 16 prompts of 640 tokens, every activation kept."""
    from sp_fast.bench.model_cases import attentions_on
    from sp_fast.bench.model_shapes import ModelShape
    from sp_fast.bench.train_cases import MODEL_IMPLEMENTATIONS, MODES, model_steps
    from sp_fast.bench.train_suite import MODEL_STEP

    shape = ModelShape("tiny", "tiny") if setting.tiny else ModelShape("7b", "clip-l-336")
    [attention] = attentions_on(setting.device, DTYPE, ["auto"])
    cases = model_steps(shape, [1 if setting.tiny else 16], [DTYPE], attention, MODES[0], 8 if setting.tiny else 58)
    return Part(cases, MODEL_IMPLEMENTATIONS, TURNS, MODEL_STEP, MODEL_PATIENCE_SECONDS)


PARTS: dict[str, Callable[[Setting], Part]] = {
    "baselines": _baselines,
    "accuracy": _accuracy,
    "projector": _projector,
    "variants": _variants,
    "model": _model,
    "train": _train,
    "train_model": _train_model,
}
