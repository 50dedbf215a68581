"""LoRA folders: merged as PEFT merges them, rounded once, and every other adapter refused."""

import shutil

import pytest
import torch
from safetensors.torch import save_file

from sp_fast import CheckpointError
from sp_fast.llava_sp.convert import FromOfficial, plan_from_official
from sp_fast.tensor_files import stored_tensors
from tests import official
from tests.official import edit, loaded, same, tensors_of, to_ours


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("settings", [{}, {"use_rslora": True, "r": 2}], ids=["lora", "rslora"])
def test_lora_is_merged_as_peft_merges_it(settings, dtype, tmp_path):
    model = official.base(tmp_path / "base", dtype=dtype)
    official.tower_folder(tmp_path / "tower", dtype=dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapted = official.lora(tmp_path / "adapter", model, **settings)
    deltas = {
        name.removeprefix("base_model.model."): layer.get_delta_weight("default").double()
        for name, layer in adapted.named_modules()
        if hasattr(layer, "get_delta_weight")
    }
    parts = {"base": tmp_path / "base", "vision_tower": tmp_path / "tower", "dtype": str(dtype).split(".")[1]}
    plan = to_ours(tmp_path / "adapter", tmp_path / "ours", **parts)
    assert plan.kind == "lora"
    made = loaded(tmp_path / "ours", dtype=dtype)
    merged = adapted.merge_and_unload()
    state = made.state_dict()
    for name in merged.state_dict():
        found = state[name.replace("model.", "model.language_model.")]
        delta = deltas.get(name.removesuffix(".weight"))
        if delta is None:
            assert torch.equal(found, before[name]), name
            continue
        assert float(delta.detach().abs().max()) > 0.1
        exact = before[name].double() + delta
        rounding = torch.finfo(dtype).eps * exact.abs().max() * 2
        assert float((found.double() - exact).abs().max()) <= rounding, name
    ids = torch.arange(4, 30)[None]
    with torch.no_grad():
        found, expected = made(input_ids=ids).logits, merged(input_ids=ids).logits
    assert float((found - expected).abs().max()) < 20 * torch.finfo(dtype).eps * float(expected.abs().max())


def test_lora_is_rounded_once(tmp_path):
    """In float32, not in the weights' float16 as PEFT does."""
    model = official.base(tmp_path / "base")
    official.tower_folder(tmp_path / "tower")
    before = {name: tensor.float() for name, tensor in model.state_dict().items()}
    adapted = official.lora(tmp_path / "adapter", model)
    to_ours(
        tmp_path / "adapter",
        tmp_path / "ours",
        base=tmp_path / "base",
        vision_tower=tmp_path / "tower",
        dtype="float16",
    )
    layer = adapted.base_model.model.model.layers[0].mlp.down_proj
    a, b = layer.lora_A["default"].weight.float(), layer.lora_B["default"].weight.float()
    exact = torch.addmm(before["model.layers.0.mlp.down_proj.weight"], b, a, alpha=4.0).half()
    assert torch.equal(tensors_of(tmp_path / "ours")["model.language_model.layers.0.mlp.down_proj.weight"], exact)


@pytest.mark.parametrize("form", ["bin", "named"])
def test_adapters_in_other_files(form, tmp_path):
    """As torch.save wrote them, and with the adapter's name in the keys, as the official trainer gives them to PEFT."""
    model = official.base(tmp_path / "base")
    official.tower_folder(tmp_path / "tower")
    official.lora(tmp_path / "adapter", model)
    parts = {"base": tmp_path / "base", "vision_tower": tmp_path / "tower"}
    to_ours(tmp_path / "adapter", tmp_path / "expected", **parts)
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    pairs = {k: v.load() for k, v in stored_tensors(path)[1].items()}
    if form == "bin":
        torch.save(pairs, path.with_suffix(".bin"))
        path.unlink()
    else:
        official.save_file({k.replace(".weight", ".default.weight"): v for k, v in pairs.items()}, path)
    to_ours(tmp_path / "adapter", tmp_path / "ours", **parts)
    assert same(tensors_of(tmp_path / "ours"), tensors_of(tmp_path / "expected"))


def plan(path):
    return plan_from_official(FromOfficial(path / "adapter", path / "ours", path / "base", path / "tower"))


ADAPTERS = [
    ({"use_dora": True}, "use_dora=True, which this conversion does not support.*merge_and_unload"),
    ({"bias": "all"}, "bias='all'"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ({"fan_in_fan_out": True}, "fan_in_fan_out=True"),
    ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
    ({"alpha_pattern": {"q_proj": 8}}, "alpha_pattern"),
    ({"peft_type": "LOHA"}, "peft_type='LOHA'"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
    ({"some_future_feature": {"x": 1}}, "some_future_feature"),
    ({"r": None}, "r=None where a number above 0"),
    ({"lora_alpha": 0}, "lora_alpha=0"),
    ({"r": 8}, r"has shapes .* but r=8"),
]


@pytest.fixture
def adapter(tmp_path):
    model = official.base(tmp_path / "base")
    official.tower_folder(tmp_path / "tower")
    official.lora(tmp_path / "adapter", model)
    return tmp_path


@pytest.mark.parametrize(
    ("changes", "message"), ADAPTERS, ids=lambda value: next(iter(value)) if isinstance(value, dict) else ""
)
def test_adapter_settings(changes, message, adapter):
    edit(adapter / "adapter" / "adapter_config.json", **changes)
    with pytest.raises(CheckpointError, match=message):
        plan(adapter)


NAMES = [
    (
        "base_model.model.model.layers.9.mlp.down_proj.lora_{}.weight",
        "adapts .*layers.9.* which the language model does",
    ),
    ("base_model.model.model.conv_4.lora_{}.weight", "adapts .*conv_4"),
    ("base_model.model.model.layers.0.mlp.down_proj.lora_magnitude_{}", "no pair of lora_A and lora_B"),
    ("base_model.model.model.embed_tokens.lora_embedding_{}", "no pair of lora_A and lora_B"),
]


@pytest.mark.parametrize(("name", "message"), NAMES)
def test_adapters_of_something_else(name, message, adapter):
    pair = {name.format("A"): torch.zeros(4, 40), name.format("B"): torch.zeros(24, 4)}
    save_file(pair, adapter / "adapter" / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        plan(adapter)


def test_adapters_in_part(adapter):
    half = {"base_model.model.model.layers.0.mlp.down_proj.lora_A.weight": torch.zeros(4, 40)}
    save_file(half, adapter / "adapter" / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="has shapes {'A': "):
        plan(adapter)
    save_file({}, adapter / "adapter" / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="holds no tensors"):
        plan(adapter)
    (adapter / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="none of adapter_model.safetensors, adapter_model.bin"):
        plan(adapter)
    (adapter / "adapter" / "adapter_config.json").unlink()
    shutil.copy(adapter / "adapter" / "non_lora_trainables.bin", adapter / "adapter" / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="adapter_config.json does not exist, but an adapter's scale is in it"):
        plan(adapter)
    # the projector's file alone, beside its adapter, would give a model without the adapter
    file = adapter / "adapter" / "non_lora_trainables.bin"
    with pytest.raises(CheckpointError, match="adapter's scale"):
        plan_from_official(FromOfficial(file, adapter / "ours", adapter / "base", adapter / "tower"))
    (adapter / "adapter" / "non_lora_trainables.bin").unlink()
    with pytest.raises(CheckpointError, match=r"no non_lora_trainables\.bin, where its projector is"):
        plan(adapter)
