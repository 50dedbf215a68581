"""Launch choices: pure functions of chip, type and shape, and a table that is measured offline.

``launch_table.json`` holds one row a (chip, bytes of a type, batch bucket); `sp-fast bench tune` rewrites it. Nothing
is tuned while a model runs: an autotuner inside the capture of a CUDA graph would break it.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch

from sp_fast.kernels.device import Chip

TABLE = Path(__file__).with_name("launch_table.json")
BUCKETS = (1, 2, 4, 8, 16, 32, 64)  # images; beyond them the bucket is LARGE
LARGE = 0
DEFAULT_CHIP = 0  # the table's rows for chips that it does not name
SWAPPED_CHIPS = (90, 100)  # where the weights belong on the M side of a 16-bit product (wgmma, tcgen05)

# Numerics, fixed for a release: changing them changes the last bits of every spatial token.
# Cells whose products one partial sum holds, for windows of one output and of many, by the bytes of a type.
SPLIT_CELLS = {2: (4, 8), 4: (4, 8)}
# Beyond B = 64, where short sums would be a tenth of the traffic; of float32's products they are less.
LARGE_SPLIT_CELLS = {2: (32, 64), 4: (4, 8)}


@dataclass(frozen=True)
class WindowedTiles:
    """Tiles of the windowed matmul: rows for windows of one output and of many, columns of D, depth K.

    ``stages_*`` are tiles of the software pipeline, ``warps`` of 32 threads a program.
    """

    block_single: int
    block_many: int
    block_d: int
    block_k: int
    stages_single: int
    stages_many: int
    warps: int

    def shared_bytes(self, itemsize: int) -> int:
        """Shared memory of the pipeline's tiles; the larger kind, since one program runs one kind."""
        return max(
            stages * self.block_k * (self.block_d + rows) * itemsize
            for rows, stages in ((self.block_single, self.stages_single), (self.block_many, self.stages_many))
        )


@dataclass(frozen=True)
class QuantizedTiles(WindowedTiles):
    """Those on quantised weights: ``block_k`` counts stored bytes, each of ``channels`` channels."""

    channels: int

    def shared_bytes(self, itemsize: int) -> int:
        """As above, at most; ``itemsize`` is of the features, scales are float32."""
        return max(
            stages * (self.block_k * (self.block_d + rows * self.channels * itemsize) + 4 * self.block_d)
            for rows, stages in ((self.block_single, self.stages_single), (self.block_many, self.stages_many))
        )


Stream = TypeVar("Stream", bound=WindowedTiles)


def bucket_of(batch: int) -> int:
    """The batch bucket: the smallest that holds ``batch`` images, or LARGE."""
    return next((bound for bound in BUCKETS if batch <= bound), LARGE)


def split_cells(batch: int, dtype: torch.dtype) -> tuple[int, int]:
    """Cells a partial sum, for windows of one output and of many; one choice up to 64 images."""
    return (SPLIT_CELLS if batch <= BUCKETS[-1] else LARGE_SPLIT_CELLS)[dtype.itemsize]


def is_swapped(chip: Chip, dtype: torch.dtype) -> bool:
    """Whether weights go to the M side of a product. Elsewhere the pipeline's copies would fall apart."""
    return chip.capability in SWAPPED_CHIPS and dtype.itemsize == 2


@functools.cache
def launch_table(path: Path = TABLE) -> dict[tuple[int, int, int], WindowedTiles]:
    """``(chip, bytes of a type, bucket)`` to tiles."""
    rows = json.loads(path.read_text())
    return {(row.pop("chip"), row.pop("bytes"), row.pop("bucket")): WindowedTiles(**row) for row in rows}


def windowed_tiles(chip: Chip, dtype: torch.dtype, batch: int, width: int, depth: int) -> WindowedTiles:
    """The table's tiles, no larger than C = ``width`` and D = ``depth`` need, with stages that fit the chip.

    Raises:
        ValueError: two stages do not fit into the chip's shared memory.
    """
    table = launch_table()
    known = chip.capability if (chip.capability, dtype.itemsize, LARGE) in table else DEFAULT_CHIP
    tiles = table[known, dtype.itemsize, bucket_of(batch)]
    tiles = replace(
        tiles, block_d=min(tiles.block_d, power_of_two(depth)), block_k=min(tiles.block_k, power_of_two(width))
    )
    return _with_stages_that_fit(tiles, chip, dtype)


def _with_stages_that_fit(tiles: Stream, chip: Chip, dtype: torch.dtype) -> Stream:
    while tiles.shared_bytes(dtype.itemsize) > chip.shared_memory:
        if max(tiles.stages_single, tiles.stages_many) <= 2:
            raise ValueError(
                f"the windowed matmul needs {tiles.shared_bytes(dtype.itemsize)} bytes of shared memory a block, but "
                f"this GPU (compute capability {chip.capability / 10}) has {chip.shared_memory}: use backend='torch'"
            )
        tiles = replace(tiles, stages_single=max(2, tiles.stages_single - 1), stages_many=max(2, tiles.stages_many - 1))
    return tiles


