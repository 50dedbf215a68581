"""The compact extractors' fields of SPProjectorConfig: which kind reads which, what each may hold, what None means."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sp_fast.errors import ConfigError

if TYPE_CHECKING:
    from sp_fast.config import SPProjectorConfig

#: Kind to the fields that it reads.
COMPACT: dict[str, tuple[str, ...]] = {
    "bottleneck": ("rank",),
    "depthwise": (),
    "grouped": ("groups",),
    "separable": ("rank",),
    "nested": ("rank",),
    "resampled": ("rank", "base_kernel"),
}
COMPACT_FIELDS = ("rank", "groups", "base_kernel")
_REQUIRED = {"bottleneck": ("rank", "64"), "grouped": ("groups", "8")}
_BASE_KERNEL = 8


def resolve_compact(config: SPProjectorConfig) -> dict[str, int]:
    """The compact fields that are to be set, of a configuration whose other fields are resolved.

    Raises:
        ConfigError: a field that the kind does not read or cannot do without, or a value that cannot be built.
    """
    kind = config.extractor
    for name in COMPACT_FIELDS:
        if (value := getattr(config, name)) is not None and name not in COMPACT.get(kind, ()):
            readers = " or ".join(repr(reader) for reader, read in COMPACT.items() if name in read)
            raise ConfigError(
                f"{name}={value} is not read by extractor={kind!r}: leave it out, or take extractor={readers}"
            )
    if kind in _REQUIRED and getattr(config, _REQUIRED[kind][0]) is None:
        name, example = _REQUIRED[kind]
        raise ConfigError(f"extractor={kind!r} needs {name}: give it, e.g. {name}={example}")
    return _CHECKS[kind](config) if kind in _CHECKS else {}


def narrows(config: SPProjectorConfig) -> bool:
    """Whether a shared 1x1 convolution C -> rank comes first."""
    return config.rank is not None and config.extractor != "separable"


def narrowed_width(config: SPProjectorConfig) -> int:
    """Channels of the patch features behind that convolution, or as they come."""
    return config.rank if narrows(config) else config.vision_width


def _check_rank(config: SPProjectorConfig) -> None:
    if config.rank is not None and config.rank > config.vision_width:
        raise ConfigError(
            f"rank={config.rank} is more than the vision_width={config.vision_width} that it should narrow: choose 1 "
            f"to {config.vision_width}"
        )


def _bottleneck(config: SPProjectorConfig) -> dict[str, int]:
    _check_rank(config)
    return {}


def _grouped(config: SPProjectorConfig) -> dict[str, int]:
    for name in ("vision_width", "spatial_width"):
        if getattr(config, name) % config.groups:
            raise ConfigError(
                f"groups={config.groups} does not divide {name}={getattr(config, name)}: choose a number that divides "
                f"vision_width={config.vision_width} and spatial_width={config.spatial_width}"
            )
    return {}


def _separable(config: SPProjectorConfig) -> dict[str, int]:
    return {"rank": config.spatial_width} if config.rank is None else {}


def _nested(config: SPProjectorConfig) -> dict[str, int]:
    _check_rank(config)
    if not config.levels:
        raise ConfigError(
            "extractor='nested' shares the levels' kernel, but kernel_sizes=() has none: name at least one"
        )
    nest = sorted({width for height, width in config.levels if height == width})
    for kernel in config.detail_kernels:
        if kernel not in nest:
            choice = f"choose one of {', '.join(map(str, nest))}" if nest else "set detail_kernel=None"
            raise ConfigError(
                f"detail_kernel={kernel} is to be the centre of extractor='nested', and is not the size of any of its "
                f"levels: {choice}, or take another extractor"
            )
    return {}


def _resampled(config: SPProjectorConfig) -> dict[str, int]:
    _check_rank(config)
    largest = max([*(side for level in config.levels for side in level), *config.detail_kernels])
    if config.base_kernel is None:
        return {"base_kernel": min(_BASE_KERNEL, largest)}
    if config.base_kernel > largest:
        raise ConfigError(
            f"base_kernel={config.base_kernel} is larger than all regions that are averaged to it: choose 1 to "
            f"{largest}"
        )
    return {}


_CHECKS = {
    "bottleneck": _bottleneck,
    "grouped": _grouped,
    "separable": _separable,
    "nested": _nested,
    "resampled": _resampled,
}
