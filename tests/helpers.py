"""Golden files of the official code, small projectors, and a reference filled with a projector's own weights."""

import copy
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from sp_fast import SPProjector, SPProjectorConfig
from sp_fast.bench.accuracy import compare
from sp_fast.checkpoint import reference_entries
from sp_fast.training.study.drift import reference_of
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
    device = next(module.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64, device=device)
            scale = 0.5 if parameter.dim() == 1 else parameter[..., 0].numel() ** -0.5
            if name.endswith("weight") and parameter.dim() == 3:  # packed [cells, C, D]: one output sums cells * C
                scale = (parameter.shape[0] * parameter.shape[1]) ** -0.5 * 2
            parameter.copy_(noise * scale + (parameter.dim() == 1 and not name.endswith("bias")))
    return module


def features_for(config, batch=2, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, config.patch_tokens, config.vision_width, generator=generator, dtype=torch.float64)
    return (x + torch.randn(config.vision_width, generator=generator, dtype=torch.float64)).to(dtype)


def accuracy(build, dtype, seeds, batch):
    """A projector of each seed beside the reference in its type and in float64: a comparison of every output, and of
    every gradient by module, pooled over seeds."""
    pools = {}
    for seed in range(seeds):
        projector = build(seed)
        device = next(projector.parameters()).device
        x = features_for(projector.config, batch, dtype, seed).to(device)
        modules = {
            "fast": projector,
            "torch": reference_of(projector).to(device),
            "exact": reference_of(copy.deepcopy(projector).double()).to(device),
        }
        for kind, module in modules.items():
            features = x.detach().to(next(module.parameters()).dtype, copy=True).requires_grad_()
            output = module.intermediates(features)
            cotangent = torch.randn(output.tokens.shape, generator=torch.Generator().manual_seed(seed))
            output.tokens.backward(cotangent.to(dtype).to(features))
            found = {"tokens": output.tokens, "input": features.grad}
            if spatial := projector.config.spatial_tokens:
                found |= {"spatial": output.tokens[:, :spatial], "z_small": output.z_small}
            for i, (z, attention) in enumerate(zip(output.z_big, output.attention, strict=True)):
                found |= {f"z_big {i}": z, f"attention {i}": attention}
            for key, gradient in official_gradients(module).items():
                if gradient is not None:
                    pools.setdefault(key.split(".")[0], {}).setdefault(kind, []).append(gradient.flatten())
            for name, tensor in found.items():
                pools.setdefault(name, {}).setdefault(kind, []).append(tensor.detach().flatten())
    return [
        compare(name, *(torch.cat(pool[kind]) for kind in ("fast", "torch", "exact")), dtype)
        for name, pool in pools.items()
    ]


def official_gradients(module):
    """Gradients by official key, None where there is none."""
    if not isinstance(module, SPProjector):
        return {name: parameter.grad for name, parameter in module.named_parameters()}
    grads = {name: parameter.grad for name, parameter in module.named_parameters()}
    return {e.official: None if grads[e.ours] is None else e.view(grads[e.ours]) for e in reference_entries(module)}


def shrunk(variant, **overrides):
    """A variant of the same structure on a 6x6 grid: a quarter of every side."""
    whole = SPProjectorConfig.variant(
        variant, **({"vision_width": 16, "spatial_width": 16} if "tfm" in variant else {})
    )
    quarter = lambda sides: tuple(sorted({max(1, side // 4) for side in sides}))  # noqa: E731
    sizes = {} if whole.pyramid == "sliding" else {"kernel_sizes": quarter(whole.kernel_sizes)}
    if whole.extractor == "transformer":
        sizes = {"kernel_sizes": (1, 6), "transformer_layers": 1}
    detail = {"detail_kernel": tuple(max(1, side // 4) for side in whole.detail_kernels) or None}
    width = overrides.get("vision_width", 16) if whole.extractor == "transformer" else 8
    widths = {"vision_width": 16, "spatial_width": width, "text_width": 24}
    map_size = {"map_size": 6} if "map_size" in VARIANTS[variant] else {}
    return SPProjectorConfig.variant(variant, **{"grid": 6, **sizes, **detail, **map_size, **widths, **overrides})


# Without second names, and without the compact ones, which have tests of their own.
ALL_VARIANTS = sorted(VARIANTS.keys() - {"crop", "crop-dfi", "pool", "pool-dfi", "compact-5m", "compact-50m"})
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
