"""What convert refuses, in one line that names the way out; and what it never leaves behind."""

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from sp_fast import CheckpointError
from sp_fast.errors import ConfigError, ResourceError, SPFastError
from sp_fast.llava_sp import LlavaSpForConditionalGeneration
from sp_fast.llava_sp.convert import FromOfficial, plan_from_official
from sp_fast.llava_sp.export import ToOfficial, plan_to_official
from sp_fast.llava_sp.shards import parse_size
from tests import official, tiny
from tests.official import edit


@pytest.fixture
def folders(tmp_path):
    official.tower_folder(tmp_path / "tower")
    official.full(tmp_path / "source")
    return tmp_path


def plan(path, source="source", **options):
    options = {"vision_tower": path / "tower", **options}
    return plan_from_official(FromOfficial(path / source, path / "ours", **options))


WEIGHTS = [
    ({"model.layers.0.mlp.up_proj.weight": None}, r"missing model\.language_model\.layers\.0\.mlp\.up_proj\.weight"),
    ({"lm_head.weight": None}, r"missing lm_head\.weight"),
    ({"model.layers.7.mlp.up_proj.weight": (40, 24)}, r"unexpected model\.language_model\.layers\.7"),
    ({"model.norm.weight": (25,)}, r"model\.language_model\.norm\.weight has shape \[25\] where \[24\] is expected"),
    (
        {"model.vision_tower.vision_tower.vision_model.pre_layrnorm.bias": None},
        r"missing model\.vision_tower\.pre_layrnorm\.bias",
    ),
    ({"model.conv_8.weight": None}, "no official variant has these tensors; .*missing conv_8.weight"),
    ({"model.conv_8.weight": (4, 16, 8, 7)}, "conv_8.weight has shape .* where .* is expected"),
    ({"model.mm_projector.0.weight": None}, "missing mm_projector.0.weight"),
    ({"model.surprise.weight": (2,)}, "unexpected tensors: model.surprise.weight"),
    ({"layers.0.mlp.up_proj.weight": (40, 24)}, "twice, under different prefixes: keep one"),
    ({"model.layers.0.mlp.up_proj.lora_A.weight": (2, 2)}, "lora_A.*merge_and_unload"),
    ({"model.layers.0.mlp.up_proj.weight.absmax": (2,)}, "absmax.*give the unquantised checkpoint"),
]


@pytest.mark.parametrize(
    ("changes", "message"), WEIGHTS, ids=lambda value: next(iter(value)) if isinstance(value, dict) else ""
)
def test_weights_that_are_not_the_models(changes, message, tmp_path):
    official.tower_folder(tmp_path / "tower")
    tensors = official.full(tmp_path / "source")
    for name, shape in changes.items():
        tensors.pop(name, None) if shape is None else tensors.update({name: torch.zeros(shape).half()})
    official.write_weights(tmp_path / "source", tensors)
    with pytest.raises(CheckpointError, match=message):
        plan(tmp_path)


