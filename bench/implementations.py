"""The implementations that a measurement sets side by side, behind one interface.

Each takes the official weights and gives every stage of the projector as a function (cases.STAGES), and gradients in
the official layout. ``reference`` is the official form; the others but ``fast`` are it again, with its convolutions
done another way: what plain PyTorch can reach without this package.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sp_fast import ReferenceSPProjector, SPProjector, SPProjectorConfig, geometry
from sp_fast.checkpoint import fill, reference_entries
from sp_fast.compact_config import COMPACT
from sp_fast.integrator import finite_where
from sp_fast.interface import ProjectorOutput
from sp_fast.kernels.pooled_rows import pooled_rows
from sp_fast.kernels.window import Window, encode_windows
from sp_fast.kernels.windowed_matmul import windowed_matmul
from sp_fast.stored_tensor import StoredTensor

Weights = Mapping[str, StoredTensor]
StageFunction = Callable[..., tuple[Tensor, ...]]
View = Callable[[Tensor], Tensor]


class Implementation:
    """A projector and its stages (cases.STAGES), each a method of that name: tensors in, a tuple of tensors out."""

    module: SPProjector | ReferenceSPProjector

    def place(self, key: str) -> tuple[nn.Parameter, View]:
        """Where an official tensor lies: its parameter, and the official layout as a view of that."""
        raise NotImplementedError

    def parameter(self, key: str) -> Tensor:
        """A parameter in the official layout, a view of it as it is now."""
        parameter, view = self.place(key)
        return view(parameter.detach())

    def gradient(self, key: str) -> Tensor:
        """Its gradient in the official layout, a view."""
        parameter, view = self.place(key)
        return view(parameter.grad)

    def stage(self, name: str) -> StageFunction:
        return getattr(self, name)

    def accept(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The inputs of a stage, as this implementation takes them."""
        return inputs

    def intermediates(self, patch_features: Tensor) -> ProjectorOutput:
        return self.module.intermediates(patch_features)

    def whole(self, patch_features: Tensor) -> tuple[Tensor, ...]:
        return (self.module(patch_features),)


class Fast(Implementation):
    """The projector of this package."""

    def __init__(self, config: SPProjectorConfig, weights: Weights, device: torch.device) -> None:
        sum_in_float32()
        self.module = SPProjector(config, device="meta", dtype=_dtype(weights)).to_empty(device=device)
        places = reference_entries(self.module)
        fill("the weights", self.module, places, weights)
        self.module.eval()
        self._places = {entry.official: entry for entry in places}
        self._spatial = _alone(geometry.spatial_windows(config))
        self._detail = _alone(geometry.detail_windows(config))

    def gradient_keys(self) -> list[str]:
        """Official keys of the tensors that a backward gave a gradient."""
        return [key for key, e in self._places.items() if self.module.get_parameter(e.ours).grad is not None]

    def place(self, key: str) -> tuple[nn.Parameter, View]:
        entry = self._places[key]
        return self.module.get_parameter(entry.ours), entry.view

    def spatial(self, patch_features: Tensor) -> tuple[Tensor, ...]:
        extractor, config, backend = self.module.extractor, self.module.config, self.module.backend.name
        if config.extractor == "transformer":
            return (extractor(patch_features),)
        levels = geometry.pooled_levels(config)
        rows = pooled_rows(patch_features, config.grid, geometry.map_origin(config), config.map_size, levels, backend)
        z = windowed_matmul(rows, [extractor.spatial_weight], self._spatial, backend)
        return (finite_where("spatial", z, config),)

    def detail(self, patch_features: Tensor) -> tuple[Tensor, ...]:
        config = self.module.config
        weights, backend = [self.module.extractor.detail_weight], self.module.backend.name
        z = windowed_matmul(patch_features, weights, self._detail, backend)
        return finite_where("detail", z, config).split([side * side for side in config.detail_sides], dim=1)

    def convolutions(self, patch_features: Tensor) -> tuple[Tensor, ...]:
        config = self.module.config
        lengths = [config.spatial_tokens, *(side * side for side in config.detail_sides)]
        z_small, *z_big = self.module.extractor(patch_features, self.module.backend.name).split(lengths, dim=1)
        return finite_where("spatial", z_small, config), *(finite_where("detail", z, config) for z in z_big)

    def tail(self, z_small: Tensor, *z_big: Tensor) -> tuple[Tensor, ...]:
        return (self.module.integrate(torch.cat([z_small, *z_big], dim=1))[0],)

    def mlp(self, patch_features: Tensor) -> tuple[Tensor, ...]:
        return (self.module.patch_mlp(patch_features),)


