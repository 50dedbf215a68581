"""`sp-fast train study`: arms, a whole study of minute size, and what it goes on from."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from sp_fast import ReferenceSPProjector
from sp_fast.cli import app
from sp_fast.config import SPProjectorConfig
from sp_fast.errors import ConfigError, TrainingError
from sp_fast.llava_sp.loading import load_model
from sp_fast.training.study import run
from sp_fast.training.study.arms import ARMS, HEADLINE, chosen
from sp_fast.training.study.results import Results, read_lines
from sp_fast.training.study.run import initial_projector
from sp_fast.training.study.study import Job
from sp_fast.training.trainer import SpTrainer
from tests import study_folder

JOBS = [Job("mlp", 0), Job("crop", 0)]


def call(folder, *words, out="out"):
    given = {"task": "task", "parts": "parts", "out": out, "recipe": "minute"}
    options = [f"--{name}={folder / value}" for name, value in given.items()]
    return CliRunner().invoke(app, ["train", "study", *options, "--workers=0", *map(str, words)])


def interrupt(*args, **kwargs):
    raise KeyboardInterrupt


TWO = ("--arm=crop", "--arm=mlp", "--seeds=1", "--images=1", "--json")


@pytest.fixture(scope="module", autouse=True)
def _quick():
    with study_folder.quick():
        yield


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A folder with a whole study in ``out``, what the command printed, and of each run's steps the samples and LoRA's first weights."""
    folder, steps = study_folder.make(tmp_path_factory.mktemp("study")), []

    def watched(self, model, inputs, *args):
        adapters = [p.detach().clone() for n, p in model.named_parameters() if "lora_A" in n and len(steps) % 4 == 2]
        steps.append((inputs["ids"], adapters))
        return step(self, model, inputs, *args)

    def noted(stage, recipe, *args):
        begun.append((stage, recipe.seed, recipe.output.name, Path(recipe.projector).relative_to(recipe.output.parent)))
        return train(stage, recipe, *args)

    step, train, begun = SpTrainer.training_step, run.train, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SpTrainer, "training_step", watched)
        patch.setattr(run, "train", noted)
        out = call(folder, *TWO)
    assert out.exit_code == 0, out.output
    stages = [("pretrain", 0, "pretrain", Path("initial")), ("finetune", 0, "finetune", Path("pretrain/projector"))]
    assert begun == stages * 2
    return folder, out, [steps[:4], steps[4:]]


@pytest.fixture
def copied(study, tmp_path):
    """The same study, to be spoilt."""
    shutil.copytree(study[0], tmp_path / "copy")
    return tmp_path / "copy"


@pytest.mark.parametrize("grid", [12, 24])
@pytest.mark.parametrize("name", ARMS)
def test_an_arm_is_built_on_either_grid(name, grid):
    config = ARMS[name].config(grid, 16, 24)
    published = SPProjectorConfig.variant(ARMS[name].variant, **ARMS[name].changes)
    assert (config.spatial_tokens, config.detail_sides) == (published.spatial_tokens, published.detail_sides)
    assert config.spatial_width == {"tfm": 16, "compact-5m": 4}.get(name.removesuffix("-crop").removesuffix("-pool"), 8)
    assert (config.transformer_layers, config.map_size) == (4, grid)
    tokens = ReferenceSPProjector(config, device="meta")(torch.empty(1, grid**2, 16, device="meta"))
    assert tokens.shape == (1, config.spatial_tokens + grid**2, 24)


