"""Configurations drawn at random: forward and every gradient of the torch path against the reference in float64."""

import random
from collections import Counter

import pytest
import torch

from sp_fast import SPProjector, SPProjectorConfig
from sp_fast.config import FUSIONS, NAN_PLACES, PYRAMIDS
from tests.helpers import features_for, official_gradients, randomised, reference_of

EXACT = 1e-9  # relative to the tensor, in Frobenius norm; float64 keeps to 1e-13
VANISHING = 1e-12  # absolute: gradients that are zero but for rounding, as the key's biases'
LAYOUTS = ("contiguous", "CLS cut off", "transposed")


def some(rng, values, fewest, most):
    """A few of the values without repeats, in ascending order."""
    values = list(values)
    return tuple(sorted(rng.sample(values, min(len(values), rng.randint(fewest, most)))))


def random_config(rng, grid=9, width=9):
    """Any configuration on up to ``grid`` x ``grid`` patches with up to ``width`` channels; each draw is valid."""
    transformer = rng.choices(("full", "transformer"), (9, 1))[0] == "transformer"
    side = rng.randint(1, grid)
    pyramid = rng.choice(("crop", "pool") if transformer else PYRAMIDS)
    fields = {
        "pyramid": pyramid,
        "grid": side,
        "map_size": rng.choice((None, rng.randint(1, side))),
        "nan_to_num": rng.choice((None, some(rng, NAN_PLACES, 0, 3))),
        "spatial_bias": rng.choice((None, True, False)),
        **{name: rng.randint(1, width) for name in ("vision_width", "spatial_width", "text_width")},
    }
    if transformer:
        heads = rng.randint(1, 3)
        fields |= dict.fromkeys(("vision_width", "spatial_width"), heads * rng.randint(1, max(1, width // heads)))
        fields |= {"transformer_heads": heads, "transformer_layers": rng.randint(1, 2), "extractor": "transformer"}
    fields |= random_levels(rng, fields, transformer)
    return SPProjectorConfig(**fields, **random_detail(rng, fields, transformer))


def random_levels(rng, fields, transformer):
    side, map_size = fields["grid"], fields["map_size"] or fields["grid"]
    if fields["pyramid"] == "sliding":
        divisors = [n for n in range(1, map_size + 1) if map_size % n == 0][:3]
        return {"sliding_windows": (rng.choice(divisors), rng.choice(divisors))}
    sizes = range(1, (side if fields["pyramid"] == "crop" else map_size) + 1)
    return {"kernel_sizes": some(rng, sizes, 1 if transformer else rng.choice((0, 1, 1, 1)), 4)}


def random_detail(rng, fields, transformer):
    """None to three details; one where there is no level, because the tokens are then its map."""
    levels = fields.get("kernel_sizes", True)
    count = 0 if transformer else rng.randint(0, 3) if levels else 1
    crops = fields["kernel_sizes"] if fields["pyramid"] == "crop" else ()
    map_size = fields["map_size"] or max(crops, default=fields["grid"])
    kernels = tuple(rng.randint(1, map_size) for _ in range(count))  # in any order, repeats too
    detail = {
        "detail_kernel": kernels or None,
        "detail_stride": rng.randint(1, 3),
        "detail_fusion": rng.choice(FUSIONS),
    }
    if count and levels:
        detail["detail_values"] = rng.choice((None, tuple(rng.randrange(count) for _ in range(count))))
    return detail


def random_features(rng, config):
    """Up to four images, an eighth of the batches with a NaN somewhere, and a layout for them."""
    features = features_for(config, rng.randint(1, 4), torch.float64, rng.randrange(2**31))
    spoilt = rng.random() < 1 / 8
    if spoilt:
        features.view(-1)[rng.randrange(features.numel())] = torch.nan
    return features, rng.choice(LAYOUTS), "with NaN" if spoilt else "finite"


def laid_out(features, layout):
    """The same values with other strides."""
    if layout == "CLS cut off":
        return torch.cat([torch.full_like(features[:, :1], torch.nan), features], dim=1)[:, 1:]
    return features.mT.contiguous().mT if layout == "transposed" else features


def results(module, features, layout, seed):
    """Every output and every gradient by official name, from a random upstream gradient of tokens and attention."""
    x = laid_out(features.to(next(module.parameters()).dtype, copy=True), layout).requires_grad_()
    output = module.intermediates(x)
    outputs = {"tokens": output.tokens, "z_small": output.z_small}
    for i, (z, attention) in enumerate(zip(output.z_big, output.attention, strict=True)):
        outputs |= {f"z_big {i}": z, f"attention {i}": attention}
    generator = torch.Generator().manual_seed(seed)
    losses = [output.tokens, *output.attention]
    upstream = [torch.randn(tensor.shape, generator=generator, dtype=torch.float64) for tensor in losses]
    torch.autograd.backward(losses, [gradient.to(x.dtype) for gradient in upstream])
    gradients = {"features": x.grad} | official_gradients(module)
    return {name: tensor.detach() for name, tensor in outputs.items()}, gradients


def check(name, got, expected):
    assert (got is None) == (expected is None), name
    if expected is None:
        return
    assert got.shape == expected.shape, name
    assert torch.equal(got.isfinite(), expected.isfinite()), name
    got, expected = got.nan_to_num(), expected.nan_to_num()
    error, scale = (got - expected).norm(), expected.norm()
    assert error <= EXACT * scale + VANISHING, f"{name}: off by {error:.1e} of {scale:.1e}"


def kinds(config, batch, layout, finite):
    """What a draw is an instance of, for the count."""
    details = len(config.detail_kernels)
    role = "tokens of the detail map" if not config.levels else f"{details} details"
    yield from (config.extractor, config.pyramid, role, f"batch {batch}", layout, finite)
    yield f"{config.spatial_tokens:2} tokens" if config.spatial_tokens < 5 else "5 tokens or more"
    yield "map as large as the grid" if config.map_size == config.grid else "map smaller than the grid"
    yield "odd grid" if config.grid % 2 else "even grid"
    yield f"nan_to_num at {', '.join(config.nan_to_num) or 'no place'}"
    yield "with bias" if config.spatial_bias else "without bias"
    if details > 1 and config.attends:
        yield f"details joined: {config.detail_fusion}"
        yield "values of their own" if config.detail_values == tuple(range(details)) else "values of another detail"


ONCE_WRONG = [1025]  # a NaN in a detail map that gives the tokens itself


@pytest.mark.parametrize(
    "seeds", [[*range(39), *ONCE_WRONG], pytest.param(range(2000), marks=pytest.mark.campaign)], ids=len
)
def test_float64_equals_the_reference(seeds):
    seen = Counter()
    for seed in seeds:
        rng = random.Random(seed)
        config = random_config(rng)
        features, layout, finite = random_features(rng, config)
        projector = randomised(SPProjector(config, "torch", dtype=torch.float64), seed).eval()
        found = results(projector, features, layout, seed)
        expected = results(reference_of(projector), features, layout, seed)
        for what, ours, theirs in zip(("output", "gradient"), found, expected, strict=True):
            assert ours.keys() == theirs.keys()
            for name in theirs:
                check(f"{what} {name} of seed {seed}, {layout}, {config}", ours[name], theirs[name])
        seen.update(kinds(config, len(features), layout, finite))
    print(f"\n{len(seeds)} configurations:", *(f"{n:5} {kind}" for kind, n in sorted(seen.items())), sep="\n")
    assert min(seen.values()) >= len(seeds) // 100