CONFIGS = [
    ({"mm_vision_select_layer": None}, r"config\.json has mm_vision_select_layer=None .* add it .*-2"),
    ({"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature='cls_patch' where 'patch' is expected"),
    ({"mm_projector_type": "linear"}, "mm_projector_type='linear' where 'mlp2x_gelu'"),
    ({"mm_hidden_size": 1024}, "mm_hidden_size=1024 where 16 is expected"),
    ({"mm_vision_select_layer": -9}, "vision_feature_layer=-9 must be one of"),
    ({"mm_use_im_start_end": True}, "mm_use_im_start_end=true.*--chat-template"),
    ({"hidden_size": None, "rms_norm_eps": None}, r"config\.json lacks hidden_size, rms_norm_eps"),
    ({"model_type": "llava_nobody"}, "model_type='llava_nobody'.*give a causal language model"),
    ({"model_type": None, "architectures": None}, "model_type=None"),
    ({"quantization_config": {"bits": 4}}, "quantised weights have lost bits"),
    ({"hidden_size": "wide"}, "is no llama configuration"),
    ({"num_hidden_layers": 3}, r"missing model\.language_model\.layers\.2"),
    ({"model_type": "llava_sp"}, "no official checkpoint but one of sp_fast: convert it with --to official"),
]


@pytest.mark.parametrize(
    ("changes", "message"), CONFIGS, ids=lambda value: next(iter(value)) if isinstance(value, dict) else ""
)
def test_configurations_that_do_not_fit(changes, message, folders):
    edit(folders / "source" / "config.json", **changes)
    with pytest.raises(SPFastError, match=message):
        plan(folders)


def test_a_model_is_known_by_its_architecture_too(folders):
    edit(folders / "source" / "config.json", model_type=None, architectures=["LlavaLlamaForCausalLM"])
    assert plan(folders).plan.variant == "conv336_cropping_sfe_dfi"


def test_towers(folders):
    for changes, message in (
        ({"model_type": "dinov2"}, "model_type 'dinov2', not of clip"),
        ({"model_type": "clip_vision_model", "patch_size": None}, r"tower/config\.json lacks patch_size"),
        ({"patch_size": 4}, "conv336_cropping_sfe_dfi: .*does not fit the 12x12 grid"),
    ):
        edit(folders / "tower" / "config.json", **changes)
        with pytest.raises(SPFastError, match=message):
            plan(folders)
    shutil.rmtree(folders / "tower")
    with pytest.raises(CheckpointError, match=r"tower/config\.json does not exist: give a folder"):
        plan(folders)
    with pytest.raises(CheckpointError, match="mm_vision_tower='towers/tiny-clip'.*--vision-tower"):
        plan(folders, vision_tower=None)
    official.full(folders / "bare", tower=None)
    with pytest.raises(CheckpointError, match="holds no vision tower: give its folder with --vision-tower"):
        plan(folders, "bare", vision_tower=None)


def test_parts_that_are_missing_or_too_many(folders):
    parts = official.parts(folders / "parts") if (folders / "parts").mkdir() is None else None
    with pytest.raises(CheckpointError, match="a projector on its own: give the language model .* with --base"):
        plan(folders, "parts/stage1")
    with pytest.raises(CheckpointError, match="holds a language model itself: leave out --base"):
        plan(folders, base=parts.base)
    (parts.base / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"base/config\.json does not exist: give the language model's folder"):
        plan(folders, "parts/stage1", base=parts.base)
    with pytest.raises(CheckpointError, match="nowhere does not exist"):
        plan(folders, "nowhere")
    torch.save({"model.mm_projector.0.weight": torch.zeros(2, 2)}, parts.projector)
    official.base(parts.base)
    with pytest.raises(CheckpointError, match="only mm_projector tensors"):
        plan(folders, "parts/stage1", base=parts.base)


def test_transformer_variants_need_the_pyramid(tmp_path):
    official.tower_folder(tmp_path / "tower")
    official.full(tmp_path / "source", "tfm336")
    with pytest.raises(CheckpointError, match="tfm336 or tfm336_adptive_pooling"):
        plan(tmp_path)


def test_types(tmp_path):
    parts = official.parts(tmp_path)
    torch.save(official.projector(dtype=torch.bfloat16), parts.projector)
    with pytest.raises(CheckpointError, match="vision tower: float16; .*projector: bfloat16.*choose it with --dtype"):
        plan(tmp_path, "stage1", base=parts.base)
    wide = official.projector(dtype=torch.float32)
    wide["model.mm_projector.0.bias"][0] = 1e6
    torch.save(wide, parts.projector)
    conversion = plan(tmp_path, "stage1", base=parts.base, dtype="float16")
    with pytest.raises(CheckpointError, match=r"mm_projector\.0\.bias holds NaN or infinite values as torch\.float16"):
        conversion.write(False)
    assert not (tmp_path / "ours").exists()
    plan(tmp_path, "stage1", base=parts.base, dtype="float32").write(False)
    model = LlavaSpForConditionalGeneration.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    model.lm_head.weight.data[0, 0] = 1e6
    model.save_pretrained(tmp_path / "wide")
    with pytest.raises(CheckpointError, match="lm_head.weight has values beyond torch.float16: choose bfloat16"):
        export(tmp_path, "wide", vision_tower="x", dtype="float16", layout="full", tokenizer=parts.base).write(False)


def test_tokenizers(folders, monkeypatch):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folders / "source" / name).unlink()
    with pytest.raises(CheckpointError, match=r"source holds none of tokenizer\.json.*--tokenizer"):
        plan(folders)
    (folders / "other").mkdir()
    other = tiny.tokenizer()
    other.add_tokens(["<more>"])
    other.save_pretrained(folders / "other")
    with pytest.raises(CheckpointError, match="<more> have no row in the vocabulary of 260.*--tokenizer"):
        plan(folders, tokenizer=folders / "other")
    (folders / "other" / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="the tokenizer in .* cannot be loaded"):
        plan(folders, tokenizer=folders / "other")
    tiny.tokenizer().save_pretrained(folders / "other")
    assert plan(folders, tokenizer=folders / "other").plan.kind == "full"
    (folders / "other" / "tokenizer.json").rename(folders / "other" / "tokenizer.model")
    monkeypatch.setattr("sp_fast.llava_sp.vocabulary.is_sentencepiece_available", lambda: False)
    with pytest.raises(CheckpointError, match="pip install sentencepiece protobuf, or .*--tokenizer"):
        plan(folders, tokenizer=folders / "other")
    (folders / "other" / "tokenizer.model").rename(folders / "other" / "tokenizer.json")
    with pytest.raises(CheckpointError, match="chat template 'vicuna' is none of vicuna_v1, plain"):
        plan(folders, tokenizer=folders / "other", template="vicuna")


