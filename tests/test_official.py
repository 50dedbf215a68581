"""accelerate and restore on a stand-in of the official model: the same numbers, the same object, nothing passed by.

tests/test_official_training.py has training, saving and PEFT.
"""

import copy
import gc
import io
import pickle
import re
import types
import weakref

import pytest
import torch
from torch import nn

from sp_fast.bench.accuracy import compare
from sp_fast.errors import OfficialModelError
from sp_fast.official import accelerate, restore
from tests import standin
from tests.helpers import golden, golden_names
from tests.test_golden import OUTPUT, assert_close

VARIANTS = sorted(standin.ENCODERS)
DFI = "conv336_cropping_sfe_dfi"
POOL = "conv336_adptive_pooling_fuse_49"


def daily_types(variant):
    """One of each variant, all of one; the transformers are torch's own on both sides. The campaign has the rest."""
    if variant == DFI:
        return torch.float32, torch.float16, torch.bfloat16
    return (torch.float32 if variant.startswith("tfm") else torch.bfloat16,)


def model_of(variant, **settings):
    return standin.randomise(standin.Model(variant, **settings)).eval()


def pixels(model, images=2):
    return standin.batch(model, images)["images"]


class Given(nn.Module):
    """A tower that has seen golden features, whatever the image."""

    def __init__(self, tower, features):
        super().__init__()
        self.tower, self.features = tower, features
        self.config, self.device, self.dtype = tower.config, "cpu", features.dtype

    def forward(self, images):
        given = self.features if len(images) == len(self.features) else self.features[:1]
        return self.tower.feature_select(nn.functional.pad(given, (0, 0, int(self.tower.cls), 0)))

    @property
    def num_patches_per_side(self):
        return self.tower.grid


def golden_model(name):
    """A stand-in with the weights of a golden file, in float64."""
    file = golden(name)
    get, config = file.metadata.get, file.config
    tower = standin.Tower(get("official_crop"), config.grid, int(get("C")), cls=get("tower") == "clip")
    kernel = int(get("dfi_kernel", 0)) or None
    switch = get("official_variant")
    widths = {"c": int(get("C")), "d": int(get("D")), "h": int(get("H"))}
    model = standin.Model(
        switch,
        merge=get("mm_patch_merge_type", "flat"),
        tower_module=Given(tower, file.features),
        kernel=kernel,
        **widths,
    ).double()
    state = {k: v.double() for k, v in file.state_dict(prefix="").items()}
    lost = model.model.load_state_dict(state, strict=False)
    assert not lost.unexpected_keys
    rest = re.compile(r"(vision_tower|embed_tokens|layers|image_newline)\b")
    assert all(rest.match(key) for key in lost.missing_keys), lost.missing_keys
    if "input.image_newline" in file.tensors:
        model.model.image_newline.data = file.tensors["input.image_newline"].double()
    return file, model.eval()


@pytest.mark.parametrize("kind", ["stand-in", "accelerated"])
@pytest.mark.parametrize("name", golden_names(anyres=False))
def test_the_official_codes_own_numbers(name, kind):
    """The stand-in gives them too, so that it stands for the official code in what follows."""
    file, model = golden_model(name)
    if kind == "accelerated":
        accelerate(model)
    images = torch.zeros(file.features.shape[0], 3, 1, 1)
    assert_close(model.encode_images(images), file.tensors["output.image_features"], OUTPUT, "tokens")


@pytest.mark.parametrize("kind", ["stand-in", "accelerated"])
@pytest.mark.parametrize("name", golden_names(anyres=True))
def test_tiles_in_the_official_order(name, kind):
    file, model = golden_model(name)
    if kind == "accelerated":
        accelerate(model)
    numbers = lambda key: tuple(map(int, re.findall(r"\d+", file.metadata[key])))  # noqa: E731
    tiles = torch.zeros(int(file.metadata["tiles"]), 3, 1, 1)
    (sequence,) = model.image_features([tiles], [numbers("image_size_wh")], [numbers("grid_wh")])
    assert_close(sequence, file.tensors["output.sequence"], OUTPUT, "sequence")


