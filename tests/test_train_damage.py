"""Damaged checkpoints: refused by name, and an older one is resumed from."""

import io
import os

import pytest
import torch

from sp_fast.errors import TrainingError
from sp_fast.training.manifest import Facts, verify, write_manifest
from sp_fast.training.run_folder import newest_complete
from tests.checkpoint_damage import DAMAGES
from tests.train_standin import names, part_of, run, same_end


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Twelve steps, a checkpoint after each."""
    return run(tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_refused_by_name(whole, tmp_path, damage):
    part_of(whole, tmp_path, 5, 6)
    DAMAGES[damage](tmp_path / "checkpoint-6", tmp_path / "checkpoint-5")
    found = newest_complete(tmp_path)
    assert (found.folder, found.step) == (tmp_path / "checkpoint-5", 5)
    ((path, reason),) = found.rejected
    assert path.name in ("checkpoint-6", "checkpoint-9")
    assert reason.startswith(f"{path} is no whole checkpoint, as ")
    assert reason.endswith("; resume from another checkpoint")


def test_unreadable_is_refused(whole, tmp_path, monkeypatch):
    part_of(whole, tmp_path, 5, 6)
    original = io.open

    def forbidden(path, *args, **kwargs):
        if str(path).endswith("checkpoint-6/optimizer.pt"):
            raise PermissionError(13, "Permission denied", str(path))
        return original(path, *args, **kwargs)

    monkeypatch.setattr(io, "open", forbidden)
    assert newest_complete(tmp_path).rejected[0][1].startswith(f"{tmp_path}/checkpoint-6 cannot be read ([Errno 13]")


def test_a_damaged_one_is_refused_where_it_is_asked_for(whole, tmp_path):
    part_of(whole, tmp_path, 5, 6)
    DAMAGES["optimizer.pt bit flipped midway"](tmp_path / "checkpoint-6", tmp_path / "checkpoint-5")
    with pytest.raises(TrainingError, match="checkpoint-6 .* optimizer.pt is not what was written"):
        run(tmp_path, resume=str(tmp_path / "checkpoint-6"))


class RunsWhenRead:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_code_in_a_checkpoint_is_not_run(whole, tmp_path, monkeypatch, name):
    """Under a manifest that is right."""
    monkeypatch.chdir(tmp_path)
    hostile = part_of(whole, tmp_path / "run", 5) / "checkpoint-5"
    facts = verify(hostile).facts
    torch.save({"state": RunsWhenRead()}, hostile / name)
    (hostile / "manifest.json").unlink()
    write_manifest(hostile, facts)
    with pytest.raises(TrainingError, match=r"checkpoint-5 holds something else than tensors.*nothing of it was run"):
        run(hostile.parent, resume=True)
    assert names(tmp_path) == ["run"]


def test_a_link_is_not_listed(tmp_path):
    (tmp_path / "weights").symlink_to(tmp_path.parent)
    with pytest.raises(TrainingError, match="weights is a link or a device"):
        write_manifest(tmp_path, Facts(1, 1, {}, {}))
    assert names(tmp_path) == ["weights"]


def test_a_link_is_no_checkpoint(whole, tmp_path):
    part_of(whole, tmp_path, 5)
    (tmp_path / "latest").symlink_to(tmp_path / "checkpoint-5")
    with pytest.raises(TrainingError, match="latest is no whole checkpoint, as it is no folder"):
        run(tmp_path, resume=str(tmp_path / "latest"))


def test_nothing_whole_is_an_error_and_nothing_there_is_not(whole, tmp_path):
    assert newest_complete(tmp_path / "none") == (None, 0, ())
    with pytest.raises(TrainingError, match="holds no checkpoint to resume from"):
        run(tmp_path, resume=True)
    part_of(whole, tmp_path, 5, 6)
    (tmp_path / "checkpoint-5" / "optimizer.pt").unlink()
    (tmp_path / "checkpoint-6" / "manifest.json").unlink()
    with pytest.raises(TrainingError, match=r"no checkpoint .*checkpoint-6 .*manifest.json.*checkpoint-5 .*optimizer.pt is missing"):  # fmt: skip
        run(tmp_path, resume=True)
    assert names(tmp_path) == ["checkpoint-5", "checkpoint-6"]


def test_a_damaged_one_counts_for_nothing_and_is_kept(whole, tmp_path, caplog):
    """The limit would otherwise remove the whole one that the run resumed from, and leave a damaged one."""
    part_of(whole, tmp_path, 5, 6, 7)
    for step in (6, 7):
        (tmp_path / f"checkpoint-{step}" / "optimizer.pt").unlink()
    run(tmp_path, resume=True, stop_in=8, save_total_limit=2)
    assert names(tmp_path) == ["checkpoint-6", "checkpoint-7", "replaced-1-checkpoint-6", "replaced-1-checkpoint-7"]
    assert "checkpoint-6 was there and was not resumed from; it is replaced-1-checkpoint-6 now" in caplog.text
    run(tmp_path, resume=str(tmp_path / "checkpoint-6"), stop_in=8, save_total_limit=2)
    assert "replaced-2-checkpoint-7" in names(tmp_path)
    assert newest_complete(tmp_path).step == 7


@pytest.mark.campaign
def test_a_damaged_run_goes_on_from_the_older_checkpoint(whole, tmp_path, caplog):
    caplog.set_level("INFO", "sp_fast")
    for i, (name, damage) in enumerate(DAMAGES.items()):
        part_of(whole, folder := tmp_path / f"{i}", 5, 6)
        damage(folder / "checkpoint-6", folder / "checkpoint-5")
        ((path, _),) = newest_complete(folder).rejected
        with pytest.raises(TrainingError, match=f"{path} "):
            run(folder, resume=str(path))
        caplog.clear()
        resumed = run(folder, resume=True)
        assert same_end(whole, resumed) == set(range(6, 13)), name
        said = [record.getMessage() for record in caplog.records]
        assert said[0].startswith(f"{path} is no whole checkpoint")
        assert said[1] == f"resuming from {folder}/checkpoint-5"
        assert verify(folder / "checkpoint-6").facts.step == 6
    print(
        f"\n{len(DAMAGES)} kinds of damage: {len(DAMAGES)} refused by name, {len(DAMAGES)} resumed from the older one"
    )
    assert len(DAMAGES) >= 64
