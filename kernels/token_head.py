"""Token head: from what the windowed matmul gives to the tokens of the language model, in one buffer.

    tokens[:, :T] = GELU([z_small, attended details]) Wo^T + bo          (spatial_tail_triton.py)
    tokens[:, T:] = GELU(patch_features W1^T + b1) W2^T + b2

The patch MLP is a library product. Its second layer runs over whole images, the T unused rows of each included: one
plain product into the final buffer, 1% more of it, and neither a concatenation nor a batched product of 576 rows; the
spatial tail then writes those rows.

Counts at the published widths in 16 bits: 52 MB of weights, 24.2 + 0.05 GFLOP an image: 31 us an image at 790
TFLOP/s, never less than 12 us. What it saves that a compiler cannot: the concatenation (9.5 MB an image).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sp_fast.kernels.autocast import autocast_tensors, no_autocast
from sp_fast.kernels.spatial_tail import SpatialTail
from sp_fast.kernels.token_head_backward import token_head_backward

PARTS = ("query", "key", "value")
PROJECTION_TENSORS = 4  # LayerNorm weight and bias, linear weight and bias


def token_head(
    z: Tensor,
    patch_features: Tensor | None,
    details: Sequence[int],
    projections: Sequence[Tensor],
    output: tuple[Tensor, Tensor | None],
    patch_mlp: Sequence[Tensor],
    *,
    concat: bool,
    finite: Sequence[bool],
    eps: float,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Runs on Triton kernels; the plain torch form are the modules of integrator.py and projector.py.

    Args:
        z: ``[B, T + sum of O, D]``: spatial features, then each detail map.
        patch_features: ``[B, N, C]``, or None for spatial tokens alone.
        details: O of each detail map.
        projections: for each detail its query, key and value, each as LayerNorm weight and bias ``[D]``, linear weight
            ``[D, D]`` and bias ``[D]``.
        output: weight ``[H, F]`` and bias ``[H]`` or None; F is D, and the width of what is attended.
        patch_mlp: weight and bias of both layers; empty without patch features.
        concat: details side by side; else they are added.
        finite: where nan_to_num is applied: spatial features, detail maps, logits.
        eps: of the LayerNorms.
    Returns:
        tokens ``[B, T + N, H]``, and the attention ``[B, T, O]`` of each detail.
    Raises:
        ValueError: tensors of several types without autocast, of which only LayerNorm's may differ, or several devices.
    Gradients: for every tensor, each only where asked for; differentiable once.
    """
    weight, bias = output
    norms = [i % PROJECTION_TENSORS < 2 for i in range(len(projections))]
    z, weight, *rest = autocast_tensors(z, weight, *(t for t, norm in zip(projections, norms, strict=True) if not norm))
    # Normalisation weights stay as they are, as under torch's own autocast.
    projections = [t if norm else rest.pop(0) for t, norm in zip(projections, norms, strict=True)]
    if len({t.dtype for t, norm in zip(projections, norms, strict=True) if norm}) > 1:  # a kernel takes one type
        projections = [t.float() if norm else t for t, norm in zip(projections, norms, strict=True)]
    if bias is not None:
        (bias,) = autocast_tensors(bias)
    if patch_features is not None:
        patch_features, *patch_mlp = autocast_tensors(patch_features, *patch_mlp)
    for name, tensors in {
        "patch features": [t for t in (patch_features,) if t is not None],
        "projections": [t for t, norm in zip(projections, norms, strict=True) if not norm],
        "output layer": [t for t in (weight, bias) if t is not None],
        "patch MLP": list(patch_mlp),
    }.items():
        for t in tensors:
            if t.dtype != z.dtype:
                raise ValueError(
                    f"the spatial features are {z.dtype} but the {name} {t.dtype}: cast them to one type "
                    f"(module.to({z.dtype})), or run under torch.autocast"
                )
    for t in (*projections, weight, *patch_mlp):
        if t.device != z.device:
            raise ValueError(f"the spatial features are on {z.device} but a parameter on {t.device}: move one of them")
    with no_autocast(z):
        tokens, _, attention, *_ = _forward_op(
            z, patch_features, list(details), projections, weight, bias, list(patch_mlp), concat, list(finite), eps
        )
    return tokens, attention.split(list(details), dim=2) if details else ()