def test_arms_are_those_of_the_paper():
    halved = {name: arm.config(12, 16, 24) for name, arm in ARMS.items()}
    assert halved["crop"].kernel_sizes == halved["pool"].kernel_sizes == (2, 4, 6, 8, 10, 12)
    dfi = halved["crop-dfi"]
    assert (dfi.detail_kernel, dfi.detail_stride, dfi.detail_sides) == (8, 1, (5,))
    assert [halved[name].kernel_sizes for name in ("1-token", "3-tokens")] == [(12,), (4, 8, 12)]
    assert halved["12-tokens"].kernel_sizes == tuple(range(1, 13))
    assert [halved[f"detail-{kernel}"].detail_kernel for kernel in (4, 8, 12)] == [2, 4, 6]
    assert halved["sliding"].levels == ((4, 6),) * 6
    assert HEADLINE == ("mlp", "crop-dfi", "pool-dfi")
    whole = ARMS["pool-dfi"].config(24, 1024, 4096)
    assert whole == SPProjectorConfig.variant("conv336_adptive_pooling_fuse_49")
    compact = {name: arm.config(12, 96, 24) for name, arm in ARMS.items() if arm.table == "compact"}
    assert [compact[name].rank for name in ("compact-50m", "compact-5m", "separable", "nested")] == [4, 6, 6, 6]
    assert (compact["grouped"].groups, compact["compact-5m"].base_kernel) == (8, 4)
    assert {name: (c.extractor, c.spatial_width) for name, c in compact.items() if name.startswith("compact")} == {
        "compact-50m": ("bottleneck", 48), "compact-5m": ("resampled", 24),
    }  # fmt: skip
    assert {(c.kernel_sizes, c.detail_kernel) for c in compact.values()} == {((2, 4, 6, 8, 10, 12), 8)}
    assert all("rank" not in config.to_dict() for name, config in halved.items() if name not in compact)
    with pytest.raises(ConfigError, match=r"'crop' has kernel_sizes 4 on the published 24x24 grid.*8x8"):
        ARMS["crop"].config(8, 16, 24)
    assert ARMS["mlp"].config(8, 16, 24).grid == 8


def test_arms_are_chosen_by_name():
    assert [arm.name for arm in chosen(["sliding", "mlp"], headline=False)] == ["mlp", "sliding"]
    assert [arm.name for arm in chosen(["sliding"], headline=True)] == [*HEADLINE, "sliding"]
    assert [arm.name for arm in chosen([], headline=False)] == list(ARMS)
    with pytest.raises(ConfigError, match="'clip' is no arm: choose among mlp, crop"):
        chosen(["clip"], headline=False)


def test_every_run_has_its_line(study):
    folder, out, _ = study
    lines = read_lines(folder / "out" / "results.jsonl")
    assert [Job(line["arm"], line["seed"]) for line in lines] == JOBS
    for line in lines:
        assert [one["n"] for one in line["types"].values()] == [1] * 7
        assert line["losses"]["finetune"]["step"] == [1, 2]
        assert len(set(line["losses"]["pretrain"]["loss"])) == 2
        assert all(seconds > 0 for seconds in line["seconds"].values())
        assert line["environment"]["torch"] == torch.__version__
    mlp, crop = lines[0]["parameters"], lines[1]["parameters"]
    assert (mlp["spatial"], crop["projector"] - crop["spatial"]) == (0, mlp["projector"])
    summary = json.loads(out.stdout)
    assert [arm["seeds"] for arm in summary["arms"]] == [[0], [0]]
    described = json.loads((folder / "out" / "study.json").read_text())
    assert (described["seeds"], list(described["arms"])) == ([0], ["mlp", "crop"])
    assert described["disk_bytes"] > sum(p.stat().st_size for p in (folder / "out").rglob("*.safetensors"))


def test_what_is_left_can_be_asked(study):
    folder = study[0] / "out"
    assert {path.name for path in folder.iterdir()} == {
        "results.jsonl",
        "study.json",
        "study.svg",
        "parameters.svg",
        "models",
        "runs",
        ".lock",
    }
    assert list((folder / "runs").iterdir()) == []
    name = "model.layers.0.self_attn.q_proj.weight"
    before = load_file(study[0] / "parts" / "language-model" / "model.safetensors")[name]
    for arm in ("mlp", "crop"):
        model = load_model(folder / "models" / arm).model.model
        assert model.multi_modal_projector.config.spatial_tokens == {"mlp": 0, "crop": 6}[arm]
        assert not torch.equal(model.language_model.layers[0].self_attn.q_proj.weight, before)  # stage 2's


def test_arms_of_a_seed_begin_alike_and_see_the_same(study, tmp_path):
    folder, _, (first, second) = study
    assert [ids for ids, _ in first] == [ids for ids, _ in second]
    assert len({name for ids, _ in first for name in ids}) == 8  # four of each stage
    adapters = [next(found for _, found in run if found) for run in (first, second)]
    assert all(torch.equal(*pair) for pair in zip(*adapters, strict=True))
    one = study_folder.study(folder)
    states = {
        (arm, seed): load_file(initial_projector(one, Job(arm, seed), tmp_path / f"{arm}-{seed}") / "model.safetensors")
        for arm in ("mlp", "crop")
        for seed in (0, 1)
    }
    for name, tensor in states["mlp", 0].items():
        assert torch.equal(tensor, states["crop", 0][name])
        assert not torch.equal(tensor, states["crop", 1][name])