def _alone(windows: list[Window]) -> list[int]:
    """Windows that meet one weight, for a call with that weight only."""
    return encode_windows(replace(w, weight=0) for w in windows)


class Reference(Implementation):
    """The official form: nn.Conv2d on a permuted channels-last view, weights ``[D, C, k, k]``."""

    cudnn_benchmark = False

    def __init__(self, config: SPProjectorConfig, weights: Weights, device: torch.device) -> None:
        torch.backends.cudnn.benchmark = self.cudnn_benchmark
        if type(self) in (Reference, Exact):
            sum_in_float32()
        self.module = ReferenceSPProjector(config, device="meta", dtype=_dtype(weights)).to_empty(device=device)
        with torch.no_grad():
            for key, parameter in self.module.named_parameters():
                parameter.copy_(weights[key].load())
        self.module.eval()

    def gradient_keys(self) -> list[str]:
        return [key for key, parameter in self.module.named_parameters() if parameter.grad is not None]

    def place(self, key: str) -> tuple[nn.Parameter, View]:
        return self.module.get_parameter(key), lambda tensor: tensor

    def spatial(self, patch_features: Tensor) -> tuple[Tensor, ...]:
        return (self.module.spatial_features(patch_features),)

    def detail(self, patch_features: Tensor) -> tuple[Tensor, ...]:
        return self.module.detail_maps(patch_features)

    def convolutions(self, patch_features: Tensor) -> tuple[Tensor, ...]:
        return *self.spatial(patch_features), *self.detail(patch_features)

    def tail(self, z_small: Tensor, *z_big: Tensor) -> tuple[Tensor, ...]:
        return (self.module.integrate(z_small, z_big)[0],)

    def mlp(self, patch_features: Tensor) -> tuple[Tensor, ...]:
        return (self.module.mm_projector(patch_features),)


class ReferenceBenchmark(Reference):
    """The official form with cudnn.benchmark."""

    cudnn_benchmark = True


class ChannelsLast(Reference):
    """The official form with its convolution weights in channels-last memory format."""

    def __init__(self, config: SPProjectorConfig, weights: Weights, device: torch.device) -> None:
        super().__init__(config, weights, device)
        for conv in _convolutions(self.module).values():
            conv.weight.data = conv.weight.data.contiguous(memory_format=torch.channels_last)


class ChannelsLastBenchmark(ChannelsLast):
    """Channels-last weights with cudnn.benchmark."""

    cudnn_benchmark = True


class Compiled(Reference):
    """torch.compile of the official form, one static graph a stage and shape."""

    def stage(self, name: str) -> StageFunction:
        torch.compiler.reset()  # else a few shapes reach the limit of recompilations, and the rest run uncompiled
        return torch.compile(super().stage(name), dynamic=False)


class Linear(Reference):
    """Flattened windows and F.linear on weights ``[D, k * k * C]``."""

    def __init__(self, config: SPProjectorConfig, weights: Weights, device: torch.device) -> None:
        super().__init__(config, weights, device)
        self._flat: dict[str, _FlatConv] = {}
        for name in list(_convolutions(self.module)):  # one at a time: no second copy of all weights
            self._flat[f"{name}.weight"] = self._flatten(self.module.get_submodule(name))
            self.module.set_submodule(name, self._flat[f"{name}.weight"])

    def place(self, key: str) -> tuple[nn.Parameter, View]:
        parameter, view = super().place(key)
        return parameter, self._flat[key].official if key in self._flat else view

    def _flatten(self, conv: nn.Conv2d) -> _FlatConv:
        return _FlatConv(conv, depth_first=False)


