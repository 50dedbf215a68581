"""The implementations that a measurement sets side by side, behind one interface."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sp_fast import ReferenceSPProjector, SPProjector, SPProjectorConfig, geometry
from sp_fast.checkpoint import fill, official_entries
from sp_fast.interface import ProjectorOutput
from sp_fast.kernels.pooled_rows import pooled_rows
from sp_fast.kernels.window import Window
from sp_fast.tensor_files import StoredTensor

Weights = Mapping[str, StoredTensor]


class Fast:
    """The projector of this package."""

    def __init__(self, config: SPProjectorConfig, weights: Weights, device: torch.device) -> None:
        self.module = SPProjector(config, device="meta", dtype=_dtype(weights)).to_empty(device=device)
        places = official_entries(self.module)
        fill("the weights", self.module, places, weights)
        self.module.eval()
        self._places = {entry.official: entry for entry in places}

    def intermediates(self, patch_features: Tensor) -> ProjectorOutput:
        return self.module.intermediates(patch_features)

    def gradient_keys(self) -> list[str]:
        """Official keys of the tensors that a backward gave a gradient."""
        return [key for key, e in self._places.items() if self.module.get_parameter(e.ours).grad is not None]

    def gradient(self, key: str) -> Tensor:
        """The gradient in the official layout, a view."""
        entry = self._places[key]
        return entry.view(self.module.get_parameter(entry.ours).grad)


class Products(Fast):
    """The forward's large matrix products written by hand on the packed weights: what a forward on them can reach."""

    def intermediates(self, patch_features: Tensor) -> ProjectorOutput:
        extractor, config = self.module.extractor, self.module.config
        levels = geometry.pooled_levels(config)
        rows = pooled_rows(patch_features, config.grid, geometry.map_origin(config), config.map_size, levels)
        z_small = [_product(rows, extractor.spatial_weight, w) for w in geometry.spatial_windows(config)]
        z_big = tuple(_product(rows, extractor.detail_weight, w) for w in geometry.detail_windows(config))
        return ProjectorOutput(self.module.patch_mlp(patch_features), torch.cat(z_small or z_big, dim=1), z_big, ())


def _product(rows: Tensor, weight: Tensor, w: Window) -> Tensor:
    """im2col and one matmul."""
    starts = [w.source(output, down * w.width) for output in range(w.outputs) for down in range(w.height)]
    columns = torch.cat([rows[:, start : start + w.width] for start in starts], dim=1)
    return columns.reshape(rows.shape[0], w.outputs, -1) @ weight[w.cell : w.cell + w.cells].flatten(0, 1)


class Reference:
    """The official form: nn.Conv2d on a permuted channels-last view, weights ``[D, C, k, k]``."""

    def __init__(self, config: SPProjectorConfig, weights: Weights, device: torch.device) -> None:
        self.module = ReferenceSPProjector(config, device="meta", dtype=_dtype(weights)).to_empty(device=device)
        with torch.no_grad():
            for key, parameter in self.module.named_parameters():
                parameter.copy_(weights[key].load())
        self.module.eval()

    def intermediates(self, patch_features: Tensor) -> ProjectorOutput:
        return self.module.intermediates(patch_features)

    def gradient_keys(self) -> list[str]:
        return [key for key, parameter in self.module.named_parameters() if parameter.grad is not None]

    def gradient(self, key: str) -> Tensor:
        return self.module.get_parameter(key).grad


class Exact(Reference):
    """The reference in float64, one convolution widened at a time, so that it fits where float32 fits.

    A convolution's output is cut off from its weight; the weight's gradient is computed when it is asked for, by
    torch's own convolution gradient in float64.
    """

    def __init__(self, config: SPProjectorConfig, weights: Weights, device: torch.device) -> None:
        super().__init__(config, weights, device)
        self._dtype = _dtype(weights)
        self._met: dict[str, tuple[Tensor, Tensor]] = {}  # weight's key -> the convolution's input, and its output
        for name, module in self.module.named_modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_pre_hook(_widen)
                module.register_forward_hook(lambda conv, x, z, key=f"{name}.weight": self._cut(key, conv, x[0], z))
            elif not any(isinstance(child, nn.Conv2d) for child in module.modules()):
                module.double()
        for parameter in self.module.parameters(recurse=False):  # the transformers' learned queries
            parameter.data = parameter.data.double()

    def _cut(self, key: str, conv: nn.Conv2d, x: Tensor, z: Tensor) -> Tensor:
        conv.to(self._dtype)
        leaf = z.detach().requires_grad_(torch.is_grad_enabled())
        self._met[key] = (x.detach(), leaf)
        return leaf

    def intermediates(self, patch_features: Tensor) -> ProjectorOutput:
        return super().intermediates(patch_features.double())

    def gradient_keys(self) -> list[str]:
        return [*self._met, *super().gradient_keys()]

    def gradient(self, key: str) -> Tensor:
        if key not in self._met:
            return super().gradient(key)
        conv, (x, z) = self.module.get_submodule(key.removesuffix(".weight")), self._met[key]
        return torch.nn.grad.conv2d_weight(x, conv.weight.shape, z.grad, stride=conv.stride)


def _widen(conv: nn.Conv2d, _: tuple) -> None:
    conv.double()


def _dtype(weights: Weights) -> torch.dtype | None:
    return next(iter(weights.values())).dtype


IMPLEMENTATIONS = {"reference": Reference, "fast": Fast, "products": Products, "exact": Exact}
