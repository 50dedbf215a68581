"""Floating-point operations and bytes that a case cannot do without: the floor that its time is held against.

FLOP are those of the matrix products, a multiplication and an addition each, as torch's FlopCounterMode counts them.
Bytes: every weight and input is read once and every result written once; what passes between layers may stay on chip.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from sp_fast import SPProjectorConfig
from sp_fast.bench.cases import DTYPES, Case, parts_of
from sp_fast.compact import COMPACT_EXTRACTORS
from sp_fast.compact_config import COMPACT
from sp_fast.compact_geometry import compact_products


@dataclass(frozen=True)
class Count:
    """Of one call."""

    flop: int
    bytes: int

    def __add__(self, other: Count) -> Count:
        return Count(self.flop + other.flop, self.bytes + other.bytes)


@dataclass(frozen=True)
class Product:
    """``[rows, depth] @ [depth, width]``, with weights on the right, or with another activation."""

    rows: int
    depth: int
    width: int
    weights: int = 0  # elements of the weight, the bias included; 0 for a product of activations
    propagates: bool = True  # the backward also needs the gradient of the left side

    @property
    def forward(self) -> int:
        return 2 * self.rows * self.depth * self.width

    @property
    def backward(self) -> int:
        """The right side's gradient, and the left side's where something before it is trained."""
        return self.forward * (1 + self.propagates)


def count(case: Case) -> Count:
    """What the case costs at least."""
    stages = parts_of(case)
    products = [p for stage in stages for p in _PRODUCTS[stage](case.config, case.batch)]
    if case.stage == "whole":
        products += _compact(case.config, case.batch)
    vectors = sum(_vectors(case.config, stage) for stage in stages)
    read, written = _activations(case)
    gradients = read if case.stage == "tail" else 0  # the patch features need none
    return total(case, products, vectors, read, written, gradients)


def total(case: Case, products: Sequence[Product], vectors: int, read: int, written: int, gradients: int = 0) -> Count:
    """Of the case's products in its direction and dtype; ``vectors`` are weights that multiply no matrix, ``read`` and
    ``written`` activations, ``gradients`` those of what is read, in elements."""
    weights = vectors + sum(p.weights for p in products)
    again = sum(p.weights for p in products if p.propagates)
    forward = Count(sum(p.forward for p in products), weights + read + written)
    backward = Count(sum(p.backward for p in products), weights + again + read + written + gradients)
    chosen = {
        "forward": forward,
        "backward": backward,
        "both": Count(forward.flop + backward.flop, forward.bytes + backward.bytes),
    }[case.direction]
    return Count(chosen.flop, chosen.bytes * DTYPES[case.dtype].itemsize)


def _activations(case: Case) -> tuple[int, int]:
    """Elements that come in and go out."""
    config, batch = case.config, case.batch
    tokens = batch * config.spatial_tokens
    maps = batch * sum(side * side for side in config.detail_sides)
    patches, width = batch * config.patch_tokens, config.spatial_width
    seen = max(map(max, config.levels), default=0) if config.pyramid == "crop" else config.map_size
    mapped = config.map_size if config.detail_kernels else 0
    return {
        "whole": (patches * config.vision_width, (tokens + patches) * config.text_width),
        "spatial": (batch * seen * seen * config.vision_width, tokens * width),
        "detail": (batch * config.map_size**2 * config.vision_width, maps * width),
        "convolutions": (batch * max(seen, mapped) ** 2 * config.vision_width, (tokens + maps) * width),
        "tail": ((tokens + maps * config.attends) * width, tokens * config.text_width),
        "mlp": (patches * config.vision_width, patches * config.text_width),
    }[case.stage]


def _compact(config: SPProjectorConfig, batch: int) -> list[Product]:
    """Of a compact extractor, whose parameters count once, however many products share them."""
    if config.extractor not in COMPACT:
        return []
    found = [Product(batch * p.rows, p.depth, p.width, propagates=not p.first) for p in compact_products(config)]
    shapes = COMPACT_EXTRACTORS[config.extractor].shapes(config)
    found[-1] = replace(found[-1], weights=sum(map(math.prod, shapes.values())))
    return found


def _spatial(config: SPProjectorConfig, batch: int) -> list[Product]:
    if config.extractor == "transformer":
        return [p for size in config.kernel_sizes for p in _transformer(config, batch, size * size)]
    depths = [height * width * config.vision_width for height, width in config.levels]
    return [_first(batch, depth, config.spatial_width) for depth in depths]


def _detail(config: SPProjectorConfig, batch: int) -> list[Product]:
    return [
        _first(batch * side * side, kernel * kernel * config.vision_width, config.spatial_width)
        for kernel, side in zip(config.detail_kernels, config.detail_sides, strict=True)
    ]


def _tail(config: SPProjectorConfig, batch: int) -> list[Product]:
    tokens, width = config.spatial_tokens, config.spatial_width
    products = []
    seen: set[int] = set()
    for detail, side in enumerate(config.detail_sides if config.attends else ()):
        outputs, value = side * side, config.detail_values[detail]
        products += [
            _linear(batch * tokens, width, width),  # Q
            _linear(batch * outputs, width, width),  # K
            _linear(batch * outputs, width, width, shared=value in seen),  # V, which several details may share
            Product(batch * tokens, width, outputs),  # Q K^T
            Product(batch * tokens, outputs, width),  # A V
        ]
        seen.add(value)
    return [*products, _linear(batch * tokens, config.fused_width, config.text_width, bias=config.spatial_bias)]


def _mlp(config: SPProjectorConfig, batch: int) -> list[Product]:
    rows, width = batch * config.patch_tokens, config.text_width
    return [_linear(rows, config.vision_width, width, propagates=False), _linear(rows, width, width)]


def _transformer(config: SPProjectorConfig, batch: int, source: int) -> list[Product]:
    """One encoder-decoder block over ``source`` tokens, with one learned query; torch's layers, without biases."""
    width, rows = config.vision_width, batch * source

    def linear(count: int, out: int, propagates: bool = True) -> Product:
        return _linear(count, width, out, bias=False, propagates=propagates)

    def attention(queries: int, keys: int) -> list[Product]:
        return [Product(batch * queries, width, keys), Product(batch * queries, keys, width)]

    products = []
    for _ in range(config.transformer_layers):
        products += [linear(rows, 3 * width), *attention(source, source)]
        products += [linear(rows, width), linear(rows, width), linear(rows, width)]
    for _ in range(config.transformer_layers):
        products += [linear(batch, 3 * width), *attention(1, 1), linear(batch, width)]
        products += [linear(batch, width), linear(rows, 2 * width), *attention(1, source), linear(batch, width)]
        products += [linear(batch, width), linear(batch, width)]
    return products


def _first(rows: int, depth: int, width: int) -> Product:
    """A convolution on the patch features."""
    return Product(rows, depth, width, weights=depth * width, propagates=False)


def _linear(
    rows: int, depth: int, width: int, *, bias: bool = True, propagates: bool = True, shared: bool = False
) -> Product:
    return Product(rows, depth, width, weights=0 if shared else depth * width + width * bias, propagates=propagates)


_PRODUCTS = {"spatial": _spatial, "detail": _detail, "tail": _tail, "mlp": _mlp}


def _vectors(config: SPProjectorConfig, stage: str) -> int:
    """Elements of the parameters that multiply no matrix: normalisation, learned queries."""
    if stage == "tail" and config.attends:  # weight and bias of each LayerNorm before Q, K and V
        return 2 * config.spatial_width * (2 * len(config.detail_kernels) + len(set(config.detail_values)))
    if stage == "spatial" and config.extractor == "transformer":  # two norms a layer, three in a decoder's; two finals
        return len(config.levels) * config.vision_width * (5 * config.transformer_layers + 2 + 1)
    return 0
