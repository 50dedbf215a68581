"""Detail Feature Integrator (paper, DFI): spatial features attend to the detail maps.

Q = Linear(LN(Z)), K = Linear(LN(Z_b)), V = Linear(LN(Z_b))
A = softmax(nan_to_num(Q (K^T / sqrt(D)))),   one head, no output projection, no residual
fused = [Z, A V]          several details: [Z, A_1 V_1, A_2 V_2, ...] or [Z, A_1 V_1 + A_2 V_2 + ...]
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sp_fast.config import SPProjectorConfig
from sp_fast.layout import PARTS

NORM_EPS = 1e-5
INIT_STD = 0.02  # of linear layers, as transformers initialises them in the official training code


class DetailIntegrator(nn.Module):
    """Cross-attention of ``[B, T, D]`` spatial features over each detail map ``[B, O, D]``."""

    def __init__(self, config: SPProjectorConfig, **factory: object) -> None:
        super().__init__()
        self.config = config
        for part in PARTS:
            projections = (_projection(config.spatial_width, **factory) for _ in config.detail_kernels)
            self.add_module(part, nn.ModuleList(projections))
        for detail, value in enumerate(self.value):
            # The official multi-detail checkpoints hold a value projection that nothing uses: kept, never trained.
            value.requires_grad_(detail in config.detail_values)

    def forward(self, z_small: Tensor, z_big: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Returns the output layer's input ``[B, T, fused_width]`` and the attention ``[B, T, O]`` of each detail."""
        attended, attentions = [], []
        for detail, z in enumerate(z_big):
            query, key = self.query[detail](z_small), self.key[detail](z)
            value = self.value[self.config.detail_values[detail]](z)
            logits = query @ (key.transpose(-1, -2) / key.shape[-1] ** 0.5)
            attention = finite_where("logits", logits, self.config).softmax(-1)
            attended.append(attention @ value)
            attentions.append(attention)
        if self.config.detail_fusion == "sum":
            attended = [sum(attended[1:], start=attended[0])]
        return torch.cat([z_small, *attended], dim=-1), tuple(attentions)

    def projections(self) -> list[Tensor]:
        """For each detail its query, key and value: LayerNorm weight and bias, linear weight and bias."""
        return [
            parameter
            for detail, value in enumerate(self.config.detail_values)
            for norm, linear in (self.query[detail], self.key[detail], self.value[value])
            for parameter in (norm.weight, norm.bias, linear.weight, linear.bias)
        ]


PLAIN = (nn.Linear, nn.LayerNorm, nn.GELU, nn.Sequential, nn.ModuleList, DetailIntegrator)


def is_plain(projector: nn.Module) -> bool:
    """True where every layer after the extractor is what it was built as, without hooks: only then may a fused op read
    their parameters. An adapter around a linear layer, say, would be bypassed in silence."""
    parts = (projector.integrator, projector.output, projector.patch_mlp)
    modules = [module for part in parts if part is not None for module in part.modules()]
    layers = [type(layer) for layer in projector.patch_mlp]
    whole = all(_is_whole(module) for module in modules if module is not projector.output)
    return layers == [nn.Linear, nn.GELU, nn.Linear] and whole and all(map(_is_plain_layer, modules))


def _is_whole(module: nn.Module) -> bool:
    """True where a layer has the weight and bias that it was built with; of an output layer the bias may be missing."""
    return not isinstance(module, nn.Linear | nn.LayerNorm) or (module.weight is not None and module.bias is not None)


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_untouched(module: nn.Module) -> bool:
    """True where a call runs the forward of the module's class, and nothing beside it."""
    return "forward" not in module.__dict__ and not any(getattr(module, hooks) for hooks in HOOKS)


def _is_plain_layer(module: nn.Module) -> bool:
    if type(module) not in PLAIN or not is_untouched(module):
        return False
    return getattr(module, "approximate", "none") == "none" and getattr(module, "eps", NORM_EPS) == NORM_EPS


def finite_where(place: str, tensor: Tensor, config: SPProjectorConfig) -> Tensor:
    """The tensor with NaN as 0 and infinities as the largest finite numbers, where the configuration says so."""
    return tensor.nan_to_num() if place in config.nan_to_num else tensor


def _projection(width: int, **factory: object) -> nn.Sequential:
    linear = nn.Linear(width, width, **factory)
    init_linear(linear)
    return nn.Sequential(nn.LayerNorm(width, eps=NORM_EPS, **factory), linear)


def init_linear(linear: nn.Linear) -> None:
    """Normal weights of standard deviation 0.02, zero bias."""
    nn.init.normal_(linear.weight, std=INIT_STD)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)
