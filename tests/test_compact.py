"""Compact extractors: the reference's numbers, the equal full form's, a module's contracts, errors."""

import copy
import json
import pickle
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.checkpoint import checkpoint

from sp_fast import SPProjector, SPProjectorConfig
from sp_fast.bench.accuracy import compare
from sp_fast.bench.cases import Case, stages_of
from sp_fast.bench.counts import count
from sp_fast.compact_geometry import compact_products
from sp_fast.errors import CheckpointError, ConfigError
from sp_fast.extractors import WindowedExtractor
from sp_fast.llava_sp import LlavaSpForConditionalGeneration
from sp_fast.llava_sp.packing import unpacked
from sp_fast.tensor_files import stored_tensors
from sp_fast.training.flops import projector_flop
from sp_fast.training.stage import prepare
from sp_fast.variants import VARIANTS
from tests.compact_forms import KINDS, PYRAMIDS, build, compact
from tests.helpers import features_for, reference_of
from tests.test_random_configurations import check, results
from tests.test_train_logs import stage_of
from tests.tiny import PROJECTOR, model_of

OWN = {
    "one token": {"kernel_sizes": (12,), "detail_kernel": None},
    "tokens of the detail map": {"kernel_sizes": (), "map_size": 10, "detail_kernel": 6},
    "odd sizes off the centre": {"grid": 11, "kernel_sizes": (2, 3, 7), "detail_kernel": (3, 7), "detail_stride": 3},
    "pools of the centre": {"pyramid": "pool", "grid": 9, "map_size": 8, "kernel_sizes": (1, 3, 6), "detail_kernel": 3},
    "columns of windows": {"pyramid": "sliding", "sliding_windows": (1, 4), "detail_kernel": None},
}
FORMS = [
    (kind, name, {"pyramid": name} if name in PYRAMIDS else OWN[name])
    for kind in KINDS
    for name in (*PYRAMIDS, *OWN)
    if (kind, name) != ("nested", "tokens of the detail map")
]


# Crops of every kind, and what is a kind's own elsewhere; the campaign has the rest.
DAILY = {
    ("nested", "pool"), ("nested", "odd sizes off the centre"), ("separable", "odd sizes off the centre"),
    ("resampled", "pools of the centre"), ("depthwise", "tokens of the detail map"), ("grouped", "sliding"),
}  # fmt: skip
EQUAL = [
    pytest.param(
        kind, form, id=f"{kind}, {name}",
        marks=() if name == "crop" or (kind, name) in DAILY else pytest.mark.campaign,
    )
    for kind, name, form in FORMS
]  # fmt: skip


@pytest.mark.parametrize(("kind", "form"), EQUAL)
def test_float64_equals_the_reference_and_the_full_form(kind, form):
    """Every output and gradient; and the gradients through ``dense_weights`` are the extractor's own."""
    projector = build(kind, dtype=torch.float64, **form)
    x = features_for(projector.config, 2, torch.float64)
    found, full = results(projector, x, "contiguous", 0), results(projector.expanded(), x, "contiguous", 0)
    for ours, theirs in zip(found, results(reference_of(projector), x, "contiguous", 0), strict=True):
        assert ours.keys() == theirs.keys()
        for name in theirs:
            check(name, ours[name], theirs[name])
    for name in found[0]:
        check(f"expanded {name}", full[0][name], found[0][name])
    check("expanded input", full[1]["features"], found[1]["features"])
    extractor, gradients = projector.extractor, []
    other = WindowedExtractor(projector.expanded().config, dtype=torch.float64)
    for z in (extractor(x), other.extract(x, extractor.dense_weights(), "torch")):
        upstream = torch.randn(z.shape, generator=torch.Generator().manual_seed(1), dtype=z.dtype)
        gradients.append(torch.autograd.grad(z, list(extractor.parameters()), upstream))
    for (name, _), ours, dense in zip(extractor.named_parameters(), *gradients, strict=True):
        check(f"through dense_weights {name}", dense, ours)


