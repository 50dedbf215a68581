"""What the other projectors multiply, as counts.py counts it: the matrix products of one forward on a batch.

Convolutions are products too: a depthwise one of k x k multiplies k * k columns with one output each.
"""

from __future__ import annotations

from sp_fast.bench.counts import Product
from sp_fast.bench.field_peers import (
    POOLED_SIDE,
    QFORMER_LAYERS,
    QFORMER_QUERIES,
    RESAMPLER_SIDE,
    STAGE_DEPTH,
    Shape,
)

POOLED = POOLED_SIDE**2
CELLS = 9  # of a depthwise convolution


def linear(shape: Shape, batch: int) -> list[Product]:
    """Of one layer on every patch."""
    return [_linear(batch * shape.patches, shape.vision, shape.text, propagates=False)]


def mlp(shape: Shape, batch: int, tokens: int | None = None, propagates: bool = False) -> list[Product]:
    """On every patch, or on ``tokens`` an image; it propagates where something before it is trained."""
    rows = batch * (tokens or shape.patches)
    return [
        _linear(rows, shape.vision, shape.text, propagates=propagates),
        _linear(rows, shape.text, shape.text),
    ]


def deco(shape: Shape, batch: int) -> list[Product]:
    """The MLP on pooled patches."""
    return mlp(shape, batch, POOLED)


def ldpv2(shape: Shape, batch: int) -> list[Product]:
    """The MLP on every patch; the pool; a depthwise convolution with a bias."""
    peg = Product(batch * POOLED, CELLS, shape.text, weights=(CELLS + 1) * shape.text)
    return [*mlp(shape, batch), peg]


def c_abstractor(shape: Shape, batch: int) -> list[Product]:
    """A block: 1x1 convolutions around a depthwise one, and its gate. Positions are trained before the first."""
    width, squeezed, products = shape.vision, round(shape.vision / 4), []
    for rows in [batch * shape.patches] * STAGE_DEPTH + [batch * POOLED] * STAGE_DEPTH:
        products += [
            _linear(rows, width, width, bias=False),
            Product(rows, CELLS, width, weights=CELLS * width),
            _linear(batch, width, squeezed),
            _linear(batch, squeezed, width),
            _linear(rows, width, width, bias=False),
        ]
    return [*products, *mlp(shape, batch, POOLED, propagates=True)]


def q_former(shape: Shape, batch: int) -> list[Product]:
    """Without an instruction; its words and layers stay unused."""
    width, rows, patches = shape.qformer, batch * QFORMER_QUERIES, batch * shape.patches
    products = []
    for layer in range(QFORMER_LAYERS):
        products += [_linear(rows, width, width) for _ in range(4)]
        products += _attention(rows, width, QFORMER_QUERIES)
        if layer % 2 == 0:
            products += [_linear(rows, width, width) for _ in range(2)]
            products += [_linear(patches, shape.vision, width, propagates=False) for _ in range(2)]
            products += _attention(rows, width, shape.patches)
        products += [_linear(rows, width, 4 * width), _linear(rows, 4 * width, width)]
    return [*products, _linear(rows, width, shape.text)]


def resampler(shape: Shape, batch: int) -> list[Product]:
    """Keys and values of every patch, queries of every image though they are the same, as Qwen-VL computes them."""
    width, rows, patches = shape.text, batch * RESAMPLER_SIDE**2, batch * shape.patches
    return [
        _linear(patches, shape.vision, width, bias=False, propagates=False),
        *(_linear(patches, width, width) for _ in range(2)),
        *(_linear(rows, width, width) for _ in range(2)),
        *_attention(rows, width, shape.patches),
        _linear(rows, width, width, bias=False),
    ]


def _attention(queries: int, width: int, keys: int) -> list[Product]:
    return [Product(queries, width, keys), Product(queries, keys, width)]


def _linear(rows: int, depth: int, width: int, *, bias: bool = True, propagates: bool = True) -> Product:
    return Product(rows, depth, width, weights=depth * width + width * bias, propagates=propagates)
