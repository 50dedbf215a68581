"""`sp-fast train` from the command line: exit codes, JSON, and errors on stderr."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from sp_fast.cli import app
from sp_fast.training.recipe import HELP
from tests import tiny_training


@pytest.fixture
def folder(tmp_path):
    tiny_training.parts(tmp_path)
    tiny_training.data(tmp_path / "data", 8, text_only=(1,))
    tiny_training.start(tmp_path)
    return tmp_path


def call(folder, command, *words):
    given = {
        "language-model": "lm", "vision-tower": "tower", "projector": "start", "data": "data/data.json", "output": "run",
    }  # fmt: skip
    options = [f"--{name}={folder / value}" for name, value in given.items()]
    options += ["--max-length=400", "--global-batch-size=4", "--batch-size=2", "--workers=0", "--dtype=float32"]
    return CliRunner().invoke(app, ["train", *command.split(), *options, *words])


def test_help_lists_every_setting():
    for stage in ("pretrain", "finetune"):
        said = CliRunner().invoke(app, ["train", stage, "--help"]).output
        assert all(f"--{name.replace('_', '-')}: " in said for name in HELP)
    plain = " ".join(said.split())
    assert "with null, finetune trains all of it. (128)" in plain  # of the published recipe
    assert "Gradients are clipped to this norm; 0 leaves them. (1.0)" in plain  # of every recipe
    assert "or a file; with null, the model's own. (vicuna_v1)" in plain
    assert "Folder of the language model. --vision-tower" in plain  # of none


def test_check_data_lists_every_bad_sample(folder):
    assert call(folder, "check-data finetune").exit_code == 0
    (folder / "data" / "2.png").write_bytes(b"no image")
    rows = json.loads((folder / "data" / "data.json").read_text())
    rows[3]["image"] = "../start/config.json"
    (folder / "data" / "data.json").write_text(json.dumps(rows))
    out = call(folder, "check-data finetune", "--json", "--bad-samples=skip")
    assert out.exit_code == 1
    report = json.loads(out.stdout)
    assert {bad["id"] for bad in report["bad"]} == {"sample-2", "sample-3", "sample-7"}
    assert (report["samples"], report["good"], report["text_only"]) == (8, 5, 1)
    out = call(folder, "check-data finetune")
    assert out.exit_code == 1
    assert "sample sample-3" in out.stdout
    assert "leads out of" in out.stdout
    assert "samples 8  good 5" in out.stdout


def test_estimate_says_whether_it_fits(folder):
    out = call(folder, "estimate finetune", "--json")
    assert out.exit_code == 0
    found = json.loads(out.stdout)
    assert found["fits"] == ["none"]
    assert found["warning"] is None
    assert sum(found["parts_bytes"].values()) == found["total_bytes"]
    out = call(folder, "estimate finetune", "--memory=0.001")
    assert out.exit_code == 1
    assert "training needs about" in out.stdout
    assert "together" in out.stdout


def test_a_run_its_plot_and_its_errors(folder):
    out = call(folder, "finetune", "--max-steps=2", "--lora-rank=2")
    assert out.exit_code == 0, out.output
    assert "GiB a process, by estimate: sp-fast train estimate shows the parts" in out.stderr
    assert "step 2/2" in out.stderr
    assert out.stdout == ""
    (folder / "run" / "loss.svg").unlink()
    assert CliRunner().invoke(app, ["train", "plot", str(folder / "run")]).exit_code == 0
    assert (folder / "run" / "loss.svg").stat().st_size > 1000
    out = call(folder, "finetune", "--max-steps=2", "--lora-rank=2")
    assert (out.exit_code, out.stdout) == (1, "")
    assert "sp-fast train finetune: " in out.stderr
    assert "has finished" in out.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["merge", "nowhere", "--out", "m"], "nowhere holds no finished run"),
        (["plot", "nowhere"], "nowhere"),
        (["estimate", "evaluate"], "'evaluate' is no stage"),
        (["finetune", "--config", "nowhere"], "--config nowhere is no file"),
        (["finetune", "word"], "'word' stands before any option"),
        (["check-data", "finetune"], "data must be given"),
        (["pretrain", "--lora-rank", "4", "--data", "a", "--output", "o"], "lora_rank belongs to finetune"),
    ],
)
def test_what_cannot_be_done_is_said_and_counts(words, message):
    out = CliRunner().invoke(app, ["train", *words])
    assert out.exit_code == 1
    assert message in out.stderr
    assert f"sp-fast train {words[0]}: " in out.stderr


def interrupt(*args, **kwargs):
    raise KeyboardInterrupt


def test_an_interruption_has_its_exit_code(folder, monkeypatch):
    monkeypatch.setattr("sp_fast.training.run.read_parts", interrupt)
    assert call(folder, "finetune").exit_code == 130


@pytest.mark.usefixtures("quick_runs")
def test_a_run_says_from_which_checkpoint_it_goes_on(folder, monkeypatch):
    words = ("--max-steps=2", "--lora-rank=2", "--save-steps=1")
    with monkeypatch.context() as patch:
        patch.setattr("sp_fast.training.run.write_result", interrupt)
        assert call(folder, "finetune", *words).exit_code == 130
    out = call(folder, "finetune", *words)
    assert out.exit_code == 0, out.output
    assert f"resuming from {folder / 'run' / 'checkpoint-2'}" in out.stderr


@pytest.mark.usefixtures("quick_runs")
def test_a_run_is_merged_with_the_weights_that_it_began_with(folder):
    assert call(folder, "finetune", "--max-steps=1", "--lora-rank=2").exit_code == 0
    shutil.rmtree(folder / "start")  # the run has its own projector
    merge = ["train", "merge", str(folder / "run"), "--out"]
    for dtype in ("bfloat16", "float32"):
        assert CliRunner().invoke(app, [*merge, str(folder / dtype), "--dtype", dtype]).exit_code == 0
        tensors = load_file(folder / dtype / "model.safetensors")
        assert {str(tensor.dtype) for tensor in tensors.values()} == {f"torch.{dtype}"}
        assert json.loads((folder / dtype / "config.json").read_text())["dtype"] == dtype
    out = CliRunner().invoke(app, [*merge, str(folder / "half"), "--dtype", "half"])
    assert (out.exit_code, "dtype='half' must be one of" in out.stderr) == (1, True)
    weights = folder / "lm" / "model.safetensors"
    save_file({n: t.clone().mul_(1.5) for n, t in load_file(weights).items()}, weights, metadata={"format": "pt"})
    out = CliRunner().invoke(app, [*merge, str(folder / "other")])
    assert (out.exit_code, "was trained on other weights" in out.stderr) == (1, True)
