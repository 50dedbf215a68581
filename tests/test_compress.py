"""The methods of `sp-fast compress`: what can be kept is kept, what is found is optimal, fits never harm."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sp_fast import SPProjector, SPProjectorConfig
from sp_fast.compress import distillation, least_squares
from sp_fast.compress.features import random_features, split, spread
from sp_fast.compress.full import Full
from sp_fast.compress.methods import METHODS
from sp_fast.compress.metric import metric_of, plain_metric
from sp_fast.compress.student import Teacher, make, with_head
from sp_fast.errors import ConfigError
from tests.helpers import features_for, randomised

# Eigenvectors of a Gram matrix, and singular vectors of randomised products, are as exact as its square root is.
ROOT = torch.finfo(torch.float32).eps ** 0.5
SMALL = SPProjectorConfig(
    kernel_sizes=(2, 3, 6), detail_kernel=3, grid=6, vision_width=8, spatial_width=6, text_width=10
)
KINDS = {
    "bottleneck": {"extractor": "bottleneck", "rank": 3},
    "depthwise": {"extractor": "depthwise"},
    "grouped": {"extractor": "grouped", "groups": 2},
    "separable": {"extractor": "separable", "rank": 5},
    "nested": {"extractor": "nested"},
    "nested, rank": {"extractor": "nested", "rank": 3},
    "resampled": {"extractor": "resampled", "base_kernel": 3},
    "resampled, rank": {"extractor": "resampled", "base_kernel": 3, "rank": 3},
}
PLACES = {
    "crop": {},
    "pool": {"pyramid": "pool"},
    "detail alone": {"kernel_sizes": (), "map_size": 6},
    "sliding": {"pyramid": "sliding", "kernel_sizes": None, "detail_kernel": None, "sliding_windows": (3, 2)},
}


def configuration(kind, place="crop"):
    return replace(
        SMALL,
        **{"map_size": None, "detail_values": None, "spatial_bias": None, "nan_to_num": None}
        | PLACES[place]
        | KINDS[kind],
    )


def full_of(config, seed=0):
    plain = {"rank": None, "groups": None, "base_kernel": None}
    return Full(randomised(SPProjector(replace(config, extractor="full", **plain)), seed))


def fitted(full, config, metric):
    student = with_head(full.projector, config)
    fit = METHODS[config.extractor](full, config, metric)
    student.extractor.load_state_dict(fit.parameters)
    return student, fit


def relative(found, exact):
    found = found.detach()
    return float((found - exact).norm() / exact.norm())


DAILY = [("resampled, rank", "pool"), ("separable", "sliding"), ("grouped", "detail alone")]
PAIRS = [
    pytest.param(kind, place, marks=[] if place == "crop" or (kind, place) in DAILY else pytest.mark.campaign)
    for kind in KINDS
    for place in PLACES
    if not (kind.startswith("nested") and place == "detail alone")
]


@pytest.mark.parametrize(("kind", "place"), PAIRS)
def test_weights_that_have_the_structure_come_back(kind, place):
    """With the features' metric as with none."""
    config = configuration(kind, place)
    origin = randomised(SPProjector(config))
    full = Full(origin.expanded())
    x = features_for(config)
    for metric in (plain_metric(8), metric_of(features_for(config, 4), config)):
        student, fit = fitted(full, config, metric)
        assert relative(student.extractor(x), origin.extractor(x)) < ROOT
        assert all(abs(s.taken - 1) < ROOT for s in fit.spectra if s.name != "inside the groups")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", ["crop", pytest.param("pool", marks=pytest.mark.campaign)])
def test_no_small_change_misses_the_weights_less(kind, place):
    """Every result is a stationary point of what it minimises, in its metric; and what is kept is what is not missed."""
    config = configuration(kind, place)
    full = full_of(config)
    metrics = [plain_metric(8)]
    if kind != "depthwise":  # which is fitted to weights alone
        metrics.append(metric_of(features_for(config, 4), config))
    for metric in metrics:
        student, fit = fitted(full, config, metric)
        extractor = student.extractor.double()
        exact = [w.detach().double() for w in full.projector.extractor.parameters()]
        missed = [metric.root @ (w - made) for w, made in zip(exact, extractor.dense_weights(), strict=True)]
        loss = sum(m.square().sum() for m in missed)
        total = sum((metric.root @ w).square().sum() for w in exact)
        loss.backward()
        for parameter in extractor.parameters():
            assert parameter.grad.norm() * parameter.detach().norm() < 2 * ROOT * total
        if metric is metrics[0] and len(fit.spectra) == 1:
            assert abs(1 - float(loss / total) - fit.spectra[0].taken) < ROOT
        assert 0.1 * total < loss < total  # there was something to miss


