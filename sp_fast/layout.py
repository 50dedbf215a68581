"""The official layout: which official tensor is which part of which parameter of ours. Key names are made here;
recognise.py reads them back.

A convolution's ``[D, C, height, width]`` is a run of cells of a packed ``[cells, C, D]`` parameter; every other tensor
is the same on both sides under another name. Forms that the official code lacks are named in its manner.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from sp_fast import geometry
from sp_fast.config import SPProjectorConfig
from sp_fast.errors import CheckpointError
from sp_fast.kernels.window import Window
from sp_fast.variants import OFFICIAL

_CONV224_SIZES = OFFICIAL["conv224"]["kernel_sizes"]  # its keys count levels: conv_1 has kernel 2
DETAIL_NAMES = {1: ("CM",), 3: ("small", "mid", "huge")}
PARTS = ("query", "key", "value")
MERGE_FIRST = (
    "adapters, parametrizations and quantised layers must be merged or removed first (merge_and_unload() in PEFT)"
)


@dataclass(frozen=True)
class Entry:
    """One official tensor (key without prefix) and its place in a parameter of SPProjector."""

    official: str
    ours: str
    window: Window | None = None  # None: the whole parameter, unchanged

    def part(self, parameter: Tensor) -> Tensor:
        """The place itself, as it lies in memory: a run of cells, or the whole parameter."""
        return parameter if self.window is None else parameter[self.window.cell :][: self.window.cells]

    def view(self, parameter: Tensor) -> Tensor:
        """The official tensor as a view of our parameter (of its data, gradient or shape alike)."""
        part = self.part(parameter)
        if self.window is None:
            return part
        return part.unflatten(0, (self.window.height, self.window.width)).permute(3, 2, 0, 1)


def level_module(config: SPProjectorConfig, level: int) -> str:
    """Name of the level's official module: ``conv_4``, ``tfm_4``; ``window_0`` for sliding windows."""
    if config.pyramid == "sliding":
        return f"window_{level}"
    size = config.kernel_sizes[level]
    if config.extractor == "transformer":
        return f"tfm_{size}"
    return f"conv_{size // 2 if config.kernel_sizes == _CONV224_SIZES else size}"


def query_name(config: SPProjectorConfig, level: int) -> str:
    """Name of the learned query of a transformer level."""
    return f"query_{config.kernel_sizes[level]}"


def detail_names(config: SPProjectorConfig) -> tuple[str, ...]:
    """The official names of the detail convolutions: CM, or small, mid, huge."""
    count = len(config.detail_kernels)
    return DETAIL_NAMES.get(count, tuple(f"detail_{i}" for i in range(count)))


def attention_module(config: SPProjectorConfig, part: str, detail: int) -> str:
    """Name of a detail's query, key or value projection, e.g. ``query_projector`` or ``key_projector_mid``."""
    name = f"{part}_projector"
    return name if len(config.detail_kernels) == 1 else f"{name}_{detail_names(config)[detail]}"


def output_module(config: SPProjectorConfig) -> str:
    """Name of ``Sequential(GELU, Linear)``, the spatial output layer."""
    return "tfm_linear" if config.extractor == "transformer" else "conv_linear"


def entries(config: SPProjectorConfig, parameters: Iterable[str]) -> list[Entry]:
    """The official tensors of a projector with these parameter names, in the parameters' order."""
    renamed = _renamed(config)
    found: list[Entry] = []
    for name in parameters:
        if name == "extractor.spatial_weight":
            found += _spatial_entries(config, name)
        elif name == "extractor.detail_weight":
            found += _detail_entries(config, name)
        else:
            head = max((h for h in renamed if name.startswith(h)), key=len, default=None)
            if head is None:
                raise CheckpointError(f"{name} is no parameter of a projector: {MERGE_FIRST}")
            found.append(Entry(renamed[head] + name[len(head) :], name))
    return found


def _spatial_entries(config: SPProjectorConfig, name: str) -> list[Entry]:
    found = []
    for level, window in enumerate(geometry.spatial_windows(config)):
        # The official module of a pooled level is Sequential(AdaptiveAvgPool2d, Conv2d), which moves its key to .1
        inner = ".1.weight" if geometry.is_pooled(config, level) else ".weight"
        found.append(Entry(level_module(config, level) + inner, name, window))
    return found


def _detail_entries(config: SPProjectorConfig, name: str) -> list[Entry]:
    windows = zip(detail_names(config), geometry.detail_windows(config), strict=True)
    return [Entry(f"conv_{label}.weight", name, window) for label, window in windows]


def _renamed(config: SPProjectorConfig) -> dict[str, str]:
    """Beginnings of our parameter names, and what they are called officially."""
    renamed = {"patch_mlp.": "mm_projector.", "output.": f"{output_module(config)}.1."}
    for detail in range(len(config.detail_kernels)):
        for part in PARTS:
            renamed[f"integrator.{part}.{detail}."] = attention_module(config, part, detail) + "."
    if config.extractor == "transformer":
        for level in range(len(config.levels)):
            renamed[f"extractor.blocks.{level}."] = level_module(config, level) + "."
            renamed[f"extractor.queries.{level}"] = query_name(config, level)
    return renamed