# Registration. What the backward reads are outputs: the patch MLP's hidden layer, and the fields of SpatialTail.
Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("sp_fast::token_head", mutates_args=())
def _forward_op(
    z: Tensor,
    patch_features: Tensor | None,
    details: Sequence[int],
    projections: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    patch_mlp: Sequence[Tensor],
    concat: bool,
    finite: Sequence[bool],
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    from sp_fast.kernels.gelu_rows_triton import gelu_rows_triton
    from sp_fast.kernels.spatial_tail_triton import spatial_tail_triton

    tokens, hidden, *tail = _empty(z, patch_features, details, weight, patch_mlp)
    if not len(z):
        return tokens, hidden, *tail
    spatial = z.shape[1] - sum(details)
    if patch_features is not None:
        weight1, bias1, weight2, bias2 = patch_mlp
        # One product with its bias inside; F.linear would batch it where a CLS token was cut off.
        rows = patch_features.reshape(-1, patch_features.shape[2])
        torch.addmm(bias1, rows, weight1.t(), out=hidden.view(-1, hidden.shape[2]))
        activated = gelu_rows_triton(hidden, room=spatial)
        torch.addmm(bias2, activated.flatten(0, 1), weight2.t(), out=tokens.view(-1, tokens.shape[2]))
    tail = SpatialTail(*tail)
    spatial_tail_triton(tokens, tail, z.contiguous(), details, projections, weight, bias, concat, finite, eps)
    return tokens, hidden, *tail


def _empty(
    z: Tensor, patch_features: Tensor | None, details: Sequence[int], weight: Tensor, patch_mlp: Sequence[Tensor]
) -> Outputs:
    batch, spatial = z.shape[0], z.shape[1] - sum(details)
    patches, width = (0, 0) if patch_features is None else (patch_features.shape[1], patch_mlp[0].shape[0])
    tokens = z.new_empty(batch, spatial + patches, weight.shape[0])
    return tokens, z.new_empty(batch, patches, width), *SpatialTail.empty(z, details, weight.shape[1])


@_forward_op.register_fake
def _(
    z: Tensor,
    patch_features: Tensor | None,
    details: Sequence[int],
    projections: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    patch_mlp: Sequence[Tensor],
    concat: bool,
    finite: Sequence[bool],
    eps: float,
) -> Outputs:
    return _empty(z, patch_features, details, weight, patch_mlp)


@torch.library.custom_op("sp_fast::token_head_backward", mutates_args=())
def _backward_op(
    grad: Tensor,
    dattention: Tensor | None,
    saved: Sequence[Tensor],
    inputs: Sequence[Tensor],
    wanted: Sequence[bool],
    details: Sequence[int],
    has_bias: bool,
    concat: bool,
    finite: Sequence[bool],
) -> list[Tensor]:
    if not len(grad):
        return [t.new_zeros(t.shape if asked else 0) for t, asked in zip(inputs, wanted, strict=True)]
    found = token_head_backward(
        grad, dattention, saved, inputs, wanted, details, has_bias, concat=concat, finite=finite
    )
    return [grad.new_empty(0) if tensor is None else tensor.contiguous() for tensor in found]


@_backward_op.register_fake
def _(
    grad: Tensor,
    dattention: Tensor | None,
    saved: Sequence[Tensor],
    inputs: Sequence[Tensor],
    wanted: Sequence[bool],
    details: Sequence[int],
    has_bias: bool,
    concat: bool,
    finite: Sequence[bool],
) -> list[Tensor]:
    return [t.new_empty(t.shape if asked else 0) for t, asked in zip(inputs, wanted, strict=True)]


def _save(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    z, patch_features, details, projections, weight, bias, patch_mlp, *ctx.options, _ = inputs
    _, hidden, attention, *tail = output
    ctx.details, ctx.has_bias, ctx.has_patches = details, bias is not None, patch_features is not None
    optional = [t for t in (bias, patch_features) if t is not None]
    ctx.saved = 2 + len(tail)
    ctx.save_for_backward(hidden, attention, *tail, z, *projections, weight, *optional, *patch_mlp)
    ctx.mark_non_differentiable(hidden, *tail)
    ctx.set_materialize_grads(False)


def _backward(
    ctx: torch.autograd.function.FunctionCtx, grad: Tensor | None, _: None, dattention: Tensor | None, *__: None
) -> tuple:
    z, patches, _, projections, weight, bias, mlp, *_ = ctx.needs_input_grad
    optional = [flag for flag, there in ((bias, ctx.has_bias), (patches, ctx.has_patches)) if there]
    wanted = [z, *projections, weight, *optional, *mlp]
    tensors = list(ctx.saved_tensors)  # once: checkpointing computes them at this moment
    saved, inputs = tensors[: ctx.saved], tensors[ctx.saved :]
    if grad is None:  # a loss on the attention alone
        hidden, attention = saved[:2]
        grad = hidden.new_zeros(len(hidden), attention.shape[1] + hidden.shape[1], len(inputs[1 + len(projections)]))
    with no_autocast(grad):
        found = _backward_op(grad, dattention, saved, inputs, wanted, ctx.details, ctx.has_bias, *ctx.options)
    found = iter([tensor if asked else None for tensor, asked in zip(found, wanted, strict=True)])
    dz, dprojections, dweight = next(found), [next(found) for _ in projections], next(found)
    dbias = next(found) if ctx.has_bias else None
    dpatches = next(found) if ctx.has_patches else None
    no_details = None if ctx.details else []  # torch takes an empty list of integers for one of tensors
    return dz, dpatches, no_details, dprojections, dweight, dbias, list(found), None, None, None


_forward_op.register_autograd(_backward, setup_context=_save)
