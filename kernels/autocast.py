"""How the project's ops meet torch.autocast: like torch's own matmul, they compute in the autocast dtype."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor


def autocast_tensors(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the autocast dtype of their device where autocast is on, else unchanged; float64 always is."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(t if t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def no_autocast(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Autocast off for the tensor's device: an op has already chosen its dtype."""
    return torch.autocast(tensor.device.type, enabled=False)