def test_a_tied_head_must_be_the_embeddings(tmp_path):
    official.tower_folder(tmp_path / "tower")
    head = {"lm_head.weight": torch.zeros(tiny.VOCABULARY, 24).half()}
    official.full(tmp_path / "source", text="qwen2", tie_word_embeddings=True, extra=head)
    with pytest.raises(CheckpointError, match="lm_head.weight is not the embeddings.*set it to false"):
        plan(tmp_path)


def export(path, source="ours", **options):
    return plan_to_official(ToOfficial(path / source, path / "back", **options))


def test_models_that_cannot_be_exported(tmp_path):
    model = tiny.model_of()
    model.save_pretrained(tmp_path / "odd")
    with pytest.raises(CheckpointError, match="no official variant has these tensors"):
        export(tmp_path, "odd")
    tiny.model_of(projector="mlp").save_pretrained(tmp_path / "mlp")
    with pytest.raises(CheckpointError, match="has no projector without spatial tokens: such a model stays"):
        export(tmp_path, "mlp")
    official.full(tmp_path / "source")
    official.tower_folder(tmp_path / "tower")
    plan(tmp_path).write(False)
    shutil.rmtree(tmp_path / "ours" / "official")
    with pytest.raises(CheckpointError, match="does not say where .*mm_vision_tower.*--vision-tower"):
        export(tmp_path)
    projector = json.loads((tmp_path / "ours" / "config.json").read_text())["projector_config"]
    edit(tmp_path / "ours" / "config.json", projector_config={**projector, "nan_to_num": []})
    with pytest.raises(
        CheckpointError, match="the official code has no projector of .*its nearest is conv336_cropping"
    ):
        export(tmp_path, vision_tower="x")  # the same tensors, but other numbers
    edit(tmp_path / "ours" / "config.json", projector_config=projector)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="--tokenizer .* holds no tokenizer"):
        export(tmp_path, vision_tower="x", tokenizer=tmp_path / "empty")
    with pytest.raises(
        CheckpointError, match="is of model_type 'llava_llama', not 'llava_sp'.*leave out --to official"
    ):
        export(tmp_path, "source")
    edit(tmp_path / "ours" / "config.json", quantization_config={"bits": 4})
    with pytest.raises(CheckpointError, match="is an adapter or quantised: .*merge_and_unload"):
        export(tmp_path, vision_tower="x")
    edit(tmp_path / "ours" / "config.json", quantization_config=None)
    tensors = {k: v.load() for k, v in plan(tmp_path).tensors.items()}
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    for wrong, message in (
        ({name: tensors[name].to(torch.int8)}, f"not floating-point: {name} .*before quantisation"),
        ({f"{name}.absmax": torch.zeros(2)}, "absmax.*give the unquantised"),
        ({name.replace("weight", "base_layer.weight"): tensors[name]}, "base_layer.*merge_and_unload"),
        ({name.replace("up_proj.", ""): tensors[name]}, "unexpected model.language_model"),
    ):
        save_file({k: v.clone() for k, v in (tensors | wrong).items()}, tmp_path / "ours" / "model.safetensors")
        with pytest.raises(CheckpointError, match=message):
            export(tmp_path, vision_tower="x")
    projector = "model.multi_modal_projector.output.weight"
    save_file({k: v for k, v in tensors.items() if k != projector}, tmp_path / "ours" / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"missing {projector}"):
        export(tmp_path, vision_tower="x")


