"""Whether the fast projector takes the reference's path: stage 2 with either, and with the reference's sums reordered.

Projectors begin at random, as stage 1 begins: how far two paths lie apart does not ask where they come from.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerState
from transformers.utils import logging as transformers_logging

from sp_fast.bench.environment import environment
from sp_fast.compact_config import COMPACT
from sp_fast.errors import ConfigError
from sp_fast.projector import SPProjector
from sp_fast.training.recipe import Recipe
from sp_fast.training.record import the_only_one
from sp_fast.training.run import set_up
from sp_fast.training.stage import part_of
from sp_fast.training.study.arms import Arm
from sp_fast.training.study.conduct import jobs_of, run_the_rest
from sp_fast.training.study.drift import (
    EPS,
    Order,
    Reordered,
    Run,
    drift,
    official_parameters,
    reference_of,
    reorderings,
    within_rounding,
)
from sp_fast.training.study.results import Results
from sp_fast.training.study.run import Tell, initial_projector
from sp_fast.training.study.study import Job, Study

logger = logging.getLogger("sp_fast")

#: What takes the place of a model's projector.
Form = Callable[[SPProjector], nn.Module]
PATHS = "paths.jsonl"
DRIFTS = ("losses", "parameters")  # the largest relative one of each
_REORDERINGS = 3


def fast_form(projector: SPProjector) -> SPProjector:
    """The projector itself."""
    return projector


def reordered_form(order: Order, projector: SPProjector) -> Reordered:
    """The reference with the same weights, its sums in another order."""
    return Reordered(reference_of(projector), order)


def compare_paths(
    study: Study, arms: Sequence[Arm], seeds: int, steps: int, workers: int, console: Console
) -> dict[Job, str]:
    """Writes ``paths.jsonl``, a line each arm and seed, those that it does not have yet; returns what failed, and why.

    Raises:
        ConfigError: an arm with transformer blocks, or a compact one.
        TrainingError: results of another comparison, or another process in this folder.
    """
    if alien := [arm for arm in arms if study.config(arm.name).extractor == "transformer"]:
        raise ConfigError(
            f"the arm {alien[0].name!r} has transformer blocks, which are torch's own in both forms: leave it out"
        )
    if alien := [arm for arm in arms if study.config(arm.name).extractor in COMPACT]:
        raise ConfigError(
            f"the arm {alien[0].name!r} is compact, and has no official path to be compared with: leave it out"
        )
    with the_only_one(study.out):
        results = Results(study.out / PATHS, study.fingerprint(steps=steps, eps=EPS))
        work, ended = partial(race, study, steps), partial(_tidy, study)
        return run_the_rest(study, jobs_of(arms, seeds), results, workers, work, ended, console)


def race(study: Study, steps: int, job: Job, tell: Tell) -> dict[str, Any]:
    """All forms from the same start over the same samples; a line of ``paths.jsonl``.

    float32, without dropout, AdamW with ``drift.EPS``.
    """
    transformers_logging.disable_progress_bar()
    folder = study.run_folder(job)
    recipe = study.recipe_of(
        "finetune", folder / "finetune", job.seed, projector=str(initial_projector(study, job, folder / "initial")),
        dtype="float32", lora_dropout=0, max_steps=steps, logging_steps=1,
    )  # fmt: skip
    orders = reorderings(study.config(job.arm), _REORDERINGS)
    forms: dict[str, Form] = {"reference": reference_of, "fast": fast_form}
    forms |= {f"reordered {i}": partial(reordered_form, order) for i, order in enumerate(orders, 1)}
    begin = time.perf_counter()
    runs = {name: path(recipe, form, tell=partial(tell, name)) for name, form in forms.items()}
    reference = runs.pop("reference")
    drifts = {name: drift(run, reference) for name, run in runs.items()}
    fast = drifts.pop("fast")
    reordered = torch.stack(list(drifts.values())).amax(0)
    limits = {"fast": fast, "reordered": reordered}
    return {
        "arm": job.arm, "seed": job.seed, "holds": within_rounding(fast, reordered),
        "drift": {name: dict(zip(DRIFTS, found.tolist(), strict=True)) for name, found in limits.items()},
        "losses": {name: run.losses.tolist() for name, run in {"reference": reference, **runs}.items()},
        "seconds": {"training": time.perf_counter() - begin}, "threads": torch.get_num_threads(),
        "environment": environment(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
    }  # fmt: skip


def path(
    recipe: Recipe, form: Form, dtype: torch.dtype = torch.float32, tell: Callable[[int, int], object] | None = None
) -> Run:
    """Stage 2 with a form of the projector in its place: the losses, and everything that was trained, by module.

    A key's bias, say, begins at zero, and its gradient vanishes but for rounding: it has no size of its own that a
    drift could be measured against, and counts with its module's weight.

    Args:
        dtype: of all weights and of what is computed.
        tell: of steps taken and all of them.
    """
    trainer, _ = set_up("finetune", recipe, logger.info)
    trainer.args.adam_epsilon, trainer.args.save_strategy = EPS, "no"
    model = trainer.model.get_base_model() if hasattr(trainer.model, "peft_config") else trainer.model
    trainer.model.to(dtype)
    projector = model.model.multi_modal_projector
    found = form(projector).to(projector.patch_mlp[0].weight.device)
    model.model.multi_modal_projector = found
    watch = _Losses(tell)
    trainer.add_callback(watch)
    trainer.train()
    reordered = isinstance(found, Reordered)
    parameters = official_parameters(found.inner, found.order) if reordered else official_parameters(found)
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad and part_of(name) != "projector":
            parameters[name] = parameter.detach().double().cpu()
    return Run(torch.tensor(watch.losses, dtype=torch.float64), _by_module(parameters))


def _by_module(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found: dict[str, list[Tensor]] = {}
    for name, parameter in parameters.items():
        found.setdefault(name.rpartition(".")[0], []).append(parameter.flatten())
    return {module: torch.cat(some) for module, some in found.items()}


class _Losses(TrainerCallback):
    def __init__(self, tell: Callable[[int, int], object] | None) -> None:
        self.losses: list[float] = []
        self._tell = tell

    def on_log(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if "loss" in state.log_history[-1]:
            self.losses.append(state.log_history[-1]["loss"])
            if self._tell is not None:
                self._tell(state.global_step, state.max_steps)


def _tidy(study: Study, job: Job) -> None:
    shutil.rmtree(study.run_folder(job), ignore_errors=True)
