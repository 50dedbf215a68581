"""The official code's own outputs and gradients, in float64: reference and fast projector alike."""

import pytest
import torch

from tests.helpers import golden, golden_names, official_gradients, reference_of

OUTPUT, GRADIENT = 1e-6, 1e-5
VANISHED = 1e-14
SUFFIXES = {1: ("",), 3: ("_small", "_mid", "_huge")}


def build(name, kind):
    projector = golden(name).load().double().eval()
    return projector if kind == "fast" else reference_of(projector)


def assert_close(got, expected, tolerance, what):
    """Where the official result is finite, and only there, ours is; both in norm and in the largest element."""
    expected = expected.double()
    finite = expected.isfinite()
    # The golden files are float32: what is finite in float64 only counts as they store it.
    assert torch.equal(got.float().isfinite(), finite), what
    difference = (got - expected)[finite]
    assert finite.any(), what
    assert difference.norm() <= tolerance * expected[finite].norm(), what
    assert difference.abs().max() <= tolerance * expected[finite].abs().max(), what


@pytest.mark.parametrize("kind", ["reference", "fast"])
@pytest.mark.parametrize("name", golden_names(anyres=False))
def test_outputs(name, kind):
    file = golden(name)
    output = build(name, kind).intermediates(file.features)
    assert_close(output.tokens, file.tensors["output.image_features"], OUTPUT, "tokens")
    assert_close(output.z_small, file.tensors["output.z_small"], OUTPUT, "z_small")
    stored = {key for key in file.tensors if key.startswith(("output.z_big", "output.attention"))}
    assert len(stored) == 2 * len(output.attention)
    for suffix, z, attention in zip(SUFFIXES.get(len(output.z_big), ()), output.z_big, output.attention, strict=True):
        assert_close(z, file.tensors[f"output.z_big{suffix}"], OUTPUT, f"z_big{suffix}")
        assert_close(attention, file.tensors[f"output.attention{suffix}"], OUTPUT, f"attention{suffix}")


@pytest.mark.parametrize("kind", ["reference", "fast"])
@pytest.mark.parametrize("name", [n for n in golden_names(anyres=False) if golden(n).metadata["grads"] != "none"])
def test_gradients(name, kind):
    file, module = golden(name), build(name, kind)
    features = file.features.requires_grad_()
    (module.forward(features) * file.tensors["grad.output"].double()).sum().backward()
    assert_close(features.grad, file.tensors["grad.input.patch_features"], GRADIENT, "input")
    gradients = official_gradients(module)
    stored = {key.removeprefix("grad.model."): t for key, t in file.tensors.items() if key.startswith("grad.model.")}
    for key, expected in stored.items():
        gradient = gradients.pop(key)
        if key.startswith("key_projector") and key.endswith("bias"):
            # Softmax is blind to what all keys share: these gradients are zero but for rounding, in both.
            assert (
                max(gradient.norm(), expected.norm()) < VANISHED * stored[key.rsplit(".", 2)[0] + ".1.weight"].norm()
            ), key
        else:
            assert_close(gradient, expected, GRADIENT, key)
    unused = {key.removeprefix("model.") for key in file.metadata["unused_parameters"].split(",") if key}
    assert all(gradients.pop(key) is None for key in unused)
    # What is left was too large to store.
    assert all(key.startswith("conv_") for key in gradients)
    assert file.metadata["grads"] == "some" or not gradients


@pytest.mark.parametrize("name", golden_names(anyres=True))
def test_tiles_of_anyres(name):
    """Each tile of an any-resolution image goes through the projector like an image."""
    file = golden(name)
    tokens = build(name, "fast")(file.features)
    assert_close(tokens, file.tensors["output.image_features"], OUTPUT, "tokens")
