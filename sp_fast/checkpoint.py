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

from sp_fast import compact_layout
from sp_fast.compact_config import COMPACT
from sp_fast.config import SPProjectorConfig
from sp_fast.errors import CheckpointError, ConfigError, first_line
from sp_fast.layout import MERGE_FIRST, Entry
from sp_fast.quantize import STORED, QuantizedWeight
from sp_fast.recognise import check_size, check_whole, listed, official_keys, projector_names, recognise
from sp_fast.reference import ReferenceSPProjector
from sp_fast.stored_tensor import DTYPES, StoredTensor
from sp_fast.tensor_files import (
    check_together,
    file_problem,
    read_file,
    read_json,
    stored_tensors,
)

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
MODEL_TYPE = "sp_projector"
THIS_PROJECTOR = "give a checkpoint of this very projector"
_OUR_FOLDER = "give the folder that save_pretrained wrote"
_LARGEST_GRID = 1024  # images of 14,336 pixels
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
    _, config = _recognise(where, tensors, grid, pyramid)
    projector = cls(config, backend, device="meta", dtype=_one_dtype(where, tensors, dtype))
    fill(where, projector, official_entries(projector), tensors, device)
    return projector


def load_official_into(projector: nn.Module, source: Source) -> None:
    """Behind ``SPProjector.load_official``."""
    where, tensors = _named_projector_tensors(source)
    fill(where, projector, official_entries(projector), tensors)


def official_tensors(source: Source) -> dict[str, StoredTensor]:
    """The projector's tensors of a checkpoint, by official key without prefix; nothing is read yet."""
    return _named_projector_tensors(source)[1]


def inspect_official(
    source: Source, grid: int | None = None, pyramid: str | None = None
) -> tuple[str, SPProjectorConfig]:
    """Official name and configuration of what ``load_official`` would build; every name and shape is checked."""
    where, tensors = _named_projector_tensors(source)
    name, config = _recognise(where, tensors, grid, pyramid)
    check_whole(where, official_shapes(config), tensors, THIS_PROJECTOR)
    return name, config


def official_shapes(config: SPProjectorConfig) -> dict[str, tuple[int, ...]]:
    """Every official tensor of a configuration, without prefix, and its shape."""
    return {key: tuple(t.shape) for key, t in ReferenceSPProjector(config, device="meta").state_dict().items()}


def official_entries(projector: nn.Module) -> list[Entry]:
    """Where each official tensor lies in the projector's parameters.

    Raises CheckpointError for a compact projector, which has no official form, and where parameters are not those of
    the configuration: an export of them would not be whole.
    """
    if projector.config.extractor in COMPACT:
        raise CheckpointError(
            f"a projector with extractor={projector.config.extractor!r} has no official form: write the full one that "
            "equals it, expanded().official_state_dict(), or keep this one with save_pretrained"
        )
    return reference_entries(projector)


def reference_entries(projector: nn.Module) -> list[Entry]:
    """Where each tensor of ``ReferenceSPProjector`` lies in the projector's parameters, of every extractor.

    Raises CheckpointError where they are not those of its configuration.
    """
    if (scheme := projector.config.quantization) is not None:
        raise CheckpointError(
            f"the packed weights are quantised to {scheme}, and the official layout has none such: use "
            "projector.dequantized(), and load official files before quantising"
        )
    places = compact_layout.reference_entries(projector.config, (name for name, _ in projector.named_parameters()))
    if lost := official_keys(projector.config) - {entry.official for entry in places}:
        raise CheckpointError(f"the projector has no parameters for {listed(lost)}: {MERGE_FIRST}")
    return places


def official_state_dict(projector: nn.Module, prefix: str = "model.") -> dict[str, Tensor]:
    """Behind ``SPProjector.official_state_dict``."""
    official_entries(projector)
    return {prefix + name: tensor for name, tensor in reference_state_dict(projector).items()}


def reference_state_dict(projector: nn.Module) -> dict[str, Tensor]:
    """What ``ReferenceSPProjector`` of the same configuration loads: the official tensors without prefix, or those of a
    compact form."""
    places, state = reference_entries(projector), projector.state_dict()
    return {entry.official: entry.view(state[entry.ours]).contiguous() for entry in places}


def save_pretrained(projector: nn.Module, folder: str | os.PathLike[str], force: bool) -> None:
    """Behind ``SPProjector.save_pretrained``. Each file is written aside and then renamed."""
    _check_own(projector)
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


def _check_own(projector: nn.Module) -> None:
    """Raises CheckpointError where the parameters are not those of the configuration."""
    if projector.config.quantization is None:
        reference_entries(projector)
        return
    expected = type(projector)(projector.config, device="meta").state_dict().keys()
    if strange := expected ^ projector.state_dict().keys():
        raise CheckpointError(f"the projector lacks, or has beside its own, {listed(strange)}: {MERGE_FIRST}")


