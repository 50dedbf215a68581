"""The vision tower: from pixels to the patch features that the projector reads, and no further."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from sp_fast.errors import ConfigError


class TowerKind(NamedTuple):
    """What differs between the towers of transformers: a CLS token in front, a norm after the embeddings."""

    has_cls: bool
    norm: str | None


KINDS = {
    "clip_vision_model": TowerKind(has_cls=True, norm="pre_layrnorm"),
    "siglip_vision_model": TowerKind(has_cls=False, norm=None),
}


def tower_kind(vision_config: PretrainedConfig) -> TowerKind:
    """Raises ConfigError for a tower that is neither CLIP nor SigLIP, or whose image is not whole square patches."""
    kind = KINDS.get(vision_config.model_type)
    if kind is None:
        raise ConfigError(
            f"vision_config is of model_type {vision_config.model_type!r}; LLaVA-SP has {' or '.join(KINDS)}"
        )
    size, patch = vision_config.image_size, vision_config.patch_size
    if not isinstance(size, int) or not isinstance(patch, int) or size < patch:
        raise ConfigError(f"image_size={size!r} and patch_size={patch!r} must be pixels of a square image and patch")
    return kind


def patch_features(tower: nn.Module, pixel_values: Tensor, layer: int) -> Tensor:
    """``[B, 3, height, width]`` to ``[B, N, C]``: the tower's hidden state ``layer``, CLS removed, row-major.

    Without images there are no features; the tower runs all the same, as one that is sharded has to on every process.
    The layers beyond are not run, and no other hidden state is kept. No autograd graph goes through a tower whose
    parameters are all frozen (paper, Sec. 4: the tower is), whatever else asks for gradients.
    """
    kind, weight = tower_kind(tower.config), tower.embeddings.patch_embedding.weight
    depth = layer % (tower.config.num_hidden_layers + 1)
    if not len(pixel_values):
        return patch_features(tower, pixel_values.new_zeros(1, *pixel_values.shape[1:]), layer)[:0]
    trained = torch.is_grad_enabled() and any(p.requires_grad for p in tower.parameters())
    with torch.set_grad_enabled(trained):
        hidden = tower.embeddings(pixel_values.to(weight.device, weight.dtype))
        if kind.norm is not None:
            hidden = getattr(tower, kind.norm)(hidden)
        for block in tower.encoder.layers[:depth]:
            hidden = block(hidden, None)
    return hidden[:, 1:] if kind.has_cls else hidden
