"""Time of one call, on the device's own clock.

CUDA: device events around each run, the L2 flushed before it; around replays of a captured graph where every
implementation of the case can be captured, so that launch gaps count for nobody. CPU: the wall clock, the last-level
cache flushed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

_LLC = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Run:
    """What is timed, and what is done before and after it without being timed."""

    timed: Callable[[], object]
    before: Callable[[], object] = _nothing
    after: Callable[[], object] = _nothing
    own_ms: Callable[[], float] | None = None  # what the last run measured of itself, where a part of it is meant
    parts_ms: Callable[[], dict[str, float]] | None = None  # and of its parts, by name

    def once(self) -> None:
        """One run without a clock."""
        self.before()
        self.timed()
        self.after()


@dataclass(frozen=True)
class Times:
    """Milliseconds of single runs, and the clock: "wall", "events" or "graph"; of their parts, where runs have any."""

    ms: list[float]
    timer: str
    parts: dict[str, list[float]] = field(default_factory=dict)

    def add(self, run: Run, elapsed: float) -> None:
        """What the last run took: by its own clock, where it has one."""
        self.ms.append(run.own_ms() if run.own_ms else elapsed)
        for name, ms in (run.parts_ms() if run.parts_ms else {}).items():
            self.parts.setdefault(name, []).append(ms)


class CpuTimer:
    """The wall clock around each run."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._flush: Tensor | None = None

    def release(self) -> None:
        """Nothing is held but the buffer that flushes the cache."""
        self._flush = None

    def capture(self, key: str, run: Run) -> bool:
        """A CPU has no graphs."""
        return False

    def time(self, key: str, run: Run, seconds: float, most: int, graph: bool = False) -> Times:
        """As many runs as begin within ``seconds``, at least one and at most ``most``."""
        if self._flush is None:
            size = _LLC.read_text().strip() if _LLC.is_file() else ""
            cache = int(size[:-1]) * 2**10 if size.endswith("K") else 32 * 2**20
            self._flush = torch.zeros(2 * cache, dtype=torch.uint8, device=self._device)
        found = Times([], "wall")
        end = time.perf_counter() + seconds
        while not found.ms or (len(found.ms) < most and time.perf_counter() < end):
            run.before()
            self._flush.add_(1)
            start = time.perf_counter()
            run.timed()
            found.add(run, (time.perf_counter() - start) * 1e3)
            run.after()
        return found


class CudaTimer:
    """Device events around each run, or around each replay of its graph."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._flush: Tensor | None = None
        self._captured: tuple[str, torch.cuda.CUDAGraph | None] = ("", None)

    def release(self) -> None:
        """Lets go of the last case's graph with its memory, and of the buffer that flushes the L2."""
        self._captured, self._flush = ("", None), None

    def capture(self, key: str, run: Run) -> bool:
        """Whether the case can be replayed as a graph, which is then kept until ``release``.

        A backward alone cannot: its graph would have to begin in the middle of autograd's.
        """
        self.release()
        if run.before is not _nothing:
            return False
        graph = self._capture(run)
        self._captured = (key, graph)
        return graph is not None

    def replay(self, key: str) -> Run:
        """The captured graph of a case. Raises RuntimeError where there is none."""
        kept, graph = self._captured
        if kept != key or graph is None:
            raise RuntimeError(f"{key} was not captured")
        return Run(graph.replay)

    def time(self, key: str, run: Run, seconds: float, most: int, graph: bool = False) -> Times:
        """As many runs as fit into ``seconds``, at least three and at most ``most``; with ``graph``, replays of it."""
        run = self.replay(key) if graph else run
        if self._flush is None:
            cache = torch.cuda.get_device_properties(self._device).L2_cache_size
            self._flush = torch.zeros(max(2 * cache, 2**26), dtype=torch.uint8, device=self._device)
        if run.own_ms is not None:
            return self._own(run, seconds, most)
        estimate = max(min(self._events(run, 3)), 1e-3)
        runs = min(most, max(3, int(seconds * 1e3 / estimate)))
        return Times(self._events(run, runs), "graph" if graph else "events")

    def _own(self, run: Run, seconds: float, most: int) -> Times:
        """Runs with a clock of their own, at least three."""
        found = Times([], "wall")
        end = time.perf_counter() + seconds
        while len(found.ms) < 3 or (len(found.ms) < most and time.perf_counter() < end):
            self._flush.add_(1)
            start = time.perf_counter()
            run.once()
            found.add(run, (time.perf_counter() - start) * 1e3)
        return found

    def _events(self, run: Run, runs: int) -> list[float]:
        pairs = []
        for _ in range(runs):
            run.before()
            self._flush.add_(1)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run.timed()
            end.record()
            run.after()
            pairs.append((start, end))
        torch.cuda.synchronize(self._device)
        return [start.elapsed_time(end) for start, end in pairs]

    def _capture(self, run: Run) -> torch.cuda.CUDAGraph | None:
        """The run as a graph whose replay gives what the run gives; None where something in it cannot be captured."""
        side = torch.cuda.Stream(self._device)
        side.wait_stream(torch.cuda.current_stream(self._device))
        try:
            with torch.cuda.stream(side):  # capture wants warm libraries, on the stream that it uses
                for _ in range(3):
                    expected = [z.detach().clone() for z in run.timed()]
                    run.after()
            torch.cuda.synchronize(self._device)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=side):
                outputs = [z.detach() for z in run.timed()]
            for z in outputs:
                z.fill_(math.nan)
            graph.replay()
            torch.cuda.synchronize(self._device)
            same = all(map(_alike, outputs, expected))
        except RuntimeError:
            torch.cuda.set_stream(torch.cuda.default_stream(self._device))  # a failed capture may leave its own behind
            torch.cuda.synchronize(self._device)
            return None
        finally:
            run.after()
        return graph if same else None


def _alike(found: Tensor, expected: Tensor) -> bool:
    """Half the digits of the dtype; NaN never is."""
    difference = (found.double() - expected.double()).norm() / expected.double().norm()
    return bool(difference <= math.sqrt(torch.finfo(found.dtype).eps))


TIMERS = {"cpu": CpuTimer, "cuda": CudaTimer}
