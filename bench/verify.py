"""`sp-fast verify`: a real photograph through CLIP, then through reference and fast projector, side by side.

The float64 yardstick runs first and alone; then reference and fast live in processes of their own and take turns, so
that both meet the same machine.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sp_fast import SPProjectorConfig
from sp_fast.bench import budget
from sp_fast.bench.accuracy import Comparison, compare
from sp_fast.bench.cases import DTYPES, Case
from sp_fast.bench.environment import check_device, environment
from sp_fast.bench.gate import results
from sp_fast.bench.implementations import EXACT, OURS, YARDSTICK
from sp_fast.bench.memory import available_mib
from sp_fast.bench.subject import ProjectorJob
from sp_fast.bench.worker import Worker
from sp_fast.checkpoint import inspect_official, official_shapes
from sp_fast.errors import ConfigError, ResourceError
from sp_fast.interface import check_patch_features
from sp_fast.variants import VARIANTS
from sp_fast.vision import clip_tower, load_image, patch_features, sample_photograph

FEATURES = "features.safetensors"
STAGES = ("z_small", "z_big", "attention", "spatial_tokens", "patch_tokens")


@dataclass(frozen=True)
class Request:
    """The command's options."""

    image: Path | None = None
    vision_tower: Path | None = None
    checkpoint: Path | None = None
    variant: str | None = None
    grid: int | None = None
    spatial_width: int | None = None
    dtype: str = "float32"
    device: str = "cpu"
    threads: int = 2
    batch: int = 1
    runs: int = 5
    seed: int = 0
    backward: bool = False


@dataclass
class Direction:
    """Forward, or forward and backward together: medians over alternating runs, and errors against float64."""

    milliseconds: dict[str, list[float]] = field(default_factory=dict)
    comparisons: list[Comparison] = field(default_factory=list)

    def median(self, implementation: str) -> float:
        return statistics.median(self.milliseconds[implementation])

    def to_dict(self) -> dict[str, Any]:
        values = {f"{name}_ms": round(self.median(name), 3) for name in self.milliseconds}
        values["speedup"] = round(self.median("reference") / self.median("fast"), 2)
        values["max_rel_error"] = _largest([c.fast_error for c in self.comparisons])
        values["reference_max_rel_error"] = _largest([c.reference_error for c in self.comparisons])
        values["failed"] = [c.name for c in self.comparisons if not c.passed]
        values["runs_ms"] = {name: [round(ms, 3) for ms in runs] for name, runs in self.milliseconds.items()}
        return values


@dataclass
class Report:
    """What was found. ``agrees`` is False where a result breaks the accuracy rule."""

    variant: str
    request: Request
    threads: int
    source: dict[str, str]
    parameters: int
    forward: Direction
    backward: Direction | None
    memory: dict[str, float]
    environment: dict[str, Any]

    @property
    def agrees(self) -> bool:
        directions = [self.forward, *([self.backward] if self.backward else [])]
        return all(c.passed for direction in directions for c in direction.comparisons)

    def to_dict(self) -> dict[str, Any]:
        return {
            "variant": self.variant,
            "device": self.request.device,
            "dtype": self.request.dtype,
            "threads": self.threads,
            "batch": self.request.batch,
            "agrees": self.agrees,
            "forward": self.forward.to_dict(),
            "backward": self.backward.to_dict() if self.backward else None,
            "memory": {name: round(mib, 1) for name, mib in self.memory.items()},
            "parameters": self.parameters,
            "source": self.source,
            "environment": self.environment,
        }


def verify(request: Request, progress: Callable[[str], None]) -> Report:
    """Runs the whole comparison; ``progress`` hears each stage.

    Raises:
        SPFastError: an unreadable image, tower or checkpoint, an unknown variant, or too little memory.
    """
    check_device(request.device)
    config, variant = _configure(request)
    check_memory(config, request)
    with tempfile.TemporaryDirectory(prefix="sp_fast-verify-") as name:
        folder = Path(name)
        source = _write_features(request, config, folder, progress)
        checkpoint = str(request.checkpoint) if request.checkpoint else None
        job = ProjectorJob(
            EXACT, config, DTYPES[request.dtype], request.device, request.seed, folder, checkpoint, folder / FEATURES
        )
        cases = _cases(request, config, variant)
        progress("float64 yardstick")
        with Worker(EXACT, request.threads) as exact:
            exact.build(job)
            expected = {direction: _computed(case, exact) for direction, case in cases.items()}
        names = (YARDSTICK, OURS)
        progress(f"building {' and '.join(names)}")
        with contextlib.ExitStack() as running:
            workers = {}
            for name in names:
                workers[name] = running.enter_context(Worker(name, request.threads))
                workers[name].build(replace(job, implementation=name))
            found = {d: _measure(request, workers, case, expected[d], progress) for d, case in cases.items()}
            progress("peak memory")
            largest = cases.get("both", cases["forward"])
            memory = {f"{name}_mib": workers[name].ask("memory", largest).peak_mib for name in names}
    parameters = sum(torch.Size(shape).numel() for shape in official_shapes(config).values())
    return Report(
        variant,
        request,
        request.threads,
        source,
        parameters,
        found["forward"],
        found.get("both"),
        memory,
        environment(torch.device(request.device)),
    )


