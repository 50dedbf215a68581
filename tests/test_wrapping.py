"""What others wrap around a projector: PEFT, parametrizations, optimizers, DDP and FSDP2 on two processes.

tests/interpreter/test_wrapping_triton.py runs the same on the Triton kernels, with another ``backend``.
"""

import peft
import pytest
import torch
import torch.multiprocessing
from torch import nn
from torch.nn.utils import clip_grad_norm_, parametrize

from sp_fast.errors import CheckpointError
from tests.helpers import official_gradients
from tests.ranks import JOBS, build, features, work

OFFICIAL = {
    "output": "conv_linear.1",
    "patch_mlp.0": "mm_projector.0",
    "integrator.query.0.1": "query_projector.1",
}


@pytest.fixture(scope="module")
def backend():
    return "torch"


class Toy(nn.Module):
    """A model with a projector in it."""

    def __init__(self, backend):
        super().__init__()
        self.projector = build(backend)
        self.head = nn.Linear(self.projector.config.text_width, 3, bias=False)
        nn.init.eye_(self.head.weight)

    def forward(self, x):
        return self.head(self.projector(x))


def adapted(backend, **settings):
    """A toy with LoRA whose B is not zero, the same on every implementation."""
    toy = Toy(backend)
    torch.manual_seed(1)
    return peft.get_peft_model(toy, peft.LoraConfig(r=2, init_lora_weights=False, **settings))


def train(model, steps=2):
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    for step in range(steps):
        optimizer.zero_grad()
        model(features(step)).square().mean().backward()
        optimizer.step()


def test_modules_to_save_trains_a_copy_and_comes_back(backend, tmp_path):
    model, base, x = adapted(backend, target_modules=["head"], modules_to_save=["projector"]), Toy(backend), features()
    wrapper = model.base_model.model.projector
    train(model)
    saved, original = wrapper.modules_to_save["default"], wrapper.original_module
    before = dict(base.projector.named_parameters())
    for name, parameter in saved.named_parameters():
        assert parameter.grad is not None, name
        assert not torch.equal(parameter, before[name]), name
    for name, parameter in original.named_parameters():
        assert parameter.grad is None, name
        assert torch.equal(parameter, before[name]), name
    model.eval()
    with torch.no_grad():
        tokens = model(x)
        with model.disable_adapter():
            assert torch.equal(model(x), base(x))
        model.save_pretrained(tmp_path)
        again = peft.PeftModel.from_pretrained(Toy(backend), tmp_path)
        assert torch.equal(again(x), tokens)
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(x), tokens)
        assert merged.projector is saved
        saved.official_state_dict()


@pytest.mark.parametrize("place", OFFICIAL)
def test_lora_on_a_linear_layer(backend, place):
    model = adapted(backend, target_modules=[f"projector.{place}"])
    reference = adapted("reference", target_modules=[f"projector.{OFFICIAL[place]}"])
    x, base = features(), Toy(backend)
    tokens, expected = model(x), reference(x)
    torch.testing.assert_close(tokens, expected)
    assert not torch.allclose(tokens, base(x), atol=1e-3)
    found = []
    for one, output in ((model, tokens), (reference, expected)):
        output.square().mean().backward()
        found.append([parameter.grad for name, parameter in one.named_parameters() if "lora" in name])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)
    with model.disable_adapter():
        torch.testing.assert_close(model(x), base(x))
    torch.testing.assert_close(model.merge_and_unload()(x), tokens)


@pytest.mark.parametrize(
    "names",
    [["extractor.spatial_weight"], ["extractor.spatial_weight", "extractor.detail_weight"], ["output.weight"], ["patch_mlp.0.weight"]],
    ids=str,
)  # fmt: skip
def test_lora_on_a_parameter(backend, names):
    """PEFT parametrizes it for the time of each forward."""
    model = adapted(backend, target_modules=[], target_parameters=[f"projector.{name}" for name in names])
    x, base = features(), Toy(backend)
    tokens = model(x)
    assert not torch.allclose(tokens, base(x), atol=1e-3)
    tokens.square().sum().backward()
    lora = {name: parameter for name, parameter in model.named_parameters() if "lora" in name}
    assert len(lora) == 2 * len(names)
    assert all(parameter.grad.ne(0).any() for parameter in lora.values())
    # With the sums of weights and adapters as weights, where PEFT knows nothing of what a forward does with them.
    merged = model.merge_and_unload()
    plain = Toy(backend)
    plain.load_state_dict(merged.state_dict())
    torch.testing.assert_close(tokens, plain(x))
    torch.testing.assert_close(merged(x), plain(x))


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, weight):
        return weight * self.scale


@pytest.mark.parametrize("name", [f"{place}.weight" for place in OFFICIAL] + ["extractor.spatial_weight"])
def test_parametrization(backend, name):
    place, _, attribute = name.rpartition(".")
    projector, plain, x = build(backend), build(backend), features()
    parametrize.register_parametrization(projector.get_submodule(place), attribute, Scaled())
    with torch.no_grad():
        assert not torch.allclose(projector(x), plain(x), atol=1e-3)
        plain.get_parameter(name).mul_(1.5)
    tokens = projector(x)
    torch.testing.assert_close(tokens, plain(x))
    tokens.square().sum().backward()
    assert projector.get_submodule(place).parametrizations[attribute][0].scale.grad.ne(0)
    with pytest.raises(CheckpointError, match="parametrizations .* must be merged or removed first"):
        projector.official_state_dict()
    parametrize.remove_parametrizations(projector.get_submodule(place), attribute)
    torch.testing.assert_close(projector(x), plain(x))


def test_optimizers_and_clipping_take_the_gradients(backend):
    stepped = []
    for foreach in (True, False):
        projector, reference = build(backend), build("reference")
        norms = []
        for module in (projector, reference):
            module(features()).square().sum().backward()
            norms.append(clip_grad_norm_(module.parameters(), 1.0, foreach=foreach))
        torch.testing.assert_close(*norms)
        expected = official_gradients(reference)
        for name, gradient in official_gradients(projector).items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=name)
        torch.optim.AdamW(projector.parameters(), foreach=foreach).step()
        stepped.append(projector.state_dict())
    torch.testing.assert_close(*stepped)


@pytest.fixture(scope="module")
def jobs():
    return list(JOBS)


@pytest.fixture(scope="module")
def failures(backend, jobs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(work, (backend, jobs, folder), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("job", JOBS)
def test_two_processes(failures, job):
    for rank, failed in enumerate(failures):
        assert job not in failed, f"rank {rank}: {failed[job]}"