# Every kind in float32, one in bfloat16; the campaign has all.
JUDGED = [
    pytest.param(
        kind,
        dtype,
        marks=() if dtype == torch.float32 or (kind, dtype) == ("nested", torch.bfloat16) else pytest.mark.campaign,
    )
    for kind in KINDS
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("kind", "dtype"), JUDGED, ids=str)
def test_accuracy_rule(kind, dtype):
    """Outputs, the extractor's gradients and all others, over draws of all pyramids: one has too few elements."""
    pools = {}
    for seed, pyramid in enumerate([*PYRAMIDS] * 2):
        wide = dict.fromkeys(("vision_width", "spatial_width", "text_width"), 32)
        projector = build(kind, pyramid, dtype, seed, **wide)
        x = features_for(projector.config, 2, dtype, seed)
        modules = projector, reference_of(projector), reference_of(copy.deepcopy(projector).double())
        for judged, module in zip(("fast", "torch", "exact"), modules, strict=True):
            outputs, gradients = results(module, x, "contiguous", seed)
            for name, tensor in sorted((outputs | gradients).items()):
                part = "others"
                if name in outputs or name == "features":
                    part = name.split()[0]
                elif name.startswith(("conv_", "window_", "reduce", "kernel")) and "linear" not in name:
                    part = "weights"
                pools.setdefault(part, {}).setdefault(judged, []).append(tensor.flatten())
    assert pools.keys() == {"tokens", "z_small", "z_big", "attention", "features", "weights", "others"}
    for name, pool in pools.items():
        result = compare(name, *(torch.cat(pool[judged]) for judged in ("fast", "torch", "exact")), dtype)
        assert result.passed, result


@pytest.mark.parametrize(
    "kind", [kind if kind == "resampled" else pytest.param(kind, marks=pytest.mark.campaign) for kind in KINDS]
)
def test_compiles_whole_with_a_dynamic_batch(kind):
    torch._dynamo.reset()
    projector = build(kind)
    compiled = torch.compile(projector, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (2, 3):
        x = features_for(projector.config, batch)
        torch.testing.assert_close(compiled(x), projector(x))


@pytest.mark.parametrize("kind", KINDS)
def test_contracts_of_a_module(kind, tmp_path):
    projector = build(kind)
    x = features_for(projector.config)
    expected = projector(x)
    projector(x[:0]).sum().backward()
    for other in (copy.deepcopy(projector), pickle.loads(pickle.dumps(projector))):
        assert torch.equal(other(x), expected)
    assert projector.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    projector = build(kind)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tokens = projector(x)
    assert tokens.dtype == torch.bfloat16
    tokens.float().sum().backward()
    assert {p.grad.dtype for p in projector.parameters()} == {torch.float32}
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in SPProjector(projector.config).extractor.named_parameters()}
    assert shapes == projector.extractor.shapes(projector.config)
    projector.save_pretrained(tmp_path)
    loaded = SPProjector.from_pretrained(tmp_path)
    assert loaded.config == projector.config
    assert torch.equal(loaded(x), expected)
    found = []
    for call in (projector, lambda x: checkpoint(projector, x, use_reentrant=False)):
        projector.zero_grad()
        call(x).square().sum().backward()
        found.append([p.grad.clone() for p in projector.parameters()])
    torch.testing.assert_close(*found)
    x[1, 0, 0] = torch.nan
    assert torch.equal(projector(x)[0], expected[0])
    with pytest.raises(ValueError, match=r"features are torch\.bfloat16 but the weights torch\.float32"):
        projector(x.bfloat16())


@pytest.mark.parametrize("kind", KINDS)
def test_dense_weights_begin_as_large_as_the_full_ones(kind):
    config = compact(kind, vision_width=64, spatial_width=32, **({"rank": 16} if "rank" in KINDS[kind] else {}))
    projector = SPProjector(config)
    full = projector.expanded()
    expected = SPProjector(full.config)
    for w in full.extractor.windows:
        ours, theirs = (m.extractor._weights()[w.weight][w.cell : w.cell + w.cells].norm() for m in (full, expected))
        assert 0.4 < ours / theirs < 2.5, w


