"""Two processes: they are one with the same batch, and both DDP and FSDP2 train, save and go on."""

import math

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file

from sp_fast.llava_sp.loading import load_model
from sp_fast.training.parts import read_parts
from tests import tiny_training
from tests.tiny_training import recipe
from tests.train_processes import both, in_float64, two_processes

pytestmark = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.18"),
    reason="its Trainer asks for a device cpu:0 when it loads an optimizer on several CPU processes",
)


@pytest.fixture(
    scope="module", params=[pytest.param(False, marks=pytest.mark.campaign, id="ddp"), pytest.param(True, id="fsdp2")]
)
def found(request, tmp_path_factory):
    """The folder, what one process gives, what each of two gives."""
    folder = tmp_path_factory.mktemp("two")
    tiny_training.parts(folder)
    tiny_training.data(folder / "data", 12, text_only=(1, 2, 3, 4, 5))
    tiny_training.start(folder)
    return folder, in_float64(folder, "one"), two_processes(both, folder, folder=folder, fsdp=request.param)


def test_two_processes_equal_one_with_the_same_batch(found):
    """In float64, over all steps of an epoch; processes with text alone beside some with images."""
    _, (losses, norms, alone), two = found
    for (others, other_norms, other), *_ in two:
        assert others.keys() == losses.keys()
        assert all(math.isclose(others[step], loss, rel_tol=1e-9) for step, loss in losses.items())
        for part, norm in norms.items():
            torch.testing.assert_close(other_norms[part], norm, rtol=1e-9, atol=0)
        assert other.keys() == alone.keys()
        for name, tensor in alone.items():
            torch.testing.assert_close(other[name], tensor, rtol=1e-8, atol=1e-11)


def test_an_interrupted_run_goes_on_bit_for_bit(found):
    folder, _, ((_, (through, stopped, went_on), _), _) = found
    assert len(through) == 3
    assert min(went_on) == 3
    assert {**stopped, **went_on} == through
    for name in ("projector/model.safetensors", "adapter/adapter_model.safetensors"):
        one, other = (load_file(folder / run / name) for run in ("through", "stopped"))
        assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())


def test_a_checkpoint_holds_what_is_trained_whole(found):
    folder, (_, _, alone), _ = found
    held = load_file(folder / "through" / "checkpoint-3" / "trained.safetensors")
    assert {name: tensor.shape for name, tensor in held.items()} == {name: t.shape for name, t in alone.items()}


def test_a_whole_language_model_is_trained_and_written(found):
    folder, _, ((*_, losses), _) = found
    loaded = load_model(folder / "whole" / "model")
    assert {str(parameter.dtype) for parameter in loaded.model.parameters()} == {"torch.bfloat16"}
    before, after = (
        read_parts(recipe("finetune", folder, projector=str(folder / "start"))).rest,
        loaded.model.state_dict(),
    )
    same = {name for name, tensor in before.items() if torch.equal(tensor.load().bfloat16(), after[name])}
    assert {name for name in before if "vision_tower" in name} <= same
    assert not {name for name in same if "proj.weight" in name and "vision_tower" not in name}
    assert loaded.model.config.text_config.use_cache
    assert any(loss != torch.tensor(loss).bfloat16().item() for loss in losses.values())  # summed in float32
