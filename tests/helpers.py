"""Golden files of the official code, small projectors, and a reference filled with a projector's own weights."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from sp_fast import ReferenceSPProjector, SPProjector, SPProjectorConfig
from sp_fast.variants import OFFICIAL, VARIANTS

GOLDEN = Path(__file__).parent / "golden"


@dataclass
class Golden:
    """One file: metadata, and float32 tensors by name."""

    name: str
    metadata: dict
    tensors: dict

    @property
    def features(self):
        return self.tensors["input.patch_features"].double()

    @property
    def config(self):
        get = self.metadata.get
        width = int(get("C"))
        overrides = {"vision_width": width, "text_width": int(get("H")), "grid": int(get("grid", 24))}
        overrides["spatial_width"] = width if get("official_variant").startswith("tfm") else int(get("D"))
        if int(get("dfi_kernel", 0)):
            overrides["detail_kernel"] = int(get("dfi_kernel"))
        return SPProjectorConfig.variant(get("official_variant"), **overrides)

    def state_dict(self, prefix="model."):
        """The official tensors under another prefix."""
        return {prefix + k.removeprefix("model."): v for k, v in self.tensors.items() if k.startswith("model.")}

    def load(self):
        """What a user would call."""
        transformer = self.metadata["official_variant"].startswith("tfm")
        pyramid = self.config.pyramid if transformer else None
        return SPProjector.from_official(self.state_dict(), grid=self.config.grid, pyramid=pyramid)


def golden_names(anyres=None):
    names = sorted(p.stem for p in GOLDEN.glob("*.safetensors"))
    return [n for n in names if anyres is None or n.startswith("anyres") is anyres]


def golden(name):
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        return Golden(name, file.metadata(), {k: file.get_tensor(k) for k in file.keys()})  # noqa: SIM118


def small(variant, **overrides):
    """A variant at widths of a few channels."""
    widths = {"vision_width": 16, "spatial_width": 8, "text_width": 24}
    if VARIANTS[variant].get("extractor") == "transformer":
        widths |= {"spatial_width": 16, "transformer_layers": 1, "kernel_sizes": (4, 24)}
    return SPProjectorConfig.variant(variant, **{**widths, **overrides})


def randomised(module, seed=0):
    """Every parameter at random, biases and normalisation weights too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            scale = 0.5 if parameter.dim() == 1 else parameter[..., 0].numel() ** -0.5
            if name.endswith("weight") and parameter.dim() == 3:  # packed [cells, C, D]: one output sums cells * C
                scale = (parameter.shape[0] * parameter.shape[1]) ** -0.5 * 2
            parameter.copy_(noise * scale + (parameter.dim() == 1 and not name.endswith("bias")))
    return module


def reference_of(projector, dtype=None):
    """The reference with the same weights."""
    state = projector.official_state_dict(prefix="")
    dtype = dtype or next(iter(state.values())).dtype
    reference = ReferenceSPProjector(projector.config, dtype=dtype)
    reference.load_state_dict(state)
    return reference.eval()


def features_for(config, batch=2, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, config.patch_tokens, config.vision_width, generator=generator, dtype=torch.float64)
    return (x + torch.randn(config.vision_width, generator=generator, dtype=torch.float64)).to(dtype)


ALL_VARIANTS = sorted(VARIANTS.keys() - {"crop", "crop-dfi", "pool", "pool-dfi"})
OFFICIAL_VARIANTS = sorted(OFFICIAL)


def checkpoint(variant, prefix="model.", dtype=torch.float32):
    """An official state dict of a variant, random throughout."""
    return randomised(SPProjector(small(variant, **wide(variant)), dtype=dtype)).official_state_dict(prefix)


def wide(variant):
    return {"kernel_sizes": None, "transformer_layers": 4} if variant.startswith("tfm") else {}


def equal(a, b):
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def rest_of_model():
    """What a merged model holds beside the projector."""
    names = ["model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight", "model.norm.weight", "lm_head.weight",
             "model.image_newline", "model.vision_resampler.x", "model.layers.0.self_attn.rotary_emb.inv_freq",
             "model.vision_tower.vision_tower.vision_model.post_layernorm.weight"]  # fmt: skip
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