def inspect_pretrained(folder: str | os.PathLike[str]) -> SPProjectorConfig:
    """The configuration in a folder that ``save_pretrained`` wrote. Raises CheckpointError where there is none."""
    path = Path(folder) / CONFIG_FILE
    if problem := file_problem(path):
        raise CheckpointError(f"{path} cannot be read, as it {problem}: {_OUR_FOLDER}")
    try:
        values = read_json(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({first_line(error)}): {_OUR_FOLDER}") from error
    if not isinstance(values, dict) or values.pop("model_type", None) != MODEL_TYPE:
        raise CheckpointError(f"{path} is not of model_type {MODEL_TYPE!r}: for official checkpoints use from_official")
    grid = values.get("grid", 0)
    if isinstance(grid, int) and grid > _LARGEST_GRID:
        raise CheckpointError(f"{path}: grid={grid} must be patches a side of a vision tower, up to {_LARGEST_GRID}")
    try:
        return SPProjectorConfig.from_dict(values)
    except ConfigError as error:
        text = str(error)  # which quotes the value, whatever that is
        raise CheckpointError(f"{path}: {text if len(text) < 1000 else f'{text[:500]} ... {text[-500:]}'}") from error


def load_pretrained(
    cls: type[Projector],
    folder: str | os.PathLike[str],
    *,
    backend: str = "auto",
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> Projector:
    """Behind ``SPProjector.from_pretrained``."""
    config = inspect_pretrained(folder)
    path, weights = Path(folder) / CONFIG_FILE, Path(folder) / WEIGHTS_FILE
    if problem := file_problem(weights):
        raise CheckpointError(f"{weights} {problem}: {_OUR_FOLDER}")
    check_together(path, weights)
    tensors = read_file(weights)
    check_size(str(path), config, {name: tensor.shape for name, tensor in tensors.items()})
    try:
        projector = cls(config, backend, device="meta")
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error
    floats = {name: tensor for name, tensor in tensors.items() if not name.endswith(STORED)}
    projector.to(_one_dtype(str(weights), floats, dtype))
    places = [Entry(name, name) for name in _tensors(projector)]
    fill(str(weights), projector, places, tensors, device)
    return projector


def _named_projector_tensors(source: Source) -> tuple[str, dict[str, StoredTensor]]:
    where, tensors = stored_tensors(source)
    return where, {key: tensors[name] for key, name in projector_names(where, tensors).items()}


def _recognise(
    where: str, tensors: Mapping[str, StoredTensor], grid: int | None, pyramid: str | None
) -> tuple[str, SPProjectorConfig]:
    return recognise(where, {key: tensor.shape for key, tensor in tensors.items()}, grid, pyramid)


def _one_dtype(where: str, tensors: Mapping[str, StoredTensor], requested: torch.dtype | None) -> torch.dtype:
    """What was asked for, else the type that all tensors share."""
    if requested is not None:
        if requested not in DTYPES:
            raise CheckpointError(f"dtype={requested} is none of {', '.join(map(str, DTYPES))}")
        return requested
    for key, tensor in tensors.items():
        if tensor.dtype is None:
            raise CheckpointError(
                f"{where}: {key} is not of a floating-point type that a projector can have: give the one before "
                "quantisation"
            )
    found = {tensor.dtype for tensor in tensors.values()}
    if len(found) != 1:
        names = ", ".join(sorted(map(str, found))) or "no tensors"
        raise CheckpointError(f"{where} mixes {names}: choose one with dtype=, e.g. dtype=torch.float32")
    return found.pop()


def _tensors(projector: nn.Module) -> dict[str, Tensor]:
    """Parameters, and what quantised weights consist of."""
    return {**dict(projector.named_parameters()), **dict(projector.named_buffers())}


def fill(
    where: str,
    projector: nn.Module,
    places: list[Entry],
    tensors: Mapping[str, StoredTensor],
    device: torch.device | str | None = None,
) -> None:
    """Copies every tensor to its place, after all names and shapes have been checked; data must be finite.

    With a device, memory for the parameters is taken there, and only then: what shapes ask for may be absurd.
    """
    parameters = _tensors(projector)
    expected = {e.official: tuple(e.view(parameters[e.ours].to("meta")).shape) for e in places}
    integers = {e.official for e in places if not parameters[e.ours].is_floating_point()}
    check_whole(where, expected, tensors, THIS_PROJECTOR, integers)
    if device is not None:
        parameters = _tensors(projector.to_empty(device=device))
    with torch.no_grad():
        for entry in places:
            found, part = tensors[entry.official].load(), entry.part(parameters[entry.ours])
            if entry.official in integers and found.dtype != part.dtype:
                raise CheckpointError(
                    f"{where}: {entry.official} is {found.dtype} where {part.dtype} is expected: {THIS_PROJECTOR}"
                )
            entry.view(parameters[entry.ours]).copy_(found)
            if not all(bound.isfinite() for bound in torch.aminmax(part)):
                raise CheckpointError(
                    f"{where}: {entry.official} holds NaN or infinite values as {part.dtype}: the run that wrote it "
                    "diverged, the file is damaged, or the type is too narrow: use an earlier one, or another dtype"
                )
    for name, module in projector.named_modules():
        if isinstance(module, QuantizedWeight) and not module.is_finite():
            raise CheckpointError(f"{where}: {name} holds NaN or infinite values: the file is damaged, fetch it again")
