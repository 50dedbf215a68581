"""SPProjector on the Triton kernels, in the interpreter: the official numbers, every variant, the module's contracts."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from sp_fast import SPProjector
from sp_fast.bench.accuracy import compare
from sp_fast.errors import BackendError
from sp_fast.kernels import device
from sp_fast.kernels.device import CHIPS, pretend
from tests.helpers import (
    ALL_VARIANTS,
    accuracy,
    features_for,
    golden,
    golden_names,
    official_gradients,
    randomised,
    reference_of,
    shrunk,
)
from tests.test_golden import GRADIENT

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GRADIENT_SAMPLE = {"tfm_pooling"}
ACCURACY_SAMPLE = {(torch.bfloat16, "conv336_24")}
SAMPLE = {"dfi_cropping_nonfinite", "conv49", "tfm_pooling"}


def sampled(cases, chosen):
    """All cases, those that are not chosen for the campaign only."""
    return [pytest.param(*case, marks=() if chosen(i, case) else pytest.mark.campaign) for i, case in enumerate(cases)]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()


def build(variant="crop-dfi", dtype=torch.float32, seed=0, backend="triton", **overrides):
    config = shrunk(variant, **overrides)
    return randomised(SPProjector(config, backend, dtype=dtype), seed).eval()


def on_triton(projector):
    """The same projector, forced onto Triton."""
    other = SPProjector(projector.config, "triton", dtype=projector.output.weight.dtype)
    other.load_state_dict(projector.state_dict())
    return other.eval()


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("name", sampled([(n,) for n in golden_names(anyres=False)], lambda _, case: case[0] in SAMPLE))
def test_golden_outputs(name):
    """The official code's own numbers, by the accuracy rule beside the reference in float32."""
    file = golden(name)
    projector = on_triton(file.load())
    x = file.tensors["input.patch_features"]
    with torch.no_grad():
        found, plain = projector(x), reference_of(projector)(x)
    expected = file.tensors["output.image_features"]
    finite = expected.isfinite()
    assert torch.equal(found.isfinite(), finite)
    spatial = slice(None), slice(projector.config.spatial_tokens)
    for what, part in (("tokens", ...), ("spatial", spatial)):
        kept = finite[part]
        result = compare(what, found[part][kept], plain[part][kept], expected[part][kept].double(), torch.float32)
        assert result.passed, result


WITH_GRADIENTS = [n for n in golden_names(anyres=False) if golden(n).metadata["grads"] != "none"]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("name", sampled([(n,) for n in WITH_GRADIENTS], lambda _, case: case[0] in GRADIENT_SAMPLE))
def test_golden_gradients(name):
    """The official code's own gradients to the golden tests' tolerance, or, where plain torch in float32 misses that
    itself (transformers), to 1.5 times its error."""
    file = golden(name)
    projector = on_triton(file.load())
    stored = {
        key.removeprefix("grad."): t
        for key, t in file.tensors.items()
        if key.startswith(("grad.model.", "grad.input."))
    }
    found = []
    for module in (projector, reference_of(projector)):
        x = file.tensors["input.patch_features"].clone().requires_grad_()
        (module(x) * file.tensors["grad.output"]).sum().backward()
        gradients = {f"model.{key}": gradient for key, gradient in official_gradients(module).items()}
        found.append(gradients | {"input.patch_features": x.grad})
    assert len(stored) > 3
    for key, expected in stored.items():
        if "key_projector" in key and key.endswith("bias"):
            continue  # they vanish: softmax is blind to what all keys share
        errors = [relative_errors(gradients[key], expected.double()) for gradients in found]
        for ours, plain in zip(*errors, strict=True):
            assert ours <= max(GRADIENT, 1.5 * plain), (key, ours, plain)


