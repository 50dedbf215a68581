"""A compression from its request: the plan, which reads no weights, and the work."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sp_fast.compress.features import (
    LEAST,
    MOST,
    RANDOM,
    SPLIT,
    Features,
    only_judging,
    random_features,
    split,
    stored_count,
    stored_features,
)
from sp_fast.compress.figure import draw
from sp_fast.compress.full import Full
from sp_fast.compress.request import Request, check_options, sweep, target
from sp_fast.compress.source import read_source
from sp_fast.compress.student import Made, Teacher, make
from sp_fast.compress.write import check_out, write
from sp_fast.config import SPProjectorConfig
from sp_fast.doctor.gather import host
from sp_fast.errors import ConfigError, ResourceError
from sp_fast.projector import SPProjector

Say = Callable[[str], Any]
_PROGRAM = 700 * 2**20  # torch and transformers, imported
_SHOWN = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)  # ranks of the spectrum


@dataclass(frozen=True)
class Size:
    """Parameters of a projector, and of what LLaVA-1.5's projector has not; bytes as it is written."""

    parameters: int
    spatial_parameters: int
    bytes: int


@dataclass(frozen=True)
class Plan:
    """What a compression does."""

    source: str
    kind: str
    out: str
    to: str
    quantization: str | None
    dtype: str
    config: dict[str, Any]
    before: Size
    after: Size
    fitted_to: str
    judged_on: str
    distillation_steps: int
    #: what --plot tries: rank or groups
    sweep: list[int]
    peak_memory_estimate_bytes: int


@dataclass(frozen=True)
class Outcome:
    """What was made, and the sizes that were tried: value, spatial parameters, error of the spatial tokens."""

    made: Made
    features: str
    sweep: list[tuple[int, int, float]]

    def to_dict(self) -> dict[str, Any]:
        """As one JSON object; energies at powers of two and at the rank that was taken."""
        spectra = [
            {
                "name": s.name,
                "rank": s.rank,
                "energy_kept": s.taken,
                "energy_by_rank": {} if s.rank is None else shown(s.kept, s.rank),
            }
            for s in self.made.spectra
        ]
        return {
            "features": self.features,
            "spectra": spectra,
            "errors": [asdict(error) for error in self.made.errors],
            "sweep": [dict(zip(("value", "spatial_parameters", "error"), point, strict=True)) for point in self.sweep],
        }


def shown(kept: list[float], rank: int) -> dict[int, float]:
    """Of energies by rank, those to print."""
    return {r: kept[r - 1] for r in sorted({*_SHOWN, rank}) if r <= len(kept)}


