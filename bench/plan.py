"""From words on a command line to a plan: which cases exist, which implementations, and whether they are known."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Sequence
from typing import Any

import torch

from sp_fast import SPProjectorConfig
from sp_fast.bench.cases import DIRECTIONS, DTYPES, STAGES, Case, stages_of
from sp_fast.bench.implementations import BASELINES, OURS, baselines_on
from sp_fast.errors import ConfigError

#: Widths of a rehearsal: every shape of the real thing, in milliseconds.
TINY = {"vision_width": 64, "spatial_width": 32, "text_width": 64}


def projector_cases(
    variants: Sequence[str],
    stages: Sequence[str],
    directions: Sequence[str],
    batches: Sequence[int],
    dtypes: Sequence[str],
    overrides: dict[str, Any],
) -> tuple[Case, ...]:
    """Every combination that exists, those on the same weights beside each other.

    Raises:
        ConfigError: a name that is unknown, or a stage that none of the variants has.
    """
    for kind, given, known in (
        ("stage", stages, STAGES), ("direction", directions, DIRECTIONS), ("dtype", dtypes, tuple(DTYPES)),
    ):  # fmt: skip
        check_names(kind, given, known)
    if min(batches) < 1:
        raise ConfigError(f"batch {min(batches)} is no number of images: give 1 or more")
    configs = {variant: SPProjectorConfig.variant(variant, **fitting(variant, overrides)) for variant in variants}
    cases = tuple(
        Case(variant, configs[variant], stage, direction, batch, dtype)
        for variant, dtype, stage, direction, batch in itertools.product(variants, dtypes, stages, directions, batches)
        if stage in stages_of(configs[variant])
    )
    if not cases:
        raise ConfigError(f"{', '.join(variants)} has no stage {', '.join(stages)}: leave --stage out")
    return cases


def fitting(variant: str, overrides: dict[str, Any]) -> dict[str, Any]:
    """A transformer keeps the vision tower's width, and a rank is no larger than that."""
    published = SPProjectorConfig.variant(variant)
    if published.rank is not None and "vision_width" in overrides:
        return {**overrides, "rank": min(published.rank, overrides["vision_width"])}
    if published.extractor == "transformer" and "spatial_width" in overrides:
        return {**overrides, "spatial_width": overrides.get("vision_width", 1024)}
    return overrides


def implementations(device: str, names: Sequence[str]) -> tuple[str, ...]:
    """Ours and the baselines that exist on the device, or the ones that are named.

    Raises ConfigError for names that are none.
    """
    present = (OURS, *baselines_on(torch.device(device)))
    check_names("implementation", names, (OURS, *BASELINES))
    for name in names:
        if name not in present:
            raise ConfigError(f"{name} is no implementation of its own on {device}: choose from {', '.join(present)}")
    return tuple(dict.fromkeys(names)) or present


def check_names(kind: str, given: Sequence[str], known: Sequence[str]) -> None:
    """Raises ConfigError, with the nearest name, for one that is not known."""
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"{name!r} is no {kind}{hint}; known: {', '.join(known)}")
