"""What accelerate refuses: a tower or an encoder of another variant, changed code, layers that it would pass by. Each is
named, and the model stays as it was."""

import pytest
import torch
from torch import nn

from sp_fast.errors import OfficialModelError
from sp_fast.official import accelerate, restore
from tests import standin
from tests.test_official import DFI, VARIANTS, model_of, pixels


def daily(pairs, every, also=()):
    """Some of them each day, the others in the campaign."""
    return [
        pair if i % every == 0 or pair in also else pytest.param(*pair, marks=pytest.mark.campaign)
        for i, pair in enumerate(pairs)
    ]


TOWERS = [(variant, tower) for variant in VARIANTS for tower in ("336_pooling", "336_6_tokens", "336_3_tokens", "224")]


@pytest.mark.parametrize(("variant", "tower"), daily(TOWERS, 3))
def test_a_tower_of_another_switch_is_named(variant, tower):
    needed = standin.TOWERS.get(variant, "336_6_tokens")
    model = model_of(variant, tower=tower)
    if tower == needed:
        accelerate(model)
        return
    with pytest.raises(OfficialModelError) as caught:
        accelerate(model)
    message = str(caught.value)
    assert f"to {needed!r}" in message
    assert f"for the switch {tower!r}" in message
    assert variant in message


PAIRS = [(a, b) for a in VARIANTS for b in VARIANTS if a != b and (a == "conv224") == (b == "conv224")]
# The same modules under two names, and the two transformer variants, whose keys are the same: encode_images decides.
EQUAL = {("tfm336", "tfm336_adptive_pooling"), ("tfm336_adptive_pooling", "tfm336")}


@pytest.mark.parametrize(("modules", "encoder"), daily(PAIRS, 7, EQUAL), ids=lambda name: name.removeprefix("conv336_"))
def test_an_encoder_of_another_variant_is_never_taken_for_it(modules, encoder):
    """Whatever encode_images is, accelerate refuses, or computes what it computes."""
    model = model_of(modules, encoder=encoder)
    x = pixels(model)
    if (modules, encoder) in EQUAL:
        tokens = model.encode_images(x)
        torch.testing.assert_close(accelerate(model).encode_images(x), tokens)
        return
    with pytest.raises(OfficialModelError, match="must name the same variant"):
        accelerate(model)
    assert "encode_images" not in vars(model)


def test_a_changed_encoder_is_refused():
    class Changed(standin.Model):
        def encode_images(self, images):
            return super().encode_images(images) * 1.01

    with pytest.raises(OfficialModelError, match="encode_images returns other values"):
        accelerate(standin.randomise(Changed("conv336")))


def without_nan_to_num(core, local, patches):
    c = standin.six_crops(core, local)
    attended = standin.attend(core, c, standin.detail(core, "conv_CM", local[5]).nan_to_num())
    return torch.cat([core.conv_linear(torch.cat([c, attended], -1)), core.mm_projector(patches)], 1)


def test_a_lost_nan_to_num_is_seen(monkeypatch):
    monkeypatch.setitem(standin.ENCODERS, DFI, without_nan_to_num)
    with pytest.raises(OfficialModelError, match="encode_images feeds query_projector other values"):
        accelerate(model_of(DFI))


def conv_block(model):
    model.model.conv_4 = nn.Sequential(nn.Conv2d(8, 4, 3, bias=False), nn.BatchNorm2d(4))


def unloaded(model):
    del model.model.vision_tower.vision_tower


def sharded(model):
    model.model.conv_8.weight.data = torch.empty(0)


def hooked(model):
    model.model.conv_8.register_forward_hook(lambda *_: None)


def dispatched(model):
    model.model.conv_CM.forward = model.model.conv_CM.forward


def hooked_output(model):
    model.model.conv_linear.register_forward_hook(lambda *_: None)


def other_stride(model):
    model.model.conv_CM.stride = (3, 3)


def other_activation(model):
    model.model.conv_linear[0] = nn.GELU("tanh")


def mixed(model):
    model.model.conv_8.half()


def replaced(model):
    model.encode_images = lambda images: images


def with_cls(model):
    tower = model.model.vision_tower
    tower.feature_select = lambda hidden: (hidden, hidden)


DAMAGE = {
    conv_block: "conv_block checkpoint, which is not supported",
    unloaded: r"does not encode an image .*load_model\(\)",
    sharded: r"conv_8.weight has shape \[0\]",
    hooked: "conv_8 is a Conv2d that does more than",
    dispatched: "conv_CM is a Conv2d that does more than",
    hooked_output: "conv_linear is a Sequential that does more than",
    other_stride: r"conv_CM is Conv2d\(8, 4, kernel_size=\(16, 16\), stride=\(3, 3\).*stride=\(2, 2\)",
    other_activation: r"conv_linear.0 is GELU\(approximate='tanh'\).*'none'",
    mixed: "several kinds",
    replaced: "encode_images was replaced",
    with_cls: "577 patch features: no square map",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_what_cannot_be_accelerated_is_refused_and_left_as_it_was(damage):
    model = model_of(DFI)
    damage(model)
    attributes = set(vars(model))
    with pytest.raises(OfficialModelError, match=DAMAGE[damage]):
        accelerate(model)
    assert set(vars(model)) == attributes
    assert all(p.is_contiguous() for p in model.parameters())
    assert not any(module._state_dict_hooks for module in model.modules())


def test_other_objects_and_repeated_calls_are_refused():
    with pytest.raises(OfficialModelError, match="Linear has no get_model and no encode_images"):
        accelerate(nn.Linear(1, 1))
    model = model_of("conv336")
    with pytest.raises(OfficialModelError, match="nothing to restore"):
        restore(model)
    accelerate(model)
    with pytest.raises(OfficialModelError, match="accelerated already"):
        accelerate(model)
