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

from sp_fast import SPProjectorConfig, geometry
from sp_fast.bench.cases import DTYPES
from sp_fast.bench.plan import check_names
from sp_fast.config import NAN_PLACES
from sp_fast.errors import BackendError
from sp_fast.kernels.device import CHIPS, Chip, has_triton, interpreting, pretend
from sp_fast.kernels.launch import Launch, Recorded, recording
from sp_fast.kernels.quantized import SCHEMES
from sp_fast.kernels.tiles import bucket_of

VARIANTS = ("crop-dfi", "pool-dfi")
BATCHES = range(1, 257)  # every way to compile occurs: for 1 image, for multiples of 16, for what fits one tile
# Of them, all ways in which launches on quantised weights compile: fewer than of all others together.
QUANTIZED_BATCHES = (1, 2, 3, 5, 9, 16, 17, 32, 33, 64, 65, 80)

_TYPES = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int8: "*i8", torch.uint8: "*u8",
}  # fmt: skip


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
    variants: Sequence[str] = VARIANTS,
    batches: Sequence[int] = BATCHES,
) -> list[Configuration]:
    """At the published widths; of all chips ("90" is sm_90) and dtypes unless some are named.

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
        for variant, batch in itertools.product(variants, batches):
            for launch, arguments in _launches(SPProjectorConfig.variant(variant), CHIPS[chip], DTYPES[dtype], batch):
                users.setdefault(_source(launch, arguments, CHIPS[chip], dtype), []).append((variant, batch))
    return sorted((_configuration(source, found) for source, found in users.items()), key=_order)


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
    from sp_fast.kernels.windowed_matmul_quantized_triton import windowed_matmul_quantized_triton
    from sp_fast.kernels.windowed_matmul_triton import windowed_matmul_triton

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    width, depth, spatial = config.vision_width, config.spatial_width, config.spatial_tokens
    cells = (geometry.spatial_cells(config), geometry.detail_cells(config))
    weights = [empty(count, width, depth) for count in cells if count]
    details = [side * side for side in config.detail_sides] if config.attends else []
    windows = [*geometry.spatial_windows(config), *geometry.detail_windows(config)]
    projections = (empty(depth), empty(depth), empty(depth, depth), empty(depth)) * 3 * len(details)
    bias = empty(config.text_width) if config.spatial_bias else None
    concat, finite = config.detail_fusion == "concat", [place in config.nan_to_num for place in NAN_PLACES]
    with pretend(chip), recording() as launches:
        rows = empty(batch, config.patch_tokens, width)
        levels = geometry.pooled_levels(config)
        square = (config.grid, geometry.map_origin(config), config.map_size, levels)
        if levels:
            rows = pooled_rows_triton(rows, *square)
        gelu_rows_triton(empty(batch, config.patch_tokens, config.text_width), spatial)
        z = windowed_matmul_triton(rows, weights, windows)
        for scheme in SCHEMES.values() if batch in QUANTIZED_BATCHES else ():
            shapes = [scheme.shapes(len(weight), width, depth) for weight in weights]
            values = [torch.empty(shape, dtype=scheme.dtype, device="meta") for shape, _ in shapes]
            scales = [torch.empty(shape, dtype=torch.float32, device="meta") for _, shape in shapes]
            windowed_matmul_quantized_triton(rows, values, scales, windows)
        tail = SpatialTail.empty(z, details, config.fused_width)
        tokens = empty(batch, spatial + config.patch_tokens, config.text_width)
        output = empty(config.text_width, config.fused_width)
        spatial_tail_triton(tokens, tail, z, details, projections, output, bias, concat, finite, 1e-5)
        for dattention in (None, tail.attention):  # with a loss on the attention, too
            spatial_tail_backward_triton(
                tail.activated, dattention, tail, z, details, projections, [True] * len(projections), concat, finite
            )
        wide = [torch.empty_like(weight, dtype=torch.float32) for weight in weights]
        for buffers, add in itertools.product((weights, wide), (False, True)):
            windowed_matmul_dweight_triton(z, rows, buffers, windows, add)
        drows = windowed_matmul_drows_triton(z, rows, weights, windows)
        if levels:
            pooled_rows_backward_triton(drows, *square)
    return launches


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
