"""The norm of gradients, as exact at the size of the projector's convolutions as at any other."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.linalg import vector_norm


def gradient_norm(gradients: Iterable[Tensor]) -> Tensor:
    """Of all gradients laid one after the other: a scalar, float32 at the least; of all ranks where they are sharded.

    On a CPU torch adds the squares of a whole tensor one after the other in float32, and soon loses the small ones:
    the norm of 2**20 elements is 1e-5 too low, of 2**22 1e-4. Clipping would scale by that, and by another number
    wherever the same weights are laid out otherwise. A dimension at a time, no sum is long.
    """
    norms = [_a_dimension_at_a_time(gradient) for gradient in gradients]
    if not norms:
        return torch.zeros(())
    norm = vector_norm(torch.stack(norms))
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def _a_dimension_at_a_time(gradient: Tensor) -> Tensor:
    norm = vector_norm(gradient, dim=-1, dtype=torch.promote_types(gradient.dtype, torch.float32))
    while norm.dim():
        norm = vector_norm(norm, dim=-1)
    return norm