def quantized_tiles(
    chip: Chip, dtype: torch.dtype, batch: int, depth: int, group: int, channels: int
) -> QuantizedTiles:
    """128 bytes of a row at a time, or the ``group`` of bytes that shares a scale.

    Two sums and the widened weights lie in registers, which bounds the rows. By the machine code; not measured.

    Raises:
        ValueError: two stages do not fit into the chip's shared memory.
    """
    half = dtype.itemsize == 2
    single = min(64, power_of_two(batch)) if half else min(32, power_of_two(batch, least=4))
    many, warps = (64, 8) if half and batch > 1 else (32, 4)
    # 64 KB in flight on sm_90; of float32, whose operands lie in registers too, others have room for half of it.
    block_k, stages = (128, (7 if channels > 1 else 5, 5)) if half else (32 if chip.capability == 90 else 16, (8, 7))
    block_k, block_d = min(block_k, power_of_two(group)), min(128, power_of_two(depth))
    tiles = QuantizedTiles(single, many, block_d, block_k, *stages, warps, channels)
    return _with_stages_that_fit(tiles, chip, dtype)


def power_of_two(n: int, least: int = 16) -> int:
    """The smallest power of two that holds ``n``, at least a matrix instruction's side."""
    return max(least, 1 << (n - 1).bit_length())


def reduce_tile(batch: int, depth: int) -> tuple[int, int]:
    """Images, and columns of D, that a program of the reduction adds."""
    return min(8, power_of_two(batch, least=1)), min(128, power_of_two(depth))


@dataclass(frozen=True)
class OuterTiles:
    """Tiles of the weight gradient: rows at a time for windows of one output and of many, columns of C and of D."""

    block_single: int
    block_many: int
    block_c: int
    block_d: int
    stages: int
    warps: int
    registers: int | None

    def shared_bytes(self, itemsize: int) -> int:
        """Shared memory of the pipeline's tiles, the larger kind."""
        return self.stages * max(self.block_single, self.block_many) * (self.block_c + self.block_d) * itemsize


def outer_tiles(chip: Chip, dtype: torch.dtype, batch: int, width: int, depth: int) -> OuterTiles:
    """On the largest chips two blocks a multiprocessor or more, each of 32 KiB of results: twice what memory takes at
    4.3 TB/s and 1 us. The others have half that bandwidth or less, and half the tile."""
    half, large = dtype.itemsize == 2, chip.shared_memory > 200 * 1024
    single = min(32 if half else 16, power_of_two(batch))
    many = (64 if large else 32) if half else 16
    side, warps = (128, 8) if half and large else (64, 4)
    if half:
        registers = 128 if large else 168
    else:
        registers = 168 if batch > 1 else None  # the rows of one image are few, and their loop is unrolled
    return OuterTiles(single, many, min(side, power_of_two(width)), min(128, power_of_two(depth)), 2, warps, registers)


@dataclass(frozen=True)
class ProductTiles:
    """Tiles of a small product: rows, columns, depth; ``warps`` of 32 threads a program."""

    block_m: int
    block_n: int
    block_k: int
    stages: int
    warps: int

    @property
    def constants(self) -> dict[str, int]:
        """As kernels name them."""
        return {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "BLOCK_K": self.block_k, "STAGES": self.stages}


def product_tiles(chip: Chip, dtype: torch.dtype, batch: int, width: int) -> ProductTiles:
    """Tiles of the tail's products; one choice up to 64 images, since tiles shape the sums of a LayerNorm."""
    half = dtype.itemsize == 2
    if batch <= BUCKETS[-1]:  # narrow, so that at one image every multiprocessor reads a part of the weight
        return ProductTiles(16, 32, min(128 if half else 32, power_of_two(width)), 4 if half else 3, 4)
    large = half and chip.capability in SWAPPED_CHIPS
    return ProductTiles(64, 128 if large else 64, min(64 if half else 32, power_of_two(width)), 3, 8)


@dataclass(frozen=True)
class AttendTiles:
    """Tiles of the detail attention: spatial tokens, keys, depth of the logits, columns of D."""

    block_t: int
    block_o: int
    block_k: int
    block_d: int
    stages: int

    def shared_bytes(self, itemsize: int) -> int:
        """Shared memory of the logits' pipeline and of the values."""
        pipeline = self.stages * self.block_k * (self.block_t + self.block_o)
        return itemsize * (pipeline + self.block_o * (self.block_d + self.block_t))

    @property
    def constants(self) -> dict[str, int]:
        """As the kernel names them."""
        return {
            "BLOCK_T": self.block_t, "BLOCK_O": self.block_o, "BLOCK_K": self.block_k, "BLOCK_D": self.block_d,
            "STAGES": self.stages,
        }  # fmt: skip


def attend_tiles(chip: Chip, dtype: torch.dtype, spatial: int, outputs: int, width: int) -> AttendTiles:
    """All tokens and keys of an image in one program, as deep as the chip's shared memory allows.

    Raises:
        ValueError: a detail map that is too large for the chip.
    """
    side = min(64, power_of_two(width))
    tiles = AttendTiles(power_of_two(spatial), power_of_two(outputs), side, side, 3 if outputs <= 64 else 2)
    while tiles.shared_bytes(dtype.itemsize) > chip.shared_memory:
        if tiles.block_k <= 16:
            raise ValueError(
                f"attention over {outputs} outputs of a detail map needs {tiles.shared_bytes(dtype.itemsize)} bytes of "
                f"shared memory a block, but this GPU (compute capability {chip.capability / 10}) has "
                f"{chip.shared_memory}: use backend='torch'"
            )
        tiles = replace(tiles, block_k=tiles.block_k // 2, block_d=tiles.block_d // 2, stages=2)
    return tiles
