"""The spatial task's vision towers: small CLIPs whose patches have learnt to say what they show, and where they are.

This classification stage has images of its own, none of the data's. A pretrained CLIP's patches say both; one that is
taught colours and shapes alone drops its position embeddings on the way: the blind tower, behind which only the
projector can say where a patch lies. What lies beside what is left to the projector and the language model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from sp_fast.training.task.drawing import draw, mask_of
from sp_fast.training.task.fit import Lessons, Progress, fit
from sp_fast.training.task.scene import compose_crowd
from sp_fast.training.task.words import COLOURS, SHAPES

_MOST = 12  # things of an image
_LEAST = 1 / 10  # share of a patch that a thing must fill to be what the patch shows
_JUDGED = 200  # images
_LABELS = ("colour", "shape", "row", "column")
_SHOWN = (1 + len(COLOURS), 1 + len(SHAPES))  # 0 is the background


def make_tower(width: int, layers: int, heads: int, patch: int, size: int, seed: int) -> CLIPVisionModel:
    """At random."""
    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        image_size=size,
        patch_size=patch,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tower = CLIPVisionModel(config)
    tower.set_attn_implementation("eager")  # the fastest for such widths on a CPU
    return tower


def teach_seeing(
    tower: CLIPVisionModel,
    images: int,
    lessons: Lessons,
    seed: int,
    progress: Progress | None = None,
    places: bool = True,
) -> dict[str, float]:
    """Trains the tower under a linear head, which is dropped: each patch's colour and shape, or background, its row and
    its column. Returns the shares of patches of new images, where they show a thing, of which it says each rightly.

    Args:
        images: that are drawn, and come again in any order.
        places: whether rows and columns are taught.
    """
    config, device = tower.config, tower.device
    side = config.image_size // config.patch_size
    classes = (*_SHOWN, side, side)[: len(_LABELS) if places else len(_SHOWN)]
    pixels, labels = _drawn(seed, range(images), config, len(classes))
    order = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = nn.Linear(config.hidden_size, sum(classes)).to(device)

    def logits(pixels: Tensor) -> Tensor:
        return head(tower(pixel_values=normalised(pixels.to(device))).last_hidden_state[:, 1:])

    def loss_of(step: int) -> Tensor:
        chosen = torch.randint(images, (lessons.batch,), generator=order)
        return loss(logits(pixels[chosen]).split(classes, -1), labels[chosen].to(device))

    fit(nn.ModuleList([tower, head]), loss_of, lessons, progress)
    pixels, labels = _drawn(seed, range(images, images + _JUDGED), config, len(classes))
    with torch.no_grad():
        said = torch.stack([some.argmax(-1) for some in logits(pixels).split(classes, -1)], -1).cpu()
    right = (said == labels)[labels[..., 0] > 0].double().mean(0)
    return dict(zip(_LABELS, right.tolist(), strict=False))


def _drawn(seed: int, numbers: Iterable[int], config: CLIPVisionConfig, count: int) -> tuple[Tensor, Tensor]:
    """Pixels, and the first so many labels."""
    images = [labelled_image(seed, number, config.image_size, config.patch_size) for number in numbers]
    pixels, labels = zip(*images, strict=True)
    return torch.from_numpy(np.stack(pixels)), torch.from_numpy(np.stack(labels)[..., :count])


def loss(logits: Sequence[Tensor], labels: Tensor) -> Tensor:
    """Cross-entropy of ``[B, N, classes]``, a tensor for each of the ``[B, N, n]`` labels."""
    parts = zip(logits, labels.unbind(-1), strict=True)
    return sum(F.cross_entropy(some.float().flatten(0, 1), wanted.flatten()) for some, wanted in parts)


def labelled_image(seed: int, index: int, size: int, patch: int) -> tuple[np.ndarray, np.ndarray]:
    """``[size, size, 3]`` uint8 pixels, and for each patch ``[N, 4]`` int64 its colour and shape, counted from 1, its
    row and its column."""
    rng = Random(f"{seed}/tower/{index}")
    things = compose_crowd(rng, size, _MOST)
    side = size // patch
    most = np.full(side * side, _LEAST * patch**2)
    shown = np.zeros((side * side, 2), np.int64)
    for thing in things:
        full = np.zeros((size, size), bool)
        left, top, right, bottom = thing.box
        full[top:bottom, left:right] = mask_of(thing.kind.shape, thing.extent)
        covered = full.reshape(side, patch, side, patch).sum((1, 3)).ravel()
        shown[covered > most] = 1 + COLOURS.index(thing.kind.colour), 1 + SHAPES.index(thing.kind.shape)
        most = np.maximum(most, covered)
    where = np.stack(np.divmod(np.arange(side * side), side), -1)
    return draw(things, size, np.random.default_rng(rng.getrandbits(64))), np.concatenate([shown, where], -1)


def normalised(pixels: Tensor) -> Tensor:
    """``[B, size, size, 3]`` uint8 to ``[B, 3, size, size]`` float32 as the model's image processor does."""
    mean, std = (torch.tensor(some, device=pixels.device) for some in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    return ((pixels / 255 - mean) / std).permute(0, 3, 1, 2)
