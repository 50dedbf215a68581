"""What training changes in a model: its trained parameters and its buffers, in one file; frozen weights stay out."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sp_fast.errors import TrainingError
from sp_fast.recognise import listed
from sp_fast.stored_tensor import DTYPES
from sp_fast.tensor_files import read_file
from sp_fast.training.sharded import fill, whole

TRAINED = "trained.safetensors"


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors themselves by name: parameters that require gradients, and every buffer that a state dict has.

    Those of frozen layers too: running statistics move wherever a layer is in training mode. A tied tensor comes once,
    under its first name.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    kept = model.state_dict().keys()
    return trained | {name: buffer for name, buffer in model.named_buffers() if name in kept}


def trained_bytes(model: nn.Module) -> int:
    """Bytes of the trained parameters with Adam's two moments in float32, which is nearly all of a checkpoint."""
    return sum(p.numel() * (p.element_size() + 8) for p in model.parameters() if p.requires_grad)


def save_trained(model: nn.Module, path: Path, writes: bool = True) -> None:
    """Writes them in the types they have. Where they are sharded, every process puts them together and one ``writes``.

    Raises whatever the disk raises.
    """
    state = {}
    for name, tensor in trained_tensors(model).items():
        data = whole(tensor)
        if writes:  # copies, as safetensors refuses tensors that are views of one storage, which packed weights are
            state[name] = data.to("cpu", copy=True).contiguous()
    if writes:
        save_file(state, os.fspath(path))


@torch.no_grad()
def load_trained(model: nn.Module, path: Path) -> None:
    """Copies a file's tensors into the model's own, once names, shapes and types are known to agree.

    Raises:
        TrainingError: they do not: another part of the model is trained now, or another model.
        CheckpointError: the file cannot be read.
    """
    places, stored = trained_tensors(model), read_file(path)
    problems = [
        f"{what} {listed(names)}"
        for what, names in (("no", places.keys() - stored.keys()), ("unexpected", stored.keys() - places.keys()))
        if names
    ]
    for name in places.keys() & stored.keys():
        place, found = places[name], stored[name]
        # A type that no layer computes in, as a counter's, is only known once it is loaded.
        dtype = found.dtype if found.dtype in DTYPES else found.load().dtype
        if (found.shape, dtype) != (tuple(place.shape), place.dtype):
            problems.append(f"{name} of {list(found.shape)} {dtype}, not {list(place.shape)} {place.dtype}")
    if problems:
        raise TrainingError(
            f"{path} is of a model that trains something else: it has {'; '.join(sorted(problems)[:8])}: resume with "
            "the model and the recipe that it was saved with"
        )
    for name, place in places.items():
        fill(place, stored[name].load())
