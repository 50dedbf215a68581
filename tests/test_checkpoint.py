"""Official checkpoints in and out: every layout bit for bit."""

import threading

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

from sp_fast import CheckpointError, SPProjector, SPProjectorConfig
from sp_fast.bench.memory import status_mib
from sp_fast.checkpoint import inspect_official
from tests.helpers import (
    OFFICIAL_VARIANTS,
    checkpoint,
    equal,
    features_for,
    files_of,
    golden,
    golden_names,
    randomised,
    small,
    wide,
)  # fmt: skip

PREFIXES = ["", "model.", "base_model.model.model.", "base_model.model.", "module.model."]


def load(source, variant, **options):
    transformer = variant.startswith("tfm")
    pyramid = SPProjectorConfig.variant(variant).pyramid if transformer else None
    return SPProjector.from_official(source, pyramid=pyramid, **options)


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
    with pytest.raises(CheckpointError, match="use from_pretrained"):
        SPProjector.from_official(tmp_path / "new" / "folder")
    (tmp_path / "config.json").write_text('{"model_type": "sp_projector", "grid": "wide"}')
    with pytest.raises(CheckpointError, match=r"config\.json: grid='wide'"):
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


def test_llava_1_5s_own_projector_is_for_its_configuration_alone(tmp_path):
    """What may be a LLaVA-SP projector that lost its spatial weights is never taken for one without."""
    config = SPProjectorConfig.variant("mlp", vision_width=16, text_width=24)
    mlp = torch.nn.Sequential(torch.nn.Linear(16, 24), torch.nn.GELU(), torch.nn.Linear(24, 24)).half()
    state = {f"model.mm_projector.{name}": tensor for name, tensor in randomised(mlp).state_dict().items()}
    torch.save(state, tmp_path / "mm_projector.bin")
    projector = SPProjector(config, dtype=torch.float16)
    projector.load_official(tmp_path / "mm_projector.bin")
    assert equal(projector.official_state_dict(), state)
    projector.save_pretrained(tmp_path / "own")
    again = SPProjector.from_pretrained(tmp_path / "own")
    assert again.config == config
    assert equal(again.state_dict(), projector.state_dict())
    with pytest.raises(CheckpointError, match=r"spatial weights are gone.*variant\('mlp'\)"):
        SPProjector.from_official(tmp_path / "mm_projector.bin")
    with pytest.raises(CheckpointError, match=r"missing conv_12\.weight"):
        SPProjector(small("crop")).load_official(tmp_path / "mm_projector.bin")
    with pytest.raises(CheckpointError, match=r"unexpected conv_12\.weight"):
        projector.load_official(checkpoint("conv336"))
    assert equal(projector.official_state_dict(), state)


def test_options():
    state = checkpoint("conv336_cropping_sfe_dfi")
    assert SPProjector.from_official(state).config.grid == 24
    projector = SPProjector.from_official(state, grid=27, dtype=torch.float64)
    assert projector(features_for(projector.config, dtype=torch.float64)).shape == (2, 6 + 729, 24)
    assert SPProjector.from_official(checkpoint("conv224")).config.grid == 16
    assert inspect_official(state) == ("conv336_cropping_sfe_dfi", SPProjector.from_official(state).config)
    assert SPProjector.from_official(state, pyramid="crop").config.pyramid == "crop"
    with pytest.raises(CheckpointError, match="contradicts pyramid='pool'"):
        SPProjector.from_official(state, pyramid="pool")
    with pytest.raises(CheckpointError, match="does not fit the 16x16 grid"):
        SPProjector.from_official(state, grid=16)


def test_transformers_need_the_caller_to_say():
    with pytest.raises(CheckpointError, match=r"tfm336 or tfm336_adptive_pooling.*pyramid='crop'"):
        SPProjector.from_official(checkpoint("tfm336"))
    for pyramid, variant in (("crop", "tfm336"), ("pool", "tfm336_adptive_pooling")):
        config = SPProjector.from_official(checkpoint("tfm336"), pyramid=pyramid).config
        assert config == small(variant, **wide(variant))


def test_a_pooling_checkpoint_has_no_other_grid():
    with pytest.raises(
        CheckpointError, match="conv336_pooling_sfe, whose last level is not pooled: it has no grid of 27"
    ):
        SPProjector.from_official(checkpoint("conv336_pooling_sfe"), grid=27)
    assert SPProjector.from_official(checkpoint("conv336_adptive_pooling_multifuse_q"), grid=27).config.map_size == 24


ALTERED = {
    "LoRA": lambda p: get_peft_model(p, LoraConfig(target_modules=["patch_mlp.0", "output"])).get_base_model(),
    "parametrized": lambda p: torch.nn.utils.parametrizations.weight_norm(p.output) and p,
    "without a layer": lambda p: delattr(p, "patch_mlp") or p,
}


@pytest.mark.parametrize("how", ALTERED)
def test_an_altered_projector_is_not_exported_in_part(how, tmp_path):
    projector = ALTERED[how](SPProjector(small("crop-dfi")))
    for export in (projector.official_state_dict, lambda: projector.save_pretrained(tmp_path)):
        with pytest.raises(CheckpointError, match="merged or removed first"):
            export()
    assert not list(tmp_path.iterdir())


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
