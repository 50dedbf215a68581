"""What a run leaves: the projector, and what it made of the language model.

projector/    float32, for the next stage (setting ``projector``) or SPProjector.from_pretrained
adapter/      LoRA, as PEFT writes it
model/        instead of it, the whole model where all of the language model was trained
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sp_fast.errors import SPFastError, TrainingError, first_line
from sp_fast.llava_sp.assemble import Assembly
from sp_fast.llava_sp.modeling import PROJECTOR
from sp_fast.llava_sp.new_folder import new_folder
from sp_fast.projector import SPProjector
from sp_fast.stored_tensor import StoredTensor
from sp_fast.training.manifest import sync_folder
from sp_fast.training.recipe import Recipe
from sp_fast.training.record import FINISHED, replace_text
from sp_fast.training.sharded import whole
from sp_fast.training.stage import ADAPTER, dtype_of
from sp_fast.training.whole_model import whole_model

PROJECTOR_FOLDER, ADAPTER_FOLDER, MODEL_FOLDER = "projector", "adapter", "model"


def trained_tensors(model: nn.Module, keep: bool = True) -> dict[str, Tensor]:
    """Every trained parameter and all of the projector, whole, on the CPU.

    Where they are sharded every process puts them together, and those that ``keep`` have them.
    """
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or f"{PROJECTOR}." in name:
            tensor = whole(parameter)
            if keep:
                found[name] = tensor.cpu()
    return found


def write_result(
    recipe: Recipe, model: nn.Module, tensors: dict[str, Tensor], assembly: Assembly, frozen: str
) -> list[Path]:
    """Writes the folders, each whole or not at all, on one process.

    Args:
        model: as ``stage.prepare`` made it, without what was wrapped around it to train.
        tensors: what ``trained_tensors`` gave.
        frozen: what tells the weights that training began with from others.

    Raises:
        TrainingError: they cannot be written; the checkpoints are as they were.
    """
    run, mark = recipe.output, f"{PROJECTOR}."
    own = {name.partition(mark)[2]: tensor for name, tensor in tensors.items() if mark in name}
    language = {name: tensor for name, tensor in tensors.items() if mark not in name}
    try:
        _remove_leftovers(run)
        written = [_write_projector(run / PROJECTOR_FOLDER, own, assembly)]
        if hasattr(model, "peft_config"):
            written.append(_write_adapter(run / ADAPTER_FOLDER, model, language))
        elif language:
            written.append(_write_model(run / MODEL_FOLDER, recipe, tensors, assembly))
        for folder in written:
            _sync(folder)
        said = {"written": [folder.name for folder in written], "frozen weights": frozen}
        replace_text(run / FINISHED, json.dumps(said) + "\n")
    except (OSError, SPFastError) as error:
        raise TrainingError(
            f"the result could not be written to {run} ({first_line(error)}): mend that, and start the same command "
            "again, which goes on from the last checkpoint"
        ) from error
    return written


def _write_projector(folder: Path, tensors: dict[str, Tensor], assembly: Assembly) -> Path:
    projector = SPProjector(assembly.config.projector, device="meta", dtype=torch.float32)
    projector.load_state_dict(tensors, assign=True)
    with new_folder(folder, _size(tensors)) as made:
        projector.save_pretrained(made)
    return folder


def _write_adapter(folder: Path, model: nn.Module, tensors: dict[str, Tensor]) -> Path:
    """As PEFT does: without the adapter's name, beside its configuration."""
    plain = {name.replace(f".{ADAPTER}.", "."): tensor.contiguous() for name, tensor in tensors.items()}
    with new_folder(folder, _size(tensors)) as made:
        save_file(plain, made / "adapter_model.safetensors", metadata={"format": "pt"})
        config = model.peft_config[ADAPTER]
        config.inference_mode = True
        config.save_pretrained(made)
    return folder


def _write_model(folder: Path, recipe: Recipe, tensors: dict[str, Tensor], assembly: Assembly) -> Path:
    """In the type that frozen weights had; those are read anew, as every process has only a part of them."""
    changed = {n: StoredTensor(tuple(t.shape), t.dtype, lambda t=t: t) for n, t in tensors.items()}
    whole_model(recipe.output, folder, assembly, changed, dtype_of(recipe), "finetune").write(force=True)
    return folder


def _remove_leftovers(run: Path) -> None:
    """Of a process that was killed while it wrote these."""
    for name in (PROJECTOR_FOLDER, ADAPTER_FOLDER, MODEL_FOLDER):
        for path in run.glob(f".{name}.*"):
            shutil.rmtree(path)


def _sync(folder: Path) -> None:
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    sync_folder(folder)


def _size(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())