@pytest.mark.parametrize("kind", KINDS)
def test_products_are_those_of_the_windows(kind):
    """Held against the full form's, whose structure they leave out."""
    config = compact(kind)
    products = compact_products(config)
    c, d, outputs = 16, 8, [1] * 6 + [9]
    cells = [4, 16, 36, 64, 100, 144, 64]
    rank, met = config.rank, sum(a * b for a, b in zip(outputs, cells, strict=True))
    expected = {
        "bottleneck": lambda: 144 * c * rank + met * rank * d,
        "depthwise": lambda: met * c + sum(outputs) * c * d,
        "grouped": lambda: met * c * d // 4,
        "separable": lambda: (
            sum(k * k for k in (2, 4, 6, 8, 10, 12)) * c * rank
            + 42 * rank * d
            + 3 * 12 * 8 * c * rank
            + 9 * 8 * rank * d
        ),
        "nested": lambda: 144 * c * rank + (144 + 9 * 64) * rank * d,
        "resampled": lambda: 144 * c * rank + 15 * 16 * rank * d,
    }[kind]()
    assert sum(p.multiply_adds for p in products) == expected
    none = SPProjectorConfig(extractor="none", grid=12, vision_width=16, text_width=24, spatial_width=8)
    rest = replace(config, extractor="full", rank=None, groups=None, base_kernel=None)
    first = sum(p.multiply_adds for p in products if p.first)
    tail = projector_flop(rest) - projector_flop(none) - 4 * met * c * d
    assert projector_flop(config) == projector_flop(none) + tail + 4 * first + 6 * (expected - first)
    assert stages_of(config) == ("whole", "tail", "mlp")
    whole, other = (count(Case("", one, "whole", "forward", 1, "float32")) for one in (config, rest))
    assert whole.flop - other.flop == 2 * (expected - met * c * d)
    parameters = sum(p.numel() for p in build(kind).extractor.parameters())
    assert (whole.bytes - other.bytes) // 4 == parameters - sum(cells) * c * d


def test_variants_are_as_small_as_they_say():
    """Everything that "mlp" does not have counts."""
    published = lambda name: SPProjector(SPProjectorConfig.variant(name), device="meta")  # noqa: E731
    size = lambda name: sum(p.numel() for p in published(name).parameters())  # noqa: E731
    assert {name: size(name) - size("mlp") for name in VARIANTS if name.startswith("compact")} == {
        "compact-5m": 4_462_848,
        "compact-50m": 47_112_704,
    }


def test_a_configuration_without_compact_fields_is_written_as_before():
    assert {"rank", "groups", "base_kernel"}.isdisjoint(SPProjectorConfig().to_dict())
    for kind in KINDS:
        config = compact(kind)
        assert SPProjectorConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert compact("separable", rank=None).rank == 8
    assert compact("resampled", base_kernel=None).base_kernel == 8
    assert compact("resampled", kernel_sizes=(2, 6), detail_kernel=3, base_kernel=None).base_kernel == 6
    assert compact("nested", rank=None).rank is None


