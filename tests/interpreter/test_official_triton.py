"""An accelerated stand-in of the official model on the Triton kernels: packed views in, gradients of the views out."""

import copy

import pytest
import torch

from sp_fast.bench.accuracy import compare
from sp_fast.official import accelerate
from tests import standin
from tests.test_official_training import gradients


@pytest.mark.campaign
@pytest.mark.parametrize("variant", ["conv336_3_tokens"])
def test_tokens_and_gradients(variant):
    model = standin.randomise(standin.Model(variant)).eval()
    given = standin.batch(model, 1)
    with torch.no_grad():
        model.model.vision_tower.position.mul_(0.1)
    exact = copy.deepcopy(model).double()
    runs = {"torch": gradients(model, given)}
    accelerate(model, backend="triton")
    assert model.encode_images.__self__.projector.backend.name == "triton"
    runs["fast"] = gradients(model, given)
    runs["exact"] = gradients(exact, given | {"images": given["images"].double()})
    names = [name for name in runs["exact"] if "conv_" in name]
    result = compare("convolutions", *(torch.cat([runs[kind][n].flatten() for n in names]) for kind in ("fast", "torch", "exact")), torch.float32)  # fmt: skip
    assert result.passed, result
    assert abs(runs["fast"]["loss"] - runs["exact"]["loss"]) < 1e-5
