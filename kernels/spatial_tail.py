"""The spatial tail's buffers, and where a detail lies in them: shared by its forward and backward kernels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class SpatialTail(NamedTuple):
    """What the backward reads; the attention is an output as well."""

    attention: Tensor  # [B, T, sum of O]
    activated: Tensor  # [B, T, F]: the output layer's input
    attended: Tensor  # [B, T, F - D], before GELU
    projected: Tensor  # [B, P, D]: T queries, O keys and O values of each detail
    statistics: Tensor  # [B, T + sum of O, 2] float32: mean and 1 / standard deviation of z's rows

    @classmethod
    def empty(cls, z: Tensor, details: Sequence[int], fused_width: int) -> SpatialTail:
        """For ``z`` ``[B, T + sum of O, D]``."""
        batch, rows, width = z.shape
        spatial = rows - sum(details)
        return cls(
            z.new_empty(batch, spatial, sum(details)),
            z.new_empty(batch, spatial, fused_width),
            z.new_empty(batch, spatial, fused_width - width),
            z.new_empty(batch, sum(spatial + 2 * outputs for outputs in details), width),
            z.new_empty(batch, rows if details else 0, 2, dtype=torch.float32),
        )


def detail_constants(
    i: int, z: Tensor, details: Sequence[int], fused_width: int, concat: bool, finite: Sequence[bool]
) -> dict[str, int | float | bool]:
    """Detail ``i``'s place in all buffers, as the kernels name it; O is 0 where there are no details."""
    _, rows, width = z.shape
    spatial = rows - sum(details)
    return {
        "ROWS": rows, "T": spatial, "O": details[i] if details else 0, "D": width,
        "P": sum(spatial + 2 * outputs for outputs in details),
        "START": sum(spatial + 2 * outputs for outputs in details[:i]),
        "KEYS": sum(details), "FIRST": sum(details[:i]), "F": fused_width, "COLUMN": width * (1 + i if concat else 1),
        "FINITE_SPATIAL": finite[0], "FINITE_DETAIL": finite[1], "FINITE_LOGITS": finite[2],
        "LARGEST": torch.finfo(z.dtype).max,
    }  # fmt: skip


def pick(constants: Mapping[str, Any], kernel: Any) -> dict[str, Any]:
    """Those that a kernel takes."""
    return {name: value for name, value in constants.items() if name in kernel.arg_names}
