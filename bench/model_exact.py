"""A transformer in float64, one layer's weights widened at a time, so that it fits where its own dtype fits."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

_LAYERS = (nn.Linear, nn.Conv2d, nn.LayerNorm)


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
        elif hasattr(module, "variance_epsilon"):
            module.forward = functools.partial(_rms_norm, module)


def _widen(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    layer.double()
    return tuple(x.double() for x in inputs)


def _narrow(dtype: torch.dtype, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    layer.to(dtype)


def _rms_norm(norm: nn.Module, x: Tensor) -> Tensor:
    x = x.double()
    return norm.weight.double() * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.variance_epsilon))
