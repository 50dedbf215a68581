"""How the project's ops meet torch.autocast: like torch's own matmul, they compute in the autocast dtype."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor


def autocast_tensors(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the autocast dtype of their device where autocast is on, else unchanged; float64 always is."""
    dtype = autocast_dtype(tensors[0].device)
    if dtype is None:
        return tensors
    return tuple(t if t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast casts to on the device; None where it is off. "meta" has none, and torch may not be asked."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def no_autocast(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Autocast off for the tensor's device: an op has already chosen its dtype."""
    kind = tensor.device.type
    return contextlib.nullcontext() if kind == "meta" else torch.autocast(kind, enabled=False)
