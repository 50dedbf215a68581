"""Projectors with quantised weights: errors, files, casts, refusals. The op itself: test_windowed_matmul_quantized.py."""

import copy
import json
import pickle
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from sp_fast import CheckpointError, SPProjector, SPProjectorConfig
from sp_fast.bench.accuracy import relative_error
from sp_fast.config import QUANTIZATIONS
from sp_fast.errors import ConfigError, SPFastError, TrainingError
from sp_fast.llava_sp import LlavaSpForConditionalGeneration
from sp_fast.llava_sp.export import ToOfficial, plan_to_official
from sp_fast.quantize import QuantizedWeight, dequantize, quantize
from sp_fast.training.factored import FactoredAdamW
from sp_fast.training.parts import read_parts
from tests import compact_forms, tiny
from tests.helpers import features_for, randomised, shrunk

# Of Gaussian weights, from the step of a group whose largest lies at 2.8 (int8, fp8: 256 channels) or 2.6 standard
# deviations (int4: 128), with an eighth to spare. An error of n% in the weights is one of about n% in the features that
# they give; attention and GELU may add to it, by half at most.
WEIGHTS = {"int8": 2.8 / 127 / 12**0.5 * 1.125, "fp8": 0.03, "int4": 2.6 / 7 / 12**0.5 * 1.125}
TOKENS = {"int8": 1e-2, "fp8": 0.045, "int4": 0.18}


def build(variant="crop-dfi", scheme="int8", seed=0, **overrides):
    projector = randomised(SPProjector(shrunk(variant, **overrides)), seed)
    return projector, projector.quantized(scheme)


@pytest.mark.parametrize("variant", ["crop-dfi", "pool-dfi"])
@pytest.mark.parametrize("scheme", QUANTIZATIONS)
def test_token_error(scheme, variant):
    """Of the spatial tokens alone, on features with a common mean: patch tokens are those of the original."""
    projector, other = build(variant, scheme, vision_width=256, spatial_width=16)
    x = features_for(projector.config)
    spatial = projector.config.spatial_tokens
    with torch.no_grad():
        exact, found = projector(x), other(x)
    assert torch.equal(found[:, spatial:], exact[:, spatial:])
    assert WEIGHTS[scheme] / 2 < relative_error(dense(other), dense(projector)) < WEIGHTS[scheme]
    assert TOKENS[scheme] / 10 < relative_error(found[:, :spatial], exact[:, :spatial]) < TOKENS[scheme]


def dense(projector):
    weights = [getattr(projector.extractor, name) for name in projector.extractor.packed]
    weights = [w.dequantized(torch.float64) if isinstance(w, QuantizedWeight) else w for w in weights if w is not None]
    return torch.cat([weight.flatten() for weight in weights])


@pytest.mark.parametrize(("scheme", "most"), [("int8", 0.51), ("fp8", 0.51), ("int4", 0.28)])
def test_bytes_at_published_widths(scheme, most):
    """Of the packed weights in bfloat16; nothing is allocated."""
    whole = SPProjector(SPProjectorConfig(), device="meta", dtype=torch.bfloat16)
    made = whole.quantized(scheme)
    assert {tensor.device.type for tensor in made.state_dict().values()} == {"meta"}
    before = sum(parameter.nbytes for parameter in whole.extractor.parameters())
    assert sum(buffer.nbytes for buffer in made.extractor.buffers()) <= most * before
    assert not list(made.extractor.parameters())
    same = SPProjector(made.config, device="meta")
    assert {n: (t.shape, t.dtype) for n, t in same.extractor.state_dict().items()} == {
        n: (t.shape, t.dtype) for n, t in made.extractor.state_dict().items()
    }


