"""Official checkpoints in and out: every layout bit for bit, and nothing accepted that is not whole."""

import json
import os
import pickle
import threading
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from sp_fast import CheckpointError, SPProjector, SPProjectorConfig
from sp_fast.bench.process_memory import status_mib
from sp_fast.checkpoint import official_config
from tests.helpers import OFFICIAL_VARIANTS, features_for, golden, golden_names, randomised, small

PREFIXES = ["", "model.", "base_model.model.model.", "base_model.model.", "module.model."]
KEPT_MID_RUN = ("mm_projector", "vision_resampler", "conv_CM", "conv_4", "CM_P", "conv_linear")  # llava_trainer.py


def checkpoint(variant, prefix="model.", dtype=torch.float32):
    """An official state dict of a variant, random throughout."""
    return randomised(SPProjector(small(variant, **wide(variant)), dtype=dtype)).official_state_dict(prefix)


def wide(variant):
    return {"kernel_sizes": None, "transformer_layers": 4} if variant.startswith("tfm") else {}


def load(source, variant, **options):
    transformer = variant.startswith("tfm")
    pyramid = SPProjectorConfig.variant(variant).pyramid if transformer else None
    return SPProjector.from_official(source, pyramid=pyramid, **options)


def equal(a, b):
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("name", golden_names())
def test_golden_state_dicts_round_trip(name, prefix):
    file = golden(name)
    state = file.state_dict(prefix)
    transformer = file.metadata["official_variant"].startswith("tfm")
    pyramid = file.config.pyramid if transformer else None
    projector = SPProjector.from_official(state, grid=file.config.grid, pyramid=pyramid)
    assert projector.config == file.config
    assert equal(projector.official_state_dict(prefix), state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("variant", OFFICIAL_VARIANTS)
def test_every_variant_round_trips_in_its_dtype(variant, dtype):
    state = checkpoint(variant, dtype=dtype)
    projector = load(state, variant)
    assert projector.config == small(variant, **wide(variant))
    assert equal(projector.official_state_dict(), state)


def rest_of_model():
    """What a merged model holds beside the projector."""
    names = ["model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight", "model.norm.weight", "lm_head.weight",
             "model.image_newline", "model.vision_tower.vision_tower.vision_model.post_layernorm.weight"]  # fmt: skip
    return {name: torch.randn(3, 2) for name in names}


def files_of(tmp_path, state):
    """The same tensors in every layout that is read."""
    torch.save(state, tmp_path / "model.bin")
    torch.save(state, tmp_path / "legacy.bin", _use_new_zipfile_serialization=False)
    save_file(state, tmp_path / "other.safetensors")
    lora = tmp_path / "lora"
    lora.mkdir()
    torch.save({f"base_model.model.{k}": v for k, v in state.items()}, lora / "non_lora_trainables.bin")
    merged = tmp_path / "merged"
    merged.mkdir()
    whole = list({**state, **rest_of_model()}.items())
    weight_map = {}
    for i in range(3):
        shard = dict(whole[i::3])
        save_file(shard, merged / f"model-0000{i}-of-00003.safetensors")
        weight_map |= dict.fromkeys(shard, f"model-0000{i}-of-00003.safetensors")
    (merged / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    single = tmp_path / "single"
    single.mkdir()
    save_file(dict(whole), single / "model.safetensors")
    return [tmp_path / "model.bin", tmp_path / "legacy.bin", tmp_path / "other.safetensors", lora, merged, single]


@pytest.mark.parametrize("variant", ["conv336_cropping_sfe_dfi", "conv336_pooling_sfe", "conv336_crop_multifuse_q"])
def test_every_file_layout(variant, tmp_path):
    state = checkpoint(variant)
    for source in files_of(tmp_path, state):
        assert equal(load(source, variant).official_state_dict(), state), source
        assert equal(load(str(source), variant).official_state_dict(), state), source


def test_own_files_round_trip(tmp_path):
    projector = randomised(SPProjector(small("pool-dfi"), dtype=torch.bfloat16))
    projector.save_pretrained(tmp_path / "new" / "folder")
    again = SPProjector.from_pretrained(tmp_path / "new" / "folder")
    assert again.config == projector.config
    assert equal(again.state_dict(), projector.state_dict())
    assert (
        SPProjector.from_pretrained(tmp_path / "new" / "folder", dtype=torch.float32).output.weight.dtype
        == torch.float32
    )
    with pytest.raises(FileExistsError, match="force=True"):
        projector.save_pretrained(tmp_path / "new" / "folder")
    projector.save_pretrained(tmp_path / "new" / "folder", force=True)
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == ["config.json", "model.safetensors"]
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        SPProjector.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    with pytest.raises(CheckpointError, match="use from_official"):
        SPProjector.from_pretrained(tmp_path)


def test_custom_forms_load_into_their_configuration():
    source = randomised(SPProjector(small("sliding-dfi")))
    target = SPProjector(small("sliding-dfi"))
    target.load_official(source.official_state_dict())
    assert equal(target.state_dict(), source.state_dict())
    with pytest.raises(CheckpointError, match="no official variant"):
        SPProjector.from_official(source.official_state_dict())


def test_options():
    state = checkpoint("conv336_cropping_sfe_dfi")
    assert SPProjector.from_official(state).config.grid == 24
    projector = SPProjector.from_official(state, grid=27, dtype=torch.float64)
    assert projector(features_for(projector.config, dtype=torch.float64)).shape == (2, 6 + 729, 24)
    assert SPProjector.from_official(checkpoint("conv224")).config.grid == 16
    assert official_config(state).detail_kernel == 16
    assert SPProjector.from_official(state, pyramid="crop").config.pyramid == "crop"
    with pytest.raises(CheckpointError, match="contradicts pyramid='pool'"):
        SPProjector.from_official(state, pyramid="pool")
    with pytest.raises(CheckpointError, match="kernel sizes.*grid=16|does not fit the 16x16 grid"):
        SPProjector.from_official(state, grid=16)


def test_transformers_need_the_caller_to_say():
    with pytest.raises(CheckpointError, match=r"tfm336 or tfm336_adptive_pooling.*pyramid='crop'"):
        SPProjector.from_official(checkpoint("tfm336"))
    for pyramid, variant in (("crop", "tfm336"), ("pool", "tfm336_adptive_pooling")):
        config = SPProjector.from_official(checkpoint("tfm336"), pyramid=pyramid).config
        assert config == small(variant, **wide(variant))


@pytest.mark.parametrize("variant", sorted(set(OFFICIAL_VARIANTS) - {"conv336_conv_49"}))
def test_mid_run_saves_are_refused_with_what_they_lost(variant, tmp_path):
    state = checkpoint(variant)
    kept = {k: v for k, v in state.items() if any(part in k for part in KEPT_MID_RUN)}
    lost = sorted(k.removeprefix("model.") for k in state.keys() - kept.keys())
    torch.save(kept, tmp_path / "mm_projector.bin")
    with pytest.raises(CheckpointError) as caught:
        SPProjector.from_official(tmp_path)
    message = str(caught.value)
    if all("mm_projector" in k for k in kept):
        assert "spatial weights are gone" in message
    else:
        assert f"as {variant} it lost {', '.join(lost[:12])}" in message
        assert "model.bin" in message
    assert len(lost) <= 12 or f"and {len(lost) - 12} more" in message or "gone" in message


def test_the_mid_run_save_that_loses_nothing_loads():
    state = checkpoint("conv336_conv_49")
    assert all(any(part in k for part in KEPT_MID_RUN) for k in state)
    assert equal(SPProjector.from_official(state).official_state_dict(), state)


def without(key):
    return lambda s: {k: v for k, v in s.items() if k != key}


def replaced(key, function):
    return lambda s: s | {key: function(s[key])}


def poisoned_at_one(value):
    def poison(tensor):
        tensor = tensor.clone()
        tensor.view(-1)[-1] = value
        return tensor

    return poison


DAMAGED = {
    "a level lost": (without("model.conv_8.weight"), "missing conv_8.weight"),
    "detail lost": (without("model.conv_CM.weight"), "missing conv_CM.weight"),
    "bias lost": (without("model.conv_linear.1.bias"), "missing conv_linear.1.bias"),
    "mlp lost": (without("model.mm_projector.2.weight"), "missing mm_projector.2.weight"),
    "extra level": (lambda s: s | {"model.conv_28.weight": torch.zeros(8, 16, 28, 28)}, "unexpected conv_28.weight"),
    "extra name": (lambda s: s | {"model.convolution": torch.zeros(1)}, "unexpected tensors: model.convolution"),
    "twice": (lambda s: s | {"conv_4.weight": s["model.conv_4.weight"]}, "holds conv_4.weight twice"),
    "kernel": (replaced("model.conv_8.weight", lambda t: t[..., :7, :7]), r"conv_8.weight has shape \[8, 16, 7, 7\] where"),
    "width": (replaced("model.key_projector.1.weight", lambda t: t[:4]), r"key_projector.1.weight has shape \[4, 8\]"),
    "transposed": (replaced("model.mm_projector.0.weight", lambda t: t.t()), "has shape"),
    "rank": (replaced("model.conv_4.weight", lambda t: t.flatten(1)), r"conv_4.weight has shape \[8, 256\], not 4 lengths"),
    "empty": (replaced("model.conv_4.weight", lambda t: t[:0]), "not 4 lengths above 0"),
    "scalar": (replaced("model.mm_projector.0.weight", lambda t: t[0, 0]), "not 2 lengths above 0"),
    "NaN": (replaced("model.conv_20.weight", poisoned_at_one(torch.nan)), "conv_20.weight holds NaN or infinite"),
    "inf": (replaced("model.query_projector.1.bias", poisoned_at_one(torch.inf)), "query_projector.1.bias holds NaN or inf"),
    "integers": (replaced("model.conv_4.weight", lambda t: t.int()), "conv_4.weight is not of a floating-point type"),
    "mixed": (replaced("model.conv_4.weight", lambda t: t.half()), r"mixes torch.float16, torch.float32: choose .*dtype="),
    "no projector": (lambda s: rest_of_model(), "no mm_projector tensors"),
    "LLaVA-1.5": (lambda s: {k: v for k, v in s.items() if "mm_projector" in k}, "spatial weights are gone"),
    "nothing": (lambda s: {}, "no mm_projector tensors"),
    "conv_block": (lambda s: s | {"model.conv_4.0.weight": torch.zeros(1)}, "conv_block.*BatchNorm"),
    "conv336_CM": (lambda s: s | {"model.CM_P.norm.weight": torch.zeros(1)}, "conv336_CM.*shape error"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_state_dicts_are_refused(case, tmp_path):
    damage, message = DAMAGED[case]
    state = damage(checkpoint("conv336_cropping_sfe_dfi"))
    with pytest.raises(CheckpointError, match=message):
        SPProjector.from_official(state)
    torch.save(state, tmp_path / "model.bin")
    with pytest.raises(CheckpointError, match=message) as caught:
        SPProjector.from_official(tmp_path)
    assert "model.bin" in str(caught.value)


def test_mixed_dtypes_load_when_one_is_chosen():
    state = checkpoint("conv336")
    state["model.conv_4.weight"] = state["model.conv_4.weight"].half()
    projector = SPProjector.from_official(state, dtype=torch.float32)
    assert {p.dtype for p in projector.parameters()} == {torch.float32}


class Payload:
    """Runs a command when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_hostile_pickles_run_nothing(tmp_path, zipped):
    state = checkpoint("conv336") | {"model.conv_4.weight": Payload(tmp_path / "ran")}
    torch.save(state, tmp_path / "model.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"model\.bin was refused.*safetensors"):
        SPProjector.from_official(tmp_path)
    (tmp_path / "model.bin").write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    with pytest.raises(CheckpointError, match="refused|damaged"):
        SPProjector.from_official(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["model.bin", "legacy.bin", "other.safetensors"])
@pytest.mark.parametrize("keep", [0.0, 0.001, 0.5, 0.999])
def test_truncated_files_are_refused(tmp_path, name, keep):
    files_of(tmp_path, checkpoint("conv336"))
    path = tmp_path / name
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(CheckpointError, match=f"{name}.*(damaged|refused)"):
        SPProjector.from_official(path)


def test_other_files_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        SPProjector.from_official(tmp_path / "nothing.bin")
    with pytest.raises(CheckpointError, match=r"holds none of .*model\.bin"):
        SPProjector.from_official(tmp_path)
    torch.save([torch.zeros(1)], tmp_path / "model.bin")
    with pytest.raises(CheckpointError, match="holds a list"):
        SPProjector.from_official(tmp_path)
    torch.save({"model.conv_4.weight": 3}, tmp_path / "model.bin")
    with pytest.raises(CheckpointError, match="'model.conv_4.weight' is a int"):
        SPProjector.from_official(tmp_path)
    with zipfile.ZipFile(tmp_path / "model.bin", "w") as archive:
        archive.writestr("../../escape", "text")
    with pytest.raises(CheckpointError, match="damaged"):
        SPProjector.from_official(tmp_path)


INDEXES = {
    "escape": ('{"weight_map": {"model.conv_4.weight": "../model.bin"}}', "not a plain file beside it"),
    "missing": ('{"weight_map": {"model.conv_4.weight": "gone.safetensors"}}', "gone.safetensors, which is missing"),
    "number": ('{"weight_map": {"model.conv_4.weight": 3}}', "not a plain file"),
    "no map": ("{}", "no index of shards"),
    "no JSON": ("{", "no index of shards"),
    "a list": ('{"weight_map": []}', "no index of shards"),
}


@pytest.mark.parametrize("case", INDEXES)
def test_bad_indexes_are_refused(tmp_path, case):
    text, message = INDEXES[case]
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        SPProjector.from_official(tmp_path)


def peak_anonymous_growth(function):
    """How much anonymous memory a call added at its largest, in MiB, seen every millisecond."""
    before, peak, done = status_mib("RssAnon"), [0.0], threading.Event()

    def watch():
        while not done.wait(0.001):
            peak[0] = max(peak[0], status_mib("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        result = function()
    finally:
        done.set()
        watcher.join()
    return max(peak[0], status_mib("RssAnon")) - before, result


def check_loading_memory(tmp_path, widths, dtype):
    projector = SPProjector(SPProjectorConfig(**widths), dtype=dtype)
    weights = sum(p.nbytes for p in projector.parameters()) / 2**20
    save_file(projector.official_state_dict(), tmp_path / "model.safetensors")
    del projector
    SPProjector.from_official(checkpoint("conv336"))  # imports
    growth, _ = peak_anonymous_growth(lambda: SPProjector.from_official(tmp_path))
    print(f"weights {weights:.0f} MiB, anonymous memory grew by {growth:.0f} MiB, {growth / weights:.3f} times")
    assert 0.9 * weights < growth <= 1.1 * weights


def test_loading_needs_one_projector_of_memory(tmp_path):
    check_loading_memory(tmp_path, {"vision_width": 256, "spatial_width": 256, "text_width": 512}, torch.float32)


@pytest.mark.campaign
def test_loading_needs_one_projector_of_memory_at_the_published_widths(tmp_path):
    check_loading_memory(tmp_path, {}, torch.float32)
