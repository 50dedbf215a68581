"""`sp-fast bench projectors` from the command line, and what it shows."""

import json
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from sp_fast.bench import field_plots, pool, worker
from sp_fast.bench.field_projectors import PROJECTORS
from sp_fast.bench.field_suite import FIELD
from sp_fast.bench.formats import FORMATS
from sp_fast.bench.record import read_records
from sp_fast.bench.roofline import Peaks
from sp_fast.cli import app
from tests.bench_helpers import LocalWorker, record

pytestmark = pytest.mark.usefixtures("local_workers", "one_input", "no_peaks")
TINY = ["projectors", "--tiny", "--device", "cpu", "--threads", "1", "--turns", "1"]
FEW = [word for name in ("linear", "deco", "ldpv2") for word in ("--projector", name)]


@pytest.fixture
def no_peaks(monkeypatch):
    rates = dict.fromkeys(("float32", "bfloat16"), 0.1)
    monkeypatch.setattr(worker, "measure_peaks", lambda *_: Peaks(20.0, 22.0, rates))


def bench(*arguments):
    return CliRunner().invoke(app, ["bench", *map(str, arguments)])


def test_the_field(tmp_path):
    out, figures = tmp_path / "a.jsonl", tmp_path / "figures"
    few = [*FEW[:4], "--projector", "crop-dfi"]
    result = bench(*TINY, *few, "--out", out, "--plot", figures, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [(c["projector"], c["tokens"]) for c in found["cases"]] == [
        ("linear", 576),
        ("deco", 144),
        ("crop-dfi", 582),
    ]
    for r in found["records"]:
        assert r["withheld"] is None
        assert 0 < r["ms_p20"] <= r["ms_p50"] <= r["ms_p80"]
        assert r["peak_mib"] > r["weights_mib"] > 0
        assert r["weight_bytes"] == 4 * r["parameters"]
        assert r["flop"] > 0 < r["roof_ms"]
    assert sorted(p.name for p in figures.iterdir()) == [f"field-forward-b1-float32.{kind}" for kind in ("png", "svg")]
    shown = bench("show", out, "--format", "md")
    assert shown.exit_code == 0, shown.output
    assert "forward, batch 1, float32: the field" in shown.stdout
    assert "LLaVA-SP crop-dfi, sp_fast" in shown.stdout
    assert bench("compare", out, out).exit_code == 0
    again = bench(*TINY, *few, "--plot", figures)
    assert again.exit_code == 1
    assert "exists: choose another folder" in again.stderr


def field_record(name, ms=10.0, **more):
    values = {
        "benchmark": "projectors",
        "case": f"{name}.whole.forward.b1.float32",
        "variant": name,
        "image_tokens": 144,
    }
    return record(
        "projector", ms, **{**values, "parameters": 20_979_712, "weight_bytes": 80 * 2**20, "error": 1e-7, **more}
    )


def test_no_two_projectors_look_the_same_in_the_figure():
    figure = field_plots._field([field_record(name) for name in PROJECTORS])
    for axis in figure.axes:
        looks = {(line.get_marker(), line.get_color()) for line in axis.lines}
        assert len(looks) == len(axis.lines) == len(PROJECTORS)


@pytest.mark.parametrize("format_", FORMATS)
def test_formats(format_):
    """Beside another benchmark's, with a projector that has left the field, and one without a figure."""
    records = [field_record(name) for name in (*PROJECTORS, "a-former-one")]
    text = FORMATS[format_]([*records, field_record("deco", None, withheld="out of memory"), record()])
    if format_ in ("table", "md"):
        assert "20.98 M" in text
        assert "104 M printed in BLIP-2 (arXiv:2301.12597), Tab. 2: ViT-L, OPT 2.7B" in text
        assert "0.08 B printed in Qwen-VL (arXiv:2308.12966), Tab. 1" in text
        assert "withheld: deco.whole.forward.b1.float32, projector: out of memory" in text
        assert "a-former-one" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--projector", "blip2-former"], "'blip2-former' is no projector; did you mean 'blip2-qformer'"),
        (["--direction", "forwards"], "did you mean 'forward'"),
        (["--dtype", "fp8"], "'fp8' is no dtype"),
        (["--batch", "0"], "batch 0 is no number of images"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_1(arguments, message):
    result = bench(*TINY, *arguments)
    assert result.exit_code == 1
    assert result.stderr.startswith("sp-fast bench projectors: ")
    assert message in result.stderr
    assert result.stdout == ""


def test_ctrl_c_keeps_finished_rows(tmp_path, monkeypatch):
    original, out = LocalWorker.ask, tmp_path / "a.jsonl"

    def ask(self, question, *arguments):
        if question == "time" and arguments[0].variant == "deco":
            raise KeyboardInterrupt
        return original(self, question, *arguments)

    monkeypatch.setattr(LocalWorker, "ask", ask)
    result = bench(*TINY, *FEW, "--out", out)
    assert result.exit_code == 130
    assert "1 finished rows are kept" in result.stderr
    assert [r.variant for r in read_records(out)] == ["linear"]
    assert "linear (LLaVA, Shikra)" in result.stdout


def test_no_memory_is_said_with_a_way_out(monkeypatch):
    monkeypatch.setattr(pool, "available_mib", lambda _: 100.0)
    result = bench(*TINY, *FEW)
    assert result.exit_code == 1
    assert "choose fewer --projector, a smaller --spatial-width or --batch, or bfloat16" in result.stderr


def test_what_does_not_fit_is_withheld_and_the_rest_measured(monkeypatch):
    needs = FIELD.needs
    monkeypatch.setattr(
        FIELD,
        "needs",
        lambda cases, names: replace(needs(cases, names), idle_mib=1e9 if cases[0].variant == "deco" else 1),
    )
    result = bench(*TINY, *FEW[2:])
    assert result.exit_code == 1
    assert "withheld: deco.whole.forward.b1.float32, projector: deco in float32 at batch 1 needs about" in result.stdout
    assert "MobileVLM V2 LDPv2" in result.stdout


def test_a_process_that_dies_costs_its_row_alone(monkeypatch):
    original = LocalWorker.ask

    def ask(self, question, *arguments):
        if question == "results" and self.name == "projector" and arguments[0].variant == "deco":
            raise RuntimeError("out of memory")
        return original(self, question, *arguments)

    monkeypatch.setattr(LocalWorker, "ask", ask)
    result = bench(*TINY, *FEW[2:])
    assert result.exit_code == 1
    assert "withheld: deco.whole.forward.b1.float32, projector: out of memory" in result.stdout
    assert "MobileVLM V2 LDPv2" in result.stdout
