"""Pixels of the spatial task: things in strong colours on backgrounds that are nearly grey."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from sp_fast.training.task.scene import Thing

_COLOURS = {
    "red": (220, 40, 40),
    "yellow": (235, 215, 50),
    "green": (50, 170, 60),
    "cyan": (50, 200, 210),
    "blue": (50, 70, 220),
    "purple": (160, 50, 190),
}
_DARKEST, _SHIFT = 0.8, 12  # of a thing's colour: the least brightness, and the most that a channel differs
_GREYS, _TINT, _CONTRAST = (50, 205), 12, 25  # of a background: levels, most of a channel, most of its pattern
_NOISE = 2  # most that a pixel differs, alike in all channels: files stay small


def draw(things: Iterable[Thing], size: int, rng: np.random.Generator) -> np.ndarray:
    """``[size, size, 3]`` uint8; no edge is smoothed, so that boxes are exact."""
    image = _background(size, rng)
    for thing in things:
        colour = rng.uniform(_DARKEST, 1) * np.array(_COLOURS[thing.kind.colour]) + rng.uniform(-_SHIFT, _SHIFT, 3)
        left, top, right, bottom = thing.box
        image[top:bottom, left:right][mask_of(thing.kind.shape, thing.extent)] = colour
    image += rng.integers(-_NOISE, _NOISE + 1, (size, size, 1))
    return image.round().clip(0, 255).astype(np.uint8)


def mask_of(shape: str, extent: int) -> np.ndarray:
    """``[extent, extent]`` bool, reaching all four edges."""
    middle = (extent - 1) / 2
    y, x = np.ogrid[:extent, :extent]
    across, down = abs(x - middle), abs(y - middle)
    masks = {
        "circle": across**2 + down**2 <= extent**2 / 4,
        "square": np.maximum(across, down) <= middle,
        "triangle": across <= (y + 1) / 2,
        "cross": np.minimum(across, down) <= extent / 8,
    }
    return masks[shape]


def _background(size: int, rng: np.random.Generator) -> np.ndarray:
    """``[size, size, 3]`` float64."""
    y, x = np.mgrid[:size, :size] / size
    pattern = _PATTERNS[rng.integers(len(_PATTERNS))](x, y, rng)
    strength = rng.uniform(0.3, 1) * _CONTRAST
    return rng.uniform(*_GREYS) + rng.uniform(-_TINT, _TINT, 3) + strength * pattern[..., None]


def _plain(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return np.zeros_like(x)


def _ramp(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    turn = rng.uniform(0, 2 * np.pi)
    return (x - 0.5) * np.cos(turn) + (y - 0.5) * np.sin(turn)


def _stripes(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return np.sin(2 * np.pi * rng.uniform(2, 8) * _ramp(x, y, rng))


def _checks(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    across, down = rng.integers(4, 17, 2)
    return np.where((x * across).astype(int) % 2 == (y * down).astype(int) % 2, 1.0, -1.0)


def _patches(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    greys = rng.uniform(-1, 1, (8, 8))
    return greys[(y * 8).astype(int), (x * 8).astype(int)]


#: Of ``[size, size]`` shares of the image across and down: values from -1 to 1.
_PATTERNS = (_plain, _ramp, _stripes, _checks, _patches)
