"""The gate, the turns and the heats: in this process, so that faults can be planted."""

import contextlib
import gc
import time
import weakref

import pytest
import torch

from sp_fast import SPProjector
from sp_fast.bench import budget, implementations, pool, run
from sp_fast.bench.cases import DIRECTIONS, Case, stages_of
from sp_fast.bench.execute import blank_record
from sp_fast.bench.implementations import BASELINES, IMPLEMENTATIONS, Compiled, Reference, baselines_on
from sp_fast.bench.plan import TINY, projector_cases
from sp_fast.bench.pool import heats_of
from sp_fast.bench.roofline import Peaks
from sp_fast.bench.run import Bench, Plan, Progress
from sp_fast.bench.subject import ProjectorJob
from sp_fast.errors import ConfigError, ResourceError
from tests.bench_helpers import LocalWorker
from tests.helpers import ALL_VARIANTS, small

PEAKS = Peaks(20.0, 22.0, {"float32": 0.1, "bfloat16": 0.1, "float16": 0.1})
EAGER = ("fast", *(name for name in baselines_on(torch.device("cpu")) if name != "compiled"))


@pytest.fixture(autouse=True)
def local(monkeypatch):
    monkeypatch.setattr(pool, "Worker", LocalWorker)
    monkeypatch.setattr(pool, "available_mib", lambda _: 1e6)
    monkeypatch.setattr(gc, "collect", lambda: 0)  # a fifth of a second in a process as full as pytest's


def cases_of(variant="crop-dfi", stages=("whole",), directions=("forward",), batches=(1,), dtypes=("float32",)):
    return projector_cases([variant], stages, directions, batches, dtypes, TINY)


def measure(cases, names=EAGER, **options):
    records, said = [], []
    options = {"turns": 2, "turn_seconds": 0.0, **options}
    plan = Plan(tuple(cases), tuple(names), **options)
    blank = blank_record(plan, {"commit": "abc"})
    bench = Bench(plan, PEAKS, blank, records.append, Progress(0, lambda *what: said.append(what)))
    bench.run()
    return records, bench, said


@pytest.mark.parametrize(
    "variant", ["crop-dfi", "pool-dfi", "conv336_conv_49", "conv336_adptive_pooling_multifuse_q", "tfm336"]
)
def test_every_stage_and_direction_passes_its_gate(variant):
    """Every implementation computes the same function as float64, in whole and in part."""
    config = small(variant, vision_width=64, spatial_width=64 if variant == "tfm336" else 32, text_width=64)
    cases = [Case(variant, config, stage, d, 2, "float32") for stage in stages_of(config) for d in ("forward", "both")]
    records, bench, said = measure(cases, turns=1)
    assert not bench.unfinished
    assert len(records) == len(cases) * len(EAGER)
    for record in records:
        assert record.withheld is None, record
        assert 0 < record.error < 1e-4
        assert record.ms_p20 <= record.ms_p50 <= record.ms_p80
        assert record.roof_share == pytest.approx(record.roof_ms / record.ms_p50)
        assert record.gbps == pytest.approx(record.bytes / record.ms_p50 / 1e6)
        assert record.tflops == pytest.approx(record.flop / record.ms_p50 / 1e9)
        assert record.serial_ms >= record.roof_ms * 0.999
        assert (record.gradients_mib > 0) is (record.direction == "both")
    assert said[-1][1] == said[-1][2] == len(records)  # the bar ends full


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_passes_its_gate(dtype):
    records, *_ = measure(
        cases_of(stages=("whole", "tail"), directions=("both",), dtypes=(dtype,), batches=(2,)), turns=1
    )
    assert [r.withheld for r in records] == [None] * len(records)


def test_the_backward_alone_is_judged_and_timed(monkeypatch):
    """Its forward is run before the clock starts."""
    records, *_ = measure(cases_of(directions=DIRECTIONS), ["fast", "reference"])
    assert [r.direction for r in records] == ["forward"] * 2 + ["backward"] * 2 + ["both"] * 2
    assert all(r.withheld is None for r in records)
    backward = [r for r in records if r.direction == "backward"]
    assert all(r.gradients_mib > 0 and r.saved_mib > 0 for r in backward)


