"""`sp-fast bench` as a user runs it: whole commands, some with real processes, some with the workers in this one."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from sp_fast.bench import model_subject, pool, worker
from sp_fast.bench.record import read_records
from sp_fast.bench.roofline import Peaks
from sp_fast.cli import app
from tests.bench_helpers import record

ROOT = Path(__file__).resolve().parent.parent
TINY = ["projector", "--tiny", "--threads", "1", "--turns", "1", "--device", "cpu"]


def bench(*arguments):
    return CliRunner().invoke(app, ["bench", *map(str, arguments)])


@pytest.fixture
def local(monkeypatch, local_workers):
    """No processes, no peaks to wait for, eager everything."""
    monkeypatch.setattr(torch, "compile", lambda f, **_: f)
    monkeypatch.setattr(model_subject, "seeds_for", lambda _: 2)  # inputs, where a tiny model would get eight
    rates = dict.fromkeys(("float32", "bfloat16", "float16"), 0.1)
    monkeypatch.setattr(worker, "measure_peaks", lambda *_: Peaks(20.0, 22.0, rates))


@pytest.mark.parametrize("other", ["linear", pytest.param("compiled", marks=pytest.mark.campaign)])
def test_a_whole_run_with_real_processes(tmp_path, other):
    """From the checkout's root, nothing installed: ours, a baseline, a file, figures, and one JSON object."""
    out, figures = tmp_path / "a.jsonl", tmp_path / "figures"
    command = [sys.executable, "-m", "sp_fast.bench", *TINY, "--batch", "2", "--implementation", "fast", "--implementation",
               other, "--out", out, "--plot", figures, "--json"]  # fmt: skip
    result = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    values = json.loads(result.stdout)
    found = read_records(out)
    assert [(r["direction"], r["implementation"]) for r in values["records"]] == [
        (direction, name) for direction in ("forward", "both") for name in ("fast", other)
    ]
    for r in found:
        assert r.withheld is None
        assert r.ms_p50 > 0 < r.peak_mib
        assert r.threads == 1
        assert r.environment["torch"] == torch.__version__
        assert r.peaks["read_gbps"] > 0
    assert [case["best_baseline"] for case in values["cases"]] == [other, other]
    assert len(list(figures.iterdir())) == 6


def members(group):
    """Processes of a group that are not zombies."""
    states = [p.read_text().rpartition(")")[2].split() for p in Path("/proc").glob("[0-9]*/stat") if p.is_file()]
    return [state for state in states if int(state[2]) == group and state[0] != "Z"]


def test_ctrl_c_keeps_finished_rows(tmp_path):
    """Exit code 130, every line whole, no worker left, no traceback."""
    out = tmp_path / "a.jsonl"
    batches = [word for batch in range(1, 7) for word in ("--batch", str(batch))]
    command = [sys.executable, "-m", "sp_fast.bench", *TINY, "--implementation", "fast", "--out", str(out), *batches]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    end = time.monotonic() + 120
    while time.monotonic() < end and not (out.is_file() and out.read_text().count("\n") >= 2):
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal sends it: to the workers too
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    assert "finished rows are kept" in stderr
    finished = read_records(out)
    assert 2 <= len(finished) < 12
    assert "sp_fast" in stdout  # the table of what there is
    end = time.monotonic() + 20
    while running := members(process.pid):
        assert time.monotonic() < end, running
        time.sleep(0.1)


