"""FactoredAdamW against torch's AdamW on dense gradients: the same parameters, states and norms."""

import copy

import pytest
import torch

from sp_fast import SPProjector
from sp_fast.bench.accuracy import compare
from sp_fast.errors import TrainingError
from sp_fast.training import factored
from sp_fast.training.factored import FactoredAdamW
from tests.helpers import randomised, small

SETTINGS = {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-7, "weight_decay": 0.2}
WITHIN = 1e-9  # in float64: AdamW divides a gradient that vanishes, which is noise, by nearly nothing
VARIANTS = ["crop-dfi", "pool-dfi", "pool", "conv336_adptive_pooling_multifuse_q"]


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch):
    """Two or three cells at a time, so that rows of windows are cut, unevenly."""
    monkeypatch.setattr(factored, "BUFFER_BYTES", 3 * 16 * 8 * 8)


def pair(variant="crop-dfi", dtype=torch.float64, **overrides):
    """Two equal projectors and their optimizers: torch's, and ours."""
    dense = randomised(SPProjector(small(variant, **overrides)).to(dtype))
    ours = copy.deepcopy(dense)
    return (
        dense,
        torch.optim.AdamW(dense.parameters(), **SETTINGS),
        ours,
        FactoredAdamW(ours.parameters(), ours, **SETTINGS),
    )


def batch(projector, images=2, seed=0):
    config, dtype = projector.config, next(projector.parameters()).dtype
    generator = torch.Generator().manual_seed(seed)
    shapes = (
        (images, config.patch_tokens, config.vision_width),
        (images, config.spatial_tokens + config.patch_tokens, config.text_width),
    )
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def step(projector, optimizer, seed, clip=None, images=(2,)):
    """Of one or several batches; returns the norm of the gradients."""
    for i, count in enumerate(images):
        features, grad = batch(projector, count, 10 * seed + i)
        projector(features).backward(grad)
    norm = None
    if clip is not None:
        ours = isinstance(optimizer, FactoredAdamW)
        norm = optimizer.clip_grad_norm_(clip) if ours else torch.nn.utils.clip_grad_norm_(projector.parameters(), clip)
    optimizer.step()
    optimizer.zero_grad()
    return norm


