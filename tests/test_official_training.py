"""Training an accelerated stand-in of the official model: losses, gradients, optimizers, PEFT, and what is saved."""

import copy
import subprocess
import sys
import warnings
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from sp_fast import SPProjector
from sp_fast.bench.accuracy import compare
from sp_fast.errors import OfficialModelError
from sp_fast.official import accelerate, restore
from tests import standin
from tests.helpers import equal

DFI = "conv336_cropping_sfe_dfi"
POOL = "conv336_adptive_pooling_fuse_49"
EXACT = 1e-11  # of float64, after a few steps


def double(variant=DFI, seed=0, **settings):
    return standin.randomise(standin.Model(variant, **settings), seed).double().eval()


def batch(model, seed=0):
    given = standin.batch(model, 2, seed)
    return given | {"images": given["images"].to(model.lm_head.weight.dtype)}


def assert_same(a, b, tolerance=EXACT):
    assert (a - b).norm() <= tolerance * b.norm(), ((a - b).norm() / b.norm()).item()


def gradients(model, given):
    """Loss and gradients of one step, by name."""
    model.zero_grad()
    loss = model(**given) * getattr(model, "loss_scale", 1.0)
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(found, expected):
    """Equal but for rounding in float64; a key's bias has no gradient but rounding, since softmax is blind to it."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        if "key_projector" in name and name.endswith("bias"):
            assert max(tensor.norm(), found[name].norm()) < EXACT * expected[name.replace("bias", "weight")].norm()
        else:
            assert_same(found[name], tensor)


@pytest.mark.parametrize("variant", sorted(standin.ENCODERS))
def test_loss_and_gradients_of_a_step(variant):
    model = double(variant)
    given = batch(model)
    expected = gradients(copy.deepcopy(model), given)
    assert_same_gradients(gradients(accelerate(model), given), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("variant", [DFI, POOL])
def test_loss_and_gradients_to_rounding(variant, dtype):
    pools = {}
    for seed in range(8):
        model = standin.randomise(standin.Model(variant), seed).to(dtype).train()
        model.loss_scale = 2.0**14  # small gradients would vanish in float16 on all sides
        given = standin.batch(model, 2, seed)
        given["images"] = given["images"].to(dtype)
        exact = copy.deepcopy(model).double()
        runs = {"torch": gradients(model, given)}
        runs["fast"] = gradients(accelerate(copy.deepcopy(model)), given)
        runs["exact"] = gradients(exact, given | {"images": given["images"].double()})
        for kind, found in runs.items():
            for name, tensor in found.items():
                group = "projector" if "conv_" in name or "_projector" in name else "rest"
                pools.setdefault(group, {}).setdefault(kind, []).append(tensor.flatten())
    for name, pool in pools.items():
        result = compare(name, *(torch.cat(pool[kind]) for kind in ("fast", "torch", "exact")), dtype)
        assert result.passed, result


def test_frozen_convolutions_get_no_gradient():
    """The official training code freezes some of them (CM, with its committed string) and trains the others."""
    model = accelerate(double())
    core, given = model.model, batch(model)
    for frozen in (core.conv_CM, core.conv_8):
        frozen.requires_grad_(False)
    found = gradients(model, given)
    assert not {"model.conv_CM.weight", "model.conv_8.weight"} & found.keys()
    assert found["model.conv_4.weight"].norm() > 0
    core.requires_grad_(False)
    assert gradients(model, given).keys() == {"loss", "lm_head.weight"}


def test_a_gradient_lies_as_its_parameter_and_adds_up():
    model = accelerate(double())
    given = batch(model)
    once = {name: g.clone() for name, g in gradients(model, given).items()}
    for name, p in model.named_parameters():
        assert p.grad is None or p.grad.stride() == p.stride(), name
    model(**given).backward()
    for name, p in model.named_parameters():
        assert p.grad is None or torch.allclose(p.grad, 2 * once[name]), name


OPTIMIZERS = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=False),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9),
}


def train(model, optimizer, steps, change=lambda step: None):
    losses = []
    for step in range(steps):
        change(step)
        optimizer.zero_grad()
        loss = model(**batch(model, step))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def trained_alike(models, losses):
    start = dict(double().named_parameters())
    assert_same(losses[0], losses[1])
    for (name, a), b in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert_same(a, b, 1e-9)
        assert a.dim() == 1 or not a.requires_grad or not torch.equal(a, start[name]), name


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_optimizers_step_alike(kind):
    models = double(), accelerate(double())
    losses = [train(model, OPTIMIZERS[kind](model.parameters()), 4) for model in models]
    trained_alike(models, losses)


@pytest.mark.parametrize("kind", ["AdamW", "AdamW foreach", "SGD"])
def test_accelerated_in_mid_run_and_restored_again(kind):
    models = double(), double()
    changes = {1: accelerate, 3: restore}
    losses = [
        train(models[0], OPTIMIZERS[kind](models[0].parameters()), 5),
        train(models[1], OPTIMIZERS[kind](models[1].parameters()), 5, lambda i: changes.get(i, id)(models[1])),
    ]
    trained_alike(models, losses)


def test_under_checkpointing_and_autocast():
    model = double()
    x = batch(model)["images"]
    expected = torch.autograd.grad(model.encode_images(x).square().mean(), model.model.conv_12.weight)[0]
    accelerate(model)
    tokens = torch.utils.checkpoint.checkpoint(model.encode_images, x, use_reentrant=False)
    assert_same(torch.autograd.grad(tokens.square().mean(), model.model.conv_12.weight)[0], expected)
    model.float()
    with torch.autocast("cpu", torch.bfloat16):
        tokens = model.encode_images(x.float())
    assert tokens.dtype == torch.bfloat16
    assert_same(tokens.double(), restore(model).double().encode_images(x), 0.02)


def flatten(model):
    """All parameters into one buffer, as DeepSpeed's ZeRO stages 1 and 2 do."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    flat = torch.cat([p.data.flatten() for p in parameters])
    for p, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.data = part.view(p.shape)
    return flat


