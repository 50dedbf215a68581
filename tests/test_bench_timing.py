"""The clocks: what they add to what they measure, what is timed and what is not, and CUDA's on a stand-in."""

import gc
import statistics
import sys
import time
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from sp_fast.bench import memory, roofline, timing
from sp_fast.bench.energy import Energy, Meter
from sp_fast.bench.memory import MIB, measure_memory, saved_bytes
from sp_fast.bench.timing import CpuTimer, CudaTimer, Run

CPU = torch.device("cpu")


def busy(milliseconds):
    def function():
        end = time.perf_counter() + milliseconds / 1e3
        while time.perf_counter() < end:
            pass

    return function


def test_the_harness_adds_less_than_two_percent():
    """A function of 5 ms that looks at the clock itself, first and last."""
    own = []

    def function():
        start = time.perf_counter()
        busy(5.0)()
        own.append((time.perf_counter() - start) * 1e3)

    found = CpuTimer(CPU).time("busy", Run(function), seconds=10.0, most=40)
    assert found.timer == "wall"
    assert len(found.ms) == len(own) == 40
    added = [harness / alone - 1 for harness, alone in zip(found.ms, own, strict=True)]
    assert 0 <= statistics.median(added) < 0.02


def test_only_the_run_is_timed():
    calls = []
    run = Run(
        lambda: calls.append("timed"),
        before=lambda: (busy(20.0)(), calls.append("before")),
        after=lambda: calls.append("after"),
    )
    found = CpuTimer(CPU).time("x", run, seconds=1.0, most=3)
    assert calls == ["before", "timed", "after"] * 3
    assert max(found.ms) < 5.0


def test_turns_keep_to_their_limits():
    timer = CpuTimer(CPU)
    assert len(timer.time("x", Run(busy(1.0)), seconds=0.0, most=50).ms) == 1
    assert len(timer.time("x", Run(busy(1.0)), seconds=60.0, most=3).ms) == 3
    assert 2 <= len(timer.time("x", Run(busy(1.0)), seconds=0.2, most=1000).ms) < 200


def test_the_cache_is_flushed_right_before_each_run(monkeypatch):
    """A buffer of at least twice the last level is written, after what comes before the run."""
    timer, order = CpuTimer(CPU), []
    run = Run(lambda: order.append(timer._flush[0].item()), before=lambda: order.append("before"))
    timer.time("x", run, seconds=10.0, most=3)
    assert order == ["before", 1, "before", 2, "before", 3]
    assert timer._flush.numel() == 2 * int(timing._LLC.read_text().strip().rstrip("K")) * 2**10
    timer.release()
    assert timer._flush is None
    monkeypatch.setattr(timing, "_LLC", Path("nowhere"))
    timer.time("x", Run(busy(0.1)), seconds=0.0, most=1)
    assert timer._flush.numel() == 2 * 32 * 2**20
    assert timer.capture("x", run) is False


class StandIn:
    """As much of torch.cuda as the clock uses, on the CPU; records what was asked of it."""

    def __init__(self, monkeypatch, milliseconds, capture_fails=False, replayed=2.0):
        self.calls, self.milliseconds, self.static, stand_in = [], milliseconds, [], self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                stand_in.calls.append("event")

            def elapsed_time(self, end):
                return stand_in.milliseconds

        class Stream:
            def __init__(self, device):
                pass

            def wait_stream(self, other):
                pass

        class Context:
            def __init__(self, *arguments, **named):
                self.graph = arguments[0] if isinstance(arguments[0], Graph) else None

            def __enter__(self):
                if self.graph:
                    stand_in.calls.append("capture")
                    if capture_fails:
                        raise RuntimeError("operation not permitted when stream is capturing")

            def __exit__(self, *_):
                pass

        class Graph:
            def replay(self):
                stand_in.calls.append("replay")
                for z in stand_in.static if replayed is not None else ():
                    z.fill_(replayed)

        class Properties:
            L2_cache_size = 60 * 2**20
            uuid = "123"

        for name, value in {
            "Event": Event, "Stream": Stream, "stream": Context, "graph": Context, "CUDAGraph": Graph,
            "current_stream": lambda device: None, "default_stream": lambda device: None,
            "set_stream": lambda stream: self.calls.append("default stream"), "synchronize": lambda device=None: None,
            "get_device_properties": lambda device: Properties(),
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, value)
        full = torch.full
        monkeypatch.setattr(
            torch, "full", lambda *size, **named: self.static.append(full(*size, **named)) or self.static[-1]
        )
        zeros = torch.zeros
        monkeypatch.setattr(torch, "zeros", lambda *size, device=None, **named: zeros(*size, **named))


