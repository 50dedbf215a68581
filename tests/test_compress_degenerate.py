"""`sp-fast compress` of what has nothing in it, or too much: what is written is finite and loads, all else is said."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from sp_fast import SPProjector
from sp_fast.cli import app
from sp_fast.compress.features import split
from sp_fast.compress.metric import metric_of
from sp_fast.errors import ConfigError
from tests.compact_forms import SMALL
from tests.helpers import features_for, randomised

pytestmark = pytest.mark.usefixtures("few_steps")

KINDS = {
    "bottleneck": ("--rank", 12),
    "depthwise": (),
    "grouped": ("--groups", 4),
    "separable": ("--rank", 4),
    "nested": (),
    "resampled": ("--rank", 4),
}


def compressed(folder, projector, x, *words):
    """Of a projector, with features or without."""
    projector.save_pretrained(folder / "projector")
    words = [folder / "projector", "--out", folder / "out", "--json", *words]
    if x is not None:
        save_file({"features": x}, folder / "x.safetensors")
        words += ["--features", folder / "x.safetensors"]
    return CliRunner().invoke(app, ["compress", *map(str, words)])


def strictly(text):
    """JSON, which has no NaN."""

    def refused(constant):
        raise ValueError(constant)

    return json.loads(text, parse_constant=refused)


def full(dtype=torch.float32):
    return randomised(SPProjector(SMALL)).to(dtype)


def test_weights_beyond_their_type_are_not_written(tmp_path):
    x = features_for(SMALL, 8) * 1e-5
    result = compressed(tmp_path, full(torch.float16), x, "--to", "bottleneck", "--rank", 12)
    assert result.exit_code == 1
    assert "extractor.reduce_weight has NaN or infinite values as torch.float16, fitted to " in result.stderr
    assert str(tmp_path / "x.safetensors") in result.stderr
    assert not (tmp_path / "out").exists()


def test_sums_of_weights_beyond_their_type_are_not_written(tmp_path):
    """A cell of the one kernel is the sum of the weights in its bin."""
    projector = full(torch.float16)
    projector.extractor.spatial_weight.data.fill_(3e4)
    result = compressed(tmp_path, projector, None, "--to", "resampled", "--base-kernel", 2)
    assert result.exit_code == 1
    assert "spatial_weight has NaN or infinite values as torch.float16, fitted to the weights alone" in result.stderr
    assert not (tmp_path / "out").exists()


def test_sizes_beyond_the_type_are_left_out_of_the_plot(tmp_path):
    x = features_for(SMALL, 8) * 1e-4
    x[..., 1:] *= 1e-6  # which a second rank would have to undo
    words = ("--to", "bottleneck", "--rank", 1, "--plot", tmp_path / "plot.svg")
    result = compressed(tmp_path, full(torch.float16), x, *words)
    assert result.exit_code == 0, result.output
    assert [point["value"] for point in strictly(result.stdout)["sweep"]] == [1]


@pytest.mark.parametrize("kind", KINDS)
def test_features_of_nothing(kind, tmp_path):
    result = compressed(tmp_path, full(), torch.zeros(8, 36, 16), "--to", kind, *KINDS[kind])
    assert result.exit_code == 1
    assert f"{tmp_path / 'x.safetensors'}: patch features whose mean square is 0 tell nothing" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("zeros", ["extractor", ""])
def test_weights_of_nothing(kind, zeros, tmp_path):
    """Those of the extractor, or all."""
    projector = full()
    for name, parameter in projector.named_parameters():
        if name.startswith(zeros):
            parameter.data.zero_()
    words = ("--to", kind, *KINDS[kind], "--distill", 2)
    result = compressed(tmp_path, projector, features_for(SMALL, 8), *words)
    assert result.exit_code == 0, result.output
    assert all(error["relative"] < 1e-6 for error in strictly(result.stdout)["errors"])
    SPProjector.from_pretrained(tmp_path / "out")


def test_features_that_are_too_large(tmp_path):
    """For float32, for a square, for the full projector."""
    with pytest.raises(ConfigError, match="has NaN or infinite values"):
        split(features_for(SMALL, 4, torch.float64) * 1e300, "these", SMALL)
    with pytest.raises(ConfigError, match="whose mean square is inf"):
        metric_of(features_for(SMALL, 4) * 1e30, SMALL)
    result = compressed(tmp_path, full(), features_for(SMALL, 4) * 1e25, "--quantize", "int8")
    assert result.exit_code == 1
    assert f"{tmp_path / 'x.safetensors'}: of these the full projector itself makes NaN" in result.stderr