def test_the_best_of_its_rank():
    """Against the singular values of the unfolded weights, in float64."""
    config = configuration("bottleneck")
    full = full_of(config)
    unfolded = torch.cat([k.double().transpose(0, 1).flatten(1) for k in full.kernels()], dim=1)
    energies = torch.linalg.svdvals(unfolded) ** 2
    (spectrum,) = METHODS["bottleneck"](full, config, plain_metric(8)).spectra
    torch.testing.assert_close(
        torch.tensor(spectrum.kept).double(), energies.cumsum(0) / energies.sum(), rtol=ROOT, atol=0
    )
    assert spectrum.taken == spectrum.kept[2]
    spectra = METHODS["separable"](full, configuration("separable"), plain_metric(8)).spectra
    for spectrum, w, kernel in zip(spectra, full.windows, full.kernels(), strict=True):
        unfolded = kernel.double().unflatten(0, (w.height, w.width)).permute(1, 2, 0, 3).flatten(2).flatten(0, 1)
        energies = torch.linalg.svdvals(unfolded) ** 2
        assert spectrum.taken == pytest.approx(float(energies[:5].sum() / energies.sum()), rel=ROOT)


def test_large_matrices_are_cut_as_small_ones_are(monkeypatch):
    config = configuration("separable")
    full = full_of(config)
    exact = METHODS["separable"](full, config, plain_metric(8)).spectra
    monkeypatch.setattr("sp_fast.compress.methods._EXACT", 1)
    state = torch.get_rng_state()
    found = METHODS["separable"](full, config, plain_metric(8)).spectra
    assert torch.equal(state, torch.get_rng_state())
    assert [s.taken for s in found] == pytest.approx([s.taken for s in exact], rel=ROOT)


def test_the_metric_is_the_features_second_moment():
    config = replace(SMALL, map_size=4, kernel_sizes=(2, 4))
    x = features_for(config, 5)
    inside = x.unflatten(1, (6, 6))[:, 1:5, 1:5].flatten(0, 2).double()
    exact = inside.t() @ inside / len(inside)
    metric = metric_of(x, config)
    torch.testing.assert_close(
        metric.moment, exact + 1e-3 * exact.diagonal().mean() * torch.eye(8).double(), rtol=ROOT, atol=ROOT
    )
    torch.testing.assert_close(metric.root @ metric.root, metric.moment)
    torch.testing.assert_close(metric.root @ metric.inverse_root, torch.eye(8).double(), rtol=ROOT, atol=ROOT)


