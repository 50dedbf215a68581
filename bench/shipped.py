"""Every launch that ships: all that a forward pass at the published widths launches, on each chip of the launch tables.

Launchers are called on "meta" tensors under a pretended chip, so that no GPU is needed. Launches that compile to the
same code are one configuration.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sp_fast import SPProjectorConfig, compact_geometry, geometry
from sp_fast.bench.cases import DTYPES
from sp_fast.bench.plan import check_names
from sp_fast.compact_config import COMPACT
from sp_fast.config import NAN_PLACES
from sp_fast.errors import BackendError
from sp_fast.kernels.device import CHIPS, Chip, has_triton, interpreting, pretend
from sp_fast.kernels.launch import Launch, Recorded, recording
from sp_fast.kernels.tiles import bucket_of
from sp_fast.kernels.window import Window
from sp_fast.kernels.windowed_matmul import disjoint_layers

VARIANTS = ("crop-dfi", "pool-dfi")
BATCHES = range(1, 257)  # every way to compile occurs: for 1 image, for multiples of 16, for what fits one tile
#: Compact projectors: the short names, and kinds that launch what those do not.
COMPACT_VARIANTS: dict[str, dict[str, Any]] = {
    "compact-5m": {},
    "compact-50m": {},
    "depthwise": {},
    "grouped": {"groups": 8},
    "separable": {"rank": 64},
    "nested": {"rank": 64},
}
COMPACT_BATCHES = (1, 16, 256)

#: Rows of an image and their width, cells of each packed weight, width of the outputs, windows.
Multiplied = tuple[tuple[int, int], list[int], int, list[Window]]

_TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}


@dataclass(frozen=True)
class Source:
    """All that the compilation of a launch depends on; equal ones compile to the same. Picklable."""

    module: str
    function: str
    chip: Chip
    dtype: str  # of the features
    warps: int
    registers: int | None
    signature: tuple[tuple[str, str], ...]  # every argument's type in triton's words
    constants: tuple[tuple[str, Any], ...]  # compile-time arguments, and integers that are 1
    aligned: tuple[int, ...]  # arguments that are multiples of 16, by position

    @property
    def kernel(self) -> str:
        return self.function.removeprefix("_").removesuffix("_kernel")


@dataclass(frozen=True)
class Configuration:
    """A source, and who launches it."""

    source: Source
    variants: tuple[str, ...]
    buckets: tuple[int, ...]  # the launch table's
    batch: int  # the smallest


def configurations(
    chips: Sequence[str] = (),
    dtypes: Sequence[str] = (),
    variants: Sequence[str] = (*VARIANTS, *COMPACT_VARIANTS),
    batches: Sequence[int] = (),
) -> list[Configuration]:
    """At the published widths; of all chips ("90" is sm_90) and dtypes unless some are named, and of BATCHES, or of
    COMPACT_BATCHES where the projector is compact.

    Raises:
        ConfigError: a chip or dtype that is not known.
        BackendError: triton is not installed, or is to interpret.
    """
    check_names("chip", chips, tuple(map(str, CHIPS)))
    check_names("dtype", dtypes, tuple(DTYPES))
    if not has_triton():
        raise BackendError("triton is not installed, and nothing can be compiled: pip install triton")
    if interpreting():
        raise BackendError("TRITON_INTERPRET=1 interprets kernels, and compiles none: unset it")
    users: dict[Source, list[tuple[str, int]]] = {}
    for chip, dtype in itertools.product(map(int, chips or CHIPS), dtypes or DTYPES):
        for variant in variants:
            config = _published(variant)
            usual = COMPACT_BATCHES if config.extractor in COMPACT else BATCHES
            for batch in batches or usual:
                for launch, arguments in _launches(config, CHIPS[chip], DTYPES[dtype], batch):
                    users.setdefault(_source(launch, arguments, CHIPS[chip], dtype), []).append((variant, batch))
    return sorted((_configuration(source, found) for source, found in users.items()), key=_order)


def _published(variant: str) -> SPProjectorConfig:
    if variant in COMPACT:  # a kind
        return SPProjectorConfig(extractor=variant, **COMPACT_VARIANTS[variant])
    return SPProjectorConfig.variant(variant)


def _configuration(source: Source, users: list[tuple[str, int]]) -> Configuration:
    variants, batches = zip(*users, strict=True)
    buckets = dict.fromkeys(map(bucket_of, sorted(batches)))
    return Configuration(source, tuple(dict.fromkeys(variants)), tuple(buckets), min(batches))


def _order(configuration: Configuration) -> tuple[Any, ...]:
    source = configuration.source
    return source.chip.capability, source.dtype, source.kernel, configuration.variants, configuration.batch


def _launches(config: SPProjectorConfig, chip: Chip, dtype: torch.dtype, batch: int) -> Recorded:
    """Those of a forward and a backward pass, every gradient asked for."""
    from sp_fast.kernels.gelu_rows_triton import gelu_rows_triton
    from sp_fast.kernels.pooled_rows_triton import pooled_rows_backward_triton, pooled_rows_triton
    from sp_fast.kernels.spatial_tail import SpatialTail
    from sp_fast.kernels.spatial_tail_backward_triton import spatial_tail_backward_triton
    from sp_fast.kernels.spatial_tail_triton import spatial_tail_triton
    from sp_fast.kernels.windowed_matmul_drows_triton import windowed_matmul_drows_triton
    from sp_fast.kernels.windowed_matmul_dweight_triton import windowed_matmul_dweight_triton
    from sp_fast.kernels.windowed_matmul_triton import windowed_matmul_triton

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    width, depth, spatial = config.vision_width, config.spatial_width, config.spatial_tokens
    details = [side * side for side in config.detail_sides] if config.attends else []
    projections = (empty(depth), empty(depth), empty(depth, depth), empty(depth)) * 3 * len(details)
    bias = empty(config.text_width) if config.spatial_bias else None
    concat, finite = config.detail_fusion == "concat", [place in config.nan_to_num for place in NAN_PLACES]
    with pretend(chip), recording() as launches:
        levels = geometry.pooled_levels(config)
        square = (config.grid, geometry.map_origin(config), config.map_size, levels)
        if levels:
            pooled_rows_triton(empty(batch, config.patch_tokens, width), *square)
            pooled_rows_backward_triton(empty(batch, compact_geometry.row_count(config), width), *square)
        gelu_rows_triton(empty(batch, config.patch_tokens, config.text_width), spatial)
        for shape, cells, outer, windows in _windowed(config):
            rows, weights = empty(batch, *shape), [empty(count, shape[1], outer) for count in cells]
            z = windowed_matmul_triton(rows, weights, windows)
            wide = [torch.empty_like(weight, dtype=torch.float32) for weight in weights]
            layers = disjoint_layers(windows)
            for buffers, add in itertools.product((weights, wide), (False, True)):
                for layer in layers[: 1 + add]:  # windows that share cells are added one after another, all alike
                    part = [w for w, _ in layer]
                    grad = empty(batch, sum(w.outputs for w in part), outer)
                    windowed_matmul_dweight_triton(grad, rows, buffers, part, add)
            windowed_matmul_drows_triton(z, rows, weights, windows)
        z = empty(batch, spatial + sum(details), depth)
        tail = SpatialTail.empty(z, details, config.fused_width)
        tokens = empty(batch, spatial + config.patch_tokens, config.text_width)
        output = empty(config.text_width, config.fused_width)
        spatial_tail_triton(tokens, tail, z, details, projections, output, bias, concat, finite, 1e-5)
        for dattention in (None, tail.attention):  # with a loss on the attention, too
            spatial_tail_backward_triton(
                tail.activated, dattention, tail, z, details, projections, [True] * len(projections), concat, finite
            )
    return launches


def _windowed(config: SPProjectorConfig) -> list[Multiplied]:
    """The windowed products of an extractor."""
    width, depth, narrow = config.vision_width, config.spatial_width, config.rank
    rows, windows = compact_geometry.row_count(config), compact_geometry.full_windows(config)

    def met(found: list[Window], inner: int, outer: int, count: int | None = None) -> Multiplied:
        """Cells and rows are those that the windows reach, but for rows that are the map's."""
        last = [max((w.cell + w.cells for w in found if w.weight == i), default=0) for i in range(2)]
        return (count or 1 + max(w.last_source for w in found), inner), [n for n in last if n], outer, found

    def passes() -> list[Multiplied]:
        across, down = compact_geometry.separable_windows(config)
        return [met(across, width, narrow, rows), met(down, narrow, depth)]

    groups = config.groups or 1
    return {
        "bottleneck": lambda: [met(windows, narrow, depth, rows)],
        "depthwise": lambda: [met(compact_geometry.pointwise_windows(config), width, depth)],
        "grouped": lambda: [
            met(compact_geometry.grouped_windows(config), width // groups, depth // groups, rows * groups)
        ],
        "separable": passes,
        "nested": lambda: [met(compact_geometry.nested_windows(config)[0], narrow or width, depth, rows)],
        "resampled": lambda: [met(compact_geometry.resampled_windows(config), narrow or width, depth)],
    }.get(config.extractor, lambda: [met(windows, width, depth, rows)])()


def _source(launch: Launch, arguments: Sequence[Tensor | float], chip: Chip, dtype: str) -> Source:
    """As triton's JIT specialises: an integer 1 becomes a constant, and a multiple of 16 is known to be one."""
    types, constants, aligned = {}, dict(launch.constants), []
    names = launch.kernel.arg_names
    for position, (name, value) in enumerate(zip(names, arguments, strict=False)):
        if isinstance(value, Tensor):
            types[name] = _TYPES[value.dtype]
        elif isinstance(value, float):
            types[name] = "fp32"
        elif value == 1:
            constants[name] = value
        else:
            types[name] = "i32" if abs(value) < 2**31 else "i64"
        if isinstance(value, Tensor) or (name in types and isinstance(value, int) and value % 16 == 0):
            aligned.append(position)
    return Source(
        launch.kernel.__module__, launch.kernel.__name__, chip, dtype, launch.warps, launch.registers,
        tuple((name, types.get(name, "constexpr")) for name in names), tuple(constants.items()), tuple(aligned),
    )  # fmt: skip
