"""ReferenceSPProjector: the paper's equations, written as the official code computes them. The yardstick, never tuned.

Its modules carry the official names and weight layouts, so its state dict is an official checkpoint without prefix.
Spatial Feature Extractor:   z_i = Conv2d_i(region_i),  the kernel covers the whole region;  Z = [z_1 ... z_T]
Detail Feature Integrator:   Z_b = Conv2d(map, stride 2);  A = softmax(Q (K^T / sqrt(D)));  fused = [Z, A V]
Output:                      spatial tokens = Linear(GELU(fused)), patch tokens = Linear(GELU(Linear(patches)))
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sp_fast import geometry, layout
from sp_fast.compact_config import narrows
from sp_fast.compact_reference import CONVOLUTIONS, SHARED_KERNELS, plain
from sp_fast.config import SPProjectorConfig
from sp_fast.extractors import transformer_block
from sp_fast.interface import ProjectorOutput, check_patch_features


class ReferenceSPProjector(nn.Module):
    """``[B, N, C]`` patch features to ``[B, T + N, H]`` tokens, slowly and obviously."""

    def __init__(
        self,
        config: SPProjectorConfig | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config = config or SPProjectorConfig()
        factory = {"device": device, "dtype": dtype}
        c, d, h = config.vision_width, config.spatial_width, config.text_width
        self.reduce = nn.Conv2d(c, config.rank, 1, bias=False, **factory) if narrows(config) else None
        self.shares = config.extractor in SHARED_KERNELS
        if self.shares and config.levels:
            self.kernel = SHARED_KERNELS[config.extractor](config, **factory)
        convolution = CONVOLUTIONS.get(config.extractor, plain)
        for level, size in enumerate(() if self.shares else config.levels):
            name = layout.level_module(config, level)
            if config.extractor == "transformer":
                self.add_module(name, transformer_block(config, **factory))
                self.register_parameter(layout.query_name(config, level), nn.Parameter(torch.zeros(1, 1, c, **factory)))
                continue
            conv = convolution(config, size, 1, **factory)
            pooled = geometry.is_pooled(config, level)
            self.add_module(name, nn.Sequential(nn.AdaptiveAvgPool2d(size), conv) if pooled else conv)
        for detail, (name, kernel) in enumerate(zip(layout.detail_names(config), config.detail_kernels, strict=True)):
            if config.extractor == "resampled":
                self.add_module(f"conv_{name}", SHARED_KERNELS[config.extractor](config, **factory))
            elif not self.shares:
                self.add_module(f"conv_{name}", convolution(config, (kernel, kernel), config.detail_stride, **factory))
            for part in layout.PARTS if config.attends else ():
                projection = nn.Sequential(nn.LayerNorm(d, **factory), nn.Linear(d, d, **factory))
                self.add_module(layout.attention_module(config, part, detail), projection)
        if config.spatial_tokens:
            linear = nn.Linear(config.fused_width, h, bias=config.spatial_bias, **factory)
            self.add_module(layout.output_module(config), nn.Sequential(nn.GELU(), linear))
        self.mm_projector = nn.Sequential(nn.Linear(c, h, **factory), nn.GELU(), nn.Linear(h, h, **factory))

    def forward(self, patch_features: Tensor) -> Tensor:
        """Raises ValueError for features of another rank, width or grid."""
        return self.intermediates(patch_features).tokens

    def intermediates(self, patch_features: Tensor) -> ProjectorOutput:
        """The forward with everything that it computes on the way."""
        config = self.config
        check_patch_features(patch_features, config)
        if not config.spatial_tokens:  # LLaVA-1.5
            nothing = patch_features.new_empty(patch_features.shape[0], 0, config.spatial_width)
            return ProjectorOutput(self.mm_projector(patch_features), nothing, (), ())
        z_big = self.detail_maps(patch_features)
        if config.levels:
            z_small = self.spatial_features(patch_features)
        else:  # the detail map itself gives the spatial tokens
            z_small, z_big = z_big[0], ()
        spatial, attention = self.integrate(z_small, z_big)
        tokens = torch.cat([spatial, self.mm_projector(patch_features)], dim=1)
        return ProjectorOutput(tokens, z_small, z_big, attention)

    def spatial_features(self, patch_features: Tensor) -> Tensor:
        """SFE: ``[B, N, C]`` to ``[B, T, D]``."""
        grid_map = self._grid_map(patch_features)
        tokens = [self._spatial(grid_map, level) for level in range(len(self.config.levels))]
        return self._finite("spatial", torch.cat(tokens, dim=1))

    def detail_maps(self, patch_features: Tensor) -> tuple[Tensor, ...]:
        """The DFI's convolutions: ``[B, N, C]`` to ``[B, O, D]`` a detail, in row-major order."""
        return tuple(self._finite("detail", z) for z in self._detail(self._grid_map(patch_features)))

    def integrate(self, z_small: Tensor, z_big: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """DFI's attention and the output layer: spatial tokens ``[B, T, H]``, and the attention of each detail."""
        fused, attention = self._attend(z_small, z_big)
        return getattr(self, layout.output_module(self.config))(fused), attention

    def _grid_map(self, patch_features: Tensor) -> Tensor:
        grid_map = patch_features.reshape(-1, self.config.grid, self.config.grid, self.config.vision_width)
        return grid_map if self.reduce is None else self.reduce(grid_map.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    def _spatial(self, grid_map: Tensor, level: int) -> Tensor:
        """One spatial token ``[B, 1, D]``."""
        region = self._region(grid_map, level)
        if self.shares:
            return self._with_shared_kernel(region.permute(0, 3, 1, 2), level)
        module = getattr(self, layout.level_module(self.config, level))
        if self.config.extractor == "transformer":
            return module(self._sequence(region, level), self._query(level, grid_map.shape[0]))
        return module(region.permute(0, 3, 1, 2)).squeeze(-1).permute(0, 2, 1)

    def _with_shared_kernel(self, region: Tensor, level: int) -> Tensor:
        size = self.config.levels[level]
        if geometry.is_pooled(self.config, level):
            region = nn.functional.adaptive_avg_pool2d(region, size)
        return self.kernel(region, size).squeeze(-1).permute(0, 2, 1)

    def _region(self, grid_map: Tensor, level: int) -> Tensor:
        """What the level's module sees, ``[B, h, w, C]``: its crop, its sliding window, or the map that it pools."""
        config, (height, width) = self.config, self.config.levels[level]
        if config.pyramid == "crop":
            return _centre(grid_map, height)
        square = _centre(grid_map, config.map_size)
        if config.pyramid == "pool":
            return square
        row, column = divmod(level, config.sliding_windows[1])
        return square[:, row * height : (row + 1) * height, column * width : (column + 1) * width]

    def _sequence(self, region: Tensor, level: int) -> Tensor:
        """The transformer's source ``[B, k * k, C]``; pooled maps are reshaped without being permuted back."""
        if self.config.pyramid == "crop":
            return region.reshape(region.shape[0], -1, region.shape[3])
        pool = nn.functional.adaptive_avg_pool2d(region.permute(0, 3, 1, 2), self.config.kernel_sizes[level])
        return pool.reshape(region.shape[0], pool[0, 0].numel(), region.shape[3])

    def _query(self, level: int, batch: int) -> Tensor:
        return getattr(self, layout.query_name(self.config, level)).repeat(batch, 1, 1)

    def _detail(self, grid_map: Tensor) -> list[Tensor]:
        """The detail maps, each ``[B, O, D]`` in row-major order."""
        square = _centre(grid_map, self.config.map_size).permute(0, 3, 1, 2)
        found = []
        for name, kernel in zip(layout.detail_names(self.config), self.config.detail_kernels, strict=True):
            conv = getattr(self, f"conv_{name}") if hasattr(self, f"conv_{name}") else self.kernel
            z = conv(square, (kernel, kernel), self.config.detail_stride) if self.shares else conv(square)
            found.append(z.flatten(2).permute(0, 2, 1))
        return found

    def _attend(self, z_small: Tensor, z_big: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Cross-attention over each detail map; returns the output layer's input and the attention."""
        attended, attentions = [], []
        for detail, z in enumerate(z_big):
            query = self._project("query", detail, z_small)
            key = self._project("key", detail, z)
            value = self._project("value", self.config.detail_values[detail], z)
            logits = self._finite("logits", query @ (key.transpose(-1, -2) / key.shape[-1] ** 0.5))
            attentions.append(logits.softmax(-1))
            attended.append(attentions[-1] @ value)
        if attended and self.config.detail_fusion == "sum":
            attended = [sum(attended[1:], start=attended[0])]
        return torch.cat([z_small, *attended], dim=-1), tuple(attentions)

    def _project(self, part: str, detail: int, z: Tensor) -> Tensor:
        return getattr(self, layout.attention_module(self.config, part, detail))(z)

    def _finite(self, place: str, tensor: Tensor) -> Tensor:
        return tensor.nan_to_num() if place in self.config.nan_to_num else tensor


def _centre(grid_map: Tensor, side: int) -> Tensor:
    """The official crop: rows and columns ``[c - side // 2, c - side // 2 + side)`` with ``c = int(l / 2)``."""
    start = int(grid_map.shape[1] / 2) - side // 2
    return grid_map[:, start : start + side, start : start + side]
