"""Checkpoints that are not whole, not safe or not ours: each is refused, and the message says why."""

import os
import pickle
import random
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from sp_fast import CheckpointError, SPProjector
from tests.helpers import OFFICIAL_VARIANTS, checkpoint, equal, files_of, randomised, rest_of_model, small

KEPT_MID_RUN = ("mm_projector", "vision_resampler", "conv_CM", "conv_4", "CM_P", "conv_linear")  # llava_trainer.py


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


CUSTOM_DAMAGE = {
    "missing": (without("window_3.weight"), "missing window_3.weight"),
    "unexpected": (lambda s: s | {"window_9.weight": torch.zeros(1)}, "unexpected window_9.weight"),
    "shape": (replaced("window_3.weight", lambda t: t[:4]), r"window_3.weight has shape \[4, 16, 8, 12\] where \[8,"),
    "integers": (replaced("window_3.weight", lambda t: t.int()), "not floating-point: window_3.weight"),
    "NaN": (replaced("window_3.weight", poisoned_at_one(torch.nan)), "window_3.weight holds NaN"),
}


@pytest.mark.parametrize("case", CUSTOM_DAMAGE)
def test_custom_forms_are_loaded_strictly(case):
    damage, message = CUSTOM_DAMAGE[case]
    state = randomised(SPProjector(small("sliding-dfi"))).official_state_dict(prefix="")
    target = SPProjector(small("sliding-dfi"))
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        target.load_official(damage(state))
    assert case == "NaN" or equal(target.state_dict(), before)


@pytest.mark.parametrize("change", ["missing", "unexpected", "misshaped"])
def test_own_files_are_loaded_strictly(tmp_path, change):
    projector = SPProjector(small("crop"))
    projector.save_pretrained(tmp_path)
    state = projector.state_dict()
    weight = state.pop("output.weight")
    state |= {"missing": {}, "unexpected": {"output.weight": weight, "other": torch.zeros(1)}}.get(
        change, {"output.weight": weight[:3].clone()}
    )
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match={"misshaped": "output.weight has shape"}.get(change, change)):
        SPProjector.from_pretrained(tmp_path)


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
    "-inf": (replaced("model.conv_20.weight", poisoned_at_one(-torch.inf)), "conv_20.weight holds NaN or infinite"),
    "inf": (replaced("model.query_projector.1.bias", poisoned_at_one(torch.inf)), "query_projector.1.bias holds NaN or inf"),
    "integers": (replaced("model.conv_4.weight", lambda t: t.int()), "conv_4.weight is not of a floating-point type"),
    "mixed": (replaced("model.conv_4.weight", lambda t: t.half()), r"mixes torch.float16, torch.float32: choose .*dtype="),
    "no projector": (lambda s: rest_of_model(), "no mm_projector tensors"),
    "LLaVA-1.5": (lambda s: {k: v for k, v in s.items() if "mm_projector" in k}, r"spatial weights are gone.*variant\('mlp'\)"),
    "nothing": (lambda s: {}, "no mm_projector tensors"),
    "conv_block": (lambda s: s | {"model.conv_4.0.weight": torch.zeros(1)}, "conv_block.*BatchNorm"),
    "conv_block's statistics": (lambda s: s | {"model.conv_4.1.running_mean": torch.zeros(1)}, "conv_block.*BatchNorm"),
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


def test_values_too_large_for_the_type_are_refused():
    state = checkpoint("conv336")
    state["model.conv_4.weight"] = state["model.conv_4.weight"] * 1e8
    assert SPProjector.from_official(state, dtype=torch.bfloat16)
    with pytest.raises(
        CheckpointError, match=r"conv_4\.weight holds NaN or infinite values as torch\.float16.*another dtype"
    ):
        SPProjector.from_official(state, dtype=torch.float16)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_other_types_are_refused(dtype):
    with pytest.raises(CheckpointError, match=f"dtype={dtype} is none of torch.float64"):
        SPProjector.from_official(checkpoint("conv336"), dtype=dtype)


@pytest.mark.parametrize("make", [lambda t: t.to("meta"), lambda t: t.to_sparse()], ids=["meta", "sparse"])
def test_tensors_without_plain_data_are_refused(make):
    state = checkpoint("conv336")
    state["model.conv_4.weight"] = make(state["model.conv_4.weight"])
    with pytest.raises(CheckpointError, match="'model.conv_4.weight' is a Tensor, not a named dense tensor"):
        SPProjector.from_official(state)


@pytest.mark.parametrize("name", ["model.bin", "legacy.bin", "other.safetensors"])
def test_mutated_files_load_whole_or_are_refused(tmp_path, name):
    """A sample of damage by chance: bytes of the first kilobytes, where names, shapes and code would be."""
    files_of(tmp_path, checkpoint("conv336_24", dtype=torch.float16))
    content = (tmp_path / name).read_bytes()
    draw = random.Random(0)
    refused = 0
    for _ in range(150):
        damaged = bytearray(content)
        for _ in range(draw.randint(1, 8)):
            place = draw.choice([draw.randrange(min(len(content), 2000)), -1 - draw.randrange(2000)])
            damaged[place] = draw.randrange(256)
        (tmp_path / name).write_bytes(damaged)
        try:
            projector = SPProjector.from_official(tmp_path / name)
        except CheckpointError:
            refused += 1
        else:
            assert all(p.isfinite().all() for p in projector.parameters())
    assert refused > 30


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