@pytest.mark.parametrize(
    ("variant", "dtype"),
    [
        pytest.param(v, d, id=f"{v}-{d}", marks=[] if d in daily_types(v) else [pytest.mark.campaign])
        for v in VARIANTS
        for d in (torch.float32, torch.float16, torch.bfloat16)
    ],
)
def test_same_tokens_to_rounding(variant, dtype):
    pools = {kind: [] for kind in ("fast", "torch", "exact")}
    for seed in range(1 if variant.startswith("tfm") else 2):  # the transformers are torch's own on both sides
        model = standin.randomise(standin.Model(variant), seed).to(dtype).eval()
        x = pixels(model).to(dtype)
        features = model.model.vision_tower(x)[1]
        exact = copy.deepcopy(model).double()
        exact.model.vision_tower = Given(exact.model.vision_tower, features.double())
        with torch.no_grad():
            pools["torch"].append(model.encode_images(x))
            pools["exact"].append(exact.encode_images(x))
            pools["fast"].append(accelerate(model).encode_images(x))
    result = compare("tokens", *(torch.stack(pools[kind]) for kind in ("fast", "torch", "exact")), dtype)
    assert result.passed, result


@pytest.mark.parametrize("variant", VARIANTS)
def test_restore_gives_the_original_object_bit_for_bit(variant):
    model = model_of(variant)
    x = pixels(model)
    tokens = model.encode_images(x)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    parameters, attributes = dict(model.named_parameters()), set(vars(model))
    names = [name for name, _ in model.named_modules()]
    accelerate(model)
    assert set(vars(model)) == attributes | {"encode_images"}
    assert [name for name, _ in model.named_modules()] == names
    assert list(model.state_dict()) == list(state)
    model.encode_images(x)
    restore(model)
    assert set(vars(model)) == attributes
    assert [name for name, _ in model.named_modules()] == names
    for name, parameter in model.named_parameters():
        assert parameter is parameters[name]
        assert parameter.is_contiguous()
        assert parameter.untyped_storage().nbytes() == parameter.numel() * parameter.element_size(), name
        assert torch.equal(parameter, state[name]), name
    assert not any(module._state_dict_hooks for module in model.modules())
    assert torch.equal(model.encode_images(x), tokens)


def held(model):
    """Bytes of the storages behind a model's parameters, each counted once."""
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    return sum(storages.values())


def tensors_alive():
    gc.collect()
    # Not the fakes that a compilation in another test may have left, which hold nothing.
    found = [o for o in gc.get_objects() if type(o) in (torch.Tensor, nn.Parameter) and not o.is_meta]
    return len(found), sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in found}.values())


def test_weights_are_held_once():
    model = model_of(DFI)
    before, alive = held(model), tensors_alive()[1]
    accelerate(model)
    assert held(model) == before
    assert tensors_alive()[1] == alive


@pytest.mark.parametrize("variant", [DFI, POOL])
def test_twenty_cycles_leak_nothing(variant):
    model = model_of(variant)
    x = pixels(model, 1)

    def cycle():
        accelerate(model)
        model.encode_images(x).sum().backward()
        model.zero_grad()
        restore(model)

    cycle()
    before = tensors_alive()
    for _ in range(20):
        cycle()
    assert tensors_alive() == before
    assert not any(module._state_dict_hooks for module in model.modules())


def test_no_cycle_keeps_the_model_alive():
    model = accelerate(model_of(DFI))
    weight = model.model.conv_24.weight
    gc.collect()
    gc.disable()
    try:
        gone = weakref.ref(model)
        del model
        assert gone() is None
        assert weight is not None
    finally:
        gc.enable()


def test_what_changes_after_accelerate_is_seen():
    model = accelerate(model_of(DFI))
    x = pixels(model)
    handle = model.model.conv_12.register_forward_pre_hook(lambda *_: None)
    with pytest.raises(OfficialModelError, match="conv_12 is a Conv2d that does more"):
        model.encode_images(x)
    handle.remove()
    model.encode_images(x)
    model.model.conv_12.weight.data = torch.empty(0)  # as ZeRO-3 leaves it
    with pytest.raises(OfficialModelError, match=r"conv_12.weight is a Parameter of shape \[0\].*ZeRO-3"):
        model.encode_images(x)


@pytest.mark.parametrize("path", ["conv_4", "conv_4.0", "conv_24", "conv_linear", "conv_linear.0"])
def test_a_hook_on_what_a_call_would_pass_by_is_seen(path):
    model = accelerate(model_of(POOL))
    handle = model.model.get_submodule(path).register_forward_hook(lambda *_: None)
    with pytest.raises(OfficialModelError, match=rf"{path} is a \w+ that does more than"):
        model.encode_images(pixels(model))
    handle.remove()
    model.encode_images(pixels(model))


