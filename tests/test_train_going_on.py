"""A run that goes on: what it has to share with its beginning, what may change, what it says; bad samples on the way."""

import json
import os
from dataclasses import replace

import pytest
from safetensors.torch import load_file, save_file

from sp_fast import SPProjector
from sp_fast.errors import DataError, TrainingError
from sp_fast.training import run
from sp_fast.training.estimate import estimate
from sp_fast.training.fingerprint import fingerprint
from sp_fast.training.parts import read_parts
from sp_fast.training.record import RECIPE, the_only_one
from sp_fast.training.result import FINISHED
from sp_fast.training.run import arguments, train
from tests import tiny, tiny_training
from tests.helpers import randomised
from tests.tiny_training import Watch, quiet, recipe

pytestmark = pytest.mark.usefixtures("quick_runs")


@pytest.fixture
def folder(training_folder):
    return training_folder


def settings_of(folder, **changes):
    return recipe("finetune", folder, **{"projector": str(folder / "start"), **changes})


def interrupted(folder, step=1, **changes):
    with pytest.raises(KeyboardInterrupt):
        train("finetune", settings_of(folder, **changes), quiet, [Watch(step)])


def test_a_refused_recipe_changes_nothing(folder):
    interrupted(folder)
    before = {path.name: path.read_bytes() for path in (folder / "finetune").iterdir() if path.is_file()}
    with pytest.raises(TrainingError, match="learning_rate is 0.5, and was 0.01"):
        train("finetune", settings_of(folder, learning_rate=0.5), quiet)
    assert {name: (folder / "finetune" / name).read_bytes() for name in before} == before
    assert RECIPE in before


def test_a_projector_of_another_geometry_does_not_go_on(folder):
    """Crops and pools have the same names and shapes."""
    interrupted(folder)
    config = tiny.config_of(projector={**tiny.PROJECTOR, "pyramid": "pool"}).projector
    randomised(SPProjector(config)).save_pretrained(folder / "pool")
    with pytest.raises(TrainingError, match="model is '"):
        train("finetune", settings_of(folder, projector=str(folder / "pool")), quiet)


def test_data_files_count_in_their_order(folder):
    (folder / "more").mkdir()
    other = folder / "more" / "data.json"
    other.write_text(json.dumps(tiny_training.rows(3, text_only=range(3))))
    first = folder / "data" / "data.json"
    prints = [
        fingerprint("finetune", settings_of(folder, data=files), read_parts(settings_of(folder)), 19)
        for files in ([first, other], [other, first], [first, first])
    ]
    assert prints[0] != prints[1]
    assert prints[1] != prints[2] != prints[0]


@pytest.mark.parametrize("epochs", [0.5, 1])
def test_what_was_trained_to_the_end_is_not_trained_further(folder, epochs):
    """Killed between its last checkpoint and its result."""
    changes = {"epochs": epochs, "schedule": "constant_with_warmup"}
    train("finetune", settings_of(folder, **changes), quiet)
    result = folder / "finetune" / "projector" / "model.safetensors"
    before = result.read_bytes()
    (folder / "finetune" / FINISHED).unlink()
    (folder / "finetune" / ".projector.abc").mkdir()  # as a kill while it is written leaves it
    train("finetune", settings_of(folder, **changes), quiet)
    assert result.read_bytes() == before
    assert not (folder / "finetune" / ".projector.abc").exists()
    assert len(list((folder / "finetune").glob("checkpoint-*"))) == 1


def test_a_launchers_precision_is_the_recipes(folder, monkeypatch):
    import torch

    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert arguments(settings_of(folder), 1, torch.device("cpu")).mixed_precision == "no"
    assert os.environ["ACCELERATE_MIXED_PRECISION"] == "no"


def attempt(path):
    """Whether another process may train there."""
    child = os.fork()
    if not child:
        try:
            with the_only_one(path):
                os._exit(0)
        except TrainingError:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_two_processes_do_not_share_a_folder(tmp_path):
    assert attempt(tmp_path / "run")
    with the_only_one(tmp_path / "run"):
        assert not attempt(tmp_path / "run")
        reads, stops = os.pipe()
        worker = os.fork()  # as one that reads data, and outlives the run
        if not worker:
            os.close(stops)
            os.read(reads, 1)
            os._exit(0)
    assert attempt(tmp_path / "run")
    os.close(stops)
    os.waitpid(worker, 0)


