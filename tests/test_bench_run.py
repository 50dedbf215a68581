"""The order of measuring: turns, heats, memory, clocks, deadlines, processes that die."""

import contextlib
import time

import pytest

from sp_fast import SPProjector
from sp_fast.bench import budget, pool, run
from sp_fast.bench.cases import STAGES
from sp_fast.bench.execute import blank_record
from sp_fast.bench.pool import heats_of
from sp_fast.bench.run import Bench, Plan, Progress
from sp_fast.errors import ResourceError
from tests.bench_helpers import EAGER, PEAKS, LocalWorker, cases_of, measure, watch

pytestmark = pytest.mark.usefixtures("local_workers")


def test_implementations_take_turns(monkeypatch):
    asked = watch(monkeypatch)
    records, *_ = measure(cases_of(), ["fast", "reference", "linear"], turns=3)
    order = [name for name, question in asked if question == "time"]
    assert order[:3] * 3 == order
    assert len(set(order)) == 3
    assert all(r.runs == 3 for r in records)
    questions = [question for name, question in asked if name == "fast"]
    assert questions == ["build", "results", "memory", "capture", "time", "time", "time", "energy"]


def test_without_spatial_tokens_the_patch_tokens_are_judged():
    cases = cases_of("mlp", STAGES, ["both"])
    assert {case.stage for case in cases} == {"whole", "mlp"}
    records, *_ = measure(cases, ["fast", "reference"], turns=0)
    assert len(records) == 4
    assert all(r.withheld is None and r.error is not None for r in records)


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
