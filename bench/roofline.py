"""The machine's limits, measured in the same run as what is held against them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sp_fast.bench.cases import DTYPES
from sp_fast.bench.counts import Count
from sp_fast.bench.memory import MIB, available_mib
from sp_fast.bench.timing import TIMERS, Run

RUNS, SECONDS = 20, 1.0
STREAM_BYTES = {"cpu": 2**30, "cuda": 2**32}
PRODUCT_SIDE = {"cpu": 2048, "cuda": 8192}
BestMs = Callable[[str, Callable[[], object]], float]  # of a name and a function


@dataclass(frozen=True)
class Peaks:
    """Best of many runs. GB/s of a stream that is only read, and of a copy (read and written bytes); TFLOP/s of a
    square matrix product a dtype, on random data."""

    read_gbps: float
    copy_gbps: float
    tflops: dict[str, float] = field(default_factory=dict)

    @property
    def gbps(self) -> float:
        """The bandwidth of the roof: the better of the two streams."""
        return max(self.read_gbps, self.copy_gbps)

    def roof_ms(self, count: Count, dtype: str) -> float:
        """The least time for these bytes and operations: whichever takes longer, with perfect overlap."""
        return max(count.bytes / (self.gbps * 1e6), count.flop / (self.tflops[dtype] * 1e9))

    def bound(self, count: Count, dtype: str) -> str:
        """What sets the roof: "memory" or "compute"."""
        bytes_ms = count.bytes / (self.gbps * 1e6)
        return "memory" if bytes_ms >= count.flop / (self.tflops[dtype] * 1e9) else "compute"


def measure_peaks(device: torch.device, dtypes: Iterable[str], shrink: int = 1) -> Peaks:
    """Measured on buffers far larger than any cache; ``shrink`` divides the sizes for a rehearsal."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    timer = TIMERS[device.type](device)

    def best_ms(name: str, function: Callable[[], object]) -> float:
        function()
        return min(timer.time(name, Run(function), SECONDS, RUNS).ms)

    with torch.no_grad():
        size = min(STREAM_BYTES[device.type] // shrink, int(available_mib(device) * MIB) // 4 // 2**14 * 2**14)
        read, copy = _stream_ms(torch.randn(size // 4, device=device), best_ms)
        side = PRODUCT_SIDE[device.type] // math.isqrt(shrink)
        tflops = {dtype: _product_tflops(dtype, device, side, best_ms) for dtype in dtypes}
    return Peaks(size / read / 1e6, 2 * size / copy / 1e6, tflops)


def _stream_ms(stream: Tensor, best_ms: BestMs) -> tuple[float, float]:
    """To read everything once, the fastest of several ways (which it is differs by device); and to copy it."""
    rows, ones = stream.view(-1, 4096), torch.ones(4096, device=stream.device)
    reads = {"sum": rows.sum, "sum a row": lambda: rows.sum(1), "matrix-vector": lambda: rows @ ones}
    target = torch.empty_like(stream)
    copy = best_ms("copy", lambda: target.copy_(stream))
    return min(best_ms(name, function) for name, function in reads.items()), copy


def _product_tflops(dtype: str, device: torch.device, side: int, best_ms: BestMs) -> float:
    a, b = (torch.randn(side, side, device=device).to(DTYPES[dtype]) for _ in range(2))
    return 2 * side**3 / best_ms(dtype, lambda: a @ b) / 1e9
