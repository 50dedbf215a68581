"""A resumed run is the run that went through, bit for bit, or is refused."""

import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from packaging.version import Version
from torch import nn

from sp_fast.errors import TrainingError
from sp_fast.training import checkpoints, trained
from sp_fast.training.epochs import check_order
from sp_fast.training.manifest import verify
from sp_fast.training.run_folder import newest_complete
from tests import tiny
from tests.train_standin import Net, TinyTrainer, names, part_of, run, same_end, trainer_of


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Twelve steps, a checkpoint after each."""
    return run(tmp_path_factory.mktemp("whole"))


# In the middle of an epoch, before its last batch, at its end, and in the second.
@pytest.mark.parametrize("step", [2, 5, 6, 9])
def test_a_resumed_run_is_the_one_that_went_through(whole, tmp_path, step):
    part = tmp_path / "part"
    run(part, stop_in=step + 1)
    resumed = run(part, resume=True)
    assert same_end(whole, resumed) == set(range(step + 1, 13))
    # Moments, schedule, random states, and every step's loss, learning rate and gradient norm.
    last = [verify(Path(t.args.output_dir, "checkpoint-12")).files for t in (whole, resumed)]
    assert last[0] == last[1]


def test_resumes_with_a_worker(tmp_path):
    workers = {"dataloader_num_workers": 1, "num_train_epochs": 1}
    run(tmp_path, stop_in=3, **workers)
    part = run(tmp_path, resume=True, **workers)
    assert same_end(run(tmp_path / "whole", **workers), part)


@pytest.mark.parametrize("end", [{"max_steps": 8}, {"num_train_epochs": 1}])
def test_a_run_that_was_complete_ends_where_it_was(tmp_path, end):
    whole = run(tmp_path, **end)  # after 8 steps, in the middle of an epoch, the Trainer would go on to a ninth
    resumed = trainer_of(tmp_path, **end)
    assert (
        resumed.train(resume_from_checkpoint=True).global_step == resumed.state.global_step == whole.state.global_step
    )
    ends = [t.model.state_dict() for t in (whole, resumed)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_holds_what_is_trained_and_no_code(whole):
    folder = newest_complete(Path(whole.args.output_dir)).folder
    assert names(folder) == ["manifest.json", "optimizer.pt", "rng_state.pth", "scheduler.pt", "trained.safetensors", "trainer_state.json"]  # fmt: skip
    stored = safetensors.torch.load_file(folder / "trained.safetensors")
    running = {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}
    assert stored.keys() == {"norm.weight", "norm.bias", "first.weight", "first.bias"} | running
    assert all(torch.equal(stored[name], whole.model.state_dict()[name]) for name in stored)
    assert stored["norm.num_batches_tracked"] == 22  # twice 11 batches
    facts = verify(folder).facts
    assert (facts.step, facts.world_size, facts.fingerprint) == (12, 1, {"data": "a", "batch": 4})


def test_of_a_model_only_its_projector(tmp_path):
    model = tiny.model_of().requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    model.model.multi_modal_projector.bfloat16()
    path = tmp_path / "trained.safetensors"
    trained.save_trained(model, path)
    other = tiny.model_of(seed=1).requires_grad_(False)
    before = {name: p.clone() for name, p in other.named_parameters()}
    other.model.multi_modal_projector.requires_grad_(True)
    with pytest.raises(TrainingError, match=r"torch.bfloat16, not .* torch.float32"):
        trained.load_trained(other, path)
    assert all(torch.equal(p, before[name]) for name, p in other.named_parameters())  # not even in part
    other.model.multi_modal_projector.bfloat16()
    trained.load_trained(other, path)
    for name, p in other.named_parameters():
        expected = model.get_parameter(name) if name.startswith("model.multi_modal_projector") else before[name]  # fmt: skip
        assert torch.equal(p, expected), name


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda net: net.frozen.requires_grad_(True), "no frozen.bias, frozen.weight"),
        (lambda net: net.norm.requires_grad_(False), "unexpected norm.bias, norm.weight"),
        (lambda net: setattr(net, "first", nn.Linear(6, 5)), r"first.bias of \[6\] torch.float32, not \[5\]"),
        (lambda net: net.norm.double(), "norm.running_mean of .* torch.float32, not .* torch.float64"),
        (lambda net: setattr(net.norm, "num_batches_tracked", torch.tensor(0.0)), "num_batches_tracked of .*int64, not"),
    ],
)  # fmt: skip
def test_refuses_another_model(whole, change, said):
    net = Net()
    change(net)
    with pytest.raises(TrainingError, match=said):
        trained.load_trained(net, Path(whole.args.output_dir, "checkpoint-3", "trained.safetensors"))


@pytest.mark.parametrize(
    ("fingerprint", "said"),
    [
        ({"data": "b", "batch": 4}, "data is 'b', and was 'a'"),
        ({"data": "a", "batch": 8}, "batch is 8, and was 4"),
        ({"data": "a"}, "batch is None, and was 4"),
        ({"data": "a", "batch": 4, "seed": 1}, "seed is 1, and was None"),
    ],
)
def test_another_run_is_refused(whole, tmp_path, monkeypatch, fingerprint, said):
    monkeypatch.setattr(TinyTrainer, "fingerprint", fingerprint)
    with pytest.raises(TrainingError, match=f"another run than this one: {said}: resume with"):
        run(part_of(whole, tmp_path, 5), resume=True)


def test_a_fingerprint_is_compared_as_json(tmp_path, monkeypatch):
    monkeypatch.setattr(TinyTrainer, "fingerprint", {"files": ("a", "b"), "rates": {1: 0.1 + 0.2}})
    run(tmp_path, stop_in=2)
    run(tmp_path, resume=True, stop_in=3)
    assert newest_complete(tmp_path).step == 2


def test_other_versions_are_said(whole, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(checkpoints, "__version__", "0.0.9")
    run(part_of(whole, tmp_path, 11), resume=True)
    assert "'sp_fast': '0.0.9'" in caplog.text
    assert "last bits may differ" in caplog.text


def test_a_new_run_takes_no_folder_of_another(whole, tmp_path):
    with pytest.raises(TrainingError, match="holds checkpoint-6: resume"):
        run(part_of(whole, tmp_path, 5, 6))


@pytest.mark.parametrize("setting", checkpoints._UNFIT)
def test_settings_that_lose_something_are_refused(tmp_path, setting):
    trainer = trainer_of(tmp_path)
    setattr(trainer.args, setting, True)
    with pytest.raises(TrainingError, match=f"^{setting}=True"):
        trainer.train()


def test_an_order_that_cannot_be_drawn_again_is_refused(tmp_path):
    with pytest.raises(TrainingError, match="the order of the samples"):
        run(tmp_path, accelerator_config={"use_seedable_sampler": False})


def test_checking_the_order_draws_nothing(tmp_path):
    loader = trainer_of(tmp_path).get_train_dataloader()
    before = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    check_order(loader)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (random.getstate(), str(np.random.get_state()))


@pytest.mark.campaign  # two ranks that train with the data's own order are in test_train_distributed.py
@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"),
    reason="its Trainer loads no optimizer on several ranks of a CPU",
)
def test_two_ranks(whole, tmp_path):
    child = subprocess.run(
        [sys.executable, "-m", "tests.train_ranks", str(tmp_path)], capture_output=True, text=True, timeout=250
    )
    assert child.returncode == 0, child.stderr[-4000:]
    assert names(tmp_path / "TinyTrainer") == ["checkpoint-4", "checkpoint-5", "checkpoint-6"]
    assert {"rng_state_0.pth", "rng_state_1.pth"} < set(names(tmp_path / "TinyTrainer" / "checkpoint-6"))
    assert names(tmp_path / "fails") == ["checkpoint-1"]
    with pytest.raises(TrainingError, match="world size is 1, and was 2"):
        run(tmp_path / "TinyTrainer", resume=True)


@pytest.mark.campaign
def test_a_hundred_kills():
    child = subprocess.run([sys.executable, "-m", "tests.kill_campaign", "100"], capture_output=True, text=True)
    print(f"\n{child.stdout}")
    assert child.returncode == 0, child.stderr[-4000:]
