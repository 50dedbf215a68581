"""The speed that is promised on a CPU, measured at the published widths; minutes, so part of the campaign only."""

import pytest
from rich.console import Console

from sp_fast.bench import summary, train_formats
from sp_fast.bench.execute import execute
from sp_fast.bench.formats import to_table
from sp_fast.bench.plan import projector_cases
from sp_fast.bench.record import Sink
from sp_fast.bench.run import Plan
from sp_fast.bench.train_cases import projector_steps
from sp_fast.bench.train_suite import PROJECTOR_STEP


@pytest.mark.campaign
@pytest.mark.parametrize(("direction", "official", "strongest"), [("forward", 9.0, 1 / 1.1), ("both", 15.0, 1 / 1.1)])
def test_speed_at_the_published_widths(direction, official, strongest):
    """In turns with the official form and with hand-written products: at least 9 and 15 times the official form's
    speed, and within 1.1 times the stronger of the products."""
    cases = projector_cases(["crop-dfi"], ["whole"], [direction], [1], ["float32"], {})
    outcome = execute(Plan(cases, ("fast", "reference", "linear", "matmul")), Sink(None), Console())
    print(to_table(outcome.records))
    assert outcome.code == 0
    (row,) = summary.rows(outcome.records)
    assert row.speedups["reference"] >= official
    assert row.speedup >= strongest


@pytest.mark.campaign
def test_a_training_step_at_the_published_widths():
    """Features given, torch's fused AdamW, a process for each implementation, of which the larger takes 16 GiB: at least
    15 times the official form's speed, and no more memory at the peak."""
    cases = projector_steps(["crop-dfi"], [1], ["float32"], {})
    outcome = execute(Plan(cases, ("fast", "reference"), suite=PROJECTOR_STEP, turns=3), Sink(None), Console())
    print(to_table(outcome.records))
    assert outcome.code == 0
    fast, reference = outcome.records
    (row,) = train_formats.rows(outcome.records)
    assert row.over_official("fast") >= 15
    assert fast.peak_mib <= reference.peak_mib
