"""A transformer in float64, one layer's weights widened at a time, so that it fits where its own dtype fits."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

_LAYERS = (nn.Conv2d, nn.LayerNorm)


def widen(model: nn.Module) -> None:
    """Everything that the model's layers multiply and normalise is float64 from now on; its weights stay what they are.

    Rows of embeddings are exact in any type. transformers computes an RMSNorm in float32 in any dtype, and so does not
    this one. The angles of rotary embeddings stay float32: they are the model's definition, the same for everyone.
    """
    for module in model.modules():
        if isinstance(module, _LAYERS):
            dtype = module.weight.dtype
            module.register_forward_pre_hook(_widen)
            module.register_forward_hook(functools.partial(_narrow, dtype))
        elif isinstance(module, nn.Linear):
            module.forward = functools.partial(_linear, module)
        elif hasattr(module, "variance_epsilon"):
            module.forward = functools.partial(_rms_norm, module)


def _widen(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    layer.double()
    return tuple(x.double() for x in inputs)


def _narrow(dtype: torch.dtype, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    layer.to(dtype)


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    z = _Product.apply(x.double(), layer.weight)
    return z if layer.bias is None else z + layer.bias.double()


class _Product(torch.autograd.Function):
    """``x @ weight.T`` in float64 with a frozen weight of another type, widened in the forward and again in the
    backward: autograd would keep every layer's wide weights."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return x @ weight.double().t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        [weight] = ctx.saved_tensors
        return grad @ weight.double(), None


def _rms_norm(norm: nn.Module, x: Tensor) -> Tensor:
    x = x.double()
    return norm.weight.double() * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.variance_epsilon))
