"""The arms of the study: projectors of the paper's tables, and LLaVA-1.5's beside them, scaled to a tower's grid."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sp_fast.config import SPProjectorConfig
from sp_fast.errors import ConfigError

#: What all others are held against: no spatial tokens.
BASELINE = "mlp"
_GRID = 24  # that the paper's lengths are counted on
_WIDTH = 1024  # of the tower that its channels are counted on
_LENGTHS = ("kernel_sizes", "map_size", "detail_kernel", "detail_stride", "base_kernel")
_LEAST_RANK = 4


@dataclass(frozen=True)
class Arm:
    """A projector as published: a variant, and what it changes there.

    Args:
        table: of the paper that it answers to, or what it shows where the paper has none.
    """

    name: str
    table: str
    variant: str
    changes: Mapping[str, Any] = field(default_factory=dict)

    def config(self, grid: int, vision_width: int, text_width: int) -> SPProjectorConfig:
        """The same on a tower of ``grid`` x ``grid`` patches: every length grows or shrinks with it.

        The spatial features' width and a rank keep their shares of the tower's width (a rank is 4 at least); groups
        stay as many.

        Raises:
            ConfigError: a length would be no whole number of patches.
        """
        published = SPProjectorConfig.variant(self.variant, **self.changes)
        values = {name: self._scaled(name, getattr(published, name), grid) for name in self._lengths(published)}
        if published.rank is not None:
            values["rank"] = max(_LEAST_RANK, published.rank * vision_width // _WIDTH)
        widths = {"vision_width": vision_width, "spatial_width": published.spatial_width * vision_width // _WIDTH}
        return SPProjectorConfig.from_dict(
            {**published.to_dict(), **values, **widths, "grid": grid, "text_width": text_width}
        )

    def _lengths(self, published: SPProjectorConfig) -> list[str]:
        lengths = [name for name in _LENGTHS if getattr(published, name) is not None]
        return [name for name in lengths if published.detail_kernels or not name.startswith("detail")]

    def _scaled(self, name: str, length: int | tuple[int, ...], grid: int) -> int | tuple[int, ...]:
        if isinstance(length, tuple):
            return tuple(self._scaled(name, one, grid) for one in length)
        if length * grid % _GRID:
            raise ConfigError(
                f"the arm {self.name!r} has {name} {length} on the published {_GRID}x{_GRID} grid, and on this tower's "
                f"{grid}x{grid} that is no whole number: take a tower of 12x12 patches (96 pixels, patches of 8) or "
                "a multiple of that, or leave the arm out"
            )
        return length * grid // _GRID


_HEADLINE, _ALONE, _EXTRACTOR, _TOKENS, _WINDOWS, _DETAIL, _COMPACT = (
    "headline", "SFE alone", "Tab. 3", "Tab. 4", "Tab. 5", "Tab. 6", "compact",
)  # fmt: skip
_ALL = (
    Arm(BASELINE, _HEADLINE, "mlp"),
    Arm("crop-dfi", _HEADLINE, "crop-dfi"),
    Arm("pool-dfi", _HEADLINE, "pool-dfi"),
    Arm("crop", _ALONE, "crop"),
    Arm("pool", _ALONE, "pool"),
    Arm("tfm-crop", _EXTRACTOR, "tfm336"),
    Arm("tfm-pool", _EXTRACTOR, "tfm336_adptive_pooling"),
    Arm("1-token", _TOKENS, "conv336_24"),  # crop has the 6
    Arm("3-tokens", _TOKENS, "conv336_3_tokens"),
    Arm("12-tokens", _TOKENS, "conv336_12_tokens"),
    Arm("sliding", _WINDOWS, "sliding"),
    Arm("detail-4", _DETAIL, "crop-dfi", {"detail_kernel": 4}),  # crop-dfi has the 16
    Arm("detail-8", _DETAIL, "crop-dfi", {"detail_kernel": 8}),
    Arm("detail-12", _DETAIL, "crop-dfi", {"detail_kernel": 12}),
    Arm("compact-50m", _COMPACT, "compact-50m"),
    Arm("compact-5m", _COMPACT, "compact-5m"),
    Arm("depthwise", _COMPACT, "crop-dfi", {"extractor": "depthwise"}),
    Arm("grouped", _COMPACT, "crop-dfi", {"extractor": "grouped", "groups": 8}),
    Arm("separable", _COMPACT, "crop-dfi", {"extractor": "separable", "rank": 64}),
    Arm("nested", _COMPACT, "crop-dfi", {"extractor": "nested", "rank": 64}),
)
#: By name, in the order in which they run and are shown.
ARMS = {arm.name: arm for arm in _ALL}
#: Whether spatial tokens help at all: the two published models beside none, half an hour on two cores.
HEADLINE = tuple(arm.name for arm in _ALL if arm.table == _HEADLINE)


def chosen(names: list[str], headline: bool) -> list[Arm]:
    """The arms asked for, in their order; all where nothing is said.

    Raises:
        ConfigError: a name that is no arm's.
    """
    if unknown := [name for name in names if name not in ARMS]:
        raise ConfigError(f"{unknown[0]!r} is no arm: choose among {', '.join(ARMS)}")
    wanted = {*names, *(HEADLINE if headline else ())} or ARMS.keys()
    return [arm for arm in ARMS.values() if arm.name in wanted]