@pytest.mark.parametrize("scheme", QUANTIZATIONS)
def test_copies_and_casts_keep_values_and_scales(scheme):
    projector, other = build(scheme=scheme)
    x = features_for(projector.config)
    expected, stored = other(x), other.extractor.state_dict()
    for same in (copy.deepcopy(other), pickle.loads(pickle.dumps(other))):
        assert torch.equal(same(x), expected)
        assert same.config == other.config
    for cast, dtype in (
        (lambda p: p.half(), torch.float16),
        (lambda p: p.to(torch.bfloat16), torch.bfloat16),
        (lambda p: p.double(), torch.float64),
    ):
        made = cast(copy.deepcopy(other))
        assert all(
            torch.equal(a, b) for a, b in zip(made.extractor.state_dict().values(), stored.values(), strict=True)
        )
        assert made(x.to(dtype)).dtype == dtype
        torch.testing.assert_close(made(x.to(dtype)).float(), expected, rtol=0.1, atol=0.05)
        back = made.float()
        assert torch.equal(back.extractor(x), other.extractor(x))
    with pytest.raises(ValueError, match=r"features are torch\.float16 but the weights torch\.float32"):
        other(x.half())


@pytest.mark.parametrize("scheme", QUANTIZATIONS)
def test_dequantised_is_the_same_projector(scheme):
    projector, other = build(scheme=scheme)
    x = features_for(projector.config)
    plain = other.dequantized()
    assert plain.config == projector.config
    torch.testing.assert_close(plain(x), other(x))
    plain(x).sum().backward()
    assert plain.extractor.spatial_weight.grad is not None
    assert list(plain.state_dict()) == list(projector.state_dict())
    assert plain.official_state_dict().keys() == projector.official_state_dict().keys()
    again = quantize(plain, scheme)  # what is representable stays
    torch.testing.assert_close(dense(again), dense(other))


def test_the_original_is_left_alone():
    projector = randomised(SPProjector(shrunk("crop-dfi")))
    before = copy.deepcopy(projector.state_dict())
    projector.output.weight.requires_grad_(False)
    made = projector.quantized("int8")
    assert projector.config.quantization is None
    assert all(torch.equal(before[name], tensor) for name, tensor in projector.state_dict().items())
    assert made.output.weight.data_ptr() != projector.output.weight.data_ptr()
    assert not made.output.weight.requires_grad
    assert {m.config for m in made.modules() if hasattr(m, "config")} == {
        replace(projector.config, quantization="int8")
    }


def test_files(tmp_path):
    for scheme in QUANTIZATIONS:
        _, other = build(scheme=scheme)
        x = features_for(other.config)
        other.save_pretrained(tmp_path / scheme)
        for dtype in (None, torch.bfloat16):
            again = SPProjector.from_pretrained(tmp_path / scheme, dtype=dtype)
            assert again.config == other.config
            assert all(
                torch.equal(a, b) for a, b in zip(again.extractor.buffers(), other.extractor.buffers(), strict=True)
            )
        assert torch.equal(SPProjector.from_pretrained(tmp_path / scheme)(x), other(x))
        fresh = SPProjector(other.config)
        fresh.load_state_dict(other.state_dict())
        assert torch.equal(fresh(x), other(x))
    assert "quantization" not in SPProjectorConfig().to_dict()
    assert json.loads((tmp_path / "int4" / "config.json").read_text())["quantization"] == "int4"


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_of_another_scheme_or_type_is_refused(assign):
    projector, other = build()
    state, before = other.state_dict(), other(features_for(other.config))
    damaged = {
        "Missing key.*int8_values.*\n.*Unexpected key.*fp8_values": projector.quantized("fp8").state_dict(),
        "stored_scales is torch.float16 where torch.int32 is expected": {name: t.half() for name, t in state.items()},
    }
    for message, tensors in damaged.items():
        with pytest.raises(RuntimeError, match=message):
            projector.quantized("int8").load_state_dict(tensors, assign=assign)
    cast = copy.deepcopy(other).type(torch.float64)
    assert [b.dtype for b in cast.buffers()] == [b.dtype for b in other.buffers()]
    torch.testing.assert_close(cast(features_for(other.config).double()).float(), before)


