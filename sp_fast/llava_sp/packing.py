"""The projector's tensors from the official layout to the packed one and back, each made when it is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from sp_fast.checkpoint import official_entries, official_shapes
from sp_fast.config import SPProjectorConfig
from sp_fast.errors import CheckpointError
from sp_fast.layout import Entry
from sp_fast.llava_sp.official_names import WHOLE
from sp_fast.projector import SPProjector
from sp_fast.recognise import check_whole
from sp_fast.stored_tensor import StoredTensor


def packed(
    where: str, config: SPProjectorConfig, official: Mapping[str, StoredTensor], dtype: torch.dtype
) -> dict[str, StoredTensor]:
    """``SPProjector``'s parameters, from official tensors by key without prefix.

    Raises:
        CheckpointError: other names or shapes than the configuration's; and, when a tensor is read, values that are
            not finite in ``dtype``.
    """
    check_whole(where, official_shapes(config), official, WHOLE)
    projector = SPProjector(config, device="meta")
    places: dict[str, list[Entry]] = {}
    for entry in official_entries(projector):
        places.setdefault(entry.ours, []).append(entry)
    shapes = {name: tuple(parameter.shape) for name, parameter in projector.named_parameters()}
    return {
        name: StoredTensor(shape, dtype, partial(_pack, where, shape, dtype, places[name], official))
        for name, shape in shapes.items()
    }


def unpacked(where: str, config: SPProjectorConfig, ours: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The official tensors by key without prefix, from ``SPProjector``'s parameters.

    Raises:
        CheckpointError: other names or shapes than the configuration's.
    """
    projector = SPProjector(config, device="meta")
    check_whole(where, {name: tuple(p.shape) for name, p in projector.named_parameters()}, ours, WHOLE)
    shapes = official_shapes(config)
    return {
        entry.official: StoredTensor(
            shapes[entry.official], ours[entry.ours].dtype, partial(_unpack, entry, ours[entry.ours])
        )
        for entry in official_entries(projector)
    }


def cast(where: str, name: str, tensor: StoredTensor, dtype: torch.dtype) -> StoredTensor:
    """The tensor in another type. Raises CheckpointError, when it is read, for what that type cannot hold."""
    if tensor.dtype == dtype:
        return tensor
    return replace(tensor, dtype=dtype, load=partial(_cast, where, name, tensor, dtype))


def _pack(
    where: str, shape: tuple[int, ...], dtype: torch.dtype, places: list[Entry], official: Mapping[str, StoredTensor]
) -> Tensor:
    parameter = torch.empty(shape, dtype=dtype)
    for entry in places:
        entry.view(parameter).copy_(official[entry.official].load())
        if not _is_finite(entry.part(parameter)):
            raise CheckpointError(
                f"{where}: {entry.official} holds NaN or infinite values as {dtype}: the run that wrote it diverged, "
                "the file is damaged, or the type is too narrow: use an earlier one, or another dtype"
            )
    return parameter


def _unpack(entry: Entry, ours: StoredTensor) -> Tensor:
    return entry.view(ours.load()).contiguous()


def _cast(where: str, name: str, tensor: StoredTensor, dtype: torch.dtype) -> Tensor:
    found = tensor.load()
    made = found.to(dtype)
    if not _is_finite(made) and _is_finite(found):
        raise CheckpointError(f"{where}: {name} has values beyond {dtype}: choose bfloat16 or float32")
    return made


def _is_finite(tensor: Tensor) -> bool:
    return not tensor.numel() or all(bound.isfinite() for bound in torch.aminmax(tensor))