def test_the_target_is_replaced_only_when_asked_and_only_at_the_end(folders):
    conversion = plan(folders)
    conversion.write(False)
    before = sorted((p.name, p.stat().st_mtime_ns) for p in (folders / "ours").iterdir())
    with pytest.raises(CheckpointError, match="ours is not empty: .*--force"):
        conversion.write(False)
    name = "lm_head.weight"

    def interrupted():
        raise KeyboardInterrupt

    broken = conversion.tensors | {name: dataclasses.replace(conversion.tensors[name], load=interrupted)}
    listing = sorted(p.name for p in folders.iterdir())
    with pytest.raises(KeyboardInterrupt):
        dataclasses.replace(conversion, tensors=broken).write(True)
    assert sorted((p.name, p.stat().st_mtime_ns) for p in (folders / "ours").iterdir()) == before
    assert sorted(p.name for p in folders.iterdir()) == listing
    (folders / "ours" / "stale").touch()
    conversion.write(True)
    assert sorted(p.name for p in (folders / "ours").iterdir()) == [name for name, _ in before]
    assert sorted(p.name for p in folders.iterdir()) == listing
    assert (folders / "ours").stat().st_mode & 0o777 == (folders / "tower").stat().st_mode & 0o777


def test_targets_that_are_refused(folders, monkeypatch):
    conversion = plan(folders)

    def at(path):
        return dataclasses.replace(conversion, plan=dataclasses.replace(conversion.plan, out=str(path)))

    for path, message in (
        (folders / "source", "holds .*source, which is read: write to another folder"),
        (folders, "which is read: write to another folder"),
        (folders / "source" / "config.json", "is there and is no folder"),
    ):
        with pytest.raises(CheckpointError, match=message):
            at(path).write(True)
    (folders / "home").mkdir()
    (folders / "home" / "thesis.tex").touch()
    with pytest.raises(CheckpointError, match=r"no config\.json, so it is no model that --force may replace"):
        at(folders / "home").write(True)
    (folders / "empty").mkdir()
    at(folders / "empty").write(False)
    assert (folders / "empty" / "config.json").is_file()
    with pytest.raises(CheckpointError, match="cannot be written"):
        at(folders / "source" / "config.json" / "below").write(False)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 0))
    with pytest.raises(ResourceError, match="0.0 GB free, but 0.0 GB are needed"):
        at(folders / "new").write(False)
    assert not (folders / "new").exists()


def test_sizes():
    assert [parse_size(text) for text in ("4GB", "500mb", "1.5KB")] == [4 * 10**9, 5 * 10**8, 1500]
    for text in ("4", "GB", "-1GB", "0GB", "4 apples", "nanGB", "infGB", ""):
        with pytest.raises(ConfigError, match="4GB or 500MB"):
            parse_size(text)
