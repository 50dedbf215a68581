"""`sp-fast verify` as a user runs it, in a process of its own, and the rule that it judges by."""

import json
import subprocess
import sys
import time
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from sp_fast import SPProjector, SPProjectorConfig
from sp_fast.bench import verify as verify_module
from sp_fast.bench.accuracy import compare
from sp_fast.bench.cases import Case
from sp_fast.bench.subject import ProjectorJob
from sp_fast.bench.verify import Request, check_memory, required_mib
from sp_fast.bench.worker import Served, Worker
from sp_fast.cli import app
from sp_fast.errors import ResourceError, SPFastError
from sp_fast.variants import VARIANTS
from tests.bench_helpers import LocalWorker
from tests.helpers import randomised, small
from tests.test_vision import png_that_claims, tiny_tower

# CLIP's grid of 2 x 2 patches: whole runs in seconds.
TINY = {"vision_width": 16, "spatial_width": 8, "text_width": 24, "grid": 2, "kernel_sizes": (1, 2), "detail_kernel": 2}


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """The command with a tiny tower and a tiny projector."""
    tiny_tower().model.save_pretrained(tmp_path / "tower")
    monkeypatch.setitem(VARIANTS, "tiny", TINY)
    return ["verify", "--variant", "tiny", "--vision-tower", str(tmp_path / "tower"), "--runs", "2", "--threads", "1"]


@pytest.fixture
def here(monkeypatch):
    """The workers in this process, which saves seven seconds of imports."""
    monkeypatch.setattr(verify_module, "Worker", LocalWorker)


def run(arguments):
    return CliRunner().invoke(app, arguments)


