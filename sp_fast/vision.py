"""From an image file to patch features: safe decoding, CLIP's own preprocessing, the penultimate layer without CLS."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from sp_fast.errors import ImageError

if TYPE_CHECKING:
    from transformers import CLIPVisionModel

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")  # no EPS, for which Pillow would start Ghostscript
WIDE_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")  # Pillow would clip these to 8 bits
MAX_PIXELS = 64_000_000  # decoded, this is 192 MB; the file that claims more can be tiny
# CLIP ViT-L/14-336, the tower of LLaVA-1.5 and of LLaVA-SP.
CLIP_L_336 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}


class VisionTower(NamedTuple):
    """A CLIP vision model, and one line on where its weights come from."""

    model: CLIPVisionModel
    origin: str


def sample_photograph() -> Path:
    """A photograph that is on every machine with matplotlib: its sample portrait of Grace Hopper (US Navy, public
    domain)."""
    import matplotlib.cbook

    return Path(matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False))


def load_image(path: str | os.PathLike[str]) -> Image.Image:
    """An RGB image. Raises ImageError for a file that is missing, unreadable or larger than 64 megapixels decoded."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is lower
            with Image.open(path, formats=FORMATS) as image:
                width, height = image.size
                if width * height > MAX_PIXELS:
                    raise ImageError(
                        f"{path} would decode to {width}x{height} pixels, more than {MAX_PIXELS:,}: scale it down first"
                    )
                if image.mode in WIDE_MODES:
                    raise ImageError(f"{path} has more than 8 bits a channel (mode {image.mode}): convert it to 8 bits")
                return image.convert("RGB")
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError(f"{path} is none of {', '.join(FORMATS)}: convert it") from error
    except Exception as error:  # decoders of damaged files fail in any way
        raise ImageError(f"{path} cannot be read as an image: {error}") from error


def clip_tower(path: str | os.PathLike[str] | None = None, seed: int = 0) -> VisionTower:
    """CLIP's vision model from a local folder, or the true ViT-L/14-336 with seeded random weights. Nothing is
    downloaded.

    Raises:
        ImageError: the folder holds no complete CLIP vision model.
    """
    from transformers import CLIPVisionConfig, CLIPVisionModel

    if path is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = CLIPVisionModel(CLIPVisionConfig(**CLIP_L_336))
        return VisionTower(model.eval(), f"CLIP ViT-L/14-336 with random weights (seed {seed})")
    if not Path(path).is_dir():
        raise ImageError(f"vision tower {path} is no folder: give a local copy of openai/clip-vit-large-patch14-336")
    try:
        model, info = CLIPVisionModel.from_pretrained(path, local_files_only=True, output_loading_info=True)
    except Exception as error:  # damaged weights and configurations fail in any way
        raise ImageError(f"vision tower {path} cannot be loaded: {error}") from error
    if missing := sorted(info["missing_keys"]):
        raise ImageError(f"vision tower {path} lacks {missing[0]} and {len(missing) - 1} more: give a whole CLIP model")
    return VisionTower(model.float().eval(), f"CLIP weights of {path}")


@torch.no_grad()
def patch_features(tower: VisionTower, images: list[Image.Image]) -> Tensor:
    """``[B, N, C]`` float32: hidden states of the layer before the last, in row-major patch order, CLS removed.

    Raises ImageError for an image so thin that CLIP's resizing of its shorter edge would make it enormous.
    """
    side = tower.model.config.image_size
    for image in images:
        if max(image.size) * side * side / min(image.size) > MAX_PIXELS:
            raise ImageError(
                f"an image of {image.width}x{image.height} pixels is too thin to resize: crop or pad it first"
            )
    pixels = _image_processor(side)(images, return_tensors="pt")["pixel_values"]
    hidden = tower.model(pixel_values=pixels, output_hidden_states=True).hidden_states
    return hidden[-2][:, 1:].contiguous()


def _image_processor(side: int):  # noqa: ANN202, the class's name depends on the release of transformers
    try:
        from transformers import CLIPImageProcessorPil as Processor
    except ImportError:
        from transformers import CLIPImageProcessor as Processor
    return Processor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
