"""What a compression is asked for: options that go together, and the configurations that they mean."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from sp_fast.compact_config import COMPACT
from sp_fast.config import SPProjectorConfig
from sp_fast.errors import ConfigError

_SWEEP = (0.125, 0.25, 0.5, 1, 2, 4)  # of the rank or the groups that were asked for


@dataclass(frozen=True)
class Request:
    """What to compress, and how.

    Args:
        to: a compact extractor, or None where only ``quantize`` is asked for.
        rank, groups, base_kernel: of the extractor, as in ``SPProjectorConfig``.
        quantize: "int8", "fp8", "int4" or None.
        grid: patches along a side, where an official checkpoint cannot tell.
        images, vision_tower: folders; a whole model has its own tower.
        features: a safetensors file instead.
        distill: steps.
        plot: an SVG file, for a sweep of ranks or groups.
    """

    source: Path
    out: Path
    to: str | None = None
    rank: int | None = None
    groups: int | None = None
    base_kernel: int | None = None
    quantize: str | None = None
    grid: int | None = None
    images: Path | None = None
    vision_tower: Path | None = None
    features: Path | None = None
    distill: int = 0
    plot: Path | None = None


def check_options(request: Request, force: bool) -> None:
    """Raises ConfigError for options that do not go together, and for a plot that may not be drawn."""
    if request.to is None and request.quantize is None:
        raise ConfigError(f"nothing is asked for: say --to {', '.join(COMPACT)}, or --quantize int8, fp8, int4")
    if request.to == "full":
        raise ConfigError(f"--to full is what the source is already: choose one of {', '.join(COMPACT)}")
    if request.to is not None and request.to not in COMPACT:
        raise ConfigError(f"--to {request.to} is no compact extractor: choose one of {', '.join(COMPACT)}")
    if request.images and request.features:
        raise ConfigError("--images and --features give the same: leave one out")
    if request.vision_tower and not request.images:
        raise ConfigError("--vision-tower is for the images of --images: give those, or leave it out")
    if request.distill and not (request.images or request.features):
        raise ConfigError("--distill needs what the model will see: give --images or --features")
    if request.distill and request.to is None:
        raise ConfigError("--distill trains a compact extractor, and quantised weights cannot be trained: say --to")
    if request.plot:
        _check_plot(request.plot, request.out, force)
    if request.features and not request.features.is_file():
        raise ConfigError(f"--features {request.features} is no file: give patch features as safetensors")


def _check_plot(plot: Path, out: Path, force: bool) -> None:
    place, folder = plot.resolve(), out.resolve()
    if plot.suffix != ".svg" or not place.parent.is_dir() or plot.is_dir():
        raise ConfigError(f"--plot {plot} must be an .svg file in a folder that is there")
    if folder in (place, *place.parents):
        raise ConfigError(f"--plot {plot} lies in {out}, which the compression replaces: draw it in another folder")
    if plot.exists() and not force:
        raise ConfigError(f"--plot {plot} exists: draw to another file, or overwrite it with --force")


def target(config: SPProjectorConfig, request: Request) -> SPProjectorConfig:
    """Raises ConfigError for a rank, groups or a kernel that cannot be, or that the kind does not read."""
    given = {"rank": request.rank, "groups": request.groups, "base_kernel": request.base_kernel}
    extractor = request.to or config.extractor
    return replace(config, extractor=extractor, quantization=request.quantize, **given)


def sweep(config: SPProjectorConfig, request: Request) -> dict[int, SPProjectorConfig]:
    """Ranks, or groups, around the one that was asked for."""
    name = "rank" if config.rank is not None else "groups"
    if (middle := getattr(config, name)) is None:
        raise ConfigError(
            f"--plot tries ranks or groups, and {config.extractor} without a rank has neither: leave it out"
        )
    found: dict[int, SPProjectorConfig] = {}
    for value in sorted({max(1, round(middle * factor)) for factor in _SWEEP}):
        try:
            found[value] = replace(config, **{name: value})
        except ConfigError:  # beyond what the widths allow
            continue
    return found