def required_mib(config: SPProjectorConfig, request: Request) -> float:
    """An estimate of the peak: both projectors alive, one of them running, or the float64 yardstick alone."""
    arguments = (config, request.dtype, request.batch, request.backward)
    return max(
        2 * budget.idle_mib(config, request.dtype) + budget.running_mib(*arguments), budget.exact_mib(*arguments)
    )


def check_memory(config: SPProjectorConfig, request: Request) -> None:
    """Raises ResourceError, with a width that would fit, where the machine's free memory is too little."""
    available, required = available_mib(torch.device(request.device)), required_mib(config, request)
    if required <= available:
        return
    message = f"about {required:,.0f} MiB are needed, but {available:,.0f} MiB are available"
    width = config.spatial_width
    while request.checkpoint is None and config.extractor == "full" and width > 8:
        width //= 2
        smaller = replace(config, spatial_width=width)
        if required_mib(smaller, request) <= available:
            raise ResourceError(f"{message}; --spatial-width {width} needs {required_mib(smaller, request):,.0f} MiB")
    raise ResourceError(f"{message}: close other programs, or use a larger machine")


def _cases(request: Request, config: SPProjectorConfig, variant: str) -> dict[str, Case]:
    directions = ["forward", *(["both"] if request.backward else [])]
    return {d: Case(variant, config, "whole", d, request.batch, request.dtype) for d in directions}


def _computed(case: Case, worker: Worker) -> dict[str, Tensor]:
    """The forward level by level, or the gradients of forward and backward."""
    if case.direction == "forward":
        return load_file(worker.ask("intermediates", case))
    return {name: tensor for name, tensor in results(case, worker).items() if name.startswith("grad.")}


def _configure(request: Request) -> tuple[SPProjectorConfig, str]:
    """The configuration, and what to call it."""
    if request.checkpoint is not None:
        if request.spatial_width:
            raise ConfigError("--spatial-width is for random weights: a checkpoint has its own widths")
        pyramid = SPProjectorConfig.variant(request.variant).pyramid if request.variant else None
        name, config = inspect_official(request.checkpoint, request.grid, pyramid)
        if request.variant and VARIANTS[request.variant] != VARIANTS[name]:
            raise ConfigError(f"the checkpoint is {name}, which contradicts --variant {request.variant}: leave it out")
        return config, request.variant or name
    variant = request.variant or "crop-dfi"
    overrides = {"grid": request.grid, "spatial_width": request.spatial_width}
    config = SPProjectorConfig.variant(variant, **{k: v for k, v in overrides.items() if v is not None})
    return config, variant


def _write_features(
    request: Request, config: SPProjectorConfig, folder: Path, progress: Callable[[str], None]
) -> dict[str, str]:
    """Patch features of the photograph; further images of a batch are the same one, rolled sideways."""
    path = request.image or sample_photograph()
    image = load_image(path)
    progress("vision tower")
    tower = clip_tower(request.vision_tower, request.seed)
    progress("patch features")
    features = patch_features(tower, [_rolled(image, i / request.batch) for i in range(request.batch)])
    _check_fit(features, config)
    save_file({"patch_features": features}, folder / FEATURES)
    weights = str(request.checkpoint) if request.checkpoint else f"random (seed {request.seed})"
    shown = str(path) if request.image else f"{path.name}, matplotlib's sample photograph"
    return {"image": shown, "vision_tower": tower.origin, "projector_weights": weights}


def _rolled(image: Any, share: float) -> Any:
    from PIL import ImageChops

    return ImageChops.offset(image, round(share * image.width), 0)


def _check_fit(features: Tensor, config: SPProjectorConfig) -> None:
    try:
        check_patch_features(features, config)
    except ValueError as error:
        raise ConfigError(f"the vision tower does not fit the projector: {error}") from error


def _largest(errors: list[float]) -> float | None:
    """The largest error; None, which JSON can hold, where one of them is not finite."""
    return max(errors) if all(map(math.isfinite, errors)) else None


def _order(name: str) -> tuple[int, int, str]:
    """Results in the order in which they are computed."""
    stage, _, index = name.partition(".")
    return STAGES.index(stage) if stage in STAGES else -1, int(index) if index.isdigit() else 0, name


def _measure(
    request: Request,
    workers: dict[str, Worker],
    case: Case,
    expected: dict[str, Tensor],
    progress: Callable[[str], None],
) -> Direction:
    """Compares once (which also warms up), then times the implementations in turns."""
    found = {name: _computed(case, worker) for name, worker in workers.items()}
    for name, tensors in found.items():
        if tensors.keys() != expected.keys():
            raise RuntimeError(f"{name} gives {sorted(tensors.keys() ^ expected.keys())} where float64 does not")
    result = Direction({name: [] for name in workers})
    dtype = DTYPES[request.dtype]
    result.comparisons = [
        compare(key, found[OURS][key], found[YARDSTICK][key], expected[key], dtype)
        for key in sorted(expected, key=_order)
    ]
    for run in range(request.runs):
        progress(f"{case.direction}, run {run + 1} of {request.runs}")
        for name, worker in workers.items():
            result.milliseconds[name] += worker.ask("time", case, 0.0, 1).ms
    return result