def relative_errors(got, expected):
    """In norm, and in the largest element."""
    finite = expected.isfinite()
    assert torch.equal(got.isfinite(), finite)
    difference = (got - expected)[finite]
    return difference.norm() / expected[finite].norm(), difference.abs().max() / expected[finite].abs().max()


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("dtype", "variant"),
    sampled([(d, v) for v in ALL_VARIANTS for d in DTYPES], lambda _, case: case in ACCURACY_SAMPLE),
    ids=str,
)
def test_accuracy_rule(variant, dtype):
    """Every output and gradient: at most 1.5 times the reference's own error in the type, plus one ulp."""
    wide = dict.fromkeys(("vision_width", "spatial_width", "text_width"), 32)
    seeds = 40 if variant.startswith("tfm") else 8  # a learned query has 32 elements, whose largest error is chance
    with pretend(CHIPS[90]):
        for comparison in accuracy(lambda seed: build(variant, dtype, seed, **wide), dtype, seeds, batch=7):
            assert comparison.passed, comparison


@pytest.mark.parametrize(
    "variant", ["crop-dfi", pytest.param("pool", marks=pytest.mark.campaign), "conv336_adptive_pooling_multifuse_q"]
)
def test_gradients_of_tokens_and_attention(variant):
    triton, torch_path = build(variant), build(variant, backend="torch")
    x = features_for(triton.config, 2)
    found = []
    for projector in (triton, torch_path):
        features = x.clone().requires_grad_()
        output = projector.intermediates(features)
        generator = torch.Generator().manual_seed(0)
        outputs = [output.tokens, *output.attention]
        torch.autograd.backward(outputs, [torch.randn(z.shape, generator=generator) for z in outputs])
        found.append({"tokens": output.tokens, "input": features.grad} | official_gradients(projector))
    for key, expected in found[1].items():
        if expected is None:
            assert found[0][key] is None, key
        elif not (key.startswith("key_projector") and key.endswith("bias")):  # which vanish
            torch.testing.assert_close(
                found[0][key], expected, rtol=1e-3, atol=2e-6 + 1e-4 * expected.abs().max().item(), msg=key
            )


def test_a_loss_on_the_attention_alone():
    projector = build()
    _, attention = projector(features_for(projector.config, 2), return_attention=True)
    (attention * torch.randn_like(attention)).sum().backward()
    assert projector.integrator.query[0][1].weight.grad.ne(0).any()
    assert projector.output.weight.grad is None or projector.output.weight.grad.eq(0).all()


@pytest.mark.parametrize("frozen", ["extractor", "integrator", "output", "patch_mlp"])
def test_frozen_parts_get_no_gradient(frozen):
    projector = build()
    projector.get_submodule(frozen).requires_grad_(False)
    projector(features_for(projector.config, 1)).square().sum().backward()
    for name, parameter in projector.named_parameters():
        assert (parameter.grad is None) == name.startswith(frozen), name