@pytest.mark.parametrize("first", ["flattened", "accelerated"])
def test_weights_in_a_flat_buffer_stay_there(first):
    model, plain = double(), double()
    given = batch(model)
    if first == "accelerated":
        accelerate(model)
    flat = flatten(model)
    if first == "flattened":
        accelerate(model)
    with pytest.warns(UserWarning, match="buffer of another owner"):
        found = gradients(model, given)
    expected = gradients(plain, given)
    assert_same_gradients(found, expected)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        before = model.encode_images(given["images"])
        flat.mul_(0.9)
        after = model.encode_images(given["images"])
        assert not torch.allclose(before, after)
        assert_same(after, restore(model).encode_images(given["images"]))
    storage = flat.untyped_storage().data_ptr()
    assert all(p.untyped_storage().data_ptr() == storage for p in model.parameters() if p.requires_grad)


def adapted(model, **settings):
    torch.manual_seed(1)
    config = peft.LoraConfig(r=2, init_lora_weights=False, **settings)
    return peft.get_peft_model(model, config).eval()


@pytest.mark.parametrize("order", ["accelerate first", "adapters first"])
@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": r".*layers\.0\.0"},
        {"target_modules": r".*(mm_projector\.0|conv_linear\.1|query_projector\.1|layers\.0\.0)"},
        {"target_modules": r".*layers\.0\.0", "modules_to_save": ["conv_8", "conv_CM", "conv_linear"]},
    ],
    ids=["language model", "projector too", "modules to save"],
)
@pytest.mark.parametrize("variant", [DFI, POOL])
def test_lora(variant, settings, order):
    """The official run wraps first, then unfreezes the projector. Nothing of an adapter is passed by."""
    plain, model = adapted(double(variant), **settings), double(variant)
    if order == "accelerate first":
        model = adapted(accelerate(model), **settings)
    else:
        model = accelerate(adapted(model, **settings))
    for wrapped in (plain, model):
        for name, p in wrapped.named_parameters():
            if "lora_" not in name and any(part in name for part in ("mm_projector", "conv_", "query_")):
                p.requires_grad_("original_module" not in name)
    given = batch(plain.get_base_model())
    expected, found = gradients(plain, given), gradients(model, given)
    assert any("lora_" in name for name in found)
    assert_same_gradients(found, expected)
    with torch.no_grad(), plain.disable_adapter(), model.disable_adapter():
        assert_same(model.encode_images(given["images"]), plain.encode_images(given["images"]))
    with torch.no_grad():
        merged = plain.merge_and_unload(), model.merge_and_unload()
        assert_same(merged[1].encode_images(given["images"]), merged[0].encode_images(given["images"]))
    restore(merged[1])
    assert equal(merged[1].state_dict(), merged[0].state_dict())
    assert not any(module._state_dict_hooks for module in merged[1].modules())


