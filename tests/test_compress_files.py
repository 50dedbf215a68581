"""Files of `sp-fast compress`: what it reads stays, a plot takes nobody else's place, and costs no compression."""

from __future__ import annotations

import shutil

import pytest
from safetensors.torch import save_file
from typer.testing import CliRunner

from sp_fast import SPProjector
from sp_fast.cli import app
from sp_fast.compress.job import Compression
from tests import tiny
from tests.compact_forms import SMALL
from tests.helpers import features_for, randomised

pytestmark = pytest.mark.usefixtures("few_steps")


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A projector and features."""
    root = tmp_path_factory.mktemp("compress_files")
    randomised(SPProjector(SMALL)).save_pretrained(root / "projector")
    save_file({"features": features_for(SMALL, 8)}, root / "features.safetensors")
    return root


def run(here, out, *words):
    return CliRunner().invoke(app, ["compress", str(here / "projector"), "--out", str(out), *map(str, words)])


def test_force_spares_what_is_read(here, tmp_path):
    """Features, or images, in the folder that would be replaced."""
    out = tmp_path / "out"
    assert run(here, out, "--to", "depthwise").exit_code == 0
    shutil.copy(here / "features.safetensors", out)
    tiny.image().save(out / "0.png")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    images = tmp_path / "images"
    images.mkdir()
    for i in range(3):
        tiny.image(i).save(images / f"{i}.png")
    (images / "other.png").symlink_to(out / "0.png")
    for words in (("--features", out / "features.safetensors"), ("--images", images, "--vision-tower", tmp_path)):
        result = run(here, out, "--to", "depthwise", "--force", *words)
        assert result.exit_code == 1
        assert "which is read: write to another folder" in result.stderr
        assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_a_plot_takes_nobody_elses_place(here, tmp_path, monkeypatch):
    """What may not be drawn shows before any work."""
    words, out, plot = ("--to", "separable", "--rank", 4), tmp_path / "out", tmp_path / "plot.svg"
    plot.write_text("mine")
    out.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(Compression, "run", lambda *_: pytest.fail("worked"))
        for place, more, message in (
            (plot, (), "exists: draw to another file, or overwrite it with --force"),
            (out / "plot.svg", (), "lies in"),
            (out / "plot.svg", ("--force",), "lies in"),
        ):
            result = run(here, out, *words, "--plot", place, *more)
            assert result.exit_code == 1, result.output
            assert message in result.stderr
            assert plot.read_text() == "mine"
    assert run(here, out, *words, "--plot", plot, "--force").exit_code == 0
    assert "<svg" in plot.read_text()


def test_a_plot_costs_no_compression(here, tmp_path, monkeypatch):
    """Its title, which names a path, is no formula; where it cannot be drawn, the projector is there all the same."""
    words, out, plot = ("--to", "separable", "--rank", 4), tmp_path / "out", tmp_path / "plot.svg"
    features = shutil.copy(here / "features.safetensors", tmp_path / "im$a_$b.safetensors")
    result = run(here, out, *words, "--features", features, "--plot", plot)
    assert result.exit_code == 0, result.output
    assert "im$a_$b" in plot.read_text()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    result = run(here, tmp_path / "other", *words, "--plot", tmp_path / "other.svg")
    assert result.exit_code == 1
    assert "cannot be written (No space left on device), though all else was" in result.stderr
    assert SPProjector.from_pretrained(tmp_path / "other").config.extractor == "separable"
