"""Time of one call, on the device's own clock.

CUDA: device events around each run, the L2 flushed before it; where a run takes less than a millisecond, a captured
graph is replayed, so that launch gaps do not count. CPU: the wall clock, the last-level cache flushed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

GRAPH_BELOW_MS = 1.0
_LLC = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Run:
    """What is timed, and what is done before and after it without being timed."""

    timed: Callable[[], object]
    before: Callable[[], object] = _nothing
    after: Callable[[], object] = _nothing

    def once(self) -> None:
        """One run without a clock."""
        self.before()
        self.timed()
        self.after()


@dataclass(frozen=True)
class Times:
    """Milliseconds of single runs, and the clock: "wall", "events" or "graph"."""

    ms: list[float]
    timer: str


class CpuTimer:
    """The wall clock around each run."""

    def __init__(self, device: torch.device) -> None:
        size = _LLC.read_text().strip() if _LLC.is_file() else ""
        cache = int(size[:-1]) * 2**10 if size.endswith("K") else 32 * 2**20
        self._flush = torch.zeros(2 * cache, dtype=torch.uint8, device=device)

    def release(self) -> None:
        """Nothing is kept between cases."""

    def time(self, key: str, run: Run, seconds: float, most: int) -> Times:
        """As many runs as begin within ``seconds``, at least one and at most ``most``."""
        found: list[float] = []
        end = time.perf_counter() + seconds
        while not found or (len(found) < most and time.perf_counter() < end):
            self._flush.add_(1)
            run.before()
            start = time.perf_counter()
            run.timed()
            found.append((time.perf_counter() - start) * 1e3)
            run.after()
        return Times(found, "wall")


class CudaTimer:
    """Device events around each run, or around each replay of its graph."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        self._flush = torch.zeros(max(2 * cache, 2**26), dtype=torch.uint8, device=device)
        self._captured: tuple[str, torch.cuda.CUDAGraph | None] = ("", None)

    def release(self) -> None:
        """Lets go of the last case's graph and of its memory."""
        self._captured = ("", None)

    def time(self, key: str, run: Run, seconds: float, most: int) -> Times:
        """As many runs as fit into ``seconds``, at least three and at most ``most``."""
        if self._captured[0] != key:
            self.release()
            run.once()
            self._captured = (key, None)
            if min(self._events(run, 3)) < GRAPH_BELOW_MS and run.before is _nothing:
                self._captured = (key, self._capture(run))
        graph = self._captured[1]
        timer, chosen = ("graph", Run(graph.replay)) if graph else ("events", run)
        estimate = min(self._events(chosen, 2))
        return Times(self._events(chosen, min(most, max(3, int(seconds * 1e3 / max(estimate, 1e-3))))), timer)

    def _events(self, run: Run, runs: int) -> list[float]:
        pairs = []
        for _ in range(runs):
            self._flush.add_(1)
            run.before()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run.timed()
            end.record()
            run.after()
            pairs.append((start, end))
        torch.cuda.synchronize(self._device)
        return [start.elapsed_time(end) for start, end in pairs]

    def _capture(self, run: Run) -> torch.cuda.CUDAGraph | None:
        """The run as a graph; None where something in it cannot be captured."""
        side = torch.cuda.Stream(self._device)
        side.wait_stream(torch.cuda.current_stream(self._device))
        try:
            with torch.cuda.stream(side):  # capture wants warm libraries, on the stream that it uses
                for _ in range(3):
                    run.once()
            torch.cuda.synchronize(self._device)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=side):
                run.timed()
        except RuntimeError:
            torch.cuda.synchronize(self._device)
            return None
        return graph


TIMERS = {"cpu": CpuTimer, "cuda": CudaTimer}
