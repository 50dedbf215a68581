"""The other projectors, from blocks of torch and transformers: ``[B, N, C]`` patch features to ``[B, T, H]`` tokens.

None is copied: what is taken from papers and published sources are shapes and order (field_projectors.py says which).
transformers is imported where it is needed, since it takes seconds.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

POOLED_SIDE = 12  # of the map that DeCo, Honeybee and LDPv2 pool to: 144 tokens
STAGE_DEPTH = 3  # RegNet blocks before the pool, and again behind it
QFORMER_WIDTH, QFORMER_HEADS, QFORMER_LAYERS, QFORMER_QUERIES = 768, 12, 12, 32
QFORMER_WORDS = 30_523  # BERT's, and one that begins a text
RESAMPLER_SIDE, RESAMPLER_HEAD = 16, 128  # 256 queries; channels of a head


@dataclass(frozen=True)
class Shape:
    """What a projector stands between. ``shrink`` divides inner widths that follow neither side, for a rehearsal."""

    grid: int = 24
    vision: int = 1024
    text: int = 4096
    shrink: int = 1

    @property
    def patches(self) -> int:
        """N, of one image."""
        return self.grid**2

    @property
    def qformer(self) -> int:
        """Width of a Q-Former."""
        return QFORMER_WIDTH // self.shrink


def import_blocks() -> None:
    """Imports what any of the projectors needs, so that a process is as large for each."""
    import transformers.models.blip_2.modeling_blip_2
    import transformers.models.convnext.modeling_convnext
    import transformers.models.instructblip.modeling_instructblip
    import transformers.models.regnet.modeling_regnet  # noqa: F401


def linear(shape: Shape) -> nn.Module:
    """LLaVA's first, and Shikra's."""
    return nn.Linear(shape.vision, shape.text)


def mlp(shape: Shape, activation: type[nn.Module] = nn.GELU) -> nn.Module:
    """LLaVA-1.5's mlp2x_gelu."""
    return nn.Sequential(nn.Linear(shape.vision, shape.text), activation(), nn.Linear(shape.text, shape.text))


class DeCo(nn.Module):
    """Patches are pooled as they are; what they mean is left to the language model."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.pool, self.mlp = nn.AdaptiveAvgPool2d(POOLED_SIDE), mlp(shape)

    def forward(self, patch_features: Tensor) -> Tensor:
        return self.mlp(_rows(self.pool(_map(patch_features))))


class LDPv2(nn.Module):
    """MobileVLM V2: the MLP on every patch, a pool, and a depthwise convolution that says where a token stands."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.mlp, self.pool = mlp(shape), nn.AdaptiveAvgPool2d(POOLED_SIDE)
        self.peg = nn.Conv2d(shape.text, shape.text, 3, padding=1, groups=shape.text)

    def forward(self, patch_features: Tensor) -> Tensor:
        pooled = self.pool(_map(self.mlp(patch_features)))
        return _rows(self.peg(pooled) + pooled)


class CAbstractor(nn.Module):
    """Honeybee: learned positions, RegNet blocks around an adaptive pool, an MLP. The blocks keep the tower's width."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.zeros(1, shape.patches, shape.vision))
        self.before, self.after = _regnet_stage(shape.vision), _regnet_stage(shape.vision)
        self.pool = nn.AdaptiveAvgPool2d(POOLED_SIDE)
        self.readout = mlp(shape, nn.SiLU)

    def forward(self, patch_features: Tensor) -> Tensor:
        features = self.before(_map(patch_features + self.positions))
        return self.readout(_rows(self.after(self.pool(features))))


def _regnet_stage(width: int) -> nn.Sequential:
    """RegNet-Y blocks of depthwise convolutions with Honeybee's SiLU and layer norms, as timm's RegStage has them."""
    from transformers import RegNetConfig
    from transformers.models.convnext.modeling_convnext import ConvNextLayerNorm
    from transformers.models.regnet.modeling_regnet import RegNetYLayer

    config = RegNetConfig(groups_width=1, hidden_act="silu")
    stage = nn.Sequential(*(RegNetYLayer(config, width, width) for _ in range(STAGE_DEPTH)))
    for name, module in list(stage.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            stage.set_submodule(name, ConvNextLayerNorm(width, data_format="channels_first"))
        elif isinstance(module, nn.ReLU):  # of the squeeze and excitation
            stage.set_submodule(name, nn.SiLU())
    return stage


class QFormer(nn.Module):
    """BLIP-2: learned queries in a BERT that looks at the patches in every other layer, then a projection."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.query_tokens = nn.Parameter(torch.zeros(1, QFORMER_QUERIES, shape.qformer))
        self.qformer = self._transformer(shape)
        self.language_projection = nn.Linear(shape.qformer, shape.text)

    def _transformer(self, shape: Shape) -> nn.Module:
        from transformers import Blip2QFormerConfig, Blip2QFormerModel

        return Blip2QFormerModel(Blip2QFormerConfig(**_qformer_sizes(shape)))

    def _attend(self, queries: Tensor, patch_features: Tensor) -> Tensor:
        return self.qformer(query_embeds=queries, encoder_hidden_states=patch_features).last_hidden_state

    def forward(self, patch_features: Tensor) -> Tensor:
        queries = self.query_tokens.expand(patch_features.shape[0], -1, -1)
        return self.language_projection(self._attend(queries, patch_features))