WIDTHS = {"grid": 6, "vision_width": 16, "text_width": 24}
VALUES, SCALES = (f"extractor.spatial_weight.{name}" for name in ("fp8_values", "stored_scales"))
DAMAGE = {
    "missing": (lambda t: t.pop(SCALES), "missing extractor.spatial_weight.stored_scales"),
    "another type": (lambda t: t.update({VALUES: t[VALUES].float()}), "float32 where torch.uint8 is expected"),
    "scales as numbers": (lambda t: t.update({SCALES: t[SCALES].view(torch.float32)}), "float32 where torch.int32"),
    "shape": (lambda t: t.update({VALUES: t[VALUES][:, :, :-1].contiguous()}), "has shape"),
    "infinite scale": (lambda t: t[SCALES].view(torch.float32)[3, 0, 2].fill_(torch.inf), "spatial_weight holds NaN or inf"),
    "NaN value": (lambda t: t[VALUES][70, 2, 3].fill_(0xFF), "spatial_weight holds NaN or infinite"),
    "unquantised": (lambda t: [t.pop(VALUES), t.pop(SCALES)] and t.update({"extractor.spatial_weight": torch.ones(9999)}),
                    "unexpected extractor.spatial_weight"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_files_are_refused(case, tmp_path):
    damage, message = DAMAGE[case]
    _, other = build("sliding", "fp8", map_size=18, grid=18)
    other.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    damage(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        SPProjector.from_pretrained(tmp_path)


def test_a_file_of_another_kind_is_refused(tmp_path):
    projector, other = build()
    other.save_pretrained(tmp_path)
    for config, message in (
        (projector.config, "missing .*spatial_weight; unexpected .*int8_values"),
        (replace(other.config, quantization="fp8"), "missing .*fp8_values.*unexpected .*int8_values"),
        (SPProjectorConfig.variant("mlp", **WIDTHS, quantization="int8"), "extractor='none' has none of"),
    ):
        values = {"model_type": "sp_projector", **config.to_dict()}
        (tmp_path / "config.json").write_text(json.dumps(values))
        with pytest.raises(CheckpointError, match=message):
            SPProjector.from_pretrained(tmp_path)


def test_what_cannot_be_quantised_is_named():
    projector, other = build()
    for scheme in ("int3", "nf4", None):
        with pytest.raises(ConfigError, match=f"quantization='{scheme}' is unknown; .*'int8', 'fp8', 'int4'"):
            projector.quantized(scheme)
    for scheme in QUANTIZATIONS:
        with pytest.raises(ConfigError, match=r"quantised to int8 already.*dequantized\(\)"):
            other.quantized(scheme)
    with pytest.raises(ConfigError, match="not quantised: there is nothing"):
        dequantize(projector)
    odd = shrunk("crop-dfi", vision_width=15)
    with pytest.raises(ConfigError, match=r"2 channels a byte, and extractor\.spatial_weight has 15: take 'int8'"):
        SPProjector(odd).quantized("int4")
    with pytest.raises(ConfigError, match="2 channels a byte"):
        SPProjector(replace(odd, quantization="int4"), device="meta")
    assert SPProjector(odd).quantized("fp8")(torch.randn(1, 36, 15)).isfinite().all()
    for config in (shrunk("tfm336"), SPProjectorConfig.variant("mlp", **WIDTHS)):
        kind = config.extractor
        with pytest.raises(ConfigError, match=f"extractor='{kind}' has none of: leave quantization out"):
            SPProjector(config).quantized("int8")
        with pytest.raises(ConfigError, match=f"extractor='{kind}' has none of"):
            SPProjector(replace(config, quantization="int8"), device="meta")
    with torch.no_grad():
        projector.extractor.detail_weight[0, 0, 0] = torch.nan
    with pytest.raises(SPFastError, match=r"extractor\.detail_weight holds NaN or infinite values"):
        projector.quantized("int8")


def test_the_official_layout_has_none(tmp_path):
    projector, other = build()
    for ask in (other.official_state_dict, lambda: other.load_official(projector.official_state_dict())):
        with pytest.raises(CheckpointError, match=r"quantised to int8.*dequantized\(\)"):
            ask()
    other.output = nn.Sequential(other.output)
    with pytest.raises(CheckpointError, match=r"lacks, or has beside its own, output\.0\.bias.*merged or removed"):
        other.save_pretrained(tmp_path)


def test_quantised_weights_are_not_trained():
    _, other = build()
    for ask in (other.requires_grad_, other.extractor.spatial_weight.requires_grad_):
        with pytest.raises(SPFastError, match=r"quantised to int8 and cannot be trained: train .*dequantized\(\)"):
            ask()
    with pytest.raises(RuntimeError, match="floating point"):  # torch's own
        other.extractor.spatial_weight.int8_values.requires_grad_()
    with pytest.raises(TrainingError, match="no packed weight that is trained"):
        FactoredAdamW(other.parameters(), other)
    x = features_for(other.config)
    other(x).sum().backward()  # the other layers can
    assert other.output.weight.grad is not None
    other.requires_grad_(False)
    assert not other(x).requires_grad
    tokens = other(x.requires_grad_())
    with pytest.raises(NotImplementedError, match=r"no gradient to the features: detach\(\).*dequantized\(\)"):
        tokens.sum().backward()


@pytest.mark.parametrize("kind", ["full", "bottleneck", "separable", "nested", "resampled"])
def test_the_layers_behind_quantised_weights_are_trained(kind):
    """Those before them are frozen, as no gradient comes through, and thaw with them."""
    projector = build()[0] if kind == "full" else compact_forms.build(kind)
    other = projector.quantized("int8")
    other(features_for(other.config)).sum().backward()
    trained = {name for name, p in other.named_parameters() if p.grad is not None}
    assert trained == {name for name, _ in other.named_parameters() if not name.startswith("extractor.")}
    assert all(p.requires_grad for p in other.dequantized().parameters())
    assert all(p.requires_grad for p in projector.parameters())


def test_compiles_whole_with_a_dynamic_batch():
    _, other = build()
    compiled = torch.compile(other, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        for batch in (2, 3):
            x = features_for(other.config, batch)
            torch.testing.assert_close(compiled(x), other(x))


def test_autocast_and_an_empty_batch():
    _, other = build()
    x = features_for(other.config)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tokens = other(x)
    assert tokens.dtype == torch.bfloat16
    torch.testing.assert_close(tokens.float(), other(x), rtol=0.05, atol=0.05)
    assert other(x[:0]).shape == (0, 42, 24)


def test_a_whole_model_keeps_it(tmp_path):
    """Saved, loaded in other types, never exported to the official layout, never trained."""
    model = tiny.model_of()
    made = model.model.multi_modal_projector.quantized("int4")
    model.model.multi_modal_projector = made
    model.save_pretrained(tmp_path)
    tiny.processor_of(model.config).save_pretrained(tmp_path)
    x = torch.randn(1, 64, 16)
    for dtype in (torch.float32, torch.bfloat16):
        again = LlavaSpForConditionalGeneration.from_pretrained(tmp_path, dtype=dtype)
        assert again.config.projector_config["quantization"] == "int4"
        found = again.model.multi_modal_projector
        assert {name: t.dtype for name, t in found.extractor.named_buffers()} == {
            name: t.dtype for name, t in made.extractor.named_buffers()
        }
        assert all(torch.equal(a, b) for a, b in zip(found.extractor.buffers(), made.extractor.buffers(), strict=True))
        assert found(x.to(dtype)).dtype == dtype
        if dtype == torch.float32:
            assert torch.equal(found(x), made(x))
    with pytest.raises(CheckpointError, match="quantised to int4, and the official layout has none such"):
        plan_to_official(ToOfficial(tmp_path, tmp_path / "official"))
    with pytest.raises(TrainingError, match=r"quantised to int4 and cannot be trained: train .*dequantized\(\)"):
        read_parts(SimpleNamespace(model=tmp_path, template=None))
    config = json.loads((tmp_path / "config.json").read_text())
    for scheme in ("int8", "fp8"):
        config["projector_config"]["quantization"] = scheme
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match=f"lacks .*spatial_weight.{scheme}_values"):
            LlavaSpForConditionalGeneration.from_pretrained(tmp_path)
    config["projector_config"]["quantization"] = "int4"
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.multi_modal_projector.extractor.spatial_weight.stored_scales"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        CheckpointError, match="lacks model.multi_modal_projector.extractor.spatial_weight.stored_scales"
    ):
        LlavaSpForConditionalGeneration.from_pretrained(tmp_path)
