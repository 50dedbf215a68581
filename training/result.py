"""What a run leaves: the projector, and what it made of the language model.

projector/    float32, for the next stage (setting ``projector``) or SPProjector.from_pretrained
adapter/      LoRA, as PEFT writes it
model/        instead of it, the whole model where all of the language model was trained
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sp_fast.errors import SPFastError, TrainingError, first_line
from sp_fast.llava_sp.assemble import Assembly
from sp_fast.llava_sp.modeling import PROJECTOR
from sp_fast.llava_sp.new_folder import new_folder
from sp_fast.projector import SPProjector
from sp_fast.training.sharded import whole
from sp_fast.training.stage import ADAPTER

PROJECTOR_FOLDER, ADAPTER_FOLDER, MODEL_FOLDER = "projector", "adapter", "model"
FINISHED = "finished.json"


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every trained parameter and all of the projector, whole, on the CPU; on every rank at once where they are
    sharded."""
    return dict(_whole(model))


def write_result(run: Path, model: nn.Module, tensors: dict[str, Tensor], assembly: Assembly) -> list[Path]:
    """Writes the folders, each whole or not at all, on one process.

    Args:
        model: as ``stage.prepare`` made it, without what was wrapped around it to train.
        tensors: what ``trained_tensors`` gave.

    Raises:
        TrainingError: they cannot be written; the checkpoints are as they were.
    """
    mark = f"{PROJECTOR}."
    own = {name.partition(mark)[2]: tensor for name, tensor in tensors.items() if mark in name}
    language = {name: tensor for name, tensor in tensors.items() if mark not in name}
    try:
        written = [_write_projector(run / PROJECTOR_FOLDER, own, assembly)]
        if hasattr(model, "peft_config"):
            written.append(_write_adapter(run / ADAPTER_FOLDER, model, language))
        elif language:
            written.append(_write_model(run / MODEL_FOLDER, model, tensors, assembly))
        (run / FINISHED).write_text(json.dumps({"written": [path.name for path in written]}) + "\n", encoding="utf-8")
    except (OSError, SPFastError) as error:
        raise TrainingError(
            f"the result could not be written to {run} ({first_line(error)}): mend that, and start the same command "
            "again, which goes on from the last checkpoint"
        ) from error
    return written


def _whole(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or f"{PROJECTOR}." in name:
            yield name, whole(parameter).cpu()


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


def _write_model(folder: Path, model: nn.Module, tensors: dict[str, Tensor], assembly: Assembly) -> Path:
    state = {name: tensors.get(name, tensor) for name, tensor in model.state_dict().items()}
    with new_folder(folder, _size(state)) as made:
        model.save_pretrained(made, state_dict=state)
        assembly.processor.save_pretrained(made)
        assembly.generation.save_pretrained(made)
    return folder


def _size(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())
