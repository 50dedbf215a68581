"""The spatial task's folder: the same for the same seed, whole or not there, and fit for training."""

import hashlib
import json
import multiprocessing
import os
import shutil
import signal

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from typer.testing import CliRunner

from sp_fast.cli import app
from sp_fast.errors import DataError
from sp_fast.training.check_data import check_data
from sp_fast.training.encoding import Encoder
from sp_fast.training.examples import Examples
from sp_fast.training.task.make import Task, make_task
from sp_fast.training.task.sheet import _draw, draw_sheet
from sp_fast.training.task.words import TYPES
from tests import task_checker, tiny
from tests.task_files import SPLITS, read

SMALL = Task(seed=5, train=14, held_out=14, captions=14)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    out = tmp_path_factory.mktemp("task") / "out"
    make_task(SMALL, out)
    return out


def files_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_same_files_whoever_draws(small, tmp_path):
    described = make_task(SMALL, tmp_path / "out", workers=2)
    assert files_of(tmp_path / "out") == files_of(small)
    assert described == json.loads((small / "task.json").read_text())


def test_another_seed_is_another_task(small, tmp_path):
    make_task(Task(seed=6, train=14, held_out=14, captions=14), tmp_path / "out")
    before, after = files_of(small), files_of(tmp_path / "out")
    assert before.keys() == after.keys()
    assert not [path for path in before if before[path] == after[path]]


def test_a_longer_task_begins_like_a_shorter_one(small, tmp_path):
    make_task(Task(seed=5, train=1, held_out=1, captions=2), tmp_path / "out")
    for split, rows in (("train", 1), ("held_out", 8), ("captions", 2)):
        assert read(tmp_path / "out", split) == read(small, split)[:rows]
    name = "images/held_out/000000.png"
    assert (tmp_path / "out" / name).read_bytes() == (small / name).read_bytes()


def test_no_image_is_shared(tmp_path):
    make_task(Task(train=30, held_out=30, captions=30, size=64), tmp_path / "out")
    images = list((tmp_path / "out").rglob("images/*/*.png"))
    pixels = {hashlib.sha256(np.asarray(Image.open(path)).tobytes()).digest() for path in images}
    assert len(pixels) == len(images) == 90
    named = {row["image"] for split in SPLITS for row in read(tmp_path / "out", split)}
    assert named == {path.relative_to(tmp_path / "out").as_posix() for path in images}


@pytest.mark.parametrize(
    ("split", "template"), [("train", "vicuna_v1"), ("held_out", "vicuna_v1"), ("captions", "plain")]
)
def test_training_can_read_it(split, template, small):
    encoder = Encoder(tiny.processor_of(tiny.config_of()), template, max_length=2048)
    report = check_data(Examples([small / f"{split}.json"], small, encoder, "skip"))
    assert report.bad == ()
    assert report.truncated == 0
    assert report.good == report.images == (14 * 8 if split == "held_out" else 14)


def test_nothing_is_overwritten(small, tmp_path):
    before = files_of(small)
    with pytest.raises(DataError, match="is there already: write to another folder"):
        make_task(SMALL, small)
    assert files_of(small) == before
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match="is there already"):
        make_task(SMALL, tmp_path / "link")


@pytest.mark.timeout(60)  # all images would take longer
@pytest.mark.parametrize("workers", [0, 1])
def test_an_interruption_leaves_nothing(workers, tmp_path, monkeypatch):
    drawing, remove = [], shutil.rmtree

    def interrupt(done, total):
        assert total == 40_002
        if done == 20:
            raise KeyboardInterrupt

    def watched(path, **kwargs):
        drawing.append(multiprocessing.active_children())
        remove(path, **kwargs)

    monkeypatch.setattr(shutil, "rmtree", watched)
    with pytest.raises(KeyboardInterrupt):
        make_task(Task(train=1, held_out=1, captions=40_000, size=64), tmp_path / "out", workers, interrupt)
    assert drawing == [[]]  # nobody writes into what is being removed
    assert not list(tmp_path.iterdir())


def test_a_killed_worker_is_said(tmp_path):
    def kill(done, total):
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGKILL)

    with pytest.raises(DataError, match="was killed: free memory"):
        make_task(Task(train=1, held_out=1, captions=4000), tmp_path / "out", workers=1, progress=kill)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"seed": -1}, "seed=-1 must be 0 or more"),
        ({"train": 0}, "train=0 must be 1 image or more"),
        ({"held_out": 0}, "held_out=0 must be"),
        ({"captions": -3}, "captions=-3 must be"),
        ({"size": 63}, "size=63 must be 64 to 1024 pixels"),
        ({"size": 1025}, "size=1025 must be"),
    ],
)
def test_what_cannot_be_made_is_said(given, message):
    with pytest.raises(DataError, match=message):
        Task(**given)


def test_the_command(tmp_path):
    words = [
        "train",
        "make-task",
        "--train=1",
        "--held-out=2",
        "--captions=1",
        "--size=64",
        "--seed=3",
        f"--out={tmp_path / 'a'}",
    ]
    out = CliRunner().invoke(app, [*words, "--json"])
    assert out.exit_code == 0, out.output
    assert json.loads(out.stdout) == json.loads((tmp_path / "a" / "task.json").read_text())
    assert json.loads(out.stdout)["size"] == 64
    out = CliRunner().invoke(app, words)
    assert (out.exit_code, out.stdout) == (1, "")
    assert "sp-fast train make-task: " in out.stderr
    assert "is there already" in out.stderr
    out = CliRunner().invoke(app, [*words[:-1], f"--out={tmp_path / 'b'}"], terminal_width=100)
    assert out.exit_code == 0
    assert all(name in out.stdout for name in (*TYPES, "25.0%", "11.1%", "2 x 2", "0-1"))
    out = CliRunner().invoke(app, [*words[:-1], f"--out={tmp_path / 'c'}", "--workers=-1"])
    assert out.exit_code == 1
    assert "workers=-1 must be 0 or more" in out.stderr


def test_the_contact_sheet(small, tmp_path):
    with Image.open(small / "samples.png") as image:
        assert image.width > image.height > 200
        assert np.asarray(image).std() > 20
    draw_sheet(small, tmp_path / "a.svg", 3)
    draw_sheet(small, tmp_path / "b.svg", 3)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert (tmp_path / "a.svg").read_text().count("<image ") == 3
    axis = Figure().subplots()
    row = next(row for row in read(small, "held_out") if row["type"] == "box")
    _draw(axis, small, [row])
    things, size = task_checker.regions(small / row["image"])
    edges = np.array(task_checker.box(row["conversations"][0]["value"], things, size))
    assert abs(axis.patches[0].get_bbox().extents - (edges - 0.5)).max() < size / 200  # written in hundredths
    pair = [row for row in read(small, "held_out") if row["type"] == "presence"][:2]
    _draw(axis, small, pair)
    said = axis.get_title().replace("\n", " ")
    for row in pair:
        assert f"{row['conversations'][0]['value'].removeprefix('<image>')[1:]} {row['answer']}" in said
    with pytest.raises(DataError, match="cannot be drawn to .* give a folder that make-task has made"):
        draw_sheet(tmp_path, tmp_path / "c.svg")
    assert not (tmp_path / "c.svg").exists()
