"""A tensor in a file: what is known before it is read, and what no model has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# Far beyond any model: the bytes that list the tensors (2 MiB are 10,000 of them), a name, a rank.
LONGEST_LIST, LONGEST_NAME, HIGHEST_RANK = 2**21, 500, 64


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that has not been read yet. ``dtype`` is None for anything but the common floating-point types."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None
    load: Callable[[], Tensor]


def check_listed(name: str, shape: Sequence[int]) -> None:
    """Raises ValueError for a name or a rank that no model has."""
    if len(name) > LONGEST_NAME or not name.isprintable() or len(shape) > HIGHEST_RANK:
        raise ValueError(f"no model has a tensor {name[:40]!r} of {len(name)} characters and rank {len(shape)}")