CUDA = torch.device("cuda")


def a_run(calls, value=2.0):
    """Outputs of its own; ``after`` is noted."""
    return Run(lambda: (calls.append("run"), [torch.full((4,), value)])[1], after=lambda: calls.append("after"))


def test_replays_of_a_graph(monkeypatch):
    stand_in = StandIn(monkeypatch, milliseconds=0.2)
    timer, calls = CudaTimer(CUDA), []
    assert timer.capture("a", a_run(calls)) is True
    # three times to warm up, each cleaned up after; then captured, and cleaned up after
    assert calls == ["run", "after"] * 4
    found = timer.time("a", a_run(calls), seconds=0.01, most=50, graph=True)
    assert (found.timer, found.ms) == ("graph", [0.2] * 50)
    assert timer._flush.numel() == 2 * 60 * 2**20
    assert stand_in.calls.count("replay") == 54  # one to compare, three to estimate
    assert len(calls) == 8
    with pytest.raises(RuntimeError, match="b was not captured"):
        timer.time("b", a_run(calls), seconds=0.01, most=50, graph=True)
    timer.release()
    assert timer._captured == ("", None)


def test_a_replay_that_gives_something_else_is_no_graph(monkeypatch):
    """Replays are compared with the run itself, on outputs that were filled with NaN before."""
    for replayed, wanted in ((2.0, True), (2.0000001, True), (2.1, False), (None, False)):
        StandIn(monkeypatch, milliseconds=0.2, replayed=replayed)
        calls = []
        assert CudaTimer(CUDA).capture("a", a_run(calls)) is wanted, replayed
        assert calls[-1] == "after"


def test_events(monkeypatch):
    stand_in = StandIn(monkeypatch, milliseconds=20.0)
    found = CudaTimer(CUDA).time("a", a_run([]), seconds=0.2, most=50)
    assert (found.timer, found.ms) == ("events", [20.0] * 10)
    assert len(CudaTimer(CUDA).time("a", a_run([]), seconds=0.0, most=50).ms) == 3
    assert CudaTimer(CUDA).capture("a", Run(lambda: [], before=lambda: None)) is False  # a backward alone
    assert "capture" not in stand_in.calls


def test_what_cannot_be_captured_is_cleaned_up_after(monkeypatch):
    stand_in, calls = StandIn(monkeypatch, milliseconds=0.2, capture_fails=True), []
    assert CudaTimer(CUDA).capture("a", a_run(calls)) is False
    assert stand_in.calls[-1] == "default stream"
    assert calls[-1] == "after"


