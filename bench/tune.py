"""Launch tables, measured offline: the windowed matmul's tiles for this GPU, one batch bucket at a time.

Coordinate descent from the table's present choice: one field at a time, the fastest value is kept. Tiles are schedule,
not numerics, so a candidate's result must be the present choice's bit for bit.
"""

from __future__ import annotations

import functools
import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from sp_fast import SPProjectorConfig, geometry
from sp_fast.bench.cases import DTYPES
from sp_fast.bench.timing import CudaTimer, Run
from sp_fast.kernels.device import Chip, chip_of
from sp_fast.kernels.tiles import TABLE, WindowedTiles, bucket_of, launch_table, windowed_tiles

VALUES = {
    "block_d": (64, 128, 256, 512),
    "block_k": (32, 64, 128),
    "stages_single": (2, 3, 4, 5, 6, 8),
    "stages_many": (2, 3, 4, 5, 6, 8),
    "block_many": (32, 64, 128, 256),
    "warps": (4, 8),
}
ACCUMULATORS = 128  # float32 a thread, beyond which registers spill
PASSES = 2
GAIN = 0.01  # below which a difference is noise
SECONDS, RUNS = 0.05, 60  # of one candidate
Measure = Callable[[WindowedTiles], float | str]


@dataclass(frozen=True)
class Trial:
    """One candidate: median milliseconds, or why it has none."""

    tiles: WindowedTiles
    ms: float | None
    reason: str = ""


def neighbours(tiles: WindowedTiles, field: str, chip: Chip, itemsize: int, depth: int) -> Iterator[WindowedTiles]:
    """The other values of one field that the chip can hold."""
    for value in VALUES[field]:
        found = replace(tiles, **{field: value})
        rows = max(found.block_single, found.block_many)
        fits = found.shared_bytes(itemsize) <= chip.shared_memory and found.block_d <= depth
        if found != tiles and fits and found.block_d * rows <= ACCUMULATORS * 32 * found.warps:
            yield found


def descend(
    start: WindowedTiles, chip: Chip, itemsize: int, depth: int, measure: Measure
) -> tuple[WindowedTiles, list[Trial]]:
    """The fastest tiles found, and all trials. ``measure`` gives milliseconds, or a reason why there are none."""
    trials: dict[WindowedTiles, Trial] = {}

    def tried(tiles: WindowedTiles) -> Trial:
        if tiles not in trials:
            found = measure(tiles)
            trials[tiles] = Trial(tiles, None, found) if isinstance(found, str) else Trial(tiles, found)
        return trials[tiles]

    best = tried(start)
    if best.ms is None:
        return start, [best]
    for _ in range(PASSES):
        before = best
        for field in VALUES:
            for tiles in neighbours(best.tiles, field, chip, itemsize, depth):
                trial = tried(tiles)
                if trial.ms is not None and trial.ms < (1 - GAIN) * best.ms:
                    best = trial
        if best == before:
            break
    return best.tiles, list(trials.values())


def gpu_measure(device: torch.device, dtype: torch.dtype, batch: int) -> tuple[WindowedTiles, Measure]:
    """The table's present tiles at the published widths (crop-dfi), and how a candidate is timed on this GPU."""
    from sp_fast.kernels.windowed_matmul_triton import windowed_matmul_triton

    config = SPProjectorConfig()
    windows = geometry.spatial_windows(config) + geometry.detail_windows(config)
    make = functools.partial(torch.randn, device=device, dtype=dtype)
    rows = make(batch, config.patch_tokens, config.vision_width)
    cells = (geometry.spatial_cells(config), geometry.detail_cells(config))
    weights = [make(n, config.vision_width, config.spatial_width).mul_(0.01) for n in cells]
    start = windowed_tiles(chip_of(device), dtype, batch, config.vision_width, config.spatial_width)
    expected = windowed_matmul_triton(rows, weights, windows, start)
    timer = CudaTimer(device)

    def measure(tiles: WindowedTiles) -> float | str:
        run = Run(lambda: (windowed_matmul_triton(rows, weights, windows, tiles),))
        try:
            if not torch.equal(run.timed()[0], expected):
                return "other bits than the present choice"
        except Exception as error:  # noqa: BLE001 (whatever Triton raises for tiles that it cannot build)
            return f"{type(error).__name__}: {str(error).splitlines()[0]}"
        graph = timer.capture(str(tiles), run)
        return statistics.median(timer.time(str(tiles), run, SECONDS, RUNS, graph=graph).ms)

    return start, measure


@dataclass(frozen=True)
class Tuned:
    """What a bucket came out as."""

    batch: int
    before: Trial
    after: Trial
    trials: list[Trial]

    @property
    def line(self) -> str:
        """For people."""
        if self.before.ms is None or self.after.ms is None:
            return f"B={self.batch}: {self.before.reason}"
        changed = "kept" if self.after == self.before else str(self.after.tiles)
        return f"B={self.batch}: {self.before.ms:.3f} -> {self.after.ms:.3f} ms of {len(self.trials)} trials, {changed}"


def tune_bucket(device: torch.device, dtype: str, batch: int, table: Path | None) -> Tuned:
    """Tunes one bucket on a GPU from the package's tiles, and puts the result into the table, if there is one."""
    torch_dtype, chip = DTYPES[dtype], chip_of(device)
    with torch.cuda.device(device):  # events are recorded on the current one
        start, measure = gpu_measure(device, torch_dtype, batch)
        best, trials = descend(start, chip, torch_dtype.itemsize, SPProjectorConfig().spatial_width, measure)
    by_tiles = {trial.tiles: trial for trial in trials}
    if table is not None and best != start:
        write_row(chip, torch_dtype.itemsize, batch, best, table)
    return Tuned(batch, by_tiles[start], by_tiles[best], trials)


def write_row(chip: Chip, itemsize: int, batch: int, tiles: WindowedTiles, path: Path = TABLE) -> None:
    """Puts tiles into the table, atomically; a chip without rows takes the default chip's for the other buckets."""
    table = {key: asdict(value) for key, value in launch_table(path).items()}
    if not any(known == chip.capability for known, _, _ in table):
        table |= {(chip.capability, *rest): value for (known, *rest), value in table.items() if known == 0}
    table[chip.capability, itemsize, bucket_of(batch)] = asdict(tiles)
    order = sorted(table, key=lambda key: (*key[:2], key[2] or 2**31))
    lines = [json.dumps(dict(zip(("chip", "bytes", "bucket"), key, strict=True)) | table[key]) for key in order]
    aside = path.with_suffix(".new")
    aside.write_text("[\n" + ",\n".join(f"  {line}" for line in lines) + "\n]\n")
    aside.replace(path)
    launch_table.cache_clear()
