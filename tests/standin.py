"""A small model with the structure of the official LLaVA-SP code, and no line of it: names, switches, encoding, sequence
assembly, saving. tests/test_official.py holds it against the official code's own numbers.

It imports nothing but torch, so that what an accelerated model saved can be loaded where this package is missing.
"""

import math
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

IMAGE_TOKEN, IGNORE = -200, -100
SIX = (4, 8, 12, 16, 20, 24)
STEPS = {"336_6_tokens": 2, "336": 2, "336_3_tokens": 4, "224": 1}  # patches by which the tower's crops grow


class Tower(nn.Module):
    """The vision tower: ``(crops or map, patch features)`` under no_grad. ``cls`` as in CLIP; SigLIP has none."""

    def __init__(self, switch, grid=24, width=8, cls=True):
        super().__init__()
        self.switch, self.grid, self.cls = switch, grid, cls
        self.vision_tower = nn.Conv2d(3, width, 14, stride=14)
        self.position = nn.Parameter(torch.randn(grid * grid + cls, width))
        self.config = SimpleNamespace(image_size=14 * grid, hidden_size=width)
        self.requires_grad_(False)

    def feature_select(self, hidden):
        patches = hidden[:, int(self.cls) :]
        side = int(patches.shape[1] ** 0.5)
        grid_map = patches.reshape(-1, side, side, patches.shape[2])
        if self.switch == "336_pooling":
            return grid_map, patches
        step, centre = STEPS[self.switch], side // 2
        crops = []
        for i in range(0, centre, step):
            around = slice(centre - step - i, centre + step + i)
            crops.append(grid_map[:, around, around])
        return crops, patches

    @torch.no_grad()
    def forward(self, images):
        hidden = self.vision_tower(images.to(self.device, self.dtype)).flatten(2).transpose(1, 2)
        return self.feature_select(F.pad(hidden, (0, 0, int(self.cls), 0)) + self.position)

    @property
    def device(self):
        return self.position.device

    @property
    def dtype(self):
        return self.position.dtype

    @property
    def num_patches_per_side(self):
        return self.grid


def crops_of(names):
    def encode(core, local, patches):
        tokens = torch.cat([conv(core, name, crop) for name, crop in zip(names, local, strict=False)], 1)
        return torch.cat([core.conv_linear(tokens), core.mm_projector(patches)], 1)

    return encode


def conv(core, name, region):
    return getattr(core, name)(region.permute(0, 3, 1, 2)).squeeze(-1).permute(0, 2, 1)


def detail(core, name, region):
    return getattr(core, name)(region.permute(0, 3, 1, 2)).flatten(2).permute(0, 2, 1)


def attend(core, c, big, suffix="", value=""):
    query, key = getattr(core, f"query_projector{suffix}")(c), getattr(core, f"key_projector{suffix}")(big)
    logits = (query @ (key.transpose(-1, -2) / key.shape[-1] ** 0.5)).nan_to_num()
    return logits.softmax(-1) @ getattr(core, f"value_projector{value or suffix}")(big)


def whole_map(core, local, patches):
    tokens = torch.cat([conv(core, f"conv_{k}", local) for k in SIX], 1)
    return torch.cat([core.conv_linear(tokens), core.mm_projector(patches)], 1)


def last_crop(core, local, patches):
    return torch.cat([core.conv_linear(conv(core, "conv_24", local[5])), core.mm_projector(patches)], 1)


def detail_alone(core, local, patches):
    return torch.cat([core.conv_linear(detail(core, "conv_CM", local[5])), core.mm_projector(patches)], 1)


def dfi(spatial, region):
    def encode(core, local, patches):
        c = spatial(core, local).nan_to_num()
        attended = attend(core, c, detail(core, "conv_CM", region(local)).nan_to_num())
        return torch.cat([core.conv_linear(torch.cat([c, attended], -1)), core.mm_projector(patches)], 1)

    return encode


def six_crops(core, local):
    return torch.cat([conv(core, f"conv_{k}", crop) for k, crop in zip(SIX, local, strict=False)], 1)


def six_pools(core, region):
    return torch.cat([conv(core, f"conv_{k}", region) for k in SIX], 1)


def multifuse_crop(core, local, patches):
    c, attended = six_crops(core, local).nan_to_num(), []
    for suffix, value in (("_small", ""), ("_mid", "_small"), ("_huge", "")):
        attended.append(attend(core, c, detail(core, f"conv{suffix}", local[5]).nan_to_num(), suffix, value))
    return torch.cat([core.conv_linear(torch.cat([c, *attended], -1)), core.mm_projector(patches)], 1)


def multifuse_pool(core, local, patches):
    c, attended = six_pools(core, local[5]), 0
    for suffix, value in (("_small", ""), ("_mid", "_small"), ("_huge", "")):
        attended = attended + attend(core, c, detail(core, f"conv{suffix}", local[5]), suffix, value)
    return torch.cat([core.conv_linear(torch.cat([c, attended], -1)), core.mm_projector(patches)], 1)