def difference(one, other):
    """The largest, relative to each tensor's largest element."""
    return max(
        ((p - q).abs().max() / q.abs().max()).item() for p, q in zip(one.parameters(), other.parameters(), strict=True)
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_same_parameters_and_states(variant):
    dense, plain, ours, optimizer = pair(variant)
    before = copy.deepcopy(ours)
    for seed in range(3):
        step(dense, plain, seed)
        step(ours, optimizer, seed)
    assert difference(ours, dense) < WITHIN
    moved = [name for name, p in ours.named_parameters() if not torch.equal(p, before.get_parameter(name))]
    assert {"extractor.spatial_weight", "output.weight", "patch_mlp.2.weight"} <= set(moved)
    for p, q in zip(ours.parameters(), dense.parameters(), strict=True):
        states = optimizer.state[p], plain.state[q]
        assert {key: value.dtype for key, value in states[0].items()} == {
            key: value.dtype for key, value in states[1].items()
        }
        for key, value in states[1].items():
            torch.testing.assert_close(states[0][key], value, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("max_norm", [0.5, 1e9])
def test_accumulated_and_clipped(max_norm):
    """Batches of different sizes, and a norm that cuts or does not."""
    dense, plain, ours, optimizer = pair()
    for seed in range(2):
        norms = [step(p, o, seed, max_norm, images=(2, 1, 3)) for p, o in ((dense, plain), (ours, optimizer))]
        assert norms[1].item() == pytest.approx(norms[0].item(), rel=WITHIN)
        assert (norms[0] > max_norm).item() is (max_norm < 1)
    assert difference(ours, dense) < WITHIN


def test_float32_keeps_to_the_accuracy_rule():
    exact, exactly, *_ = pair()
    dense, plain, ours, optimizer = pair(dtype=torch.float32)
    for projector, adamw in ((exact, exactly), (dense, plain), (ours, optimizer)):
        for seed in range(2):
            features, grad = (x.float().to(next(projector.parameters()).dtype) for x in batch(exact, seed=seed))
            projector(features).backward(grad)
            adamw.step()
            adamw.zero_grad()
    for name in ("extractor.spatial_weight", "extractor.detail_weight"):
        weights = (p.get_parameter(name).detach() for p in (ours, dense, exact))
        assert compare(name, *weights, torch.float32).passed


def test_no_gradient_is_made():
    _, _, ours, optimizer = pair()
    features, grad = batch(ours)
    ours(features).backward(grad)
    assert ours.extractor.spatial_weight.grad is None is ours.extractor.detail_weight.grad
    assert ours.output.weight.grad is not None
    [(rows, dz)] = optimizer._factors
    assert rows.shape == (2, 576, 16)
    assert dz.shape == (2, 6 + 25, 8)


def test_gradients_can_be_seen():
    dense, _, ours, optimizer = pair()
    for projector in (dense, ours):
        features, grad = batch(projector)
        projector(features).backward(grad)
    for weight, other in zip(optimizer.packed, dense.extractor.parameters(), strict=True):
        torch.testing.assert_close(optimizer.gradient(weight), other.grad, rtol=1e-10, atol=1e-12)


def test_features_that_are_trained_get_their_gradient():
    dense, plain, ours, optimizer = pair()
    found = []
    for projector, adamw in ((dense, plain), (ours, optimizer)):
        features, grad = batch(projector)
        projector(features.requires_grad_()).backward(grad)
        found.append(features.grad)
        adamw.step()
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)
    assert difference(ours, dense) < WITHIN


def test_factors_are_used_once():
    """A loop that zeroes the model's gradients and not the optimizer's, as the Trainer does; and a step without any."""
    dense, plain, ours, optimizer = pair()
    for seed in range(2):
        for projector, adamw in ((dense, plain), (ours, optimizer)):
            features, grad = batch(projector, seed=seed)
            projector(features).backward(grad)
            adamw.step()
            projector.zero_grad()
    assert difference(ours, dense) < WITHIN
    before = copy.deepcopy(ours)
    optimizer.step()
    assert difference(ours, before) == 0


def test_zero_grad_and_no_grad_leave_nothing():
    _, _, ours, optimizer = pair()
    features, grad = batch(ours)
    with torch.no_grad():
        ours(features)
    ours(features).backward(grad)
    optimizer.zero_grad()
    before = copy.deepcopy(ours)
    optimizer.step()
    assert difference(ours, before) == 0


def test_a_frozen_weight_stays():
    dense = randomised(SPProjector(small("crop-dfi")).double())
    dense.extractor.detail_weight.requires_grad_(False)
    ours = copy.deepcopy(dense)
    plain, optimizer = (
        torch.optim.AdamW(dense.parameters(), **SETTINGS),
        FactoredAdamW(ours.parameters(), ours, **SETTINGS),
    )
    before = ours.extractor.detail_weight.clone()
    step(dense, plain, 0)
    step(ours, optimizer, 0)
    assert difference(ours, dense) < WITHIN
    assert torch.equal(ours.extractor.detail_weight, before)
    optimizer.release()
    assert not ours.extractor.detail_weight.requires_grad
    assert ours.extractor.spatial_weight.requires_grad


def test_groups_and_a_schedule():
    dense, _, ours, optimizer = pair()
    optimizer.release()

    def groups(projector):
        convolutions = list(projector.extractor.parameters())
        known = {id(p) for p in convolutions}
        rest = [p for p in projector.parameters() if id(p) not in known]
        return [
            {"params": rest},
            {"params": convolutions, "lr": 1e-4, "weight_decay": 0.0, "betas": (0.5, 0.6), "eps": 1e-5},
        ]

    plain, optimizer = torch.optim.AdamW(groups(dense), **SETTINGS), FactoredAdamW(groups(ours), ours, **SETTINGS)
    schedules = [torch.optim.lr_scheduler.LinearLR(o, 0.1, 1.0, 3) for o in (plain, optimizer)]
    for seed in range(3):
        step(dense, plain, seed)
        step(ours, optimizer, seed)
        for schedule in schedules:
            schedule.step()
    assert difference(ours, dense) < WITHIN


def test_states_go_from_one_optimizer_to_the_other():
    """A run that began densely goes on factored, and back."""
    dense, plain, ours, optimizer = pair()
    for seed in range(2):
        step(dense, plain, seed)
    ours.load_state_dict(dense.state_dict())
    optimizer.load_state_dict(copy.deepcopy(plain.state_dict()))
    for projector, adamw in ((dense, plain), (ours, optimizer)):
        step(projector, adamw, 2)
    assert difference(ours, dense) < WITHIN
    optimizer.release()
    again = torch.optim.AdamW(ours.parameters(), **SETTINGS)
    again.load_state_dict(optimizer.state_dict())
    step(dense, plain, 3)
    step(ours, again, 3)
    assert difference(ours, dense) < WITHIN


def test_half_precision_is_torchs_fused_kernel():
    dense, _, ours, optimizer = pair(dtype=torch.bfloat16)
    plain = torch.optim.AdamW(dense.parameters(), fused=True, **SETTINGS)
    for seed in range(2):
        step(dense, plain, seed)
        step(ours, optimizer, seed)
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), dense.parameters(), strict=True))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda p: FactoredAdamW(p.output.parameters(), p),
            r"has 2 of the projector's trained packed weights not among",
        ),
        (
            lambda p: FactoredAdamW(p.parameters(), p.requires_grad_(False)),
            "no packed weight that is trained: use torch",
        ),
    ],
)
def test_what_cannot_be_trained_so(make, message):
    projector = SPProjector(small("crop-dfi"))
    with pytest.raises(TrainingError, match=message):
        make(projector)


def test_a_transformer_has_no_packed_weights():
    projector = SPProjector(small("tfm336"))
    with pytest.raises(TrainingError, match=r"\(transformer extractor\) has no packed weight that is trained"):
        FactoredAdamW(projector.parameters(), projector)
