"""The gate: right results pass at every stage, planted faults are withheld and named, a wrong yardstick judges nothing."""

import pytest
import torch

from sp_fast.bench import implementations
from sp_fast.bench.cases import DIRECTIONS, Case, stages_of
from sp_fast.bench.implementations import IMPLEMENTATIONS, Reference
from tests.bench_helpers import EAGER, FAULTS, cases_of, faulty, measure
from tests.helpers import small

pytestmark = pytest.mark.usefixtures("local_workers")


@pytest.mark.parametrize(
    "variant",
    [
        "crop-dfi",
        pytest.param("conv336_conv_49", marks=pytest.mark.campaign),
        "tfm336",
        pytest.param("pool-dfi", marks=pytest.mark.campaign),
        pytest.param("conv336_adptive_pooling_multifuse_q", marks=pytest.mark.campaign),
    ],
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


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.campaign)])
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
