"""The patch features that a compression is fitted to and judged by: who gives them, and how they are split."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sp_fast.config import SPProjectorConfig
from sp_fast.errors import CheckpointError, ConfigError
from sp_fast.interface import check_patch_features
from sp_fast.stored_tensor import StoredTensor
from sp_fast.tensor_files import file_problem, read_file

MOST = 256  # images that are used of many: 600 MB of features at the published widths
LEAST = 4
RANDOM = 8  # images of random features
SPLIT = "of every four images, by name, two are fitted, one decides when to stop, one is held out for the errors"
_NAME = "features"


@dataclass(frozen=True)
class Features:
    """``[n, N, C]`` float32 each. Where nothing is fitted there is only ``held_out``, which judges."""

    origin: str
    fitted: Tensor
    deciding: Tensor
    held_out: Tensor

    @property
    def given(self) -> bool:
        """Whether there is something to fit to."""
        return len(self.fitted) > 0


def spread(count: int) -> list[int]:
    """Which of so many images are used: all, or ``MOST`` at equal distances."""
    return [i * count // min(count, MOST) for i in range(min(count, MOST))]


def split(features: Tensor, origin: str, config: SPProjectorConfig) -> Features:
    """As ``SPLIT`` says, of features ``[n, N, C]``.

    Raises:
        ConfigError: too few images, another width or grid than the projector's, NaN or infinite values.
    """
    features = _checked(features, origin, config)
    if len(features) < LEAST:
        raise ConfigError(f"{origin} has {len(features)} images, and {LEAST} are needed at least: {SPLIT}")
    place = torch.arange(len(features)) % 4
    return Features(origin, *(features[chosen] for chosen in (place < 2, place == 2, place == 3)))


def only_judging(features: Tensor, origin: str, config: SPProjectorConfig) -> Features:
    """All of the features ``[n, N, C]`` judge, where nothing is fitted. Raises ConfigError as ``split`` does."""
    features = _checked(features, origin, config)
    if not len(features):
        raise ConfigError(f"{origin} has no images: give one at least")
    return Features(origin, features[:0], features[:0], features)


def _checked(features: Tensor, origin: str, config: SPProjectorConfig) -> Tensor:
    """As float32, in which wider ones may be infinite."""
    try:
        check_patch_features(features, config)
    except ValueError as error:
        raise ConfigError(f"{origin}: {error}") from error
    features = features.float()
    if not features.isfinite().all():
        raise ConfigError(f"{origin} has NaN or infinite values: compute the features again")
    return features


def stored_count(path: Path) -> int:
    """How many images ``stored_features`` gives; only names and shapes are read, errors are the same."""
    return len(spread(_stored(path).shape[0]))


def stored_features(path: Path) -> Tensor:
    """The tensor "features" of a safetensors file, or its only one: ``[n, N, C]``, CLS removed, row-major.

    Of more than ``MOST`` images as many at equal distances.

    Raises:
        CheckpointError: no such file, a damaged one, or one without it.
    """
    stored = _stored(path)
    return stored.load()[spread(stored.shape[0])]


def _stored(path: Path) -> StoredTensor:
    if problem := file_problem(path):
        raise CheckpointError(f"{path} {problem}: give a safetensors file of patch features")
    tensors = read_file(path)
    found = tensors.get(_NAME) or (next(iter(tensors.values())) if len(tensors) == 1 else None)
    if found is None or found.dtype is None or len(found.shape) != 3:
        raise CheckpointError(
            f"{path} has no floating-point tensor {_NAME!r} [images, patches, width]: save it as that"
        )
    return found


def random_features(config: SPProjectorConfig, seed: int = 0) -> Features:
    """Normal, around a mean that all patches share, as features of a vision tower have one; only to judge by."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(RANDOM, config.patch_tokens, config.vision_width, generator=generator)
    noise += torch.randn(config.vision_width, generator=generator)
    origin = f"{RANDOM} images of random features with a common mean, as no images are given (seed {seed})"
    return Features(origin, noise[:0], noise[:0], noise)