def test_a_study_goes_to_another_process(study):
    one = study_folder.study(study[0])
    config = one.config("crop")
    other = pickle.loads(pickle.dumps(one))
    assert (other, other.config("crop")) == (one, config)


def test_a_run_whose_line_was_cut_off_goes_on_where_it_was(copied, monkeypatch):
    """Interrupted after its stages, then in its questions; no stage is run again."""
    path = copied / "out" / "results.jsonl"
    before = path.read_text().splitlines(keepends=True)
    path.write_text(before[0] + before[1][:-40])
    for place in ("plan_merge", "answer", "train"):
        with monkeypatch.context() as patch:
            patch.setattr(f"sp_fast.training.study.run.{place}", interrupt)
            out = call(copied, *TWO)
        assert out.exit_code == (0 if place == "train" else 130), out.output
        assert "1 of 2 runs to go" in out.stderr
    again = path.read_text().splitlines(keepends=True)
    assert again[0] == before[0]
    timed = ("seconds", "environment")
    first, second = ({k: v for k, v in json.loads(text[1]).items() if k not in timed} for text in (before, again))
    assert first == second  # bit for bit, the losses too


def test_results_of_another_study_are_refused(copied):
    recipe = copied / "minute-finetune.yaml"
    recipe.write_text(recipe.read_text().replace("learning_rate: 0.001", "learning_rate: 0.002"))
    out = call(copied, "--arm=crop", "--images=2")
    assert (out.exit_code, out.stdout) == (1, "")
    assert (
        "results of another study: finetune learning_rate was 0.001 and is 0.002; held-out images was 1" in out.stderr
    )
    assert "Give another --out" in out.stderr


def test_another_tower_is_another_study(copied):
    blind = copied / "parts" / "blind-tower"
    shutil.copytree(copied / "parts" / "vision-tower", blind)
    weights = load_file(blind / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, blind / "model.safetensors", {"format": "pt"})
    out = call(copied, *TWO, "--tower=blind-tower")
    assert (out.exit_code, "results of another study: weights of the parts was" in out.stderr) == (1, True)
    out = call(copied, *TWO, "--tower=vision-tower")
    assert (out.exit_code, "0 of 2 runs to go" in out.stderr) == (0, True)


def test_an_arm_that_has_changed_is_refused(copied, monkeypatch):
    monkeypatch.setitem(ARMS, "crop", ARMS["pool"])
    out = call(copied, *TWO)
    assert (out.exit_code, "has the arm 'crop' with another projector" in out.stderr) == (1, True)


def test_a_run_that_fails_is_named_and_the_others_go_on(copied, study, monkeypatch):
    line = read_lines(study[0] / "out" / "results.jsonl")[1]

    def failing(one, job, tell):
        if job == ("pool", 0):
            raise TrainingError("the loss is not finite")
        tell("finetune", 1, 2)
        return line | {"arm": job.arm, "seed": job.seed, "projector": one.config(job.arm).to_dict()}

    monkeypatch.setattr("sp_fast.training.study.conduct.run_one", failing)
    (copied / "out" / "runs" / "crop-0" / "finetune").mkdir(parents=True)  # its process was killed after its line
    out = call(copied, "--arm=pool", "--arm=sliding", "--seeds=2", "--images=1")
    assert out.exit_code == 1
    assert out.stderr.count("pool-0 failed: the loss is not finite") == 2  # at once, and at the end
    assert "sliding-0 is done; 0:00:" in out.stderr
    found = [(line["arm"], line["seed"]) for line in read_lines(copied / "out" / "results.jsonl")]
    assert found[2:] == [("sliding", 0), ("pool", 1), ("sliding", 1)]  # every arm has one seed early
    assert not (copied / "out" / "runs" / "crop-0").exists()


def test_another_process_is_kept_out_and_parts_are_checked(tmp_path):
    out = call(tmp_path)
    assert (out.exit_code, "sp-fast train study: " in out.stderr) == (1, True)
    path = tmp_path / "results.jsonl"
    path.write_text('{"arm": "crop"}\n')
    with pytest.raises(ValueError, match="line 1 is no result"):
        Results(path, {})