def test_a_copy_to_save_does_not_overwrite_its_original():
    model = adapted(accelerate(double()), target_modules=r".*layers\.0\.0", modules_to_save=["conv_8"])
    wrapper, x = model.get_base_model().model.conv_8, batch(double())["images"]
    original = wrapper.original_module.weight.clone()
    with torch.no_grad():
        wrapper.modules_to_save["default"].weight.mul_(2)
        model.encode_images(x)
    assert torch.equal(wrapper.original_module.weight, original)
    assert torch.equal(wrapper.modules_to_save["default"].weight, 2 * original)


def test_an_adapter_on_a_convolution_is_refused():
    model = adapted(double(), target_modules=r".*conv_8")
    with pytest.raises(OfficialModelError, match="conv_8 is a Conv2d that does more than"):
        accelerate(model)


LOAD = """
import sys, torch
sys.modules["sp_fast"] = None
sys.path.insert(0, {root!r})
from tests import standin
images, out = torch.load({folder!r} + "/images.pt"), {{}}
for name in {names!r}:
    model = standin.Model({variant!r}).double()
    state = torch.load({folder!r} + "/" + name, weights_only=True)
    state = {{k.removeprefix("base_model.model."): v for k, v in state.items()}}
    lost = model.load_state_dict(state, strict=False)
    assert not lost.unexpected_keys, lost
    assert not [k for k in lost.missing_keys if any(part in k for part in ("conv_", "_projector"))], lost
    assert model.model.conv_20.weight.is_contiguous()
    out[name] = model.encode_images(images)
torch.save(out, {folder!r} + "/out.pt")
"""


def test_what_is_saved_after_accelerated_training_loads_without_this_package(tmp_path):
    model = accelerate(double())
    given = batch(model)
    train(model, torch.optim.AdamW(model.parameters(), lr=1e-2), 2)
    expected = model.encode_images(given["images"]).detach()
    files = {"full.bin": standin.full_file(model), "model.bin": standin.adapter_file(model)}
    lora = adapted(model, target_modules=r".*layers\.0\.0")
    for name, p in lora.named_parameters():
        p.requires_grad_("conv_" in name or "_projector" in name or "lora_" in name)
    files["non_lora_trainables.bin"] = standin.non_lora_trainables(lora)
    torch.save(given["images"], tmp_path / "images.pt")
    features = model.model.vision_tower(given["images"])[1]
    for name, state in files.items():
        torch.save(state, tmp_path / name)
        size = sum(v.numel() * v.element_size() for v in state.values())
        assert (tmp_path / name).stat().st_size < size + 50_000, name
        assert_same(SPProjector.from_official(tmp_path / name)(features), expected)
    root = str(Path(standin.__file__).parent.parent)
    code = LOAD.format(root=root, variant=DFI, folder=str(tmp_path), names=list(files))
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    assert found.keys() == files.keys()
    assert_same(found["full.bin"], expected)  # the others do not hold the frozen tower


def test_what_is_saved_as_safetensors(tmp_path):
    model = accelerate(double())
    train(model, torch.optim.AdamW(model.parameters(), lr=1e-2), 1)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    assert equal(load_file(tmp_path / "model.safetensors"), restore(model).state_dict())


def test_any_resolution_tiles_in_a_training_step():
    model = double(merge="spatial_unpad")
    given = standin.batch(model)
    tiles = [torch.randn(1 + n, 3, 336, 336).double() for n in (3, 4)]
    given |= {"images": tiles, "sizes": [(700, 333), (640, 601)], "grids": [(3, 1), (2, 2)]}
    expected = gradients(model, given)
    found = gradients(accelerate(model), given)
    assert "model.image_newline" in found
    assert_same_gradients(found, expected)