@pytest.mark.parametrize(
    "path", ["conv_linear.1", "query_projector", "value_projector.0", "mm_projector", "mm_projector.2"]
)
def test_a_hook_on_another_layer_is_called(path):
    model = accelerate(model_of(POOL))
    calls = []
    model.model.get_submodule(path).register_forward_hook(lambda *_: calls.append(1))
    model.encode_images(pixels(model))
    assert calls == [1]


def test_an_own_instance_method_comes_back():
    model = model_of("conv336")
    model.encode_images = own = types.MethodType(standin.Model.encode_images, model)
    restore(accelerate(model))
    assert vars(model)["encode_images"] is own


@pytest.mark.parametrize("name", ["module", "_orig_mod"])
def test_wrappers_are_seen_through(name):
    wrapper, model = nn.Module(), model_of("conv336")
    wrapper.add_module(name, model)
    assert accelerate(wrapper) is wrapper
    assert "encode_images" in vars(model)
    restore(wrapper)
    assert "encode_images" not in vars(model)


MOVES = {
    "half and back": lambda m: m.half().float(),
    "bfloat16 and back": lambda m: m.to(torch.bfloat16).float(),
    "load": lambda m: m.load_state_dict({k: v * 0.5 for k, v in m.state_dict().items()}) and m,
    "load, assigned": lambda m: m.load_state_dict({k: v * 0.5 for k, v in m.state_dict().items()}, assign=True) and m,
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "in place": lambda m: [p.data.mul_(0.5) for p in m.parameters()] and m,
    "turned": lambda m: setattr(m.model.conv_8.weight, "data", m.model.conv_8.weight.data.transpose(2, 3)) or m,
    "one replaced": lambda m: setattr(m.model.conv_8.weight, "data", m.model.conv_8.weight.detach() * 2) or m,
}


@pytest.mark.parametrize("move", MOVES)
def test_weights_are_followed(move):
    """Whatever happens to the parameters, the next forward computes with them, and holds them once."""
    model = accelerate(model_of(DFI))
    x = pixels(model)
    model.encode_images(x)
    moved = MOVES[move](model)
    got = moved.encode_images(x)
    assert held(moved) == held(model_of(DFI))
    plain = restore(moved)
    torch.testing.assert_close(got, plain.encode_images(x))
    if moved is not model:
        assert "encode_images" in vars(model)


def test_old_places_are_not_written_to():
    """Code that swaps weights keeps the old tensors: they must not change under its hands."""
    model = accelerate(model_of(DFI))
    backup = {name: p.data for name, p in model.named_parameters()}
    values = {name: tensor.clone() for name, tensor in backup.items()}
    for p in model.parameters():
        p.data = p.data * 3
    x = pixels(model)
    model.encode_images(x)
    assert all(torch.equal(backup[name], values[name]) for name in values)
    for name, p in model.named_parameters():
        p.data = backup[name]
    # Views of a tensor that is no longer the packed one: somebody else's, as far as anyone can tell.
    with pytest.warns(UserWarning, match="another owner"):
        got = model.encode_images(x)
    torch.testing.assert_close(got, restore(model).encode_images(x))


def test_inference_mode_leaves_weights_that_can_be_trained():
    model = accelerate(model_of(DFI))
    x = pixels(model)
    model.half().float()
    with torch.inference_mode():
        model.encode_images(x)
    model.encode_images(x).sum().backward()
    assert model.model.conv_4.weight.grad is not None


def test_a_state_dict_holds_contiguous_copies_and_parameters_where_asked():
    model = accelerate(model_of(DFI))
    assert not model.model.conv_24.weight.is_contiguous()
    state = model.state_dict()
    assert all(v.is_contiguous() for v in state.values())
    assert all(v.untyped_storage().nbytes() == v.numel() * v.element_size() for v in state.values())
    for name, value in model.state_dict(keep_vars=True).items():
        assert value is dict(model.named_parameters())[name]
    one = io.BytesIO()
    torch.save({"conv_4": state["model.conv_4.weight"]}, one)
    assert one.getbuffer().nbytes < 8 * state["model.conv_4.weight"].numel()
