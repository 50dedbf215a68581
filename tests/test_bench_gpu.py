"""`sp-fast bench gpu`: its parts, what a call begins and leaves, and how the next one goes on."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from sp_fast.bench import environment, gpu_jobs, model_subject, share_plugin, worker
from sp_fast.bench.cases import STAGES
from sp_fast.bench.execute import blank_record
from sp_fast.bench.gpu import CAMPAIGN, PARTS, SHARE_VARIABLE, Checks, Estimate, Part, Setting, Tuning
from sp_fast.bench.gpu_jobs import Call, Checked, Measured, Outcome, Tuned, job_of
from sp_fast.bench.record import read_records
from sp_fast.bench.roofline import Peaks
from sp_fast.bench.run import Plan
from sp_fast.bench.suite import PROJECTOR
from sp_fast.cli import app
from sp_fast.errors import ResourceError

ROOT = Path(__file__).resolve().parent.parent
FOUND = {"machine": "x", "source": "y"}


def bench(*arguments):
    return CliRunner().invoke(
        app, ["bench", "gpu", "--device", "cpu", "--tiny", "--threads", "2", *map(str, arguments)]
    )


def call_of(setting, seconds=3600.0, found=FOUND, **options):
    return Call(setting, found, Console(stderr=True), time.monotonic() + seconds, **options)


@pytest.fixture
def local(monkeypatch, local_workers):
    """No processes, no peaks to wait for, eager everything."""
    monkeypatch.setattr(torch, "compile", lambda f, **_: f)
    monkeypatch.setattr(model_subject, "seeds_for", lambda _: 2)
    rates = dict.fromkeys(("float32", "bfloat16", "float16"), 0.1)
    monkeypatch.setattr(worker, "measure_peaks", lambda *_: Peaks(20.0, 22.0, rates))


@pytest.fixture
def parts(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    return {name: make(Setting("cuda", 2, tmp_path)) for name, make in PARTS.items()}


def minutes(parts, names):
    jobs = [job_of(name, parts[name]) for name in names]
    call = call_of(Setting("cuda", 2, Path("nowhere")))
    return sum(job.part.estimate.of(len(job.left(call))) for job in jobs) / 60


class TestParts:
    """What the floors and aims ask for, in the order of its worth, in 25 minutes."""

    def test_the_first_quarter_of_an_hour_gives_the_most(self, parts):
        assert CAMPAIGN[:4] == ("baselines", "tests", "projector", "train")
        assert minutes(parts, CAMPAIGN[:4]) <= 15
        assert minutes(parts, CAMPAIGN) <= 25
        call = call_of(Setting("cuda", 2, Path("nowhere")))
        assert all(job_of(name, parts[name]).least(call) <= 480 for name in CAMPAIGN)

    def test_baselines(self, parts):
        """Published widths, bfloat16, ours beside all seven baselines, forward and training."""
        found = parts["baselines"]
        assert [(c.direction, c.batch) for c in found.cases] == [
            (direction, batch) for batch in (1, 8, 32, 256) for direction in ("forward", "both")
        ]
        assert {(c.dtype, c.stage, c.config.vision_width, c.config.spatial_width) for c in found.cases} == {
            ("bfloat16", "whole", 1024, 512)
        }
        assert len(found.implementations) == 8

    def test_stages_variants_and_every_variant(self, parts):
        stages = {(c.stage, c.direction, c.batch) for c in parts["projector"].cases}
        assert {(stage, d, 1) for stage in STAGES[1:] for d in ("forward", "both")} <= stages
        assert {("convolutions", "forward", 8), ("mlp", "both", 32)} <= stages
        assert {c.variant for c in parts["variants"].cases} == {"pool", "pool-dfi"}
        assert {"fast", "linear"} <= set(parts["projector"].implementations) & set(parts["variants"].implementations)
        assert len(parts["accuracy"].cases) == 15 * 3
        assert parts["accuracy"].turns == 0

    def test_a_whole_7b(self, parts):
        """One prompt to the first token and beyond, beside LLaVA-1.5; a LoRA step of 16 prompts of 640 tokens."""
        cases = {name: parts[name].cases for name in ("model", "compiled")}
        assert {(c.shape.llm, c.shape.tower, c.dtype, c.batch) for found in cases.values() for c in found} == {
            ("7b", "clip-l-336", "bfloat16", 1)
        }
        assert {(c.mode, c.stage) for found in cases.values() for c in found} == {
            *(("eager", stage) for stage in ("ttft", "decode", "prefill")), ("compiled", "ttft"), ("compiled", "decode"),
        }  # fmt: skip
        assert parts["model"].implementations == ("sp_fast", "sp_reference", "llava")
        assert all(c.new_tokens >= model_subject.JUDGED_STEPS for c in cases["model"])
        [step] = parts["train_model"].cases
        assert (step.shape.llm, step.batch, step.dtype, step.mode) == ("7b", 16, "bfloat16", "eager")
        assert step.prompt_tokens + 582 == 640

    def test_training_tuning_tests(self, parts):
        assert [(c.batch, c.dtype) for c in parts["train"].cases] == [
            (b, d) for d in ("bfloat16", "float32") for b in (1, 16)
        ]
        assert {"fast", "factored", "reference", "linear"} <= set(parts["train"].implementations)
        assert parts["tune"].batches == (1, 8)
        files = sorted(ROOT.glob(parts["tests"].files[0]))
        named = next(line for line in (ROOT / "Makefile").read_text().splitlines() if "-m gpu" in line)
        assert [str(f.relative_to(ROOT)) for f in files] == sorted(w for w in named.split() if w.startswith("tests/"))


class TestCommand:
    @pytest.mark.campaign
    def test_it_is_rehearsed(self, local, tmp_path):
        """On the CPU with tiny shapes; a second call has nothing left to do. The parts' own commands have tests too."""
        names = [name for name in PARTS if name != "tests"]
        words = ["--minutes", "600", "--out", tmp_path / "out", *(word for name in names for word in ("--part", name))]
        result = bench(*words)
        assert result.exit_code == 0, result.output
        for name in set(names) - {"tune"}:  # a CPU has no launch table
            records = read_records(tmp_path / "out" / f"{name}.jsonl")
            assert [r.withheld for r in records] == [None] * len(records) != [], name
        assert {r.stage for r in read_records(tmp_path / "out" / "projector.jsonl")} == set(STAGES[1:])
        again = bench(*words)
        assert again.exit_code == 0
        assert again.stdout == ""
        assert "complete for these sources" in again.stderr

    def test_it_goes_on_where_it_stopped(self, local, tmp_path):
        """A call too short begins nothing; a killed one loses the case that it was at; another machine or source, all."""
        short = bench("--minutes", "0.4", "--part", "variants", "--out", tmp_path)
        assert short.exit_code == 1
        assert "variants: 3 left, about 0.7 min" in short.stderr
        assert not (tmp_path / "variants.jsonl").exists()
        path, setting = tmp_path / "variants.jsonl", Setting("cpu", 2, tmp_path, tiny=True)
        found, job = environment.environment(torch.device("cpu")), job_of("variants", PARTS["variants"](setting))
        blank = blank_record(Plan((), (), "cpu"), found)
        whole = [
            replace(blank, implementation=name, ms_p50=1.0, **PROJECTOR.fields(case, name))
            for case in job.part.cases
            for name in job.part.implementations
        ]
        kept = [r.to_json() + "\n" for r in whole]
        path.write_text("".join(kept[:-1]) + kept[-1][:50])  # in the middle of a line
        assert len(job.left(call_of(setting, found=found))) == 1
        assert bench("--minutes", "600", "--part", "variants", "--out", tmp_path).exit_code == 0
        assert sorted(r.identity for r in read_records(path)) == sorted(r.identity for r in whole)
        assert job.left(call_of(setting, found=found)) == ()
        for other in ({**found, "source": "other"}, {**found, "machine": "other"}):
            assert len(job.left(call_of(setting, found=other))) == 3
        for elsewhere in (Setting("cpu", 2, tmp_path), Setting("cuda", 2, tmp_path, tiny=True)):
            assert len(job_of("variants", PARTS["variants"](elsewhere)).left(call_of(elsewhere, found=found))) == 3
        # what was withheld waits until everything has been tried
        bad = [replace(r, withheld="out of memory") if r.direction == "both" else r for r in whole]
        path.write_text("".join(r.to_json() + "\n" for r in bad))
        assert job.left(call_of(setting, found=found)) == ()
        assert [c.direction for c in job.left(call_of(setting, found=found, again=True))] == ["both"]
        dry = bench("--dry-run", "--part", "variants", "--out", tmp_path)
        assert dry.exit_code == 0
        assert "variants: 1 left, about 0.5 min (once more: they failed)" in dry.stderr

    def test_what_is_missing_is_said_before_anything_runs(self, tmp_path, monkeypatch):
        find = gpu_jobs.importlib.util.find_spec
        monkeypatch.setattr(gpu_jobs.importlib.util, "find_spec", lambda name: None if name == "peft" else find(name))
        monkeypatch.setattr(environment, "_commit", lambda: None)
        result = bench("--out", tmp_path / "out", "--minutes", "0")
        assert result.exit_code == 1
        assert result.stderr.splitlines()[:2] == [
            f"{name} is left out: python has no peft: pip install peft" for name in ("tests", "train_model")
        ]
        assert "set SP_FAST_COMMIT=REVISION before you measure" in result.stderr
        assert "baselines: 4 left" in result.stderr
        assert "model: 3 left" in result.stderr
        assert "train_model: " not in result.stderr

    def test_a_part_that_cannot_run_leaves_the_others_their_time(self, tmp_path, monkeypatch):
        begun = []

        def run(job, call):
            begun.append(job.name)
            if job.name == "projector":
                raise ResourceError("it needs 1 TiB")
            return Outcome()

        monkeypatch.setattr(Measured, "run", run)
        result = bench("--out", tmp_path, "--minutes", "600", "--part", "projector", "--part", "variants")
        assert result.exit_code == 1
        assert "projector: it needs 1 TiB" in result.stderr
        assert begun == ["projector", "variants"]

    @pytest.mark.campaign
    @pytest.mark.parametrize("part", ["accuracy", "tests"])
    def test_with_real_processes(self, tmp_path, part):
        """From the checkout's root; processes are reused for the next variant, and tests shared between them."""
        command = [
            sys.executable,
            "-m",
            "sp_fast.bench",
            "gpu",
            "--tiny",
            "--device",
            "cpu",
            "--part",
            part,
            "--out",
            tmp_path,
        ]
        result = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        lines = list(map(json.loads, (tmp_path / f"{part}.jsonl").read_text().splitlines()))
        if part == "accuracy":
            assert len(lines) == 2 * 3 * 2
            assert {line["withheld"] for line in lines} == {None}
            assert "agrees" in result.stdout
        else:
            assert [line["share"] for line in lines] == ["0/2", "1/2"]
            assert all("passed" in line["said"] for line in lines)