def faulty(monkeypatch, name, change):
    """Plants a fault into one implementation's whole stage."""

    class Faulty(IMPLEMENTATIONS[name]):
        def whole(self, patch_features):
            return change(super().whole(patch_features))

    monkeypatch.setitem(implementations.IMPLEMENTATIONS, name, Faulty)


FAULTS = {
    "one wrong token": lambda out: (torch.cat([out[0][:, :1] * 1.001, out[0][:, 1:]], dim=1),),
    "tokens in another order": lambda out: (out[0].flip(1),),
    "zeros": lambda out: (out[0] * 0,),
    "NaN": lambda out: (out[0] * float("nan"),),
    "a last token that is not written": lambda out: (torch.cat([out[0][:, :-1], out[0][:, -1:] * 0], dim=1),),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_withheld_and_named(monkeypatch, fault):
    faulty(monkeypatch, "fast", FAULTS[fault])
    records, *_ = measure(cases_of(), ["fast", "reference", "linear"])
    found = {r.implementation: r for r in records}
    assert "accuracy: " in found["fast"].withheld
    assert "tokens" in found["fast"].withheld
    assert found["fast"].ms_p50 is None is found["fast"].peak_mib
    assert found["reference"].ms_p50 > 0 < found["linear"].ms_p50


def test_a_wrong_gradient_is_withheld(monkeypatch):
    """The outputs are right; the patch MLP's gradient is one percent off."""

    class Faulty(IMPLEMENTATIONS["fast"]):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.module.patch_mlp[0].weight.register_hook(lambda g: g * 1.01)

    monkeypatch.setitem(implementations.IMPLEMENTATIONS, "fast", Faulty)
    records, *_ = measure(cases_of(directions=("forward", "both")), ["fast", "reference"])
    verdicts = {(r.direction, r.implementation): r.withheld for r in records}
    assert verdicts["forward", "fast"] is None
    assert "grad.mm_projector" in verdicts["both", "fast"]
    assert verdicts["both", "reference"] is None


def test_a_wrong_baseline_is_withheld_and_an_inexact_one_is_not(monkeypatch):
    """A baseline may be less exact than the rule for ours, but must be the same function."""
    faulty(monkeypatch, "linear", lambda out: (out[0] * (1 + 1e-5),))
    faulty(monkeypatch, "matmul", lambda out: (out[0] * 1.01,))
    records, *_ = measure(cases_of(), ["fast", "reference", "linear", "matmul"])
    found = {r.implementation: r for r in records}
    assert found["linear"].withheld is None
    assert found["linear"].error > 5 * found["reference"].error
    assert "half the digits" in found["matmul"].withheld


def test_one_that_fails_does_not_stop_the_others(monkeypatch):
    class Broken(Reference):
        def __init__(self, *arguments):
            raise MemoryError("no room for it")

    faulty(monkeypatch, "matmul", lambda out: torch.linalg.inv(torch.zeros(2, 2)))
    monkeypatch.setitem(implementations.IMPLEMENTATIONS, "linear", Broken)
    records, *_ = measure(cases_of(batches=(1, 2)), ["fast", "reference", "linear", "matmul"])
    found = {(r.implementation, r.batch): r.withheld for r in records}
    assert len(found) == len(records) == 8
    assert found["fast", 2] is None is found["reference", 1]
    assert "MemoryError: no room for it" in found["linear", 1]
    assert "LinAlgError" in found["matmul", 2]


@pytest.mark.parametrize("fault", ["zeros", "tokens in another order", "NaN"])
def test_a_wrong_yardstick_judges_nothing(monkeypatch, fault):
    faulty(monkeypatch, "reference", FAULTS[fault])
    records, *_ = measure(cases_of(), ["fast", "reference", "linear"])
    found = {r.implementation: r.withheld for r in records}
    assert "it judges nothing" in found["reference"]
    assert "not judged: the official form gave no results here, or wrong ones" in found["fast"]
    assert "not judged" in found["linear"]
    assert all(r.ms_p50 is None for r in records)


@pytest.mark.parametrize("name", ["exact", "reference"])
def test_without_a_yardstick_nothing_is_printed(monkeypatch, name):
    faulty(monkeypatch, name, lambda out: torch.linalg.inv(torch.zeros(2, 2)))
    records, *_ = measure(cases_of(), ["fast", "reference"])
    assert all(r.withheld and r.ms_p50 is None for r in records)
    ours = next(r for r in records if r.implementation == "fast")
    assert "not judged: " in ours.withheld


def test_the_yardstick_judges_even_where_it_is_not_shown():
    records, *_ = measure(cases_of(), ["fast", "linear"])
    assert [r.implementation for r in records] == ["fast", "linear"]
    assert records[0].reference_error > 0
    assert records[0].withheld is None


def test_judged_only():
    records, *_ = measure(cases_of(directions=("both",)), ["fast", "reference"], turns=0)
    assert all(r.ms_p50 is None is r.withheld and r.error > 0 for r in records)


def test_implementations_take_turns(monkeypatch):
    asked = watch(monkeypatch)
    records, *_ = measure(cases_of(), ["fast", "reference", "linear"], turns=3)
    order = [name for name, question in asked if question == "time"]
    assert order[:3] * 3 == order
    assert len(set(order)) == 3
    assert all(r.runs == 3 for r in records)
    questions = [question for name, question in asked if name == "fast"]
    assert questions == ["build", "results", "memory", "capture", "time", "time", "time", "energy"]


def test_heats_follow_memory(monkeypatch):
    """Ours in each, the yardstick in the first; too little for one beside ours is said."""
    cases = list(cases_of())
    idle = budget.idle_mib(cases[0].config, "float32")
    running = budget.running_mib(cases[0].config, "float32", 1, False)

    def heats(processes, names=EAGER):
        monkeypatch.setattr(pool, "available_mib", lambda _: (processes * idle + running + 1) / pool.SHARE)
        return heats_of(cases, names, "cpu")

    assert heats(10) == [EAGER]
    assert heats(3) == [("fast", "reference", "channels_last"), ("fast", "linear", "matmul")]
    assert heats(2) == [("fast", name) for name in EAGER[1:]]
    assert heats(9, ("fast", "linear")) == [("fast", "reference", "linear")]
    assert heats(1.5, ("linear",)) == [("reference",), ("linear",)]
    with pytest.raises(ResourceError, match=r"needs about [\d,]+ MiB, but [\d,]+ MiB are available: choose a smaller"):
        heats(1)


def test_the_budget_counts_what_is_held():
    """By hand: weights, 500 MiB a process; gradients; and once more the weights for what torch.compile keeps."""
    config = cases_of()[0].config
    weights = sum(p.numel() for p in SPProjector(config).parameters()) * 4 / 2**20
    assert budget.idle_mib(config, "float32") == pytest.approx(weights + 500)
    assert budget.idle_mib(config, "bfloat16") == pytest.approx(weights / 2 + 500)
    forward = budget.running_mib(config, "float32", 1, False)
    assert budget.running_mib(config, "float32", 1, False, compiled=True) == forward
    assert budget.running_mib(config, "float32", 1, True) == pytest.approx(forward + weights)
    assert budget.running_mib(config, "float32", 1, True, compiled=True) == pytest.approx(forward + 2 * weights)


def test_a_heat_keeps_ours_and_gives_the_others_back(monkeypatch):
    monkeypatch.setattr(run, "heats_of", lambda *_: [("fast", "reference"), ("fast", "linear")])
    asked = watch(monkeypatch)
    records, *_ = measure(cases_of(directions=("both",)), ["fast", "reference", "linear"])
    built = [entry for entry in asked if entry[1] in ("build", "forget")]
    assert built == [("exact", "build"), ("exact", "forget"), ("reference", "build"), ("fast", "build"), ("exact", "forget"),
                     ("reference", "forget"), ("linear", "build")]  # fmt: skip
    assert [(r.implementation, r.heat) for r in records] == [("fast", 0), ("reference", 0), ("fast", 1), ("linear", 1)]
    assert all(r.withheld is None for r in records)


def watch(monkeypatch, answers=None):
    """Every question asked of a worker; ``answers`` maps (name, question) to what is answered, or raised, instead."""
    asked, answers = [], answers or {}
    original = LocalWorker.ask

    def ask(self, question, *arguments):
        asked.append((self.name, question))
        answer = answers.get((self.name, question), answers.get(question))
        if isinstance(answer, Exception):
            raise answer
        return original(self, question, *arguments) if answer is None else answer

    monkeypatch.setattr(LocalWorker, "ask", ask)
    return asked


def test_what_does_not_fit_is_withheld_and_the_rest_measured(monkeypatch):
    small_cases, large = cases_of(), cases_of("pool-dfi")
    fits = heats_of(list(small_cases), ("fast", "reference"), "cpu")

    def heats(cases, *_):
        if cases[0].variant == "pool-dfi":
            raise ResourceError("too large")
        return fits

    monkeypatch.setattr(run, "heats_of", heats)
    records, *_ = measure((*large, *small_cases), ["fast", "reference"])
    assert [(r.variant, r.withheld) for r in records] == [("pool-dfi", "too large")] * 2 + [("crop-dfi", None)] * 2
    with pytest.raises(ResourceError, match="too large"):
        measure(large, ["fast", "reference"])


def test_a_process_that_died_is_replaced_for_the_next_case(monkeypatch):
    died = []
    original = LocalWorker.ask

    def ask(self, question, *arguments):
        if (self.name, question) == ("linear", "time") and not died:
            died.append(self)
            self.alive = False
            raise ResourceError("the linear process died")
        return original(self, question, *arguments)

    monkeypatch.setattr(LocalWorker, "ask", ask)
    records, *_ = measure(cases_of(batches=(1, 2)), ["fast", "reference", "linear"], turns=1)
    found = {(r.implementation, r.batch): r.withheld for r in records}
    assert found["linear", 1] == "the linear process died"
    assert found["linear", 2] is None is found["fast", 1]


@pytest.mark.parametrize("question", ["memory", "energy"])
def test_a_missing_instrument_costs_no_time(monkeypatch, question):
    """A sandbox without /proc, a driver that fails: the time stands, and the record says what is missing."""
    watch(monkeypatch, {question: RuntimeError("no instrument")})
    records, *_ = measure(cases_of(), ["fast", "reference"])
    assert all(r.ms_p50 > 0 and r.withheld is None and "no instrument" in r.note for r in records)
    assert all((r.peak_mib is None) is (question == "memory") for r in records)


@pytest.mark.parametrize("captured", [True, False])
def test_graphs_for_all_or_for_none(monkeypatch, captured):
    """One implementation that cannot be captured puts everyone on events."""
    asked = []
    answers = {("fast", "capture"): True, ("reference", "capture"): captured}

    def time_of(self, question, *arguments):
        asked.append((self.name, question, arguments[-1] if question == "time" else None))
        return answers.get((self.name, question)) if question == "capture" else original(self, question, *arguments)

    original = LocalWorker.ask
    monkeypatch.setattr(LocalWorker, "ask", time_of)
    measure(cases_of(), ["fast", "reference"], turns=1)
    assert [entry[2] for entry in asked if entry[1] == "time"] == [captured] * 2


def test_the_deadline_leaves_whole_cases():
    cases = cases_of(batches=(1, 2))
    records, bench, _ = measure(cases, ["fast", "reference"], deadline=time.monotonic() - 1)
    assert records == []
    assert bench.unfinished == list(cases)


def test_interrupted_between_turns_keeps_finished_rows(monkeypatch):
    original = LocalWorker.ask

    def ask(self, question, *arguments):
        if question == "time" and arguments[0].batch == 2:
            raise KeyboardInterrupt
        return original(self, question, *arguments)

    monkeypatch.setattr(LocalWorker, "ask", ask)
    records = []
    plan = Plan(cases_of(batches=(1, 2)), ("fast", "reference"), turns=1)
    bench = Bench(plan, PEAKS, blank_record(plan, {}), records.append, Progress(0, lambda *_: None))
    with contextlib.suppress(KeyboardInterrupt):
        bench.run()
    assert {(r.batch, r.implementation) for r in records} == {(1, "fast"), (1, "reference")}


def test_baselines_of_a_device():
    assert baselines_on(torch.device("cpu")) == ("reference", "channels_last", "linear", "matmul", "compiled")
    assert baselines_on(torch.device("cuda")) == BASELINES
    from sp_fast.bench.plan import implementations as chosen

    assert chosen("cpu", ()) == ("fast", *baselines_on(torch.device("cpu")))
    assert chosen("cpu", ("linear", "linear")) == ("linear",)
    with pytest.raises(ConfigError, match="is no implementation of its own on cpu"):
        chosen("cpu", ("channels_last_benchmark",))
    with pytest.raises(ConfigError, match="did you mean 'linear'"):
        chosen("cpu", ("linaer",))


def test_cudnn_is_told_what_each_baseline_wants(monkeypatch):
    """One process, one switch."""
    for name, wanted in (("reference", False), ("reference_benchmark", True), ("channels_last_benchmark", True)):
        monkeypatch.setattr(torch.backends.cudnn, "benchmark", not wanted)
        worker = LocalWorker(name, 1)
        case = cases_of()[0]
        job = ProjectorJob(name, case.config, torch.float32, "cpu", 0, None)
        worker.build(job)
        assert torch.backends.cudnn.benchmark is wanted


def test_baselines_hold_the_weights_their_names_say():
    case = cases_of()[0]
    built = {}
    for name in ("channels_last", "linear", "matmul", "reference"):
        worker = LocalWorker(name, 1).build(ProjectorJob(name, case.config, torch.float32, "cpu", 0, None))
        built[name] = worker._served.subject.module.conv_CM.weight
    c, d = case.config.vision_width, case.config.spatial_width
    assert built["reference"].is_contiguous()
    assert built["channels_last"].is_contiguous(memory_format=torch.channels_last)
    assert not built["channels_last"].is_contiguous()
    assert built["linear"].shape == (d, 256 * c)
    assert built["matmul"].shape == (256 * c, d)
    assert built["matmul"].is_contiguous()
    assert built["linear"].is_contiguous()
    torch.testing.assert_close(
        built["linear"].view(d, 16, 16, c).permute(0, 3, 1, 2), built["reference"], rtol=0, atol=0
    )
    torch.testing.assert_close(built["matmul"].t(), built["linear"], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["linear", "matmul", "channels_last"])
def test_a_baseline_never_holds_its_weights_twice(name, monkeypatch):
    """Convolutions are replaced one by one: at most one of them is there in both forms."""
    live, most = weakref.WeakSet(), []
    flat, init = implementations._FlatConv.__init__, torch.nn.Conv2d.__init__

    def made(self, *arguments, **named):
        init(self, *arguments, **named)
        live.add(self)

    monkeypatch.setattr(torch.nn.Conv2d, "__init__", made)
    monkeypatch.setattr(
        implementations._FlatConv, "__init__", lambda self, *a, **n: most.append(len(live)) or flat(self, *a, **n)
    )
    case = cases_of()[0]
    LocalWorker(name, 1).build(ProjectorJob(name, case.config, torch.float32, "cpu", 0, None))
    assert most == ([] if name == "channels_last" else [7, 6, 5, 4, 3, 2, 1])


def test_compiled_is_compiled(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda f, dynamic: compiled.append((f.__name__, dynamic)) or f)
    records, *_ = measure(cases_of(stages=("whole", "mlp")), ["compiled", "reference"], turns=1)
    assert compiled == [("whole", False), ("mlp", False)]
    assert issubclass(Compiled, Reference)
    assert [r.withheld for r in records] == [None] * 4


@pytest.mark.parametrize("variant", ALL_VARIANTS)
def test_fast_stages_are_the_projectors_own(variant):
    """Spatial features, detail maps and spatial tokens as intermediates() has them."""
    config = small(variant)
    case = Case(variant, config, "whole", "forward", 2, "float32")
    subject = LocalWorker("fast", 1).build(ProjectorJob("fast", config, torch.float32, "cpu", 0, None))._served.subject
    fast, projector = subject._implementation, subject.module
    assert isinstance(projector, SPProjector)
    (x,) = case.inputs(0, torch.device("cpu"))
    with torch.no_grad():
        expected = projector.intermediates(x)
        if config.levels:
            torch.testing.assert_close(fast.spatial(x)[0], expected.z_small)
        details = fast.detail(x) if config.detail_kernels else ()
        for got, z in zip(details, expected.z_big if config.attends else (expected.z_small,), strict=False):
            torch.testing.assert_close(got, z)
        torch.testing.assert_close(
            fast.tail(expected.z_small, *expected.z_big)[0], expected.tokens[:, : config.spatial_tokens]
        )
        torch.testing.assert_close(fast.mlp(x)[0], expected.tokens[:, config.spatial_tokens :])
