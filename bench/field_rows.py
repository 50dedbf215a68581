"""What the field holds of a projector, of others or LLaVA-SP: how it is built and counted, what is printed of it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from sp_fast import SPProjector, SPProjectorConfig
from sp_fast.bench.cases import DTYPES, Case
from sp_fast.bench.counts import Count, Product, count, total
from sp_fast.bench.field_peers import Shape
from sp_fast.bench.implementations import OURS
from sp_fast.checkpoint import official_shapes
from sp_fast.errors import ConfigError
from sp_fast.quantize import quantize
from sp_fast.variants import VARIANTS


@dataclass(frozen=True)
class FieldCase(Case):
    """A projector, by its name in ``variant``. ``config`` holds the widths that all of them share."""

    shrink: int = 1

    @property
    def shape(self) -> Shape:
        return Shape(self.config.grid, self.config.vision_width, self.config.text_width, self.shrink)


@dataclass(frozen=True)
class Published:
    """A parameter count as it is printed: ``count`` to the next ``unit``, of a projector between these widths."""

    count: float
    unit: float
    source: str
    vision: int
    text: int
    part: str = ""  # of the module; "" is all of it


@dataclass(frozen=True)
class Peer:
    """A projector of others."""

    label: str
    make: Callable[[Shape], nn.Module]
    products: Callable[[Shape, int], list[Product]]
    source: str  # of its shapes
    tokens: int | None = None  # None: as many as patches
    runs: Callable[[Shape], nn.Module] | None = None  # what of it takes part, where that is not all
    published: tuple[Published, ...] = ()
    remark: str = "no count is printed there"

    def config(self, overrides: dict[str, Any]) -> SPProjectorConfig:
        return SPProjectorConfig.variant("mlp", **overrides)

    def image_tokens(self, case: FieldCase) -> int:
        return self.tokens or case.shape.patches

    def parameters(self, case: FieldCase) -> int:
        return elements(self.make, case.shape)

    def weight_bytes(self, case: FieldCase) -> int:
        """What is held, fixed positions included."""
        return (self.parameters(case) + fixed(self.make, case.shape)) * DTYPES[case.dtype].itemsize

    def count(self, case: FieldCase) -> Count:
        shape, runs = case.shape, self.runs or self.make
        products = self.products(shape, case.batch)
        vectors = elements(runs, shape) - sum(p.weights for p in products)
        read = case.batch * shape.patches * shape.vision + fixed(runs, shape)
        return total(case, products, vectors, read, case.batch * self.image_tokens(case) * shape.text)


@dataclass(frozen=True)
class Spatial:
    """LLaVA-SP: a variant, or the variant with further settings of its configuration, in one implementation.

    ``quantization`` is of the packed weights, whose configuration stays what it was before: weights are quantised when
    they are loaded, and judged beside what they then hold.
    """

    label: str
    variant: str
    implementation: str = OURS
    settings: dict[str, Any] = field(default_factory=dict)
    quantization: str | None = None
    source: str = "the official code's own tensors (sp_fast/variants.py)"
    published: tuple[Published, ...] = ()
    remark: str = (
        "LLaVA-SP (arXiv:2507.00505) prints 1536 MiB for its projector, which is no variant of its code: in 16 bits "
        "this one has 1762 MiB, and 1500 without the DFI"
    )

    def config(self, overrides: dict[str, Any]) -> SPProjectorConfig:
        """With other widths; spatial features that the variant itself narrows are no wider for it."""
        given = {**self.settings, **overrides}
        if (own := VARIANTS[self.variant].get("spatial_width")) and "spatial_width" in given:
            given["spatial_width"] = min(own, given["spatial_width"])
        try:
            return SPProjectorConfig.variant(self.variant, **given)
        except ConfigError as error:
            raise ConfigError(f"{self.label}: {error}, or name other projectors") from error

    def image_tokens(self, case: FieldCase) -> int:
        return case.config.spatial_tokens + case.config.patch_tokens

    def parameters(self, case: FieldCase) -> int:
        return sum(map(math.prod, official_shapes(case.config).values()))

    def weight_bytes(self, case: FieldCase) -> int:
        """As the projector keeps them."""
        return held_bytes(case, self.quantization)

    def count(self, case: FieldCase) -> Count:
        found = count(case)
        return replace(found, bytes=found.bytes + held_bytes(case, self.quantization) - held_bytes(case, None))


@functools.lru_cache(maxsize=64)
def held_bytes(case: FieldCase, quantization: str | None) -> int:
    """Of a LLaVA-SP's weights."""
    projector = SPProjector(case.config, device="meta", dtype=DTYPES[case.dtype])
    held = quantize(projector, quantization) if quantization else projector
    return sum(tensor.numel() * tensor.element_size() for tensor in held.state_dict().values())


@functools.lru_cache(maxsize=64)
def on_meta(make: Callable[[Shape], nn.Module], shape: Shape) -> nn.Module:
    """A projector without memory, to be counted."""
    with torch.device("meta"):
        return make(shape)


def elements(make: Callable[[Shape], nn.Module], shape: Shape, part: str = "") -> int:
    """Of its parameters."""
    return sum(p.numel() for p in on_meta(make, shape).get_submodule(part).parameters())


def fixed(make: Callable[[Shape], nn.Module], shape: Shape) -> int:
    """Of what is laid down and not trained: positions."""
    return sum(b.numel() for b in on_meta(make, shape).buffers() if b.is_floating_point())
