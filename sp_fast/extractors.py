"""Spatial extractors: patch features in, spatial features and detail maps out. One interface, one class a kind.

extractor(patch_features [B, N, C], backend) -> z [B, T + sum of O, D]: spatial features, then each detail map
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sp_fast import geometry
from sp_fast.compact import COMPACT_EXTRACTORS
from sp_fast.config import SPProjectorConfig
from sp_fast.interface import check_dtype
from sp_fast.kernels.pooled_rows import pooled_rows
from sp_fast.kernels.window import encode_windows
from sp_fast.quantize import PackedWeight, packed_matmul


class WindowedExtractor(nn.Module):
    """Convolutions as windows on the patch map (paper: SFE, and the DFI's detail convolution), weights packed.

    ``spatial_weight`` is ``[sum of height * width over levels, C, D]``, ``detail_weight`` ``[sum of k * k, C, D]``.
    """

    packed = ("spatial_weight", "detail_weight")  # what can be quantised

    def __init__(self, config: SPProjectorConfig, **factory: object) -> None:
        super().__init__()
        self.config = config
        depth = (config.vision_width, config.spatial_width)
        cells = {"spatial_weight": geometry.spatial_cells(config), "detail_weight": geometry.detail_cells(config)}
        for name, count in cells.items():
            self.register_parameter(name, nn.Parameter(torch.empty(count, *depth, **factory)) if count else None)
        self.windows = [*geometry.spatial_windows(config), *geometry.detail_windows(config)]
        self._encoded = encode_windows(self.windows)
        self._pooled = geometry.pooled_levels(config)
        self._origin = geometry.map_origin(config)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Each convolution as torch's Conv2d begins: uniform within 1 / sqrt(C * height * width)."""
        weights = self._weights()
        for w in self.windows:
            bound = 1 / math.sqrt(self.config.vision_width * w.cells)
            nn.init.uniform_(weights[w.weight][w.cell : w.cell + w.cells], -bound, bound)

    def _weights(self) -> list[PackedWeight]:
        return [weight for weight in (self.spatial_weight, self.detail_weight) if weight is not None]

    def forward(self, patch_features: Tensor, backend: str = "torch") -> Tensor:
        return self.extract(patch_features, self._weights(), backend)

    def extract(self, patch_features: Tensor, weights: list[PackedWeight], backend: str) -> Tensor:
        """The forward with weights from elsewhere, packed alike; quantised ones take features of any type."""
        if isinstance(weights[0], Tensor):
            check_dtype(patch_features, weights[0])
        return packed_matmul(self.rows(patch_features, backend), weights, self._encoded, backend)

    def rows(self, patch_features: Tensor, backend: str = "torch") -> Tensor:
        """What the windows read, ``[B, R, C]``: the patch features, and after them the pooled levels."""
        config = self.config
        return pooled_rows(patch_features, config.grid, self._origin, config.map_size, self._pooled, backend)


class TransformerExtractor(nn.Module):
    """Encoder-decoder blocks, one a level, each with one learned query (paper, Tab. 3); plain nn.Transformer on
    every backend.

    Pooled levels enter as the official code has them: the pooled NCHW map is reshaped to ``[B, k * k, C]`` without
    being permuted back, so channels and positions are mixed. Checkpoints were trained that way.
    """

    def __init__(self, config: SPProjectorConfig, **factory: object) -> None:
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(transformer_block(config, **factory) for _ in config.levels)
        self.queries = nn.ParameterList(torch.zeros(1, 1, config.vision_width, **factory) for _ in config.levels)

    def forward(self, patch_features: Tensor, backend: str = "torch") -> Tensor:
        check_dtype(patch_features, next(self.parameters()))
        grid_map = patch_features.unflatten(1, (self.config.grid, self.config.grid))
        batch = patch_features.shape[0]
        tokens = [
            block(self._source(grid_map, level), query.expand(batch, -1, -1))
            for level, (block, query) in enumerate(zip(self.blocks, self.queries, strict=True))
        ]
        return torch.cat(tokens, dim=1)

    def _source(self, grid_map: Tensor, level: int) -> Tensor:
        """The level's region as a sequence ``[B, k * k, C]``."""
        size, pooled = self.config.kernel_sizes[level], self.config.pyramid == "pool"
        side = self.config.map_size if pooled else size
        start = geometry.crop_start(self.config.grid, side)
        region = grid_map[:, start : start + side, start : start + side]
        if not pooled:
            return region.flatten(1, 2)
        pool = F.adaptive_avg_pool2d(region.permute(0, 3, 1, 2), size)
        return pool.reshape(region.shape[0], size * size, region.shape[3])


class NoExtractor(nn.Module):
    """Nothing, in the place of spatial features: ``[B, 0, D]``. What is left is LLaVA-1.5's projector."""

    def __init__(self, config: SPProjectorConfig, **factory: object) -> None:
        super().__init__()
        self.config = config

    def forward(self, patch_features: Tensor, backend: str = "torch") -> Tensor:
        return patch_features.new_empty(patch_features.shape[0], 0, self.config.spatial_width)


def transformer_block(config: SPProjectorConfig, **factory: object) -> nn.Transformer:
    """The official block: pre-norm, batch first, feed-forward as wide as the model, no biases."""
    shape = {
        "d_model": config.vision_width,
        "nhead": config.transformer_heads,
        "dim_feedforward": config.vision_width,
        "dropout": config.transformer_dropout,
        "batch_first": True,
        "norm_first": True,
        "bias": False,
        **factory,
    }
    norm = nn.LayerNorm(config.vision_width, bias=False, **factory)
    # Built by hand only to switch nested tensors off: pre-norm layers cannot use them and would warn at every build.
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(**shape), config.transformer_layers, norm, enable_nested_tensor=False
    )
    return nn.Transformer(custom_encoder=encoder, num_decoder_layers=config.transformer_layers, **shape)


EXTRACTORS = {
    "full": WindowedExtractor,
    "transformer": TransformerExtractor,
    "none": NoExtractor,
    **COMPACT_EXTRACTORS,
}