class Nvml:
    """A driver that answers; ``refuses`` names what it does not tell."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0

    def __init__(self, refuses=()):
        self.refuses, self.energy = refuses, 1000

    def __getattr__(self, name):
        if name.startswith("nvmlClocks"):
            raise AttributeError(name)

        def call(*arguments):
            if name in self.refuses:
                raise RuntimeError("not supported")
            self.energy += 50
            return {"nvmlDeviceGetTotalEnergyConsumption": self.energy,
                    "nvmlDeviceGetClockInfo": 1980, "nvmlDeviceGetTemperature": 40,
                    "nvmlDeviceGetCurrentClocksThrottleReasons": 8, "nvmlSystemGetDriverVersion": "580.1"}.get(name, name)  # fmt: skip

        return call


def test_energy_by_a_drivers_counters(monkeypatch):
    StandIn(monkeypatch, 1.0)
    monkeypatch.setitem(sys.modules, "pynvml", Nvml())
    runs = []
    found = Meter(CUDA).measure(Run(lambda: runs.append(1)), seconds=0.0001)
    assert found.energy_mj * len(runs) == pytest.approx(50 * (len(runs) // 10 * 4 + 1), abs=1)  # every call counts 50
    assert found.power_w > 0
    assert found == replace(found, sm_mhz=1980, memory_mhz=1980, temperature_c=40, throttled=True)
    assert Meter(CUDA).driver() == "580.1"


@pytest.mark.parametrize(
    ("refused", "field"),
    [("nvmlDeviceGetTotalEnergyConsumption", "energy_mj"), ("nvmlDeviceGetTotalEnergyConsumption", "power_w"),
     ("nvmlDeviceGetClockInfo", "sm_mhz"), ("nvmlDeviceGetCurrentClocksThrottleReasons", "throttled")],
)  # fmt: skip
def test_what_a_driver_refuses_is_none(monkeypatch, refused, field):
    StandIn(monkeypatch, 1.0)
    monkeypatch.setitem(sys.modules, "pynvml", Nvml([refused]))
    found = Meter(CUDA).measure(Run(lambda: None), seconds=0.0001)
    assert getattr(found, field) is None
    assert found.temperature_c == 40


@pytest.mark.parametrize("broken", [None, Nvml(["nvmlInit"]), Nvml(["nvmlDeviceGetHandleByUUID"])])
def test_without_nvml_there_is_no_energy(monkeypatch, broken):
    StandIn(monkeypatch, 1.0)
    monkeypatch.setitem(sys.modules, "pynvml", broken)  # None: the import fails
    meter = Meter(CUDA)
    assert meter.measure(Run(lambda: pytest.fail("nothing is to be run")), 1.0) == Energy()
    assert meter.driver() is None
    assert Meter(CPU).measure(Run(lambda: None), 1.0) == Energy()


def test_saved_activations_are_counted_by_storage():
    linear, x = nn.Linear(8, 16), torch.randn(4, 8, requires_grad=True)
    # The linear keeps its input (known) and weight (known); the first exp keeps its result, the sum nothing
    assert saved_bytes([*linear.parameters(), x], lambda: linear(x).exp().sum()) == 4 * 16 * 4
    assert saved_bytes(linear.parameters(), lambda: linear(x).exp().sum()) == (4 * 16 + 4 * 8) * 4
    twice = lambda: (y := linear(x).exp(), y[:2] * y[:2])  # noqa: E731, views of one storage
    assert saved_bytes([*linear.parameters(), x], twice) == 4 * 16 * 4


def test_counting_saved_activations_leaves_nothing_behind():
    """Softmax saves its own result: handed back by a hook, it would hold the graph that holds it."""

    def counted():
        linear, x = nn.Linear(8, 16), torch.randn(4, 8)
        assert saved_bytes([*linear.parameters(), x], lambda: linear(x).softmax(-1).sum()) == 4 * 16 * 4
        return weakref.ref(linear.weight)

    weight = counted()
    gc.collect()
    assert weight() is None


def test_memory_of_a_run():
    """40 MiB of weights and gradients, 20 MiB kept, a 100 MiB temporary."""
    module = nn.Linear(1, 10 * MIB, bias=False)
    x = torch.ones(1, 1)

    def forward():
        torch.ones(25 * MIB).sum()
        return (module(x)[:, : 5 * MIB].exp(),)

    def timed():
        outputs = forward()
        outputs[0].sum().backward()
        return outputs

    found = measure_memory(module, [x], Run(timed, after=lambda: module.zero_grad()), forward, "both")
    assert (found.weights_mib, found.gradients_mib, found.saved_mib) == (40.0, 40.0, 20.0)
    assert module.weight.grad is None
    assert found.peak_mib > 140
    free = measure_memory(module, [x], Run(torch.no_grad()(forward)), forward, "forward")
    assert (free.saved_mib, free.gradients_mib) == (0.0, 0.0)
    assert 75 < free.temporary_mib < 110  # 100 of the temporary, before 20 of outputs and 40 of the layer are there


def test_peaks_are_those_of_the_machine():
    """A product of known size, and streams that are no faster than the formula allows."""
    peaks = roofline.measure_peaks(CPU, ("float32",), shrink=64)
    assert peaks.gbps == max(peaks.read_gbps, peaks.copy_gbps) > 1
    a, b = torch.randn(256, 256), torch.randn(256, 256)
    best = min(CpuTimer(CPU).time("x", Run(lambda: a @ b), 0.2, 50).ms)
    assert peaks.tflops["float32"] == pytest.approx(2 * 256**3 / best / 1e9, rel=0.8)


def test_peaks_count_a_copy_twice(monkeypatch):
    """1 ms each for reading, copying and multiplying."""
    monkeypatch.setattr(CpuTimer, "time", lambda *_: timing.Times([1.0], "wall"))
    peaks = roofline.measure_peaks(CPU, ("float32", "bfloat16"), shrink=1024)
    assert peaks.read_gbps == pytest.approx(2**20 / 1e6)
    assert peaks.copy_gbps == pytest.approx(2 * 2**20 / 1e6)
    assert peaks.tflops == {d: pytest.approx(2 * 64**3 / 1e9) for d in ("float32", "bfloat16")}


def test_current_memory_counts_as_its_peak_does():
    assert Path("/proc/self/status").is_file()
    memory.reset_peak(CPU)
    held = torch.ones(50 * MIB // 4)
    assert memory.peak_mib(CPU) >= memory.current_mib(CPU) - 1 > held.numel() * 4 / MIB