class Matmul(Linear):
    """Flattened windows and one matrix product on weights ``[k * k * C, D]``, a convolution each."""

    def _flatten(self, conv: nn.Conv2d) -> _FlatConv:
        return _FlatConv(conv, depth_first=True)


class _FlatConv(nn.Module):
    """im2col and one product, in place of a convolution."""

    def __init__(self, conv: nn.Conv2d, depth_first: bool) -> None:
        super().__init__()
        self.kernel, self.step = conv.kernel_size, conv.stride
        flat = conv.weight.data.permute(0, 2, 3, 1).flatten(1)
        self.weight = nn.Parameter(flat.t().contiguous() if depth_first else flat)
        self._product = torch.matmul if depth_first else F.linear
        self._depth_first = depth_first

    def official(self, weight: Tensor) -> Tensor:
        """``[D, C, k, k]``, a view."""
        flat = weight.t() if self._depth_first else weight
        return flat.unflatten(1, (*self.kernel, -1)).permute(0, 3, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        (height, width), (down, right) = self.kernel, self.step
        windows = x.permute(0, 2, 3, 1).unfold(1, height, down).unfold(2, width, right)
        columns = windows.permute(0, 1, 2, 4, 5, 3).flatten(3)
        return self._product(columns, self.weight).permute(0, 3, 1, 2)


class Exact(Reference):
    """The reference in float64, one convolution widened at a time, so that it fits where float32 fits.

    A convolution's output is cut off from its weight; the weight's gradient is computed when it is asked for, by
    torch's own convolution gradient in float64.
    """

    def __init__(self, config: SPProjectorConfig, weights: Weights, device: torch.device) -> None:
        super().__init__(config, weights, device)
        self._dtype = _dtype(weights)
        self._met: dict[str, tuple[Tensor, Tensor]] = {}  # weight's key -> the convolution's input, and its output
        if config.extractor in COMPACT:  # convolutions of convolutions, and small
            self.module.double()
            return
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

    def accept(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        self._met.clear()  # of the stage before
        return tuple(x.detach().double().requires_grad_(x.requires_grad) for x in inputs)

    def gradient_keys(self) -> list[str]:
        return [*self._met, *super().gradient_keys()]

    def gradient(self, key: str) -> Tensor:
        if key not in self._met:
            return super().gradient(key)
        conv, (x, z) = self.module.get_submodule(key.removesuffix(".weight")), self._met[key]
        return torch.nn.grad.conv2d_weight(x, conv.weight.shape, z.grad, stride=conv.stride)


def sum_in_float32() -> None:
    """For what is held to the accuracy rule; the other baselines keep torch's defaults, which may be faster."""
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


def _widen(conv: nn.Conv2d, _: tuple) -> None:
    conv.double()


def _convolutions(module: nn.Module) -> dict[str, nn.Conv2d]:
    """Those that are nothing but a convolution of all channels."""
    found = {name: child for name, child in module.named_modules() if type(child) is nn.Conv2d}
    return {name: conv for name, conv in found.items() if conv.groups == 1}


def _dtype(weights: Weights) -> torch.dtype | None:
    return next(iter(weights.values())).dtype


OURS, YARDSTICK, EXACT = "fast", "reference", "exact"
IMPLEMENTATIONS = {
    OURS: Fast,
    YARDSTICK: Reference,
    "reference_benchmark": ReferenceBenchmark,
    "channels_last": ChannelsLast,
    "channels_last_benchmark": ChannelsLastBenchmark,
    "linear": Linear,
    "matmul": Matmul,
    "compiled": Compiled,
    EXACT: Exact,
}
BASELINES = tuple(name for name in IMPLEMENTATIONS if name not in (OURS, EXACT))


def baselines_on(device: torch.device) -> tuple[str, ...]:
    """The baselines that differ from one another there: cudnn's switch means nothing to a CPU."""
    cuda = device.type == "cuda"
    return tuple(name for name in BASELINES if cuda or not IMPLEMENTATIONS[name].cudnn_benchmark)