class InstructQFormer(QFormer):
    """InstructBLIP: the same with words and layers for an instruction, which are held and, without one, not used."""

    def _transformer(self, shape: Shape) -> nn.Module:
        from transformers import InstructBlipQFormerConfig, InstructBlipQFormerModel

        words = QFORMER_WORDS // shape.shrink
        return InstructBlipQFormerModel(InstructBlipQFormerConfig(vocab_size=words, **_qformer_sizes(shape)))

    def _attend(self, queries: Tensor, patch_features: Tensor) -> Tensor:
        found = self.qformer(input_ids=None, query_embeds=queries, encoder_hidden_states=patch_features)
        return found.last_hidden_state


def _qformer_sizes(shape: Shape) -> dict[str, int]:
    return {
        "hidden_size": shape.qformer, "intermediate_size": 4 * shape.qformer, "num_attention_heads": QFORMER_HEADS,
        "num_hidden_layers": QFORMER_LAYERS, "cross_attention_frequency": 2, "encoder_hidden_size": shape.vision,
    }  # fmt: skip


class Resampler(nn.Module):
    """One cross-attention of learned queries over the patches, in the language model's width; fixed 2D positions."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width = shape.text
        self._grid = shape.grid
        self.query = nn.Parameter(torch.zeros(RESAMPLER_SIDE**2, width))
        self.kv_proj = nn.Linear(shape.vision, width, bias=False)
        self.attn = nn.MultiheadAttention(width, max(1, width // RESAMPLER_HEAD), batch_first=True)
        self.ln_q, self.ln_kv = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.register_buffer("query_positions", torch.empty(RESAMPLER_SIDE**2, width))
        self.register_buffer("key_positions", torch.empty(shape.patches, width))

    def lay_positions(self) -> None:
        """Fills the fixed positions; the keys' are those of the queries' grid, laid over the patches'."""
        width = self.query_positions.shape[1]
        own = sin_cos_positions(width, RESAMPLER_SIDE)
        square = own.T.reshape(1, width, RESAMPLER_SIDE, RESAMPLER_SIDE)
        keys = F.interpolate(square, size=(self._grid, self._grid), mode="bicubic", align_corners=False)
        self.query_positions.copy_(own)
        self.key_positions.copy_(keys[0].flatten(1).T)

    def forward(self, patch_features: Tensor) -> Tensor:
        values = self.ln_kv(self.kv_proj(patch_features))
        queries = (self.ln_q(self.query) + self.query_positions).expand(patch_features.shape[0], -1, -1)
        return self.attn(queries, values + self.key_positions, values, need_weights=False)[0]


class QwenVL(nn.Module):
    """Qwen-VL's resampler, and the norm and projection between it and the language model."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.resampler, self.ln_post = Resampler(shape), nn.LayerNorm(shape.text, eps=1e-6)
        self.proj = nn.Linear(shape.text, shape.text, bias=False)

    def forward(self, patch_features: Tensor) -> Tensor:
        return self.proj(self.ln_post(self.resampler(patch_features)))


def sin_cos_positions(width: int, side: int) -> Tensor:
    """``[side * side, width]`` in float64, row by row: sines and cosines of the column, then those of the row."""
    frequencies = 10_000 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies
    line = torch.cat([angles.sin(), angles.cos()], dim=1)
    return torch.cat([line.repeat(side, 1), line.repeat_interleave(side, dim=0)], dim=1)


def _map(tokens: Tensor) -> Tensor:
    """``[B, N, C]`` to ``[B, C, side, side]``, a view."""
    side = round(tokens.shape[1] ** 0.5)
    return tokens.transpose(1, 2).unflatten(2, (side, side))


def _rows(features: Tensor) -> Tensor:
    """``[B, C, side, side]`` to ``[B, N, C]``."""
    return features.flatten(2).transpose(1, 2)
