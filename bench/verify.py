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
from safetensors.torch import save_file
from torch import Tensor

from sp_fast import SPProjectorConfig
from sp_fast.bench.accuracy import Comparison, compare
from sp_fast.bench.environment import environment
from sp_fast.bench.process_memory import MIB, available_mib
from sp_fast.bench.worker import FEATURES, Job, Worker
from sp_fast.checkpoint import inspect_official, official_shapes
from sp_fast.errors import ConfigError, ResourceError
from sp_fast.interface import check_patch_features
from sp_fast.variants import VARIANTS
from sp_fast.vision import clip_tower, load_image, patch_features, sample_photograph

STAGES = ("z_small", "z_big", "attention", "spatial_tokens", "patch_tokens")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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
    products: bool = False


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
        job = Job(
            "exact",
            config,
            str(request.checkpoint) if request.checkpoint else None,
            DTYPES[request.dtype],
            request.device,
            request.threads,
            request.seed,
            folder,
        )
        names = ["reference", "fast", *(["products"] if request.products else [])]
        progress("float64 yardstick")
        with Worker(job) as exact:
            expected = {kind: exact.tensors(kind) for kind in _kinds(request)}
        progress(f"building {' and '.join(names)}")
        with contextlib.ExitStack() as running:
            workers = {name: running.enter_context(Worker(replace(job, implementation=name))) for name in names}
            forward = _measure(request, workers, "forward", expected["outputs"], progress)
            backward = None
            if request.backward:
                trained = {name: workers[name] for name in ("reference", "fast")}
                backward = _measure(request, trained, "backward", expected["gradients"], progress)
            progress("peak memory")
            direction = "backward" if request.backward else "forward"
            memory = {f"{name}_mib": workers[name].ask("memory_mib", direction) for name in ("reference", "fast")}
    parameters = sum(torch.Size(shape).numel() for shape in official_shapes(config).values())
    found = environment(torch.device(request.device))
    return Report(variant, request, request.threads, source, parameters, forward, backward, memory, found)


def required_mib(config: SPProjectorConfig, request: Request) -> float:
    """An estimate of the peak: both projectors alive, the reference with its re-laid weights and its gradients."""
    size = DTYPES[request.dtype].itemsize
    shapes = official_shapes(config).values()
    counts = [torch.Size(shape).numel() for shape in shapes]
    largest, total = max(counts), sum(counts)
    exact = total * size + largest * 8 * (3 if request.backward else 2)
    alive = 2 + request.products + request.backward
    pair = total * size * alive + largest * 4 * 3
    activations = request.batch * config.patch_tokens * (config.vision_width + 4 * config.text_width) * 8
    return (max(exact, pair) + activations) / MIB + 1200  # and the imports of three processes


def check_device(name: str) -> None:
    """Raises ConfigError for a device that torch does not know or cannot reach."""
    try:
        if torch.empty(0, device=name).device.type not in ("cpu", "cuda"):
            raise RuntimeError("it is neither cpu nor cuda")
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device {name!r} cannot be used ({reason}); without a working GPU, choose cpu") from error


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


def _kinds(request: Request) -> list[str]:
    return ["outputs", *(["gradients"] if request.backward else [])]


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
    direction: str,
    expected: dict[str, Tensor],
    progress: Callable[[str], None],
) -> Direction:
    """Compares once (which also warms up), then times the implementations in turns."""
    kind = "outputs" if direction == "forward" else "gradients"
    found = {name: workers[name].tensors(kind) for name in ("reference", "fast")}
    for name, tensors in found.items():
        if tensors.keys() != expected.keys():
            raise RuntimeError(f"{name} gives {sorted(tensors.keys() ^ expected.keys())} where float64 does not")
    result = Direction({name: [] for name in workers})
    dtype = DTYPES[request.dtype]
    result.comparisons = [
        compare(key, found["fast"][key], found["reference"][key], expected[key], dtype)
        for key in sorted(expected, key=_order)
    ]
    for name in workers.keys() - found.keys():
        workers[name].ask("time_ms", direction)
    for run in range(request.runs):
        progress(f"{direction}, run {run + 1} of {request.runs}")
        for name, worker in workers.items():
            result.milliseconds[name].append(worker.ask("time_ms", direction))
    return result
