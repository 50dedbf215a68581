"""Synthetic official checkpoints on tiny widths: the key lists of the official code, random values, every file form."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    Qwen2Config,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from sp_fast import SPProjectorConfig
from sp_fast.checkpoint import official_shapes
from sp_fast.llava_sp import LlavaSpForConditionalGeneration
from sp_fast.llava_sp.convert import FromOfficial, plan_from_official
from sp_fast.llava_sp.export import ToOfficial, plan_to_official
from sp_fast.tensor_files import stored_tensors
from tests import tiny

_TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
_MAP = {"image_size": 48, "patch_size": 2}  # 24x24 patches, which the official kernels need
TOWERS = {"clip": CLIPVisionConfig(**_TOWER, **_MAP), "siglip": SiglipVisionConfig(**_TOWER, **_MAP)}
_TEXT = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": tiny.VOCABULARY,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TEXTS = {"llama": (LlamaConfig, "llava_llama"), "qwen2": (Qwen2Config, "llava_qwen")}
FACTS = {
    "mm_vision_tower": "towers/tiny-clip",
    "mm_hidden_size": 16,
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "use_mm_proj": True,
}


def random_tensors(shapes, dtype=torch.float16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {k: (torch.randn(s, generator=generator) * 0.2).to(dtype) for k, s in shapes.items()}


def projector(variant="conv336_cropping_sfe_dfi", prefix="model.", dtype=torch.float16):
    width = 16 if variant.startswith("tfm") else 4
    config = SPProjectorConfig.variant(variant, vision_width=16, spatial_width=width, text_width=24)
    return random_tensors({prefix + k: s for k, s in official_shapes(config).items()}, dtype)


def text_model(text="llama", dtype=torch.float16, **changes):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return AutoModelForCausalLM.from_config(TEXTS[text][0](**{**_TEXT, **changes})).to(dtype)


def tower_model(tower="clip", dtype=torch.float16, seed=2):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return {"clip": CLIPVisionModel, "siglip": SiglipVisionModel}[tower](TOWERS[tower]).to(dtype)


def language_tensors(model):
    tensors = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    return tensors


def tower_tensors(model, prefix):
    return {prefix + k.removeprefix("vision_model."): v for k, v in model.state_dict().items()}


def official_config(model, text="llama", **changes):
    """As transformers 4.37 wrote it."""
    values = {k: v for k, v in model.config.to_dict().items() if k in {**_TEXT, "tie_word_embeddings": None}}
    values |= {"model_type": TEXTS[text][1], "torch_dtype": "float16", "rope_theta": 10000.0, "rope_scaling": None}
    values |= {"transformers_version": "4.37.2", **FACTS, **changes}
    return {k: v for k, v in values.items() if v is not None or k == "rope_scaling"}


def write_json(path, values):
    path.write_text(json.dumps(values))


def write_weights(folder: Path, tensors, form="safetensors"):
    """As one file or two shards, by safetensors or torch.save."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.contiguous() for k, v in tensors.items()}
    kind, sharded = form.removeprefix("sharded-"), form.startswith("sharded-")
    stem, save = {"safetensors": ("model", save_file), "bin": ("pytorch_model", torch.save)}[kind]
    if not sharded:
        save(tensors, folder / f"{stem}.{kind}")
        return
    names = sorted(tensors)
    shards = {f"{stem}-{i + 1:05}-of-00002.{kind}": names[i::2] for i in range(2)}
    for file, own in shards.items():
        save({name: tensors[name] for name in own}, folder / file)
    index = {"metadata": {}, "weight_map": {name: file for file, own in shards.items() for name in own}}
    write_json(folder / f"{stem}.{kind}.index.json", index)


def full(folder, variant="conv336_cropping_sfe_dfi", text="llama", tower="clip", form="safetensors", **changes):
    """A whole official model with its tower inside; the tensors that were written."""
    model = text_model(text, tie_word_embeddings=changes.pop("tie_word_embeddings", False))
    tensors = language_tensors(model) | projector(variant)
    if tower is not None:
        tensors |= tower_tensors(tower_model(tower, seed=4), "model.vision_tower.vision_tower.vision_model.")
    tensors |= changes.pop("extra", {})
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    write_weights(folder, tensors, form)
    write_json(folder / "config.json", official_config(model, text, **changes))
    tiny.tokenizer().save_pretrained(folder)
    return tensors


def base(folder, text="llama", **changes):
    """A language model's folder, as transformers writes it; the model."""
    model = text_model(text, **changes)
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return model


def tower_folder(folder, tower="clip", whole=False, dtype=torch.float16):
    """A tower's folder, or with ``whole`` one of CLIP with its text half, as its authors published it."""
    folder.mkdir(parents=True)
    model = tower_model(tower, dtype)
    if not whole:
        model.save_pretrained(folder)
        return model
    text = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8, "vocab_size": 9}
    text |= {"bos_token_id": 1, "eos_token_id": 2}
    clip = CLIPModel(CLIPConfig(vision_config=TOWERS["clip"].to_dict(), text_config=text)).to(dtype)
    tensors = {k: v for k, v in clip.state_dict().items() if not k.startswith("vision_model.")}
    tensors |= tower_tensors(model, "vision_model.")
    tensors["vision_model.embeddings.position_ids"] = torch.arange(577)[None]
    torch.save(tensors, folder / "pytorch_model.bin")
    write_json(folder / "config.json", {"model_type": "clip", "vision_config": TOWERS["clip"].to_dict()})
    return model


def lora(folder, model, variant="conv336_cropping_sfe_dfi", **settings):
    """An official LoRA folder on a language model; PEFT's own merged model."""
    settings = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "down_proj"], **settings}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.data = torch.randn_like(parameter) * 0.2
    adapted.save_pretrained(folder)
    torch.save(projector(variant, "base_model.model.model."), folder / "non_lora_trainables.bin")
    write_json(folder / "config.json", official_config(model))
    return adapted


def parts(path):
    """Base, tower and projector files side by side."""
    base(path / "base")
    tower_folder(path / "tower")
    (path / "stage1").mkdir()
    torch.save(projector(), path / "stage1" / "model.bin")
    return SimpleNamespace(base=path / "base", tower=path / "tower", projector=path / "stage1" / "model.bin")


def edit(path, **changes):
    values = json.loads(path.read_text())
    for name, value in changes.items():
        values.pop(name, None) if value is None else values.update({name: value})
    path.write_text(json.dumps(values))


def to_ours(source, out, force=False, **options):
    conversion = plan_from_official(FromOfficial(source, out, **options))
    conversion.write(force)
    return conversion.plan


def to_official(source, out, **options):
    conversion = plan_to_official(ToOfficial(source, out, **options))
    conversion.write(False)
    return conversion.plan


def tensors_of(path):
    return {name: tensor.load() for name, tensor in stored_tensors(path)[1].items()}


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name
    return True


def loaded(folder, **options):
    model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True, **options)
    assert isinstance(model, LlavaSpForConditionalGeneration)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    model.generation_config.eos_token_id = None  # as many tokens as are asked for
    return model.eval()