def test_json_has_the_promised_fields(tiny):
    result = run([*tiny, "--json", "--backward", "--batch", "2"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["agrees"] is True
    assert (report["variant"], report["device"], report["dtype"], report["threads"]) == (
        "tiny",
        "cpu",
        "float32",
        1,
    )
    for direction in ("forward", "backward"):
        found = report[direction]
        assert found["reference_ms"] > 0 < found["fast_ms"]
        assert found["speedup"] == pytest.approx(found["reference_ms"] / found["fast_ms"], rel=0.02)
        assert 0 < found["max_rel_error"] < 1e-5
        assert found["failed"] == []
        assert len(found["runs_ms"]["fast"]) == 2
    assert report["memory"]["reference_mib"] > 50 < report["memory"]["fast_mib"]
    assert report["environment"]["torch"] == torch.__version__
    assert report["parameters"] == sum(p.numel() for p in SPProjector(SPProjectorConfig(**TINY)).parameters())


def test_without_spatial_tokens_the_patch_tokens_are_judged(tmp_path):
    case = Case("mlp", small("mlp"), "whole", "forward", 1, "float32")
    for name in ("fast", "reference"):
        worker = LocalWorker(name, 1).build(ProjectorJob(name, case.config, torch.float32, "cpu", 0, tmp_path))
        assert load_file(worker.ask("intermediates", case)).keys() == {"patch_tokens"}


@pytest.mark.usefixtures("here")
def test_tables_for_people(tiny):
    result = run(tiny)
    assert result.exit_code == 0, result.output
    for text in ("z_small.0", "attention.0", "forward, ms", "peak memory", "The results agree", "random (seed 0)"):
        assert text in result.stdout


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.campaign)])
def test_half_precision_agrees(tiny, dtype):
    result = run([*tiny, "--json", "--dtype", dtype, "--backward"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["dtype"] == dtype


@pytest.mark.usefixtures("here")
def test_disagreement_is_exit_code_1(tiny, monkeypatch):
    def shifted(name, fast, reference, exact, dtype):
        return compare(name, fast * (1 + 1e-4) if name == "z_small.1" else fast, reference, exact, dtype)

    monkeypatch.setattr(verify_module, "compare", shifted)
    result = run(tiny)
    assert result.exit_code == 1
    assert "disagree" in result.stdout
    assert "z_small.1" in result.stdout


def test_wrong_input_is_exit_code_1_with_one_line(tiny, tmp_path):
    png_that_claims(tmp_path / "bomb.png", 9000, 9000)
    save_file({"model.conv_4.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    cases = {
        ("--image", str(tmp_path / "none.jpg")): "No such file",
        ("--image", str(tmp_path / "bomb.png")): "scale it down first",
        ("--checkpoint", str(tmp_path)): "no mm_projector tensors",
        ("--vision-tower", str(tmp_path / "none")): "is no folder",
    }
    for arguments, message in cases.items():
        result = run([*tiny, *arguments])
        assert result.exit_code == 1, arguments
        assert result.stdout == ""
        assert result.stderr.startswith("sp-fast verify: ")
        assert message in result.stderr
        assert "Traceback" not in result.output


@pytest.mark.parametrize("device", ["cuda:99", "nonsense", "meta"])
def test_devices_that_are_not_there(tiny, device):
    result = run([*tiny, "--device", device])
    assert result.exit_code == 1
    assert f"device '{device}' cannot be used" in result.stderr


def test_results_come_in_the_order_of_computation():
    ordered = ["z_small.2", "z_small.10", "z_big.0", "attention.0", "spatial_tokens", "patch_tokens"]
    assert sorted(sorted(ordered), key=verify_module._order) == ordered


def test_unknown_variants_and_unfitting_towers(tmp_path):
    result = run(["verify", "--variant", "conv336_CM"])
    assert result.exit_code == 1
    assert "shape error" in result.stderr
    tiny_tower().model.save_pretrained(tmp_path)
    result = run(["verify", "--vision-tower", str(tmp_path), "--spatial-width", "8"])
    assert result.exit_code == 1
    assert "the vision tower does not fit the projector" in result.stderr


@pytest.mark.usefixtures("here")
def test_a_checkpoint_is_verified_with_its_own_weights(tmp_path, monkeypatch):
    """A whole official checkpoint, from file to verdict, on features of the true grid."""
    widths = {"vision_width": 16, "spatial_width": 8, "text_width": 24}
    projector = randomised(SPProjector(SPProjectorConfig.variant("pool-dfi", **widths)))
    save_file(projector.official_state_dict(), tmp_path / "model.safetensors")

    def features(request, config, folder, progress):
        save_file({"patch_features": torch.randn(1, 576, 16)}, folder / "features.safetensors")
        return {"projector_weights": str(request.checkpoint)}

    monkeypatch.setattr(verify_module, "_write_features", features)
    report = verify_module.verify(Request(checkpoint=tmp_path, runs=1, threads=1), lambda stage: None)
    assert report.agrees
    assert report.variant == "conv336_adptive_pooling_fuse_49"
    for variant in ("pool", "crop-dfi"):
        with pytest.raises(SPFastError, match="contradicts"):
            verify_module.verify(Request(checkpoint=tmp_path, variant=variant), lambda stage: None)
    assert "attention.0" in [c.name for c in report.forward.comparisons]
    assert report.parameters == sum(p.numel() for p in projector.parameters())


def test_too_little_memory_is_said_before_anything_is_built(monkeypatch):
    config = SPProjectorConfig()
    enough = required_mib(SPProjectorConfig(spatial_width=128), Request()) + 1
    monkeypatch.setattr(verify_module, "available_mib", lambda _: enough)
    with pytest.raises(ResourceError, match=r"MiB are needed, but .* available; --spatial-width 128 needs"):
        check_memory(config, Request())
    monkeypatch.setattr(verify_module, "available_mib", lambda _: 10.0)
    with pytest.raises(ResourceError, match="close other programs"):
        check_memory(config, Request())
    monkeypatch.setattr(verify_module, "available_mib", lambda _: 1e6)
    check_memory(config, Request())


def test_a_worker_that_fails_says_why(tiny, monkeypatch):
    monkeypatch.setitem(verify_module.DTYPES, "float32", torch.int32)
    with pytest.raises(RuntimeError, match="exact: "):
        CliRunner().invoke(app, tiny, catch_exceptions=False)


def test_a_misshaped_checkpoint_is_refused_before_anything_runs(tmp_path):
    state = randomised(SPProjector(small("crop-dfi"))).official_state_dict()
    save_file(state | {"model.key_projector.1.weight": torch.zeros(4, 8)}, tmp_path / "model.safetensors")
    result = run(["verify", "--checkpoint", str(tmp_path)])
    assert result.exit_code == 1
    assert "key_projector.1.weight has shape [4, 8] where [8, 8] is expected" in result.stderr


@pytest.mark.parametrize("implementation", ["reference", "fast", "linear", "exact"])
def test_no_gradient_outlives_its_run(tmp_path, implementation):
    """An idle process that kept them would hold as much memory again as its weights."""
    save_file({"patch_features": torch.randn(1, 4, 16)}, tmp_path / "features.safetensors")
    served, config = Served(), SPProjectorConfig(**TINY)
    features = tmp_path / "features.safetensors"
    served.build(ProjectorJob(implementation, config, torch.float32, "cpu", 0, tmp_path, features=features))
    case = Case("tiny", config, "whole", "both", 1, "float32")
    for question in (("time", case, 0.0, 1), ("memory", case), ("results", case), ("intermediates", case)):
        served.answer(*question)
        assert all(p.grad is None for p in served.subject.module.parameters()), question
    weights = [weakref.ref(p) for p in served.subject.module.parameters()]
    served.answer("forget")
    assert [w() for w in weights] == [None] * len(weights)


def test_workers_stop_where_a_later_one_fails(tiny, monkeypatch):
    closed = []
    monkeypatch.setattr(Worker, "close", lambda self: (closed.append(self.name), self._process.kill()))

    def fails(self, name, threads):
        if name == "fast":
            raise ResourceError("no room")
        start(self, name, threads)

    start = Worker.__init__
    monkeypatch.setattr(Worker, "__init__", fails)
    assert run(tiny).exit_code == 1
    assert closed == ["exact", "reference"]


def test_a_killed_worker_is_reported(tiny, monkeypatch):
    monkeypatch.setattr(Worker, "build", lambda self, job: self._process.kill() or self.ask("build", job))
    result = run(tiny)
    assert result.exit_code == 1
    assert "exact process died (exit code -9" in result.stderr


@pytest.mark.usefixtures("here")
def test_an_error_that_is_no_number_is_null_in_json(tiny, monkeypatch):
    def broken(name, fast, reference, exact, dtype):
        return compare(name, fast * torch.nan, reference, exact, dtype)

    monkeypatch.setattr(verify_module, "compare", broken)
    result = run([*tiny, "--json"])
    assert result.exit_code == 1
    assert json.loads(result.stdout, parse_constant=pytest.fail)["forward"]["max_rel_error"] is None


class TestRule:
    exact = torch.tensor([1.0, -2.0, 4.0], dtype=torch.float64)

    def judge(self, fast, reference=None):
        return compare("x", self.exact + fast, self.exact + (reference or 0.0), self.exact, torch.float32)

    def test_passes_within_one_and_a_half_times_torchs_error_and_an_ulp(self):
        ulp = torch.finfo(torch.float32).eps
        assert self.judge(0.9 * ulp).passed
        assert self.judge(1.4e-3, 1e-3).passed
        assert not self.judge(1.6e-3, 1e-3).passed
        assert not self.judge(1e-5).passed
        small = self.exact / 8  # the ulp of a largest element below 1
        assert compare("x", small + 0.4 * ulp / 2, small, small, torch.float32).passed

    def test_one_wrong_element_fails(self):
        wrong = torch.tensor([0.0, 0.0, 2e-3], dtype=torch.float64)
        comparison = self.judge(wrong, 1e-3)
        assert comparison.fast_error < 1.5 * comparison.reference_error
        assert not comparison.passed

    def test_zeros_and_nan_fail(self):
        assert not compare("x", self.exact * 0, self.exact, self.exact, torch.float32).passed
        assert not self.judge(torch.nan).passed
        assert not self.judge(torch.nan, torch.nan).passed


def test_help_is_quick_and_names_units():
    begin = time.perf_counter()
    result = subprocess.run([sys.executable, "-m", "sp_fast", "--help"], capture_output=True, text=True, check=True)
    assert time.perf_counter() - begin < 1.0
    assert "verify" in result.stdout
    text = subprocess.run([sys.executable, "-m", "sp_fast", "verify", "--help"], capture_output=True, text=True).stdout
    assert "time (ms)" in text
    assert "(MiB)" in text