def transformers_on(source):
    def encode(core, local, patches):
        batch, width = patches.shape[0], patches.shape[2]
        tokens = [
            getattr(core, f"tfm_{k}")(
                source(local, i, k).reshape(batch, -1, width), getattr(core, f"query_{k}").repeat(batch, 1, 1)
            )
            for i, k in enumerate(SIX)
        ]
        return torch.cat([core.tfm_linear(torch.cat(tokens, 1)), core.mm_projector(patches)], 1)

    return encode


ENCODERS = {
    "conv336": crops_of([f"conv_{k}" for k in SIX]),
    "conv336_cropping_sfe_dfi": dfi(six_crops, lambda local: local[5]),
    "conv336_pooling_sfe": whole_map,
    "conv336_adptive_pooling_fuse_49": dfi(six_pools, lambda local: local),
    "conv336_3_tokens": crops_of(["conv_8", "conv_16", "conv_24"]),
    "conv336_12_tokens": crops_of([f"conv_{k}" for k in range(2, 25, 2)]),
    "conv336_24": last_crop,
    "conv224": crops_of([f"conv_{k}" for k in range(1, 9)]),
    "conv336_conv_49": detail_alone,
    "conv336_crop_multifuse_q": multifuse_crop,
    "conv336_adptive_pooling_multifuse_q": multifuse_pool,
    "tfm336": transformers_on(lambda local, i, k: local[i]),
    "tfm336_adptive_pooling": transformers_on(
        lambda local, i, k: F.adaptive_avg_pool2d(local[5].permute(0, 3, 1, 2), k)
    ),
}
TOWERS = {
    "conv336_pooling_sfe": "336_pooling",
    "conv336_adptive_pooling_fuse_49": "336_pooling",
    "conv336_3_tokens": "336_3_tokens",
    "conv336_12_tokens": "224",
    "conv224": "224",
}
POOLED = {"conv336_pooling_sfe", "conv336_adptive_pooling_fuse_49", "conv336_adptive_pooling_multifuse_q"}
MULTI = {"conv336_crop_multifuse_q", "conv336_adptive_pooling_multifuse_q"}
DFI = {"conv336_cropping_sfe_dfi", "conv336_adptive_pooling_fuse_49"}
SIZES = {
    "conv336_3_tokens": {k: k for k in (8, 16, 24)},
    "conv336_12_tokens": {k: k for k in range(2, 25, 2)},
    "conv336_24": {24: 24},
    "conv224": {i: 2 * i for i in range(1, 9)},
    "conv336_conv_49": {},
}


class Core(nn.Module):
    """``get_model()``: the projector's modules under their official names, the tower, an embedding, a layer."""

    def __init__(self, switch, tower, c=8, d=4, h=12, kernel=None):
        super().__init__()
        self.vision_tower = tower
        self.embed_tokens = nn.Embedding(32, h)
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(h, h), nn.Tanh())])
        self.image_newline = nn.Parameter(torch.randn(h))
        self.mm_projector = nn.Sequential(nn.Linear(c, h), nn.GELU(), nn.Linear(h, h))
        if switch.startswith("tfm"):
            self.tfm_linear = nn.Sequential(nn.GELU(), nn.Linear(c, h, bias=False))
            for k in SIX:
                block = nn.Transformer(
                    batch_first=True, norm_first=True, d_model=c, num_encoder_layers=4, num_decoder_layers=4,
                    dim_feedforward=c, dropout=0.1, nhead=8, bias=False,
                )  # fmt: skip
                self.add_module(f"tfm_{k}", block)
                self.register_parameter(f"query_{k}", nn.Parameter(torch.zeros(1, 1, c)))
            return
        for name, k in SIZES.get(switch, {k: k for k in SIX}).items():
            layer = nn.Conv2d(c, d, k, bias=False)
            pooled = switch in POOLED and k != 24
            self.add_module(f"conv_{name}", nn.Sequential(nn.AdaptiveAvgPool2d(k), layer) if pooled else layer)
        if switch == "conv336_conv_49":
            self.conv_CM = nn.Conv2d(c, d, 12, stride=2, bias=False)
        details = {"_small": 12, "_mid": 9, "_huge": 5} if switch in MULTI else {"": 16} if switch in DFI else {}
        for suffix, k in details.items():
            self.add_module(f"conv{suffix or '_CM'}", nn.Conv2d(c, d, kernel or k, stride=2, bias=False))
            for part in ("query", "key", "value"):
                self.add_module(f"{part}_projector{suffix}", nn.Sequential(nn.LayerNorm(d), nn.Linear(d, d)))
        width = d * (4 if switch == "conv336_crop_multifuse_q" else 2 if details else 1)
        bias = switch in {"conv336_cropping_sfe_dfi", "conv336_adptive_pooling_multifuse_q"}
        self.conv_linear = nn.Sequential(nn.GELU(), nn.Linear(width, h, bias=bias))

    def get_vision_tower(self):
        return self.vision_tower


