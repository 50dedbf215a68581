"""From a folder of images to patch features: the tower and the preparation of images that the model itself has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, PretrainedConfig

from sp_fast.compress.features import spread
from sp_fast.errors import CheckpointError, ImageError, first_line
from sp_fast.llava_sp.assemble import Assembly
from sp_fast.llava_sp.official_config import PUBLISHED_LAYER, vision_config
from sp_fast.llava_sp.official_names import TOWER, tower_tensors
from sp_fast.llava_sp.processing import image_processor
from sp_fast.llava_sp.tower import patch_features, tower_kind
from sp_fast.stored_tensor import StoredTensor
from sp_fast.tensor_files import stored_tensors
from sp_fast.vision import FORMATS, load_image

_SUFFIXES = (*(f".{name.lower()}" for name in FORMATS), ".jpg", ".tif")
_BATCH = 8


def image_files(folder: Path) -> list[Path]:
    """Images in a folder and below, by name; of more than ``MOST`` as many at equal distances.

    Raises:
        ImageError: no folder, or none in it.
    """
    if not folder.is_dir():
        raise ImageError(f"{folder} is no folder: give one with images like those that the model will see")
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES and path.is_file())
    if not found:
        raise ImageError(f"{folder} holds no images ({', '.join(_SUFFIXES)}): give another folder")
    return [found[i] for i in spread(len(found))]


def features_of_model(assembly: Assembly, files: list[Path], say: Callable[[str], Any]) -> Tensor:
    """``[n, N, C]`` float32, as the whole model computes them. Raises ImageError for an image that cannot be read."""
    config = assembly.config
    prepare = assembly.processor.image_processor
    return _features(config.vision_config, assembly.rest, config.vision_feature_layer, prepare, files, say)


def features_of_tower(folder: Path, files: list[Path], say: Callable[[str], Any]) -> Tensor:
    """``[n, N, C]`` float32 of a CLIP's or SigLIP's folder, as LLaVA-SP reads it: images padded to a square, the layer
    before the last.

    Raises:
        CheckpointError: no such tower.
        ImageError: an image that cannot be read.
    """
    tensors = tower_tensors(*stored_tensors(folder))
    config = vision_config(folder, None, any(name.startswith(f"{TOWER}head.") for name in tensors))
    prepare = image_processor(config.image_size, tower_kind(config).has_cls)
    return _features(config, tensors, PUBLISHED_LAYER, prepare, files, say)


def _features(
    config: PretrainedConfig,
    tensors: Mapping[str, StoredTensor],
    layer: int,
    prepare: Any,
    files: list[Path],
    say: Callable[[str], Any],
) -> Tensor:
    tower = AutoModel.from_config(config).float().eval()
    own = {name.removeprefix(TOWER): t.load().float() for name, t in tensors.items() if name.startswith(TOWER)}
    try:
        tower.load_state_dict(own)
    except RuntimeError as error:
        raise CheckpointError(f"the vision tower is not whole ({first_line(error)}): give its whole folder") from error
    found = []
    for start in range(0, len(files), _BATCH):
        say(f"patch features of image {start + 1} of {len(files)}")
        images = [load_image(file) for file in files[start : start + _BATCH]]
        pixels = prepare(images, return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            found.append(patch_features(tower, pixels, layer))
    return torch.cat(found)
