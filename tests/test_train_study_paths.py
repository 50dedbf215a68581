"""`sp-fast train study-paths`: the fast projector's path beside the reference's, and reorderings of every arm."""

import json

import pytest
import torch
from typer.testing import CliRunner

from sp_fast import SPProjector
from sp_fast.cli import app
from sp_fast.training.study import paths
from sp_fast.training.study.arms import ARMS
from sp_fast.training.study.drift import Reordered, Run, reference_of, reorderings
from tests import study_folder
from tests.helpers import features_for, randomised


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return study_folder.make(tmp_path_factory.mktemp("paths"))


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(paths, "_REORDERINGS", 1)
    with study_folder.quick():
        yield


def call(folder, *words):
    given = {"task": "task", "parts": "parts", "out": "out", "recipe": "minute"}
    options = [f"--{name}={folder / value}" for name, value in given.items()]
    words = ("--workers=0", "--seeds=1", "--steps=3", *words)
    return CliRunner().invoke(app, ["train", "study-paths", *options, *words])


@pytest.mark.parametrize(
    "name", [name for name, arm in ARMS.items() if not name.startswith("tfm") and arm.table != "compact"]
)
def test_a_reordered_reference_is_the_same_function(name):
    projector = randomised(SPProjector(ARMS[name].config(12, 6, 10), dtype=torch.float64))
    features = features_for(projector.config, dtype=torch.float64)
    (order,) = reorderings(projector.config, 1)
    reordered = Reordered(reference_of(projector), order)
    torch.testing.assert_close(reordered(features), reference_of(projector)(features))
    assert any(not torch.equal(order[axis], order[axis].sort().values) for axis in "CDMH")
    found = paths.official_parameters(reordered.inner, order)
    for key, expected in paths.official_parameters(projector).items():
        assert torch.equal(found[key], expected)


def test_the_rule_holds(folder, monkeypatch):
    out = call(folder, "--arm=crop-dfi", "--json")
    assert out.exit_code == 0, out.output
    (line,) = json.loads(out.stdout)
    assert line["holds"]
    assert {name: len(losses) for name, losses in line["losses"].items()} == {
        "fast": 3,
        "reference": 3,
        "reordered 1": 3,
    }
    assert len(set(line["losses"]["reference"])) == 3
    assert all(drift < 1e-5 for form in line["drift"].values() for drift in form.values())
    assert (folder / "out" / "paths.svg").stat().st_size > 5000
    assert "0 of 1 runs to go" in call(folder, "--arm=crop-dfi").stderr
    out = call(folder, "--arm=crop-dfi", "--steps=4")
    assert (out.exit_code, "another study: steps was 3 and is 4" in out.stderr) == (1, True)

    def drifting(recipe, form, **kwargs):
        """A hundredth of the reference's reordered sums' drift more than the fast one may have."""
        far = {paths.reference_of: 0, paths.fast_form: 2.01e-3}.get(form, 1e-3)
        return Run(torch.tensor([2.0, 1 + far]), {"any": torch.ones(3)})

    monkeypatch.setattr(paths, "path", drifting)
    out = call(folder, "--arm=crop")
    assert out.exit_code == 1
    assert ["holds" in text for text in out.stdout.splitlines() if "crop" in text] == [True, False]
    assert out.stdout.count("BROKEN") == 1


def test_transformer_blocks_are_refused(folder):
    out = call(folder, "--arm=tfm-crop")
    assert (out.exit_code, "the arm 'tfm-crop' has transformer blocks" in out.stderr) == (1, True)
