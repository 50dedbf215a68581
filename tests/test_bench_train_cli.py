"""`sp-fast bench train` from the command line, and what it shows."""

import json
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from sp_fast.bench import plan, worker
from sp_fast.bench.formats import FORMATS
from sp_fast.bench.roofline import Peaks
from sp_fast.bench.train_cases import FACTORED
from sp_fast.bench.train_formats import rows
from sp_fast.cli import app
from tests.bench_helpers import record
from tests.test_bench_train import WIDTHS

pytestmark = pytest.mark.usefixtures("local_workers")


@pytest.fixture
def no_peaks(monkeypatch):
    rates = dict.fromkeys(("float32", "bfloat16"), 0.1)
    monkeypatch.setattr(worker, "measure_peaks", lambda *_: Peaks(20.0, 22.0, rates))


def bench(*arguments):
    return CliRunner().invoke(app, ["bench", *map(str, arguments)])


class TestCommand:
    @pytest.mark.usefixtures("no_peaks", "one_input")
    def test_the_projectors_step(self, tmp_path, monkeypatch):
        for name, width in WIDTHS.items():
            monkeypatch.setitem(plan.TINY, name, width)
        out = tmp_path / "a.jsonl"
        names = [x for name in ("fast", "reference") for x in ("--implementation", name)]
        result = bench("train", "--tiny", "--device", "cpu", "--turns", "1", *names, "--out", out, "--json")
        assert result.exit_code == 0, result.output
        found = json.loads(result.stdout)
        assert [r["implementation"] for r in found["records"]] == ["fast", "reference"]
        [case] = found["cases"]
        ratio = found["records"][1]["ms_p50"] / found["records"][0]["ms_p50"]
        assert case["fast"]["speedup_over_official_form"] == pytest.approx(ratio, abs=1e-3)
        shown = bench("show", out, "--format", "md").stdout
        assert "projector's step, crop-dfi, float32, batch 1: memory, MiB" in shown
        assert bench("compare", out, out).exit_code == 0
        assert bench("train", "--tiny", "--out", out).exit_code == 1  # it is there

    @pytest.mark.usefixtures("no_peaks", "one_input")
    def test_a_models_step(self):
        result = bench("train", "--stage", "step", "--tiny", "--device", "cpu", "--turns", "1")
        assert result.exit_code == 0, result.output
        assert (
            "LoRA step (rank 128), tiny, tiny, crop-dfi, float32, sdpa attention, eager, batch 1, 582 image"
            in result.stdout
        )

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--stage", "steps"], "'steps' is no stage; did you mean 'step'"),
            (["--implementation", "sp_fast"], "'sp_fast' is no implementation; did you mean"),
            (["--implementation", "reference_benchmark"], "is no implementation of its own on cpu"),
            (["--llm", "7b", "--recompute"], "--stage projector has no --llm, --recompute: leave it out"),
            (["--stage", "step", "--spatial-width", "8"], "--stage step has no --spatial-width"),
            (["--stage", "step", "--implementation", "fast"], "did you mean 'sp_fast'"),
            (["--stage", "step", "--prompt-tokens", "2000"], "the language model's context is 2048"),
            (["--stage", "step", "--dtype", "fp8"], "'fp8' is no dtype"),
            (["--variant", "crop-dif"], "did you mean 'crop-dfi'"),
            (["--batch", "0"], "batch 0 is no number of images"),
        ],
    )  # fmt: skip
    def test_wrong_input_is_one_line_and_exit_code_1(self, arguments, message):
        result = bench("train", "--tiny", "--device", "cpu", *arguments)
        assert result.exit_code == 1
        assert result.stderr.startswith("sp-fast bench train: ")
        assert message in result.stderr


class TestShown:
    def results(self):
        values = {"benchmark": "train", "direction": "step", "optimizer_ms_p50": 2.0, "optimizer_mib": 200.0}
        found = [("fast", 10.0, 0), ("reference", 160.0, 0), (FACTORED, 8.0, 0), ("fast", 12.0, 1), ("linear", 15.0, 1)]
        return [record(name, ms, heat=heat, **values) for name, ms, heat in found]

    def test_ratios_are_taken_within_a_heat(self):
        [row] = rows(self.results())
        assert row.over_official("fast") == 16.0
        assert row.over_official(FACTORED) == 20.0
        assert row.over_strongest("fast") == (1.25, "linear")
        assert row.over_strongest(FACTORED) == (20.0, "reference")  # it took no turns with F.linear
        assert [r.implementation for r in row.shown()] == ["reference", "linear", "fast", FACTORED]
        assert row.shown()[2].ms_p50 == 10.0
        assert row.to_dict()["fast"] == {"speedup_over_official_form": 16.0, "speedup": 1.25, "best_baseline": "linear"}

    @pytest.mark.parametrize("format_", FORMATS)
    def test_formats(self, format_):
        text = FORMATS[format_]([*self.results(), record()])  # beside a record of the projector's benchmark
        if format_ in ("table", "md"):
            assert "sp_fast, factored AdamW" in text
            assert "16.00x" in text
            assert "25%" in text  # the optimizer, of 8 ms

    def test_what_is_withheld_has_no_ratio(self):
        [row] = rows([replace(r, ms_p50=None, withheld="wrong") if r.heat == 0 else r for r in self.results()])
        assert row.over_official("fast") is None
        assert row.over_strongest("fast") == (1.25, "linear")