def related(config, count=16):
    """Features that lie in few dimensions, as those of images do."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(count, 6, generator=generator)
    ways = torch.randn(6, config.patch_tokens * config.vision_width, generator=generator)
    x = (hidden @ ways).unflatten(1, (config.patch_tokens, -1)) + torch.randn(config.vision_width, generator=generator)
    return split(x, "these", config)


@pytest.mark.parametrize(
    "kind",
    [
        k if "rank" in k or k in ("depthwise", "separable") else pytest.param(k, marks=pytest.mark.campaign)
        for k in KINDS
    ],
)
def test_least_squares_find_what_the_features_show(kind, monkeypatch):
    """Features of 7 dimensions are told by few images: those that nothing was fitted to gain as well."""
    config = configuration(kind)
    full, features = full_of(config), related(config)
    student, _ = fitted(full, config, metric_of(features.fitted, config))
    extractor, parts = student.extractor, ("fitted", "deciding", "held_out")
    known = {part: (getattr(features, part), full.z(getattr(features, part))) for part in parts}
    before = {part: relative(extractor(x), z) for part, (x, z) in known.items()}
    monkeypatch.setattr(least_squares, "STEPS", 6)
    least_squares.refine(extractor, known["fitted"], known["deciding"], full.split, lambda text: None)
    after = {part: relative(extractor(x), z) for part, (x, z) in known.items()}
    assert after["held_out"] < before["held_out"]
    assert after["fitted"] < before["fitted"]
    assert least_squares.factors(extractor)[0][0].split("_")[1] in ("weight", "point", "down")


def test_least_squares_keep_what_decides_best():
    """Nothing moves where every step is a step away for the images that decide."""
    config = configuration("bottleneck")
    full, features = full_of(config), related(config)
    student, fit = fitted(full, config, plain_metric(8))
    x = features.deciding
    known = (features.fitted, full.z(features.fitted)), (x, student.extractor(x).detach())
    least_squares.refine(student.extractor, *known, full.split, lambda text: None)
    assert all(torch.equal(p, fit.parameters[name]) for name, p in student.extractor.named_parameters())


def test_least_squares_end_at_the_solution():
    """Where one factor is wanting and the images tell all of it, it is found."""
    config = replace(configuration("bottleneck"), kernel_sizes=(2,), detail_kernel=None, map_size=6, detail_values=None)
    origin = randomised(SPProjector(replace(config, spatial_bias=None, nan_to_num=None)))
    full, features = Full(origin.expanded()), related(config)
    extractor = with_head(full.projector, origin.config).extractor
    extractor.reduce_weight.data.copy_(origin.extractor.reduce_weight)
    known = [(getattr(features, part), full.z(getattr(features, part))) for part in ("fitted", "deciding")]
    least_squares.refine(extractor, *known, full.split, lambda text: None)
    assert relative(extractor(features.held_out), full.z(features.held_out)) < ROOT


def test_distillation_is_seeded_and_keeps_the_best(monkeypatch):
    config = configuration("bottleneck")
    teacher = Teacher(full_of(config), related(config))
    x, tokens = teacher.features.deciding, teacher.tokens["deciding"]
    known = [(getattr(teacher.features, part), teacher.tokens[part]) for part in ("fitted", "deciding")]

    def trained(steps):
        student, _ = fitted(teacher.full, config, plain_metric(8))
        start = relative(distillation.spatial_tokens(student, x), tokens)
        distillation.distil(student, *known, steps, lambda text: None)
        return student, start, relative(distillation.spatial_tokens(student, x), tokens)

    student, start, end = trained(12)
    assert end < start
    again, _, _ = trained(12)
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), again.parameters(), strict=True))
    head = fitted(teacher.full, config, plain_metric(8))[0]
    for name, parameter in student.named_parameters():
        moved = not torch.equal(parameter, head.get_parameter(name))
        assert moved == name.startswith(("extractor.", "output."))
    monkeypatch.setattr(distillation, "RATE", 100.0)
    _, start, end = trained(2)
    assert end == start


def test_random_features_only_judge():
    config = configuration("bottleneck")
    features = random_features(config)
    assert not features.given
    assert torch.equal(features.held_out, random_features(config).held_out)
    assert features.held_out.mean((0, 1)).std() > 0.5
    made = make(Teacher(full_of(config), features), config, torch.float32, 0, lambda text: None)
    assert [error.name for error in made.errors] == ["2x2", "3x3", "6x6", "detail 3x3", "spatial tokens"]


def test_of_every_four_images_one_is_held_out():
    x = features_for(SMALL, 9)
    features = split(x, "these", SMALL)
    assert torch.equal(features.fitted, x[[0, 1, 4, 5, 8]])
    assert torch.equal(features.deciding, x[[2, 6]])
    assert torch.equal(features.held_out, x[[3, 7]])
    assert spread(5) == [0, 1, 2, 3, 4]
    assert len(set(spread(1000))) == 256
    assert spread(1000)[-1] > 990


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (torch.zeros(3, 36, 8), "these has 3 images, and 4 are needed"),
        (torch.zeros(4, 36, 9), "these: patch features of width 9 do not fit vision_width=8"),
        (torch.zeros(4, 49, 8), r"these: 36 patches an image were expected \(6x6\), not 49: that is a 7x7 map"),
        (torch.full((4, 36, 8), float("nan")), "NaN or infinite values"),
    ],
)
def test_features_that_do_not_fit(features, message):
    with pytest.raises(ConfigError, match=message):
        split(features, "these", SMALL)
