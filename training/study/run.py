"""One run of the study: an arm's projector trained in both stages from a seed, and the held-out questions asked."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from transformers import TrainerCallback, TrainerState
from transformers.utils import logging as transformers_logging

from sp_fast.bench.environment import environment
from sp_fast.llava_sp.loading import load_model
from sp_fast.llava_sp.new_folder import new_folder
from sp_fast.training.log_file import read_log
from sp_fast.training.merge import plan_merge
from sp_fast.training.record import FINISHED
from sp_fast.training.result import MODEL_FOLDER, PROJECTOR_FOLDER
from sp_fast.training.run import train
from sp_fast.training.study.arms import BASELINE
from sp_fast.training.study.study import Job, Study
from sp_fast.training.task.answers import answer, read_questions, summarise
from sp_fast.training.task.report import scores_to_dict

logger = logging.getLogger("sp_fast")

#: Is told what a run does, how much of it is done, and how much there is.
Tell = Callable[[str, int, int], None]
_POINTS = 200  # of a loss curve, at most


def run_one(study: Study, job: Job, tell: Tell) -> dict[str, Any]:
    """Runs, or goes on; what it returns is a line of ``results.jsonl``.

    Every arm has the same data in the same order, and begins as the same model but for its spatial part: a seed's
    patch MLP and LoRA are alike in all.

    Raises:
        SPFastError: training or scoring could not be done.
    """
    transformers_logging.disable_progress_bar()
    folder = study.run_folder(job)
    projector = initial_projector(study, job, folder / "initial")
    for stage in ("pretrain", "finetune"):
        recipe = study.recipe_of(stage, folder / stage, job.seed, projector=str(projector))
        if not (recipe.output / FINISHED).is_file():
            train(stage, recipe, logger.info, [_Steps(stage, tell)])
        projector = recipe.output / PROJECTOR_FOLDER
    logs = {stage: read_log(folder / stage) for stage in ("pretrain", "finetune")}
    begin = time.perf_counter()
    types = _ask(study, _whole_model(folder), tell)
    seconds = {stage: _seconds(log) for stage, log in logs.items()} | {"questions": time.perf_counter() - begin}
    return {
        "arm": job.arm, "seed": job.seed,
        "projector": study.config(job.arm).to_dict(), "parameters": study.count(job.arm),
        "types": types, "mean": fmean(one["accuracy"] for one in types.values()),
        "losses": {stage: _curve(log) for stage, log in logs.items()}, "seconds": seconds,
        "threads": torch.get_num_threads(), "environment": environment(_device()),
    }  # fmt: skip


def initial_projector(study: Study, job: Job, folder: Path) -> Path:
    """A random projector of the arm; its patch MLP is the seed's, whatever the arm. One that is there is left."""
    if not folder.is_dir():
        projector = study.assemble(job.arm).make_projector(job.seed)
        projector.patch_mlp = study.assemble(BASELINE).make_projector(job.seed).patch_mlp
        with new_folder(folder, 4 * study.count(job.arm)["projector"]) as made:
            projector.save_pretrained(made)
    return folder


def tidy(study: Study, job: Job) -> None:
    """After its result is on the disk: a run's folder goes, but for the model of seed 0, which is kept."""
    folder, kept = study.run_folder(job), study.model_folder(job.arm)
    if job.seed == 0 and folder.is_dir() and not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        _whole_model(folder).rename(kept)
    shutil.rmtree(folder, ignore_errors=True)


class _Steps(TrainerCallback):
    def __init__(self, stage: str, tell: Tell) -> None:
        self._stage, self._tell = stage, tell

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._tell(self._stage, state.global_step, state.max_steps)


def _whole_model(folder: Path) -> Path:
    """Of a run whose stages have finished; adapters are merged once."""
    trained, merged = folder / "finetune" / MODEL_FOLDER, folder / "merged"
    if trained.is_dir():
        return trained
    if not merged.is_dir():
        plan_merge(folder / "finetune", merged).write(force=False)
    return merged


def _ask(study: Study, model: Path, tell: Tell) -> dict[str, Any]:
    loaded = load_model(model, device=str(_device()))
    rows = read_questions(study.task, study.images)
    said = answer(loaded.model, loaded.processor, rows, study.task, progress=lambda i, n: tell("questions", i, n))
    return scores_to_dict(summarise(rows, said))


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _seconds(log: list[dict[str, Any]]) -> float:
    """Of all steps, in however many processes they were taken."""
    steps = [0, *(line["step"] for line in log)]
    return sum(
        line["step_seconds"] * (step - before) for line, (before, step) in zip(log, pairwise(steps), strict=True)
    )


def _curve(log: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Last step and mean loss of each of up to 200 runs of lines."""
    together = -(-len(log) // _POINTS)
    runs = [log[i : i + together] for i in range(0, len(log), together)]
    return {"step": [run[-1]["step"] for run in runs], "loss": [fmean(line["loss"] for line in run) for run in runs]}