def test_other_frozen_weights_do_not_go_on(folder):
    settings = settings_of(folder)
    interrupted(folder)
    weights = folder / "lm" / "model.safetensors"
    save_file({n: t.clone().mul_(1.01) for n, t in load_file(weights).items()}, weights, metadata={"format": "pt"})
    with pytest.raises(TrainingError, match="frozen weights is '"):
        train("finetune", settings, quiet)


def test_a_run_that_does_not_fit_says_so_before_it_loads(folder, monkeypatch):
    monkeypatch.setattr(run, "estimate", estimate)
    monkeypatch.setattr(run, "free_memory", lambda: 1000)
    said = []
    monkeypatch.setattr(run.Assembly, "build", lambda *args: said.append("loaded"))
    with pytest.raises(AttributeError):
        train("finetune", recipe("finetune", folder, projector=str(folder / "start")), said.append)
    warning = next(text for text in said if text.startswith("warning: training needs about"))
    assert said.index(warning) < said.index("loaded")
    assert "choose a smaller batch_size" in warning


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_read_stops_the_run_by_its_sample(folder, workers):
    (folder / "data" / "4.png").write_bytes(b"no image")
    with pytest.raises(DataError) as raised:
        train("finetune", recipe("finetune", folder, projector=str(folder / "start"), workers=workers), quiet)
    assert str(raised.value).startswith("sample sample-")
    assert "4.png is none of PNG" in str(raised.value)
    assert "Traceback" not in str(raised.value)


def test_bad_samples_are_skipped_and_counted_where_asked(folder, caplog):
    (folder / "data" / "4.png").write_bytes(b"no image")
    rows = json.loads((folder / "data" / "data.json").read_text())
    rows[0]["image"] = "nowhere.png"
    (folder / "data" / "data.json").write_text(json.dumps(rows))
    said = []
    settings = recipe("finetune", folder, projector=str(folder / "start"), bad_samples="skip")
    train("finetune", settings, said.append)
    assert "15 samples; 1 are left out, see left_out.jsonl" in said
    left_out, *read = map(json.loads, (folder / "finetune" / "left_out.jsonl").read_text().splitlines())
    assert left_out["id"] == "sample-0"
    assert "nowhere.png" in left_out["reason"]
    assert sorted(one["reason"].split()[1] for one in read) == ["sample-14", "sample-9"]
    lines = [json.loads(line) for line in (folder / "finetune" / "log.jsonl").read_text().splitlines()]
    late = [record.getMessage() for record in caplog.records if "skipped" in record.getMessage()]
    assert sorted(text.split()[2] for text in late) == ["sample-14", "sample-9"]
    assert lines[-1]["skipped"] == 2  # of samples 4, 9 and 14 with that image the first has none


def test_a_run_that_stopped_at_a_bad_sample_goes_on_without_it(folder):
    """What its error says."""
    (folder / "data" / "4.png").write_bytes(b"no image")
    changes = {"save_steps": 1, "batch_size": 1, "group_by_length": False, "seed": 3}
    with pytest.raises(DataError, match="leave them out with --bad-samples skip, with which the run goes on"):
        train("finetune", settings_of(folder, **changes), quiet)
    done = [int(path.name.split("-")[1]) for path in (folder / "finetune").glob("checkpoint-*")]
    watch = Watch()
    train("finetune", settings_of(folder, **changes, bad_samples="skip"), quiet, [watch])
    assert min(watch.losses) == max(done, default=0) + 1


def test_a_step_without_a_good_sample_changes_nothing_and_goes_on(folder):
    (folder / "data" / "4.png").write_bytes(b"no image")
    watch = Watch()
    changes = {"batch_size": 1, "global_batch_size": 1, "bad_samples": "skip", "group_by_length": False}
    train("finetune", settings_of(folder, **changes), quiet, [watch])
    assert sum(loss == 0 for loss in watch.losses.values()) == 2
    assert len(watch.losses) == 16


@pytest.mark.parametrize("how", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "deepspeed"])
def test_a_run_that_its_processes_divide_is_not_warned_of(folder, monkeypatch, how):
    """The sum is of one that they do not."""
    monkeypatch.setattr(run, "free_memory", lambda: 1000)
    settings = settings_of(folder)
    if how == "deepspeed":
        settings = replace(settings, deepspeed=folder / "zero2.json")
    else:
        monkeypatch.setenv(how, "true")
    said = []
    run._say_memory("finetune", settings, read_parts(settings), 2, said.append)
    assert len(said) == 1
    assert said[0].startswith("about ")
