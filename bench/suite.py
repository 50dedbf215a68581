"""What the core asks of a thing that can be measured. The projector's answers; the model's are in model_suite.py."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from sp_fast.bench import budget
from sp_fast.bench.cases import DTYPES, Case, parts_of
from sp_fast.bench.counts import Count, count
from sp_fast.bench.gate import Gate
from sp_fast.bench.implementations import EXACT, OURS, YARDSTICK
from sp_fast.bench.subject import ProjectorJob
from sp_fast.bench.worker import Job


class AnyCase(Protocol):
    """One row of a table, for every implementation that takes part. Frozen, picklable."""

    stage: str
    direction: str
    batch: int
    dtype: str

    @property
    def key(self) -> str:
        """Unique in a plan, and a file name."""

    @property
    def gate(self) -> AnyCase:
        """The case whose results judge this one."""

    @property
    def exact(self) -> AnyCase:
        """The case whose float64 results judge this one: one for all that differ only in how it is computed."""


@dataclass(frozen=True)
class Needs:
    """Memory, MiB: of a process that holds its weights and waits, of the one that runs beyond that, and of float64."""

    what: str  # needs it, for a message
    idle_mib: float
    running_mib: float
    exact_mib: float
    way_out: str
    rebuilt: bool = False  # where two do not fit side by side, each is built anew for its turn


class Suite(Protocol):
    """Kinds of cases and implementations; the order of measuring is the core's."""

    ours: str
    yardstick: str  # judged before the others
    exact: str

    def weights(self, case: Any) -> Hashable:
        """Cases with equal ones are measured on the same weights."""

    def job(self, case: Any, device: str, seed: int, folder: Path) -> Job:
        """Builds the float64 subject; with another ``implementation``, that one."""

    def gate(self, case: Any) -> Gate:
        """Of the cases on the same weights."""

    def needs(self, cases: Sequence[Any], implementations: Sequence[str]) -> Needs:
        """Of cases on the same weights."""

    def fields(self, case: Any, name: str) -> dict[str, Any]:
        """Of the record of an implementation, what the case says of it."""

    def figures(self, case: Any, p50_ms: float) -> dict[str, Any]:
        """Of its record, what follows from the time alone."""

    def steps(self, case: Any, name: str) -> list[Count]:
        """What has to be done one after another: the roof of the case is the sum of theirs."""

    def parts(self, case: Any, name: str) -> list[Count]:
        """What an implementation would usually do one after another."""

    def captured(self, case: Any) -> bool:
        """Whether replays of a graph are timed, where all implementations allow it."""

    def metered(self, case: Any) -> bool:
        """Whether energy is read."""


class ProjectorSuite:
    """The projector: stages, directions and baselines."""

    ours, yardstick, exact = OURS, YARDSTICK, EXACT

    def weights(self, case: Case) -> Hashable:
        return case.config, case.dtype

    def job(self, case: Case, device: str, seed: int, folder: Path) -> ProjectorJob:
        return ProjectorJob(EXACT, case.config, DTYPES[case.dtype], device, seed, folder)

    def gate(self, case: Case) -> Gate:
        return Gate(case.dtype)

    def needs(self, cases: Sequence[Case], implementations: Sequence[str]) -> Needs:
        first, batch = cases[0], max(case.batch for case in cases)
        backward = any(case.direction != "forward" for case in cases)
        arguments = (first.config, first.dtype, batch, backward)
        return Needs(
            f"{first.variant} in {first.dtype} at batch {batch}",
            budget.idle_mib(first.config, first.dtype),
            budget.running_mib(*arguments, compiled="compiled" in implementations),
            budget.exact_mib(*arguments),
            "choose a smaller --spatial-width or --batch, or bfloat16",
        )

    def fields(self, case: Case, name: str) -> dict[str, Any]:
        config = case.config
        return {
            "benchmark": "projector", "case": case.key, "variant": case.variant, "stage": case.stage,
            "direction": case.direction, "batch": case.batch, "dtype": case.dtype, "grid": config.grid,
            "vision_width": config.vision_width, "spatial_width": config.spatial_width,
            "text_width": config.text_width,
        }  # fmt: skip

    def figures(self, case: Case, p50_ms: float) -> dict[str, Any]:
        return {}

    def steps(self, case: Case, name: str) -> list[Count]:
        return [count(case)]

    def parts(self, case: Case, name: str) -> list[Count]:
        return [count(replace(case, stage=stage)) for stage in parts_of(case)]

    def captured(self, case: Case) -> bool:
        return True

    def metered(self, case: Case) -> bool:
        return case.stage == "whole"


PROJECTOR = ProjectorSuite()