def test_a_withheld_row_is_named_and_is_exit_code_1(local, tmp_path, monkeypatch):
    from sp_fast.bench import implementations

    class Faulty(implementations.Fast):
        def whole(self, patch_features):
            return (super().whole(patch_features)[0] * 1.001,)

    monkeypatch.setitem(implementations.IMPLEMENTATIONS, "fast", Faulty)
    result = bench(*TINY, "--direction", "forward", "--batch", "1", "--out", tmp_path / "a.jsonl")
    assert result.exit_code == 1
    assert (
        "withheld: crop-dfi.whole.forward.b1.float32, sp_fast: accuracy: patch_tokens has an error of" in result.stdout
    )
    assert "against" not in result.stdout.replace("error against", "")
    ours = next(r for r in read_records(tmp_path / "a.jsonl") if r.implementation == "fast")
    assert ours.ms_p50 is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*TINY, "--variant", "crop-dif"), "did you mean 'crop-dfi'"),
        ((*TINY, "--variant", "conv336_CM"), "shape error"),
        ((*TINY, "--stage", "wole"), "did you mean 'whole'"),
        ((*TINY, "--implementation", "cudnn"), "is no implementation"),
        ((*TINY[:-1], "cuda:7"), "device 'cuda:7' cannot be used"),
        (("gpu", "--out", "x"), "without a working GPU, choose cpu"),
        (("gpu", "--out", "x", "--device", "cpu", "--part", "baseline"), "did you mean 'baselines'"),
        (("show", "none.jsonl"), "none.jsonl cannot be read"),
        (("show", "."), "holds no benchmark results"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_1(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if torch.cuda.device_count():
        pytest.skip("a machine with a GPU")
    result = bench(*arguments)
    assert result.exit_code == 1
    assert message in result.stderr
    assert result.stderr.startswith(f"sp-fast bench {arguments[0]}: ")
    assert result.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_results_are_safe_before_anything_is_measured(local, tmp_path, monkeypatch):
    """A file or figure that is there, or a folder that cannot be written, is said at once."""
    monkeypatch.setattr(worker, "measure_peaks", lambda *_: pytest.fail("measured in vain"))
    (tmp_path / "a.jsonl").write_text("precious")
    (tmp_path / "latency-crop-dfi-float32.png").write_text("precious")
    for arguments in (
        ["--out", tmp_path / "a.jsonl"],
        ["--plot", tmp_path],
        ["--out", tmp_path / "a.jsonl" / "b.jsonl"],
    ):
        result = bench(*TINY, *arguments)
        assert result.exit_code == 1, arguments
        assert "exists: choose another" in result.stderr or "cannot be written" in result.stderr
    assert {p.read_text() for p in tmp_path.iterdir()} == {"precious"}


def test_a_read_only_folder(local, tmp_path):
    """/proc is one even for root."""
    (tmp_path / "closed").mkdir(mode=0o500)
    closed = Path("/proc/sp_fast") if os.geteuid() == 0 else tmp_path / "closed"
    result = bench(*TINY, "--out", closed / "a.jsonl")
    assert result.exit_code == 1
    assert "a.jsonl cannot be written (" in result.stderr
    assert "choose a folder that can" in result.stderr


def test_compare_is_for_scripts(tmp_path):
    """Exit codes 0, 1 and 2."""
    for name, ms in (("a", 100.0), ("b", 120.0)):
        (tmp_path / f"{name}.jsonl").write_text(record(ms=ms).to_json() + "\n")
    a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    assert bench("compare", a, a).exit_code == 0
    assert bench("compare", b, a).exit_code == 0
    result = bench("compare", a, b, "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["changes"][0]["verdict"] == "slower"
    assert bench("compare", a, b, "--threshold", "0.3").exit_code == 0
    result = bench("compare", a, tmp_path / "none")
    assert result.exit_code == 2
    assert "no result file, no folder and no git revision" in result.stderr


def test_show_prints_and_draws(tmp_path):
    (tmp_path / "a.jsonl").write_text(record().to_json() + "\n" + record("linear", 20.0).to_json() + "\n")
    for format_, part in (
        ("table", "2.00x against F.linear"),
        ("md", "| 2.00x |"),
        ("csv", "ms_p50"),
        ("json", '"speedup": 2.0'),
    ):
        result = bench("show", tmp_path / "a.jsonl", "--format", format_)
        assert result.exit_code == 0
        assert part in result.stdout
    result = bench("show", tmp_path / "a.jsonl", "--plot", tmp_path / "figures")
    assert result.exit_code == 0
    assert result.stderr.count("wrote ") == 6


def test_no_memory_is_said_with_a_way_out(local, monkeypatch):
    monkeypatch.setattr(pool, "available_mib", lambda _: 100.0)
    result = bench(*TINY)
    assert result.exit_code == 1
    assert "choose a smaller --spatial-width or --batch, or bfloat16" in result.stderr


def test_help_has_units():
    text = bench("projector", "--help").stdout
    assert "(ms)" in text
    assert "(MiB)" in text