def test_no_case_begins_that_would_not_end_in_time(tmp_path):
    setting = Setting("cpu", 2, tmp_path, tiny=True)
    call = call_of(setting, 100.0)
    part = replace(PARTS["variants"](setting), estimate=Estimate(30, 60))
    assert call.has(job_of("variants", part).least(call))
    assert not call.has(job_of("variants", replace(part, estimate=Estimate(30, 80))).least(call))
    plan = job_of("variants", part)._plan(call, part.cases)
    assert call.end - plan.deadline == 60
    assert isinstance(part, Part)


@pytest.fixture
def python(tmp_path, monkeypatch):
    """In python's place: a script of the shell."""

    def put(script):
        path = tmp_path / "python"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setattr(gpu_jobs.sys, "executable", str(path))

    return put


class TestTests:
    def job(self):
        return Checked("tests", Checks(("tests/test_gpu*.py",), "gpu", 3, Estimate(1, 1)))

    def test_shares_that_failed_are_told_and_wait(self, tmp_path, python, capsys):
        python(
            f'case ${SHARE_VARIABLE} in 1/3) echo "FAILED tests/a.py::b"; echo "1 failed"; exit 1;; esac; echo "= 9 passed ="'
        )
        call = call_of(Setting("cuda", 2, tmp_path))
        assert self.job().left(call) == ("0/3", "1/3", "2/3")
        assert self.job().least(call) == 4
        assert self.job().run(call).failed
        said = capsys.readouterr().err
        assert "tests 1/3: 1 failed\nFAILED tests/a.py::b\ntests 2/3: 9 passed\n" in said
        assert self.job().left(call) == ()
        assert self.job().left(replace(call, again=True)) == ("1/3",)
        assert len(self.job().left(replace(call, environment={**FOUND, "source": "z"}))) == 3
        python('echo "9 passed"')
        assert not self.job().run(replace(call, again=True)).failed
        assert self.job().left(replace(call, again=True)) == ()

    def test_time_is_over(self, tmp_path, python, capsys):
        """What has not ended is killed, and begins anew."""
        python(f'case ${SHARE_VARIABLE} in 0/3) echo "9 passed"; exit 0;; esac; exec sleep 60')
        call = call_of(Setting("cuda", 2, tmp_path), gpu_jobs.ENDING_SECONDS + 0.5)
        start = time.monotonic()
        assert not self.job().run(call).failed
        assert time.monotonic() - start < 10
        assert self.job().left(call) == ("1/3", "2/3")
        assert "time is over" in capsys.readouterr().err

    def test_without_a_checkout(self, tmp_path, monkeypatch):
        monkeypatch.setattr(gpu_jobs, "ROOT", tmp_path)
        with pytest.raises(gpu_jobs.ConfigError, match="run it from a checkout"):
            self.job().run(call_of(Setting("cuda", 2, tmp_path)))

    def test_every_test_is_in_one_share(self, monkeypatch):
        found, left_out = [], []

        class Config:
            class hook:
                pytest_deselected = staticmethod(lambda items: left_out.extend(items))

        for share in range(3):
            monkeypatch.setitem(os.environ, SHARE_VARIABLE, f"{share}/3")
            items = list(range(10))
            share_plugin.pytest_collection_modifyitems(Config, items)
            found += items
        assert sorted(found) == list(range(10))
        assert len(left_out) == 20


def test_tuning_goes_into_a_table_of_its_own(tmp_path, python, capsys):
    """A bucket a process; one that fails has no line, and stays."""
    python(
        'case "$5" in 8) echo "out of memory" >&2; exit 1;; esac; echo "B=$5: kept" >&2; echo "{\\"buckets\\": [{\\"batch\\": $5}]}"'
    )
    job, call = Tuned("tune", Tuning((1, 8), Estimate(0, 1))), call_of(Setting("cuda", 2, tmp_path))
    assert job.run(call).failed
    assert "tune B=1: B=1: kept\ntune B=8: out of memory\n" in capsys.readouterr().err
    assert (tmp_path / "launch_table.json").read_bytes() == (ROOT / "kernels" / "launch_table.json").read_bytes()
    assert job.left(call) == (8,)
    assert job.run(replace(call, end=time.monotonic())).failed is False
