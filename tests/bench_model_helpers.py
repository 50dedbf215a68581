"""Tiny models under measurement, in this process."""

from pathlib import Path

from sp_fast.bench.execute import blank_record
from sp_fast.bench.model_cases import IMPLEMENTATIONS, STAGES, Lengths, model_cases
from sp_fast.bench.model_shapes import ModelShape
from sp_fast.bench.model_suite import MODEL
from sp_fast.bench.run import Bench, Plan, Progress
from tests.bench_helpers import PEAKS

TINY = ModelShape("tiny", "tiny")
LENGTHS = Lengths(8, 4)
ROOT = Path(__file__).resolve().parent.parent


def cases_of(stages=STAGES, batches=(1,), dtype="float32", modes=("eager",), attentions=("sdpa",), shape=TINY):
    return model_cases([shape], stages, batches, [dtype], {dtype: attentions}, modes, LENGTHS)


def measure(cases, names=IMPLEMENTATIONS, **options):
    records = []
    plan = Plan(tuple(cases), tuple(names), suite=MODEL, **{"turns": 1, "turn_seconds": 0.0, **options})
    Bench(plan, PEAKS, blank_record(plan, {"commit": "abc"}), records.append, Progress(0, lambda *_: None)).run()
    return records


def judged(names=IMPLEMENTATIONS, dtype="float32"):
    """Judged only: each implementation's record."""
    return {r.implementation: r for r in measure(cases_of(["end_to_end"], dtype=dtype), names, turns=0)}


def measure_everything():
    """Every stage of every implementation."""
    return measure(cases_of(batches=(2,)))
