"""The token head's gradients: the spatial tail on Triton kernels, the products with large weights by the library."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sp_fast.kernels.spatial_tail import SpatialTail

Gradients = list[Tensor | None]


def token_head_backward(
    grad: Tensor,
    dattention: Tensor | None,
    saved: Sequence[Tensor],
    inputs: Sequence[Tensor],
    wanted: Sequence[bool],
    details: Sequence[int],
    has_bias: bool,
    *,
    concat: bool,
    finite: Sequence[bool],
) -> Gradients:
    """Gradients of the ``inputs``; None where not ``wanted``.

    Args:
        grad: of the tokens, ``[B, T + N, H]``.
        dattention: of the attention, ``[B, T, sum of O]``, or None.
        saved: hidden layer of the patch MLP ``[B, N, H]``, then the fields of SpatialTail.
        inputs: z, projections, output weight, its bias where there is one, and where there are patches, these and the
            patch MLP's four.
        details, concat, finite: as token_head's.
    """
    hidden, tail = saved[0], SpatialTail(*saved[1:])
    spatial, count = tail.attention.shape[1], 1 + 12 * len(details) + 1 + has_bias
    found: Gradients = [None] * len(inputs)
    if any(wanted[:count]):
        rows = grad[:, :spatial].reshape(-1, grad.shape[2])
        found[:count] = _spatial_backward(
            rows, dattention, tail, inputs[:count], wanted[:count], details, concat, finite
        )
    if any(wanted[count:]):
        rows = grad[:, spatial:].reshape(-1, grad.shape[2])
        found[count:] = _patch_backward(rows, hidden.flatten(0, 1), *inputs[count:], wanted[count:])
    return found


def _spatial_backward(
    rows: Tensor,
    dattention: Tensor | None,
    tail: SpatialTail,
    inputs: Sequence[Tensor],
    wanted: Sequence[bool],
    details: Sequence[int],
    concat: bool,
    finite: Sequence[bool],
) -> Gradients:
    """Of z, the projections, the output weight and its bias; ``rows`` are the spatial tokens' gradients."""
    from sp_fast.kernels.spatial_tail_backward_triton import spatial_tail_backward_triton

    before = 1 + 12 * len(details)  # z and the projections
    z, projections, weight = inputs[0], inputs[1:before], inputs[before]
    found: Gradients = [None] * before
    if any(wanted[:before]):
        dfused = (rows @ weight).view(tail.activated.shape)
        dz, dprojections = spatial_tail_backward_triton(
            dfused, None if dattention is None else dattention.contiguous(), tail, z.contiguous(), details,
            projections, wanted[1:before], concat, finite,
        )  # fmt: skip
        found = [dz, *dprojections]
    found.append(rows.t() @ tail.activated.flatten(0, 1) if wanted[before] else None)
    found += [rows.sum(0) for _ in inputs[before + 1 :]]
    return [g if asked else None for g, asked in zip(found, wanted, strict=True)]


def _patch_backward(
    rows: Tensor, hidden: Tensor, patch_features: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor,
    wanted: Sequence[bool],
) -> Gradients:  # fmt: skip
    """Of the patch features and the two layers' weights and biases; ``rows`` are the patch tokens' gradients."""
    wants_x, wants_w1, wants_b1, wants_w2, wants_b2 = wanted
    found: Gradients = [None] * 3
    if any(wanted[:3]):
        dhidden = torch.ops.aten.gelu_backward(rows @ w2, hidden)
        found = [
            (dhidden @ w1).view(patch_features.shape) if wants_x else None,
            dhidden.t() @ patch_features.flatten(0, 1) if wants_w1 else None,
            dhidden.sum(0) if wants_b1 else None,
        ]
        del dhidden  # as large as what comes next
    return [*found, rows.t() @ F.gelu(hidden) if wants_w2 else None, rows.sum(0) if wants_b2 else None]
