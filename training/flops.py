"""Floating-point operations of a training step, from shapes: what model FLOP utilisation (MFU) is counted in.

A product ``[m, k] @ [k, n]`` is 2 m k n. Counted is what the step cannot do without, so neither padding, nor what
gradient checkpointing computes again, nor attention to later tokens:

    language model  each linear layer, the head and LoRA's among them, in * out a token: forward and input gradient,
                    and the weight's gradient where it is trained. A layer's attention, over the n (n + 1) / 2 pairs of
                    a row of n tokens: two products forward, four backward
    vision tower    forward alone, up to the layer that is read: patches, linear layers, attention over all pairs
    projector       forward and weights' gradients; input gradients where something before the product is trained,
                    which is everywhere but in its first layers

Linear layers are found in the model, attention is counted from the configuration, as of ordinary heads: windows of
attention count as whole, and experts that are no linear layers do not count.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import nn

from sp_fast import SPProjectorConfig
from sp_fast.compact_config import COMPACT
from sp_fast.compact_geometry import compact_products
from sp_fast.geometry import detail_windows, spatial_windows
from sp_fast.llava_sp.configuration import LlavaSpConfig
from sp_fast.llava_sp.modeling import LlavaSpForConditionalGeneration

_SIDES = {"cuda": 8192, "cpu": 512}
_SECONDS = 0.1


@dataclass(frozen=True)
class Flop:
    """Of forward and backward: for each token, each pair of tokens that attend, and each image."""

    token: int
    pair: int
    image: int

    def of(self, tokens: float, pairs: float, images: float) -> float:
        """Of so many."""
        return self.token * tokens + self.pair * pairs + self.image * images


def core_of(model: nn.Module) -> LlavaSpForConditionalGeneration:
    """The model inside of whatever is wrapped around it."""
    return next(module for module in model.modules() if isinstance(module, LlavaSpForConditionalGeneration))


def model_flop(model: nn.Module) -> Flop:
    """Of a model as ``stage.prepare`` made it, whatever is wrapped around it."""
    core = core_of(model)
    text = core.config.text_config
    linear = [m for part in (core.model.language_model, core.lm_head) for m in _linear(part)]
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return Flop(
        token=sum(2 * m.in_features * m.out_features * (2 + m.weight.requires_grad) for m in linear),
        pair=3 * 4 * text.num_hidden_layers * text.num_attention_heads * head,
        image=_tower(core.model.vision_tower, core.config) + projector_flop(core.config.projector),
    )


def projector_flop(config: SPProjectorConfig) -> int:
    """Of one image, forward and backward, everything trained but the patch features."""
    vision, width, text = config.vision_width, config.spatial_width, config.text_width
    tokens, patches = config.spatial_tokens, config.patch_tokens
    first = patches * vision * text  # without an input gradient
    later = patches * text * text + tokens * config.fused_width * text
    if config.extractor == "transformer":
        later += sum(_transformer(config, size * size) for size in config.kernel_sizes)
        windows = detail_windows(config)
    elif config.extractor in COMPACT:
        products = compact_products(config)
        later += sum(p.multiply_adds for p in products if not p.first)
        first += sum(p.multiply_adds for p in products if p.first)
        windows = []
    else:
        windows = [*spatial_windows(config), *detail_windows(config)]
    first += sum(w.outputs * w.cells for w in windows) * vision * width
    for side in config.detail_sides if config.attends else ():
        outputs = side * side
        later += (tokens + 2 * outputs) * width * width + 2 * tokens * outputs * width
    return 2 * (2 * first + 3 * later)


def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP a second of a large square product on random data: the best of what fits into 0.1 s, after one that warms
    up."""
    side = _SIDES[device.type]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    _seconds(a, b)
    end = time.perf_counter() + _SECONDS
    while time.perf_counter() < end or best == float("inf"):
        best = min(best, _seconds(a, b))
    return 2 * side**3 / best


def _seconds(a: torch.Tensor, b: torch.Tensor) -> float:
    _wait_for(a.device)
    start = time.perf_counter()
    torch.mm(a, b)
    _wait_for(a.device)
    return time.perf_counter() - start


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _linear(module: nn.Module) -> list[nn.Linear]:
    return [m for m in module.modules() if isinstance(m, nn.Linear)]


def _tower(tower: nn.Module, config: LlavaSpConfig) -> int:
    """Of one image, forward."""
    vision = config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    tokens = tower.embeddings.position_embedding.num_embeddings  # with CLS, where there is one
    layers = tower.encoder.layers[: config.vision_feature_layer % (vision.num_hidden_layers + 1)]
    matrices = sum(m.in_features * m.out_features for layer in layers for m in _linear(layer))
    attention = 2 * len(layers) * tokens * tokens * vision.hidden_size
    return 2 * (patches * 3 * vision.patch_size**2 * vision.hidden_size + tokens * matrices + attention)


def _transformer(config: SPProjectorConfig, source: int) -> int:
    """Multiply-adds of one block's forward over ``source`` tokens, with one query, feed-forward as wide as the rest."""
    width = config.vision_width
    encoder = source * 6 * width + 2 * source * source  # query, key, value, output, two of feed-forward
    decoder = 8 * width + 2  # self-attention of the query, query and output of cross-attention, feed-forward
    decoder += source * 2 * width + 2 * source  # its keys and values
    return config.transformer_layers * (encoder + decoder) * width
