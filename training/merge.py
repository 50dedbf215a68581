"""A finished run to a whole model: the parts it began with, its projector, its adapters merged."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from sp_fast.errors import TrainingError
from sp_fast.llava_sp.assemble import Assembly
from sp_fast.llava_sp.conversion import DTYPE_NAMES, Conversion
from sp_fast.llava_sp.lora import adapted
from sp_fast.llava_sp.official_names import PROJECTOR
from sp_fast.tensor_files import stored_tensors
from sp_fast.training.fingerprint import weights
from sp_fast.training.parts import read_parts
from sp_fast.training.record import FINISHED, read_run
from sp_fast.training.result import ADAPTER_FOLDER, MODEL_FOLDER, PROJECTOR_FOLDER
from sp_fast.training.whole_model import whole_model

_WRAPPED = "base_model.model."  # in front of our names, in PEFT's


def plan_merge(run: Path, out: Path, dtype: str | None = None) -> Conversion:
    """What will be written; see ``Conversion.write``.

    Args:
        run: the folder of a finished run.
        dtype: of all weights, by name; None: as frozen weights were in training.

    Raises:
        TrainingError: no finished run, one that needs no merging, or other weights than it began with.
        CheckpointError: parts of it, or of what it began with, are missing, damaged or another's.
    """
    if not (run / FINISHED).is_file():
        raise TrainingError(f"{run} holds no finished run: start its command again, which goes on, and merge then")
    if (run / MODEL_FOLDER).is_dir():
        raise TrainingError(f"{run / MODEL_FOLDER} is a whole model already: nothing is to be merged")
    if dtype is not None and dtype not in DTYPE_NAMES:
        raise TrainingError(f"dtype={dtype!r} must be one of {', '.join(DTYPE_NAMES)}")
    stage, recipe = read_run(run)
    # The template of a first stage is not one to ask with; the run has a projector of its own.
    projector = None if recipe.model is not None else str(run / PROJECTOR_FOLDER)
    template = recipe.template if stage == "finetune" else None
    assembly = read_parts(replace(recipe, template=template, projector=projector))
    _check_same(run, assembly)
    adapter = run / ADAPTER_FOLDER
    changed = adapted(adapter, assembly.rest, _our_name) if adapter.is_dir() else {}
    _, own = stored_tensors(run / PROJECTOR_FOLDER)
    changed |= {PROJECTOR + name: tensor for name, tensor in own.items()}
    return whole_model(run, out, assembly, changed, DTYPE_NAMES[dtype or recipe.dtype], stage)


def _check_same(run: Path, assembly: Assembly) -> None:
    """An adapter on other weights than its own gives a model that was never trained."""
    if json.loads((run / FINISHED).read_text(encoding="utf-8")).get("frozen weights") != weights(assembly):
        places = ", ".join(map(str, assembly.origins.values()))
        raise TrainingError(f"{run} was trained on other weights than those in {places} now: put the former back")


def _our_name(where: str, name: str) -> str:
    return name.removeprefix(_WRAPPED)
