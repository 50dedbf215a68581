"""The token head's gradients in plain torch, from what the forward saved; everything small is computed anew."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten
Gradients = list[Tensor | None]


class _Projection(NamedTuple):
    """One of query, key and value: ``linear(layer_norm(x))``, with what its backward reads."""

    x: Tensor
    normed: Tensor
    mean: Tensor
    rstd: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    weight: Tensor
    out: Tensor

    @classmethod
    def of(cls, x: Tensor, tensors: Sequence[Tensor], eps: float) -> _Projection:
        norm_weight, norm_bias, weight, bias = tensors
        wide = x.to(norm_weight.dtype)  # wider than x under autocast
        normed, mean, rstd = aten.native_layer_norm(wide, x.shape[-1:], norm_weight, norm_bias, eps)
        normed = normed.to(x.dtype)
        return cls(wide, normed, mean, rstd, norm_weight, norm_bias, weight, F.linear(normed, weight, bias))

    def backward(self, grad: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The gradient of ``x``, and those of the four parameters."""
        dnormed, dweight, dbias = _linear_backward(grad, self.normed, self.weight)
        dx, dnorm_weight, dnorm_bias = aten.native_layer_norm_backward(
            dnormed.to(self.x.dtype), self.x, self.x.shape[-1:], self.mean, self.rstd, self.norm_weight, self.norm_bias,
            [True] * 3,
        )  # fmt: skip
        return dx.to(grad.dtype), [dnorm_weight, dnorm_bias, dweight, dbias]


def token_head_backward_torch(
    grad: Tensor,
    grad_attention: Tensor | None,
    tensors: Sequence[Tensor],
    wanted: Sequence[bool],
    details: Sequence[int],
    has_bias: bool,
    *,
    concat: bool,
    finite: Sequence[bool],
    eps: float,
) -> Gradients:
    """Gradients of everything that ``tensors`` holds beyond the first two; None where not ``wanted``.

    Args:
        grad: of the tokens, ``[B, T + N, H]``.
        grad_attention: of the attention, ``[B, T, sum of O]``, or None.
        tensors: attention ``[B, T, sum of O]``, hidden layer of the patch MLP ``[B, N, H]``, z, projections, output
            weight, its bias where there is one, and where there are patches, these and the patch MLP's four.
        details, concat, finite, eps: as token_head's.
    """
    attention, hidden, z, *rest = tensors
    count = 12 * len(details)
    projections, weight, rest = rest[:count], rest[count], rest[count + 1 + has_bias :]
    spatial = attention.shape[1]
    patch_wants = wanted[-len(rest) :] if rest else []
    found: Gradients = [None] * len(wanted)
    if any(wanted[: len(wanted) - len(rest)]):
        found[: len(wanted) - len(rest)] = _spatial_backward(
            grad[:, :spatial], grad_attention, attention, z, projections, weight, details, has_bias, concat, finite, eps
        )
    if any(patch_wants):
        found[len(wanted) - len(rest) :] = _patch_backward(grad[:, spatial:], hidden, *rest, patch_wants)
    return [g if asked else None for g, asked in zip(found, wanted, strict=True)]


def _spatial_backward(
    grad: Tensor,
    grad_attention: Tensor | None,
    attention: Tensor,
    z: Tensor,
    projections: Sequence[Tensor],
    weight: Tensor,
    details: Sequence[int],
    has_bias: bool,
    concat: bool,
    finite: Sequence[bool],
    eps: float,
) -> Gradients:
    """Of z, the projections, the output weight and its bias."""
    parts = z.split([attention.shape[1], *details], dim=1)
    places = [finite[0]] + [finite[1]] * len(details)
    kept = [part.nan_to_num() if where else part for part, where in zip(parts, places, strict=True)]
    small, big = kept[0], kept[1:]
    built = [
        [_Projection.of(x, projections[12 * i + 4 * j :][:4], eps) for j, x in enumerate((small, x, x))]
        for i, x in enumerate(big)
    ]
    weights = attention.split(list(details), dim=2) if details else ()
    attended = [a @ value.out for a, (_, _, value) in zip(weights, built, strict=True)]
    if attended and not concat:
        attended = [sum(attended[1:], start=attended[0])]
    fused = torch.cat([small, *attended], dim=-1)
    dactivated, dweight, dbias = _linear_backward(grad, F.gelu(fused), weight)
    dsmall, *dattended = aten.gelu_backward(dactivated, fused).split([small.shape[-1]] * (1 + len(attended)), dim=-1)
    dattended = dattended if concat else dattended * len(details)
    dattentions = [None] * len(details) if grad_attention is None else grad_attention.split(list(details), dim=2)

    dbig, dprojections = [], []
    for a, da, dout, (query, key, value) in zip(weights, dattentions, dattended, built, strict=True):
        da = dout @ value.out.mT + (0 if da is None else da)
        dlogits = aten._softmax_backward_data(da, a, -1, a.dtype)  # float32 within
        scale = key.out.shape[-1] ** -0.5
        if finite[2]:
            dlogits = dlogits.where((query.out @ (key.out.mT * scale)).isfinite(), 0)
        dquery, of_query = query.backward(dlogits @ key.out * scale)
        dkey, of_key = key.backward(dlogits.mT @ query.out * scale)
        dvalue, of_value = value.backward(a.mT @ dout)
        dsmall = dsmall + dquery
        dbig.append(dkey + dvalue)
        dprojections += [*of_query, *of_key, *of_value]
    dz = torch.cat([dsmall, *dbig], dim=1)
    replaced = [~part.isfinite() & where for part, where in zip(parts, places, strict=True)]
    dz = dz.masked_fill(torch.cat(replaced, dim=1), 0)
    dprojections = [g.to(p.dtype) for g, p in zip(dprojections, projections, strict=True)]
    return [dz, *dprojections, dweight, *([dbias] if has_bias else [])]


def _patch_backward(
    grad: Tensor, hidden: Tensor, patch_features: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor,
    wanted: Sequence[bool],
) -> Gradients:  # fmt: skip
    """Of the patch features and the two layers' weights and biases."""
    dactivated, dw2, db2 = _linear_backward(grad, F.gelu(hidden) if wanted[3] else None, w2)
    if not any(wanted[:3]):
        return [None, None, None, dw2, db2]
    dhidden = aten.gelu_backward(dactivated, hidden)
    dx, dw1, db1 = _linear_backward(dhidden, patch_features if wanted[1] else None, w1, wants_input=wanted[0])
    return [dx, dw1, db1, dw2, db2]


def _linear_backward(
    grad: Tensor, x: Tensor | None, weight: Tensor, wants_input: bool = True
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """Of a linear layer's input, weight (where its input ``x`` is given) and bias."""
    rows = grad.flatten(0, -2)
    dweight = None if x is None else rows.t() @ x.flatten(0, -2)
    return grad @ weight if wants_input else None, dweight, rows.sum(0)
