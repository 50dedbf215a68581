"""A checkpoint is saved whole, or not at all and with an error, and what was there stays."""

import io
import os
import resource
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from sp_fast.errors import TrainingError
from sp_fast.training import checkpoints, trained
from sp_fast.training.manifest import verify
from sp_fast.training.run_folder import newest_complete, remove_leftovers
from tests.train_standin import Net, TinyTrainer, names, part_of, run, same_end, trainer_of


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Twelve steps, a checkpoint after each."""
    return run(tmp_path_factory.mktemp("whole"))


# What a save asks of the system and of the libraries that write; each call of each is made to fail in its turn.
WRITING = [
    (os, "mkdir"), (os, "rename"), (os, "fsync"), (os, "open"), (os, "rmdir"), (io, "open"), (torch, "save"),
    (trained, "save_file"), (shutil, "disk_usage"), (os, "lstat"), (os, "scandir"),
]  # fmt: skip


class Faults:
    """Counts those calls, and fails from the ``first`` on: once, or every time as a full disk does."""

    def __init__(self, patch, first, once):
        self.calls, self.first, self.once = 0, first, once
        for module, name in WRITING:
            patch.setattr(module, name, self._faulty(getattr(module, name)))
        patch.setattr("builtins.open", io.open)

    def _faulty(self, original):
        def call(*args, **kwargs):
            self.calls += 1
            if self.calls == self.first or (self.calls > self.first and not self.once):
                raise OSError(28, "No space left on device")
            return original(*args, **kwargs)

        return call


def save_with_faults(trainer, folder, first, once):
    """How many calls there were, and whether the save raised."""
    trainer.args.output_dir, trainer._whole = str(folder), [folder / "checkpoint-1"]
    with pytest.MonkeyPatch.context() as patch:
        faults = Faults(patch, first, once)
        try:
            trainer._save_checkpoint(trainer.model, None)
        except TrainingError as error:
            return faults.calls, str(error)
    return faults.calls, None


@pytest.mark.parametrize("once", [True, False])
def test_a_save_that_fails_anywhere_leaves_the_older_ones(whole, tmp_path, once):
    trainer = run(tmp_path / "origin", stop_in=2)
    calls, _ = save_with_faults(trainer, part_of(whole, tmp_path / "none", 1), 10**9, once)
    assert calls > 30
    for first in range(1, calls + 1):
        folder = part_of(whole, tmp_path / f"{first}", 1)
        _, error = save_with_faults(trainer, folder, first, once)
        found = newest_complete(folder)
        if error is not None:
            assert f"{folder}/checkpoint-1, the last whole one" in error
            assert "No space left" in error
        assert found.rejected == ()
        assert found.step in ((2,) if error is None else (1, 2)), first
        assert all(name.startswith((".saving-", ".removing-", "checkpoint-")) for name in names(folder))
        remove_leftovers(folder)
        assert names(folder) == [f"checkpoint-{step}" for step in range(1, found.step + 1)]
    part = run(tmp_path / "1", resume=True)
    assert same_end(whole, part)


def test_a_disk_too_small_is_known_before(tmp_path, monkeypatch):
    run(tmp_path, stop_in=2)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(
        TrainingError, match=r"needs 0.017 GB .the disk has 0.000 GB free.*checkpoint-1, the last whole"
    ):
        run(tmp_path, resume=True)
    assert names(tmp_path) == ["checkpoint-1"]
    with pytest.raises(TrainingError, match="none was saved yet"):
        run(tmp_path / "new")
    assert trained.trained_bytes(Net()) == 12 * (36 + 6 + 6 + 6)  # in float32 with both moments; without frozen ones


@pytest.mark.parametrize("limit", [100, 2000, 6000])  # within the weights, the optimizer, the random states
def test_a_disk_that_fills_up_while_writing(tmp_path, limit):
    trainer = run(tmp_path, stop_in=2)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(TrainingError, match="checkpoint-2 was not saved.*checkpoint-1, the last whole one"):
            trainer._save_checkpoint(trainer.model, None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == ["checkpoint-1"]
    assert newest_complete(tmp_path).step == 1


def test_everything_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    """Which no kill can show: the system writes what a dead process left, and a power cut does not."""
    done = []
    sync, rename = os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda fd: (done.append(str(Path(f"/proc/self/fd/{fd}").readlink())), sync(fd)))
    monkeypatch.setattr(os, "rename", lambda old, new: (done.append((str(old), str(new))), rename(old, new)))
    run(tmp_path, stop_in=2)
    written, final = f"{tmp_path}/.saving-checkpoint-1/checkpoint-1", tmp_path / "checkpoint-1"
    named = done.index((written, str(final)))
    assert set(done[:named]) == {written, *(f"{written}/{name}" for name in names(final))}
    assert done[named - 2 : named] == [f"{written}/manifest.json", written]  # the manifest last, and then the names
    assert done[named + 1 :] == [str(tmp_path)]


def test_the_oldest_goes_once_the_newest_is_there(tmp_path, monkeypatch):
    seen = []
    original = checkpoints.shutil.rmtree
    monkeypatch.setattr(
        shutil, "rmtree", lambda path, **kwargs: (seen.append(names(tmp_path)), original(path, **kwargs))
    )
    run(tmp_path, save_total_limit=2, stop_in=5)
    assert names(tmp_path) == ["checkpoint-3", "checkpoint-4"]
    assert seen[-1] == [".removing-checkpoint-2", "checkpoint-3", "checkpoint-4"]
    assert all(verify(path) for path in tmp_path.iterdir())


def test_a_checkpoint_that_cannot_be_removed_is_named(tmp_path, monkeypatch):
    original = os.rename

    def busy(old, new):
        if ".removing-" in str(new):
            raise OSError(16, "Device or resource busy")
        original(old, new)

    monkeypatch.setattr(os, "rename", busy)
    with pytest.raises(
        TrainingError, match="checkpoint-1 is one more than save_total_limit=1 .*busy.*checkpoint-2, the"
    ):
        run(tmp_path, save_total_limit=1)
    assert newest_complete(tmp_path) == (tmp_path / "checkpoint-2", 2, ())


def test_left_overs_of_killed_saves_go_and_nothing_else(whole, tmp_path):
    part_of(whole, tmp_path, 5)
    ours = (".saving-checkpoint-6", ".removing-checkpoint-4")
    others = (".saving-notes", "saving-checkpoint-6", ".saving-checkpoint-6.txt", ".saving-checkpoint-x")
    for name in (*ours, *others):
        (tmp_path / name / "inner").mkdir(parents=True)
    (tmp_path / ".saving-checkpoint-9").symlink_to(tmp_path / "checkpoint-5")
    (tmp_path / ".saving-checkpoint-8").write_text("a file")
    assert newest_complete(tmp_path).step == 5
    run(tmp_path, resume=True, stop_in=6)
    left = {".saving-checkpoint-8", ".saving-checkpoint-9", "checkpoint-5"}
    assert set(names(tmp_path)) == {*others, *left}


def test_what_the_trainer_leaves_out_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(TinyTrainer, "_save_rng_state", lambda *_: None)
    with pytest.raises(TrainingError, match="did not write it.*rng_state.pth"):
        run(tmp_path)
    assert names(tmp_path) == []


def test_a_model_is_saved_as_ever_at_the_end(tmp_path):
    trainer = trainer_of(tmp_path, model=lambda: nn.Linear(2, 2).requires_grad_(False))
    trainer.save_model(str(tmp_path))
    assert safetensors.torch.load_file(tmp_path / "model.safetensors").keys() == {"weight", "bias"}
