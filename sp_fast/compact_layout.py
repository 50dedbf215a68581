"""Where the tensors of the natural, plain torch form of a compact extractor lie in its parameters.

There is no official one; names are in its manner. Every one of them is a view, so that it can be read and filled.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from torch import Tensor

from sp_fast import compact_geometry, geometry
from sp_fast.compact_config import COMPACT
from sp_fast.config import SPProjectorConfig
from sp_fast.errors import CheckpointError
from sp_fast.extractors import EXTRACTORS
from sp_fast.kernels.window import Window
from sp_fast.layout import MERGE_FIRST, Entry, detail_names, entries, level_module


@dataclass(frozen=True)
class GroupedEntry(Entry):
    """Cells of a parameter ``[groups, cells, C, D]``, as ``[groups, D, C, height, width]``."""

    def part(self, parameter: Tensor) -> Tensor:
        return parameter[:, self.window.cell :][:, : self.window.cells]

    def view(self, parameter: Tensor) -> Tensor:
        part = self.part(parameter).unflatten(1, (self.window.height, self.window.width))
        return part.permute(0, 4, 3, 1, 2)


@dataclass(frozen=True)
class DepthEntry(Entry):
    """Cells of a parameter ``[cells, C]``, as a depthwise ``[C, 1, height, width]``."""

    def view(self, parameter: Tensor) -> Tensor:
        part = self.part(parameter).unflatten(0, (self.window.height, self.window.width))
        return part.permute(2, 0, 1).unsqueeze(1)


@dataclass(frozen=True)
class PointEntry(Entry):
    """A parameter ``[out, in]`` as a 1x1 convolution ``[out, in, 1, 1]``."""

    def view(self, parameter: Tensor) -> Tensor:
        return parameter[:, :, None, None]


def reference_entries(config: SPProjectorConfig, parameters: Iterable[str]) -> list[Entry]:
    """The tensors of ReferenceSPProjector in a projector's parameters of these names, in their order; for a projector
    that is not compact they are the official ones.

    Raises:
        CheckpointError: a name that is no parameter of a projector.
    """
    found: list[Entry] = []
    for name in parameters:
        mine = config.extractor in COMPACT and name.startswith("extractor.")
        found += _entries(config, name.removeprefix("extractor.")) if mine else entries(config, [name])
    return found


def _entries(config: SPProjectorConfig, parameter: str) -> list[Entry]:
    """Those in a parameter of a compact extractor."""
    ours = f"extractor.{parameter}"
    if parameter not in EXTRACTORS[config.extractor].shapes(config):
        raise CheckpointError(f"{ours} is no parameter of a projector: {MERGE_FIRST}")
    if parameter == "reduce_weight":
        return [PointEntry("reduce.weight", ours)]
    if parameter == "shared_weight":
        return list(_nest(config, ours))
    part, _, role = parameter.partition("_")
    convolutions = _convolutions(config, part)
    if config.extractor == "resampled":
        return list(_resampled(config, convolutions, part, ours))
    if role == "weight":
        kind = GroupedEntry if config.extractor == "grouped" else Entry
        return [kind(f"{name}.weight", ours, w) for name, w in convolutions]
    return list(_ROLES[role](convolutions, ours))


def _convolutions(config: SPProjectorConfig, part: str) -> list[tuple[str, Window]]:
    """The name and the window of every full convolution of a part, "spatial" or "detail"."""
    if part == "detail":
        names = [f"conv_{label}" for label in detail_names(config)]
        return list(zip(names, geometry.detail_windows(config), strict=True))
    found = []
    for level, w in enumerate(geometry.spatial_windows(config)):
        inner = ".1" if geometry.is_pooled(config, level) else ""  # after AdaptiveAvgPool2d
        found.append((level_module(config, level) + inner, w))
    return found


def _depth(convolutions: list[tuple[str, Window]], ours: str) -> Iterator[Entry]:
    for name, w in convolutions:
        yield DepthEntry(f"{name}.0.weight", ours, w)


def _point(convolutions: list[tuple[str, Window]], ours: str) -> Iterator[Entry]:
    for i, (name, w) in enumerate(convolutions):
        yield Entry(f"{name}.1.weight", ours, replace(w, cell=i, height=1, width=1))


def _across(convolutions: list[tuple[str, Window]], ours: str) -> Iterator[Entry]:
    cell = 0
    for name, w in convolutions:
        yield Entry(f"{name}.0.weight", ours, replace(w, cell=cell, height=1))
        cell += w.width


def _down(convolutions: list[tuple[str, Window]], ours: str) -> Iterator[Entry]:
    cell = 0
    for name, w in convolutions:
        yield Entry(f"{name}.1.weight", ours, replace(w, cell=cell, width=1))
        cell += w.height


_ROLES = {"depth": _depth, "point": _point, "across": _across, "down": _down}


def _nest(config: SPProjectorConfig, ours: str) -> Iterator[Entry]:
    parts = [part for ring in compact_geometry.rings(config) for part in ring.parts]
    for i, part in enumerate(parts):
        yield Entry(f"kernel.parts.{i}", ours, _kernel(part.cell, part.height, part.width))


def _resampled(
    config: SPProjectorConfig, convolutions: list[tuple[str, Window]], part: str, ours: str
) -> Iterator[Entry]:
    side = config.base_kernel
    names = ["kernel"] if part == "spatial" else [name for name, _ in convolutions]
    for i, name in enumerate(names):
        yield Entry(f"{name}.weight", ours, _kernel(i * side * side, side, side))


def _kernel(cell: int, height: int, width: int) -> Window:
    """A kernel as it lies in a parameter; what it reads plays no part."""
    return Window(0, cell, 0, width, height, width, 1, 1, 1)
