"""Checkpoints: official layouts to ours and back, strict in both directions, and our own files.

A load allocates the parameters once and fills them tensor by tensor from mapped files, so its peak is one projector.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sp_fast.config import SPProjectorConfig
from sp_fast.errors import CheckpointError
from sp_fast.layout import Entry, entries
from sp_fast.recognise import listed, projector_names, recognise
from sp_fast.tensor_files import StoredTensor, read_file, stored_tensors

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
MODEL_TYPE = "sp_projector"
Source = str | os.PathLike[str] | Mapping[str, Tensor]
Projector = TypeVar("Projector", bound=nn.Module)


def load_official(
    cls: type[Projector],
    source: Source,
    grid: int | None,
    pyramid: str | None,
    *,
    backend: str = "auto",
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> Projector:
    """Behind ``SPProjector.from_official``."""
    where, tensors = _named_projector_tensors(source)
    config = recognise(where, {key: tensor.shape for key, tensor in tensors.items()}, grid, pyramid)
    projector = cls(config, backend, device="meta", dtype=dtype or _common_dtype(where, tensors))
    projector.to_empty(device=device)
    fill(where, projector, official_entries(projector), tensors)
    return projector


def load_official_into(projector: nn.Module, source: Source) -> None:
    """Behind ``SPProjector.load_official``."""
    where, tensors = _named_projector_tensors(source)
    fill(where, projector, official_entries(projector), tensors)


def official_tensors(source: Source) -> dict[str, StoredTensor]:
    """The projector's tensors of a checkpoint, by official key without prefix; nothing is read yet."""
    return _named_projector_tensors(source)[1]


def official_config(source: Source, grid: int | None = None, pyramid: str | None = None) -> SPProjectorConfig:
    """What ``load_official`` would build, from keys and shapes alone."""
    where, tensors = _named_projector_tensors(source)
    return recognise(where, {key: tensor.shape for key, tensor in tensors.items()}, grid, pyramid)


def official_entries(projector: nn.Module) -> list[Entry]:
    """Where each official tensor lies in the projector's parameters."""
    return entries(projector.config, (name for name, _ in projector.named_parameters()))


def official_state_dict(projector: nn.Module, prefix: str = "model.") -> dict[str, Tensor]:
    """Behind ``SPProjector.official_state_dict``."""
    state = projector.state_dict()
    return {
        prefix + entry.official: entry.view(state[entry.ours]).contiguous() for entry in official_entries(projector)
    }


def save_pretrained(projector: nn.Module, folder: str | os.PathLike[str], force: bool) -> None:
    """Behind ``SPProjector.save_pretrained``. Each file is written aside and then renamed."""
    folder = Path(folder)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if (folder / name).exists() and not force:
            raise FileExistsError(f"{folder / name} exists: choose another folder, or overwrite it with force=True")
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_type": MODEL_TYPE, **projector.config.to_dict()}
    aside = folder / f".{WEIGHTS_FILE}.part"
    save_file({name: tensor.contiguous() for name, tensor in projector.state_dict().items()}, aside)
    aside.replace(folder / WEIGHTS_FILE)
    aside = folder / f".{CONFIG_FILE}.part"
    aside.write_text(json.dumps(config, indent=2) + "\n")
    aside.replace(folder / CONFIG_FILE)


def load_pretrained(
    cls: type[Projector],
    folder: str | os.PathLike[str],
    *,
    backend: str = "auto",
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> Projector:
    """Behind ``SPProjector.from_pretrained``."""
    path = Path(folder) / CONFIG_FILE
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): give the folder that save_pretrained wrote") from error
    if not isinstance(values, dict) or values.pop("model_type", None) != MODEL_TYPE:
        raise CheckpointError(f"{path} is not of model_type {MODEL_TYPE!r}: for official checkpoints use from_official")
    config = SPProjectorConfig.from_dict(values)
    weights = Path(folder) / WEIGHTS_FILE
    if not weights.is_file():
        raise CheckpointError(f"{weights} does not exist: give the folder that save_pretrained wrote")
    tensors = read_file(weights)
    projector = cls(config, backend, device="meta", dtype=dtype or _common_dtype(str(weights), tensors))
    projector.to_empty(device=device)
    fill(str(weights), projector, [Entry(name, name) for name, _ in projector.named_parameters()], tensors)
    return projector


def _named_projector_tensors(source: Source) -> tuple[str, dict[str, StoredTensor]]:
    where, tensors = stored_tensors(source)
    return where, {key: tensors[name] for key, name in projector_names(where, tensors).items()}


def _common_dtype(where: str, tensors: Mapping[str, StoredTensor]) -> torch.dtype:
    for key, tensor in tensors.items():
        if tensor.dtype is None:
            raise CheckpointError(f"{where}: {key} is not of a floating-point type that a projector can have")
    found = {tensor.dtype for tensor in tensors.values()}
    if len(found) != 1:
        names = ", ".join(sorted(map(str, found))) or "no tensors"
        raise CheckpointError(f"{where} mixes {names}: choose one with dtype=, e.g. dtype=torch.float32")
    return found.pop()


def fill(where: str, projector: nn.Module, places: list[Entry], tensors: Mapping[str, StoredTensor]) -> None:
    """Copies every tensor to its place, after all names and shapes have been checked; data must be finite."""
    parameters = dict(projector.named_parameters())
    _check_whole(where, {e.official: tuple(e.view(parameters[e.ours].to("meta")).shape) for e in places}, tensors)
    with torch.no_grad():
        for entry in places:
            tensor = tensors[entry.official].load()
            if tensor.numel() and not all(bound.isfinite() for bound in torch.aminmax(tensor)):
                raise CheckpointError(
                    f"{where}: {entry.official} holds NaN or infinite values: the run that wrote it diverged, or the "
                    "file is damaged; use an earlier checkpoint"
                )
            entry.view(parameters[entry.ours]).copy_(tensor)


def _check_whole(where: str, expected: Mapping[str, tuple[int, ...]], tensors: Mapping[str, StoredTensor]) -> None:
    problems = []
    if missing := expected.keys() - tensors.keys():
        problems.append(f"missing {listed(missing)}")
    if unexpected := tensors.keys() - expected.keys():
        problems.append(f"unexpected {listed(unexpected)}")
    both = [key for key in expected if key in tensors]
    problems += [
        f"{key} has shape {list(tensors[key].shape)} where {list(expected[key])} is expected"
        for key in both
        if tensors[key].shape != expected[key]
    ]
    problems += [f"{key} is not floating-point" for key in both if tensors[key].dtype is None]
    if problems:
        raise CheckpointError(f"{where}: {'; '.join(problems)}")