class Model(nn.Module):
    """The official causal model: ``encode_images``, placeholders replaced by image features, a loss."""

    def __init__(self, modules, encoder=None, tower=None, merge="flat", kernel=None, tower_module=None, **widths):
        super().__init__()
        grid = 16 if modules == "conv224" else 24
        tower = tower_module or Tower(tower or TOWERS.get(modules, "336_6_tokens"), grid, widths.get("c", 8))
        self.model = Core(modules, tower, kernel=kernel, **widths)
        self.lm_head = nn.Linear(widths.get("h", 12), 32, bias=False)
        self.switch = encoder or modules
        self.merge = merge

    def get_model(self):
        return self.model

    def encode_images(self, images):
        local, patches = self.get_model().get_vision_tower()(images)
        return ENCODERS[self.switch](self.get_model(), local, patches)

    def image_features(self, images, sizes=None, grids=None):
        """One sequence an image: ``[L, H]``; ``images`` a batch, or a list of tiles (the base first) an image."""
        if not isinstance(images, list):
            return list(self.encode_images(images))
        tokens = torch.split(self.encode_images(torch.cat(images)), [len(tiles) for tiles in images])
        if self.merge == "flat":
            return [tiles.flatten(0, 1) for tiles in tokens]
        return [self.merged(tiles, *args) for tiles, *args in zip(tokens, sizes, grids, strict=True)]

    def merged(self, tokens, size, grid):
        """[spatial tokens of all tiles]; [base patches]; [tiles as one map], with a newline a row where unpadded."""
        spatial, patches = tokens[:, :6].flatten(0, 1), tokens[:, 6:]
        (columns, rows), side = grid, self.get_model().get_vision_tower().num_patches_per_side
        tiles = patches[1:].unflatten(1, (side, side)).unflatten(0, (rows, columns))
        big = tiles.permute(0, 2, 1, 3, 4).flatten(2, 3).flatten(0, 1)  # [rows * side, columns * side, H]
        if self.merge == "spatial_unpad":
            big = unpadded(big, size)
            newline = self.model.image_newline.expand(big.shape[0], 1, -1)
            big = torch.cat([big, newline], 1)
        return torch.cat([spatial, patches[0], big.flatten(0, 1)])

    def forward(self, input_ids, images, labels=None, sizes=None, grids=None):
        """The mean loss over labels, each sequence by itself."""
        losses, features = [], self.image_features(images, sizes, grids)
        for ids, image, targets in zip(input_ids, features, labels, strict=True):
            at = int((ids == IMAGE_TOKEN).nonzero())
            embed = self.model.embed_tokens
            x = torch.cat([embed(ids[:at]), image, embed(ids[at + 1 :])])
            y = torch.cat([targets[:at], targets.new_full((len(image),), IGNORE), targets[at + 1 :]])
            # A mean over the past in the place of attention, so that every image token reaches every answer.
            past = self.model.layers[0](x).cumsum(0) / torch.arange(1, len(x) + 1, device=x.device)[:, None].to(x.dtype)
            losses.append(F.cross_entropy(self.lm_head(past)[:-1].float(), y[1:], ignore_index=IGNORE))
        return torch.stack(losses).mean()


def unpadded(big, size):
    """The padding of a letterboxed image removed; ``size`` is (width, height) of the original."""
    (width, height), (rows, columns) = size, big.shape[:2]
    if width / height > columns / rows:
        padding = (rows - int(height * (columns / width))) // 2
        return big[padding : rows - padding]
    padding = (columns - int(width * (rows / height))) // 2
    return big[:, padding : columns - padding]


def randomise(model, seed=0):
    """Every parameter at random, and outputs of the order of one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            fan = math.prod(p.shape[1:]) if p.dim() > 1 else 1
            noise = torch.randn(p.shape, generator=generator) / math.sqrt(fan)
            p.copy_(noise * 0.5 + 1 if p.dim() == 1 and name.endswith("weight") else noise)
    return model


def batch(model, images=2, seed=0):
    """Pixels, ids with one placeholder, and labels."""
    generator = torch.Generator().manual_seed(seed)
    side = model.get_model().get_vision_tower().config.image_size
    ids = torch.randint(0, 32, (images, 12), generator=generator)
    labels = ids.clone()
    ids[:, 2] = IMAGE_TOKEN
    labels[:, :3] = IGNORE
    return {"input_ids": ids, "images": torch.randn(images, 3, side, side, generator=generator), "labels": labels}


# What the official scripts save, under their names.


def adapter_file(model):
    """``model.bin`` of a pretraining run: trained parameters, and anything of mm_projector."""
    named = [(k, v) for k, v in model.named_parameters() if v.requires_grad or "mm_projector" in k]
    return {k: v.detach().cpu().clone() for k, v in named}


def non_lora_trainables(model):
    """``non_lora_trainables.bin`` of a LoRA run."""
    named = [(k, v) for k, v in model.named_parameters() if "lora_" not in k and v.requires_grad]
    return {k: v.detach().cpu().clone() for k, v in named}


def full_file(model):
    """What the Trainer writes: the state dict, on the CPU."""
    return {k: v.cpu() for k, v in model.state_dict().items()}