@pytest.mark.parametrize("variant", ["crop-dfi", pytest.param("pool", marks=pytest.mark.campaign)])
def test_compiles_whole_with_a_dynamic_batch(variant):
    """With the gradients that it has when it runs eagerly."""
    projector, other = build(variant), build(variant)
    compiled = torch.compile(projector, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (2, 3):
        x = features_for(projector.config, batch)
        found, expected = compiled(x), other(x)
        torch.testing.assert_close(found, expected)
    found.square().sum().backward()
    expected.square().sum().backward()
    for ours, theirs in zip(projector.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.campaign
@pytest.mark.parametrize("variant", ["pool-dfi", "crop"])
def test_opcheck(variant):
    """Of the head and of the pooled rows, with the arguments that a projector gives them."""
    projector = build(variant, text_width=8)
    for op in ("token_head", "pooled_rows", "token_head_backward", "pooled_rows_backward"):
        calls = []

        class Catch(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                if func is getattr(torch.ops.sp_fast, op).default:  # noqa: B023
                    calls.append(tree_map_only(torch.Tensor, lambda t: t.detach().clone(), args))  # noqa: B023
                return func(*args, **(kwargs or {}))

        x = features_for(projector.config, 1).requires_grad_()
        with Catch():
            projector(x).square().sum().backward()
        assert len(calls) == (0 if op.startswith("pooled") and projector.config.pyramid != "pool" else 1), op
        for arguments in calls:
            if not op.endswith("backward"):
                tree_map_only(torch.Tensor, lambda t: t.requires_grad_(), arguments)
            torch.library.opcheck(getattr(torch.ops.sp_fast, op).default, arguments)


def test_empty_batch():
    for variant in ("crop-dfi", "pool", "conv336_conv_49"):
        projector = build(variant)
        tokens = projector(features_for(projector.config, 0))
        assert tokens.shape == (0, projector.config.spatial_tokens + 36, 24)
        tokens.sum().backward()


@pytest.mark.campaign
def test_gradient_checkpointing_and_two_backwards():
    projector, other = build(), build()
    x = features_for(projector.config).requires_grad_()
    loss = checkpoint(projector, x, use_reentrant=False).square().sum()
    loss.backward()
    again = other(x).square().sum()
    again.backward(retain_graph=True)
    for ours, theirs in zip(projector.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    again.backward()
    torch.testing.assert_close(other.output.weight.grad, 2 * projector.output.weight.grad)


def test_double_backward_is_refused():
    projector = build()
    x = features_for(projector.config).requires_grad_()
    (gradient,) = torch.autograd.grad(projector(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        gradient.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.campaign)], ids=str)
def test_autocast(dtype):
    projector = build()
    x = features_for(projector.config)
    with torch.autocast("cpu", dtype=dtype):
        tokens, expected = projector(x), reference_of(projector)(x)
    assert tokens.dtype == expected.dtype == dtype
    torch.testing.assert_close(tokens, expected, rtol=0.05, atol=0.05)
    tokens.float().sum().backward()
    assert {p.grad.dtype for p in projector.parameters()} == {torch.float32}


def test_nonfinite_features_stay_in_their_image():
    projector = build()
    x = features_for(projector.config, 3)
    clean = projector(x)
    for value in (torch.nan, torch.inf, -torch.inf):
        x[1, 0, 0] = value
        dirty = projector(x)
        torch.testing.assert_close(dirty[[0, 2]], clean[[0, 2]])
        assert dirty[1, 6:].isnan().any()
        torch.testing.assert_close(dirty, build(backend="torch")(x), equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_replaced_values_have_no_gradient(dtype):
    """nan_to_num on features, details and logits: where a value was replaced, its gradient is zero."""
    found = []
    for backend in ("triton", "torch"):
        projector = build(dtype=dtype, backend=backend)
        z = torch.randn(2, 10, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
        z[0, 0, 0], z[0, 7, 3], z[1, 7, 2] = torch.nan, torch.inf, -torch.inf
        z.requires_grad_()
        projector.integrate(z)[0].float().sum().backward()
        found.append(z.grad)
        assert z.grad[0, 0, 0] == z.grad[0, 7, 3] == z.grad[1, 7, 2] == 0
    torch.testing.assert_close(found[0], found[1], rtol=0.05, atol=0.02)


class Adapter(nn.Module):
    """As PEFT wraps a linear layer."""

    def __init__(self, base):
        super().__init__()
        self.base, self.delta = base, nn.Parameter(torch.full((base.out_features,), 3.0))

    def forward(self, x):
        return self.base(x) + self.delta


@pytest.mark.parametrize("place", ["output", "patch_mlp.0", "integrator.key.0.1"])
def test_an_adapter_is_never_bypassed(place):
    projector, torch_path = build(), build(backend="torch")
    for one in (projector, torch_path):
        one.set_submodule(place, Adapter(one.get_submodule(place)))
    x = features_for(projector.config)
    torch.testing.assert_close(projector(x), torch_path(x))


def test_changed_layers_are_never_bypassed():
    """As offloading replaces a forward on the instance; another GELU; another epsilon."""
    changes = {
        "output.forward": lambda p: setattr(p.output, "forward", lambda x: F.linear(x, p.output.weight) + 7),
        "patch_mlp.1": lambda p: setattr(p.patch_mlp[1], "approximate", "tanh"),
        "key eps": lambda p: setattr(p.integrator.key[0][0], "eps", 0.5),
        "patch_mlp longer": lambda p: p.patch_mlp.append(nn.GELU()),
    }
    for name, change in changes.items():
        projector, torch_path = build(), build(backend="torch")
        x = features_for(projector.config, 1)
        untouched = torch_path(x)
        change(projector)
        change(torch_path)
        found = projector(x)
        torch.testing.assert_close(found, torch_path(x), msg=name)
        assert not torch.allclose(found, untouched, atol=1e-5), name


def test_layers_without_bias_are_called():
    """The fused head reads weights and biases; a layer that lacks one is no layer that it knows."""
    changes = {
        "patch_mlp.0": lambda: nn.Linear(16, 24, bias=False),
        "integrator.key.0.1": lambda: nn.Linear(8, 8, bias=False),
        "integrator.query.0.0": lambda: nn.LayerNorm(8, elementwise_affine=False),
    }
    for place, change in changes.items():
        projector, torch_path, layer = build(), build(backend="torch"), change()
        for one in (projector, torch_path):
            one.set_submodule(place, copy.deepcopy(layer))
        x = features_for(projector.config, 1)
        torch.testing.assert_close(projector(x), torch_path(x), msg=place)


def test_normalisations_of_several_types_under_autocast():
    projector, torch_path = build(dtype=torch.bfloat16), build(dtype=torch.bfloat16, backend="torch")
    x = features_for(projector.config, 2, torch.bfloat16)
    for one in (projector, torch_path):
        one.integrator.value.float()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            one(x).float().square().sum().backward()
    torch.testing.assert_close(
        projector.integrator.value[0][0].weight.grad, torch_path.integrator.value[0][0].weight.grad, rtol=0.1, atol=0.1
    )
    assert projector.integrator.query[0][0].weight.grad.dtype == torch.bfloat16


def test_strided_weights_and_mixed_types():
    projector = build()
    x = features_for(projector.config, 1)
    expected = projector(x)
    projector.output.weight.data = projector.output.weight.data.t().contiguous().t()
    torch.testing.assert_close(projector(x), expected)
    projector.output.half()
    with pytest.raises(ValueError, match=r"torch\.float32 but the output layer torch\.float16: cast them to one type"):
        projector(x)


def test_hooks_run():
    projector, calls = build(), []
    projector.output.register_forward_hook(lambda *_: calls.append(1))
    projector(features_for(projector.config))
    assert calls == [1]


def test_copies_keep_the_backend():
    projector = build()
    x = features_for(projector.config)
    for other in (copy.deepcopy(projector), copy.deepcopy(projector).half()):
        assert other.backend == ("triton", "requested")
        torch.testing.assert_close(other(x.to(other.output.weight.dtype)).float(), projector(x), rtol=0.05, atol=0.05)


def test_what_cannot_run_is_refused_with_the_reason(monkeypatch):
    double = build(dtype=torch.float64)
    with pytest.raises(BackendError, match=r"torch\.float64 is none of .*: use backend='auto' or 'torch'"):
        double(features_for(double.config, 1, torch.float64))
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(BackendError, match=r"torch\.float64 is none of"):
        double(features_for(double.config, 1, torch.float64))  # which autocast leaves alone
    projector = build()
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(BackendError, match="the tensors are on cpu, not on an NVIDIA GPU"):
        projector(features_for(projector.config))
    monkeypatch.setattr(device, "has_triton", lambda: False)
    with pytest.raises(BackendError, match="triton is not installed"):
        projector(features_for(projector.config))
    monkeypatch.setattr("sp_fast.backend.has_triton", lambda: False)
    with pytest.raises(BackendError, match="triton is not installed"):
        build()
