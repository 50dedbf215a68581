"""Tensors that FSDP2 or DeepSpeed has divided among processes: whole ones out, whole ones in, an optimizer's own share.

All processes call these together.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer


def whole(tensor: Tensor) -> Tensor:
    """A parameter's or buffer's data, put together from all processes; of DeepSpeed its float32 master."""
    data = tensor.detach()
    if isinstance(data, DTensor):
        return data.full_tensor()
    if hasattr(tensor, "_hp_mapping") or hasattr(tensor, "ds_id"):  # DeepSpeed: ZeRO-1 and 2; 3
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(tensor)
    return data


@torch.no_grad()
def fill(place: Tensor, tensor: Tensor) -> None:
    """Copies a whole tensor, which every process has, to where it is kept."""
    if isinstance(place, DTensor):
        tensor = distribute_tensor(tensor.to(place.device, place.dtype), place.device_mesh, place.placements)
    place.copy_(tensor)


def local_state(optimizer: Optimizer) -> dict[str, Any]:
    """The state dict of an optimizer of sharded parameters, with this process's share of each tensor."""
    state = optimizer.state_dict()
    return state | {"state": {i: {k: _local(v) for k, v in one.items()} for i, one in state["state"].items()}}


def load_local_state(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """What ``local_state`` gave, on as many processes, back into an optimizer of the same parameters."""
    places = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    found = {i: {k: _shared(places[i], v) for k, v in one.items()} for i, one in state["state"].items()}
    optimizer.load_state_dict(state | {"state": found})


def _local(value: Any) -> Any:
    return value.to_local() if isinstance(value, DTensor) else value


def _shared(place: nn.Parameter, value: Any) -> Any:
    """As the parameter is: but for the number of steps, which every process has."""
    if not isinstance(place, DTensor) or not isinstance(value, Tensor) or not value.dim():
        return value
    return DTensor.from_local(
        value.to(place.device), place.device_mesh, place.placements, shape=place.shape, stride=place.stride()
    )
