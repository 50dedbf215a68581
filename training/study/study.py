"""What all runs of a study share: the task, the parts, the recipes, and what tells them from another study's."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from sp_fast.config import SPProjectorConfig
from sp_fast.errors import DataError
from sp_fast.llava_sp.assemble import Assembly, assemble
from sp_fast.projector import SPProjector
from sp_fast.training.fingerprint import FREE, described, file_digest, weights
from sp_fast.training.parts import read_parts
from sp_fast.training.recipe import STAGES, Recipe
from sp_fast.training.settings import read_recipe
from sp_fast.training.study.arms import ARMS, BASELINE
from sp_fast.training.task.parts import LANGUAGE, TOWER
from sp_fast.version import __version__

HELD_OUT = "held_out.json"
_DATA = {"pretrain": "captions.json", "finetune": "train.json"}
_STATES = 3  # numbers of a checkpoint for each trained one: itself, and AdamW's two


class Job(NamedTuple):
    """One run."""

    arm: str
    seed: int

    def __str__(self) -> str:
        return f"{self.arm}-{self.seed}"


@dataclass(frozen=True)
class Study:
    """Runs differ in their arm and their seed alone.

    Args:
        task: folder of ``make-task``.
        parts: folder of ``make-parts``: ``language-model`` and the tower.
        out: the study's own.
        recipe: of ``<recipe>-pretrain`` and ``<recipe>-finetune``: shipped ones, or YAML files at that path.
        images: held-out ones whose questions are asked; None: all.
        tower: its folder's name in ``parts``.
    """

    task: Path
    parts: Path
    out: Path
    recipe: str = "tiny"
    images: int | None = None
    tower: str = TOWER

    def __getstate__(self) -> dict[str, Any]:
        """For another process: without the parts, whose files are open here."""
        return {one.name: getattr(self, one.name) for one in fields(self)}

    def recipe_of(self, stage: str, output: Path, seed: int = 0, **changes: Any) -> Recipe:
        """A stage's recipe.

        Raises:
            TrainingError: there is none, or a setting in it cannot be.
        """
        file = Path(f"{self.recipe}-{stage}.yaml")
        said = {
            "output": output, "data": self.task / _DATA[stage], "image_folder": self.task, "seed": seed,
            "language_model": self.parts / LANGUAGE, "vision_tower": self.parts / self.tower,
        }  # fmt: skip
        return read_recipe(stage, str(file) if file.is_file() else f"{self.recipe}-{stage}", said | changes)

    def config(self, arm: str) -> SPProjectorConfig:
        """An arm's projector, as large as the parts want it. Raises ConfigError where their grid does not suit it."""
        found = self._baseline.config.projector
        return ARMS[arm].config(found.grid, found.vision_width, found.text_width)

    def assemble(self, arm: str) -> Assembly:
        """The parts with an arm's projector at random. Raises CheckpointError where they are not whole."""
        return self._assemble(self.config(arm).to_dict())

    def count(self, arm: str) -> dict[str, int]:
        """Parameters of an arm's projector: all, and those that ``mlp`` does not have."""
        numbers = {
            name: sum(parameter.numel() for parameter in SPProjector(self.config(name), device="meta").parameters())
            for name in (arm, BASELINE)
        }
        return {"projector": numbers[arm], "spatial": numbers[arm] - numbers[BASELINE]}

    @cached_property
    def _baseline(self) -> Assembly:
        return self._assemble(BASELINE)

    def _assemble(self, projector: str | dict[str, Any]) -> Assembly:
        return assemble(self.parts / LANGUAGE, self.parts / self.tower, projector)

    def run_folder(self, job: Job) -> Path:
        """Of a run that has not ended, ``runs/ARM-SEED``."""
        return self.out / "runs" / str(job)

    def model_folder(self, arm: str) -> Path:
        """Of an arm's whole model that is kept, ``models/ARM``."""
        return self.out / "models" / arm

    def fingerprint(self, **more: Any) -> dict[str, Any]:
        """What two runs must share for their scores to stand beside each other, as JSON holds it.

        Args:
            more: what else there is, by name.

        Raises:
            DataError: the task's folder is not whole.
            SPFastError: parts or recipes that cannot be used.
        """
        found: dict[str, Any] = {}
        for name in (*_DATA.values(), HELD_OUT):
            try:
                found[name] = file_digest(self.task / name)
            except OSError as error:
                raise DataError(
                    f"{self.task / name} cannot be read ({error.strerror}): give a folder that sp-fast train make-task "
                    "has made"
                ) from error
        found["weights of the parts"] = weights(self._baseline)
        for stage in STAGES:
            recipe = self.recipe_of(stage, self.out)
            values = recipe.to_dict().items()
            found |= {f"{stage} {name}": value for name, value in values if name not in FREE | {"seed"}}
            found[f"{stage} model"] = described(read_parts(replace(recipe, projector=BASELINE)))
        return found | {"held-out images": self.images} | more

    def describe(self, jobs: list[Job], workers: int) -> dict[str, Any]:
        """For ``study.json``: what was asked for last. ``disk_bytes`` is an upper bound of what runs need together."""
        arms = dict.fromkeys(job.arm for job in jobs)
        return {
            "version": __version__, "task": str(self.task.absolute()), "parts": str(self.parts.absolute()),
            "recipe": self.recipe, "images": self.images, "tower": self.tower,
            "seeds": sorted({job.seed for job in jobs}),
            "arms": {arm: {"table": ARMS[arm].table, "projector": self.config(arm).to_dict()} for arm in arms},
            "disk_bytes": self._disk(list(arms), workers), "fingerprint": self.fingerprint(),
        }  # fmt: skip

    def _disk(self, arms: list[str], workers: int) -> int:
        """Models that are kept, and for each worker a run's: two models, and checkpoints of both stages, one more
        while it is written."""
        rest = sum(math.prod(tensor.shape) for tensor in self._baseline.rest.values())
        sizes = [self.count(arm)["projector"] for arm in arms]
        recipes = [self.recipe_of(stage, self.out) for stage in STAGES]
        checkpoints = [_STATES * (recipe.save_total_limit + 1) for recipe in recipes]
        run = 2 * rest + checkpoints[1] * rest + (4 + sum(checkpoints)) * max(sizes)
        return 4 * (sum(rest + own for own in sizes) + max(1, workers) * run)