WRONG = {
    "no rank": ({"extractor": "bottleneck"}, "needs rank: give it, e.g. rank=64"),
    "no groups": ({"extractor": "grouped"}, "needs groups: give it, e.g. groups=8"),
    "rank too large": ({"extractor": "nested", "rank": 1025}, "rank=1025 is more than the vision_width=1024.*choose 1 to 1024"),
    "rank 0": ({"extractor": "bottleneck", "rank": 0}, "rank=0 must be a positive integer"),
    "groups of widths": ({"extractor": "grouped", "groups": 24}, "groups=24 does not divide vision_width=1024"),
    "groups of features": ({"extractor": "grouped", "groups": 8, "spatial_width": 12}, "does not divide spatial_width=12"),
    "groups no number": ({"extractor": "grouped", "groups": "8"}, "groups='8' must be a positive integer"),
    "base kernel": ({"extractor": "resampled", "base_kernel": 25}, "base_kernel=25 is larger than all regions.*choose 1 to 24"),
    "rank unread": ({"rank": 64}, "rank=64 is not read by extractor='full': leave it out, or take extractor='bottleneck' or"),
    "groups unread": ({"extractor": "bottleneck", "rank": 64, "groups": 8}, "groups=8 is not read by extractor='bottleneck'"),
    "kernel unread": ({"extractor": "nested", "base_kernel": 8}, "base_kernel=8 is not read by .*take extractor='resampled'"),
    "detail outside": ({"extractor": "nested", "detail_kernel": 15}, "detail_kernel=15 is to be the centre.*choose one of 4, 8"),
    "no square": ({"extractor": "nested", "pyramid": "sliding", "detail_kernel": 8}, "not the size of any.*detail_kernel=None"),
    "no nest": ({"extractor": "nested", "kernel_sizes": ()}, "shares the levels' kernel, but kernel_sizes=\\(\\) has none"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_values_are_named(case):
    values, message = WRONG[case]
    with pytest.raises(ConfigError, match=message):
        SPProjectorConfig(**values)


@pytest.mark.parametrize("kind", KINDS)
def test_there_is_no_official_form_but_the_expanded_one(kind):
    projector = build(kind)
    for call in (projector.official_state_dict, lambda: projector.load_official({"conv_2.weight": torch.zeros(1)})):
        with pytest.raises(CheckpointError, match=f"{kind}' has no official form.*expanded\\(\\)"):
            call()
    other = SPProjector(projector.expanded().config)
    other.load_official(projector.expanded().official_state_dict())
    x = features_for(projector.config)
    torch.testing.assert_close(other(x), projector(x))
    with pytest.raises(ValueError, match="'full' is not compact"):
        other.expanded()
    projector.output.requires_grad_(False)
    frozen = {name for name, p in projector.expanded().named_parameters() if not p.requires_grad}
    assert frozen == {name for name, p in projector.named_parameters() if not p.requires_grad} != set()


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_of_another_kind_is_refused(kind, tmp_path):
    projector, other = build(kind), build("depthwise" if kind != "depthwise" else "grouped")
    with pytest.raises(RuntimeError, match=r"Missing key.*extractor"):
        other.load_state_dict(projector.state_dict())
    projector.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": config["model_type"], **other.config.to_dict()}))
    with pytest.raises(CheckpointError, match=r"missing extractor\..*; unexpected extractor\."):
        SPProjector.from_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({n: t for n, t in state.items() if not n.startswith("extractor.")}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"missing extractor\."):
        SPProjector.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"spatial_width": 2**40, "text_width": 2**40}))
    with pytest.raises(CheckpointError, match="far from filling"):
        SPProjector.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_takes_them_by_configuration(kind, tmp_path):
    """Saved and loaded by transformers, trained by both stages' rules, refused by the official layouts."""
    model = model_of(projector={**PROJECTOR, "extractor": kind, **KINDS[kind]})
    model.save_pretrained(tmp_path)
    loaded = LlavaSpForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.config.projector == model.config.projector
    assert loaded.config.projector.extractor == kind
    for (name, ours), theirs in zip(model.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    projector = prepare(model, "pretrain", stage_of(0)).model.multi_modal_projector
    assert all(parameter.requires_grad for parameter in projector.extractor.parameters())
    ours = stored_tensors(dict(projector.state_dict()))[1]
    with pytest.raises(CheckpointError, match="has no official form.*expanded"):
        unpacked("it", model.config.projector, ours)


def test_a_model_keeps_the_projector_that_was_put_in(tmp_path):
    """One that gives as many tokens as the model's configuration says."""
    model = model_of()
    config = replace(model.config.projector, extractor="depthwise")
    for core in (model.model, model):
        model.model.multi_modal_projector = SPProjector(config)
        core.save_pretrained(tmp_path)
        again = type(core).from_pretrained(tmp_path)
        assert again.config.projector == config
        found, expected = again.state_dict(), core.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    for change, message in (
        ({"kernel_sizes": config.kernel_sizes[1:]}, "gives 2 spatial tokens an image, .* has 3: build the model"),
        ({"text_width": 8}, "text_width=8, but the text_config has"),
    ):
        model.model.multi_modal_projector = SPProjector(replace(config, **change))
        with pytest.raises(ConfigError, match=message):
            model.save_pretrained(tmp_path / "other")
        assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("kind", ["full", *KINDS])
def test_shapes_alone(kind):
    """A forward without data or memory."""
    config = compact(kind) if kind in KINDS else replace(compact("depthwise"), extractor="full")
    x = torch.empty(2, config.patch_tokens, config.vision_width, device="meta")
    assert SPProjector(config, device="meta")(x).shape == (2, config.spatial_tokens + config.patch_tokens, 24)