class Compression:
    """A request that was checked. ``plan`` costs nothing; ``run`` makes the projector, ``write`` the files.

    Raises:
        ConfigError: what cannot be made, or options that do not go together.
        CheckpointError: a source that cannot be read.
        ResourceError: the memory does not suffice.
    """

    def __init__(self, request: Request, force: bool = False) -> None:
        self.request = request
        check_options(request, force)
        self.source = read_source(request.source, request.grid)
        if self.source.kind == "model" and request.vision_tower:
            raise ConfigError(f"{request.source} has a vision tower of its own: leave out --vision-tower")
        if self.source.kind != "model" and request.images and not request.vision_tower:
            raise ConfigError("--images needs the vision tower that the projector was trained with: --vision-tower DIR")
        if request.grid is not None and self.source.kind != "official":
            raise ConfigError(f"--grid is for official checkpoints, and {request.source} says its own: leave it out")
        self.config = target(self.source.config, request)
        self._sweep = sweep(self.config, request) if request.plot else {}
        self.files: list[Path] = []
        if request.images:
            from sp_fast.compress.images import image_files

            self.files = image_files(request.images)
            if request.to and len(self.files) < LEAST:
                raise ConfigError(
                    f"{request.images} has {len(self.files)} images, and {LEAST} are needed at least: {SPLIT}"
                )
        read = (request.source, request.vision_tower, request.images, request.features)
        check_out(request.out, force, [*filter(None, read), *self.files])
        self.plan = self._plan()

    def check_memory(self) -> None:
        """Raises ResourceError where the estimate is beyond what is free."""
        needed, free = self.plan.peak_memory_estimate_bytes, host().available
        if needed > free:
            raise ResourceError(
                f"some {needed / 1e9:.1f} GB of memory are needed, and {free / 1e9:.1f} GB are free: close other "
                "programs, choose a smaller rank, or give fewer images"
            )

    def run(self, say: Say) -> Outcome:
        """Makes the projector, and judges it; with a plot also the others of the sweep."""
        self.check_memory()
        features = self._features(say)
        say("reading the full projector")
        teacher = Teacher(Full(self.source.load(), say), features)
        made = make(teacher, self.config, self.source.dtype, self.request.distill, say)
        points = []
        for value, config in self._sweep.items():
            say(f"{self.config.extractor}, {value}")
            try:
                same = config == self.config
                tried = made if same else make(teacher, config, self.source.dtype, self.request.distill, say)
            except ConfigError:  # beyond what the type holds
                continue
            points.append((value, _size(config, self.source.dtype).spatial_parameters, tried.errors[-1].relative))
        return Outcome(made, features.origin, points)

    def write(self, outcome: Outcome, force: bool, say: Say) -> None:
        """The folder of a projector, or of a whole model; it appears whole or not at all. Then the plot."""
        write(self.source, outcome.made.projector, self.request.out, force, say)
        if self.request.plot:
            labelled = [(str(value), size, error) for value, size, error in outcome.sweep]
            draw(labelled, self.plan.before.spatial_parameters, self._title(outcome), self.request.plot)

    def _features(self, say: Say) -> Features:
        request, config = self.request, self.source.config
        shared = split if request.to else only_judging
        if request.features:
            return shared(stored_features(request.features), str(request.features), config)
        if not self.files:
            return random_features(config)
        from sp_fast.compress.images import features_of_model, features_of_tower

        if self.source.assembly is not None:
            found = features_of_model(self.source.assembly, self.files, say)
        else:
            found = features_of_tower(request.vision_tower, self.files, say)
        return shared(found, f"{len(self.files)} images of {request.images}", config)

    def _title(self, outcome: Outcome) -> str:
        what = "rank" if self.config.rank is not None else "groups"
        return f"{self.config.extractor}, by {what}\n{outcome.features}"

    def _plan(self) -> Plan:
        request, dtype = self.request, self.source.dtype
        fitted_to, judged_on = self._said()
        return Plan(
            source=str(request.source),
            kind=self.source.kind,
            out=str(request.out),
            to=self.config.extractor,
            quantization=self.config.quantization,
            dtype=str(dtype).removeprefix("torch."),
            config=self.config.to_dict(),
            before=_size(self.source.config, dtype),
            after=_size(self.config, dtype),
            fitted_to=fitted_to,
            judged_on=judged_on,
            distillation_steps=request.distill,
            sweep=list(self._sweep),
            peak_memory_estimate_bytes=self._memory(),
        )

    def _said(self) -> tuple[str, str]:
        """What the compression is fitted to, and judged on."""
        given, fits = self.request.images or self.request.features, self.request.to is not None
        fitted_to = "the weights alone, as no images or features are given"
        judged_on = f"{RANDOM} images of random features with a common mean"
        if given:
            fitted_to = f"the features of {given}"
            judged_on = f"a quarter of {given}: {SPLIT}" if fits else f"all images of {given}, {MOST} at most"
        return fitted_to if fits else "nothing, as weights are quantised and no more", judged_on

    def _memory(self) -> int:
        """An estimate: the full projector as it is held, a convolution in float32 with an unfolded copy, the largest
        compact one with its copies in float32, features; and the program."""
        config, dtype = self.source.config, self.source.dtype
        held = torch.float32 if self.source.kind == "model" else dtype
        largest = max(h * w for h, w in [*config.levels, *((k, k) for k in config.detail_kernels)])
        unfolded = 4 * largest * config.vision_width * config.spatial_width
        made = [_size(c, torch.float32).bytes for c in (self.config, *self._sweep.values())]
        copies = 6 if self.request.distill else 4
        images = stored_count(self.request.features) if self.request.features else len(self.files) or RANDOM
        rows = config.patch_tokens * config.vision_width * 4
        if self.config.extractor == "full":  # which is quantised as a whole
            copies = 1
        return _PROGRAM + _size(config, held).bytes + 2 * unfolded + copies * max(made) + 3 * rows * images


def _size(config: SPProjectorConfig, dtype: torch.dtype) -> Size:
    stored = SPProjector(config, device="meta", dtype=dtype).state_dict().values()
    plain = SPProjector(replace(config, quantization=None), device="meta")
    every = sum(math.prod(p.shape) for p in plain.parameters())
    patches = sum(math.prod(p.shape) for p in plain.patch_mlp.parameters())
    return Size(every, every - patches, sum(t.numel() * t.itemsize for t in stored))
