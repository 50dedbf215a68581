"""A compact or quantised projector from a full one: the extractor is fitted, every other layer copied."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sp_fast.compress.distillation import distil
from sp_fast.compress.features import Features
from sp_fast.compress.full import Full
from sp_fast.compress.least_squares import refine
from sp_fast.compress.measure import Error, errors, integrated
from sp_fast.compress.methods import METHODS, Spectrum
from sp_fast.compress.metric import metric_of, plain_metric
from sp_fast.config import SPProjectorConfig
from sp_fast.errors import ConfigError
from sp_fast.projector import SPProjector


class Teacher:
    """What a full projector gives on features, computed once: ``z[part]`` and spatial ``tokens[part]``, float32.

    Raises:
        ConfigError: features so large that it gives NaN or infinite values.
    """

    def __init__(self, full: Full, features: Features) -> None:
        self.full, self.features = full, features
        # The layers after the extractor in float32; the extractor is the smallest that there is, and is not used.
        self.head = with_head(full.projector, replace(full.config, extractor="bottleneck", rank=1))
        parts = {name: getattr(features, name) for name in ("fitted", "deciding", "held_out")}
        sizes = [len(part) for part in parts.values()]
        whole = full.z(torch.cat(list(parts.values())))
        self.z: dict[str, Tensor] = dict(zip(parts, whole.split(sizes), strict=True))
        self.tokens = {name: integrated(self.head, z) for name, z in self.z.items() if len(z)}
        if not all(given.isfinite().all() for given in (whole, *self.tokens.values())):
            raise ConfigError(
                f"{features.origin}: of these the full projector itself makes NaN or infinite values, so nothing can "
                "be compared: give features as the vision tower computes them"
            )


@dataclass(frozen=True)
class Made:
    """A projector in the type that it is written in, what of the weights it keeps, what it misses when held out."""

    projector: SPProjector
    spectra: list[Spectrum]
    errors: list[Error]


def make(
    teacher: Teacher, config: SPProjectorConfig, dtype: torch.dtype, distill: int, say: Callable[[str], Any]
) -> Made:
    """The projector of a configuration; errors are those of its numbers in ``dtype``, computed in float32.

    Raises:
        ConfigError: features that tell nothing, or weights that are NaN or infinite in ``dtype``.
    """
    full, scheme = teacher.full, config.quantization
    if config.extractor == "full":
        made = full.projector.to(dtype).quantized(scheme)
        return Made(made, [], _errors(teacher, made, teacher.head))
    student, spectra = _fitted(teacher, replace(config, quantization=None), distill, say)
    rounded = student.to(dtype)
    _check_finite(rounded, teacher.features)
    judged = SPProjector(rounded.config, "torch", dtype=torch.float32)
    judged.load_state_dict(rounded.state_dict())
    if scheme is not None:
        rounded, judged = rounded.quantized(scheme), judged.quantized(scheme)
    return Made(rounded, spectra, _errors(teacher, judged, judged))


def _check_finite(projector: SPProjector, features: Features) -> None:
    fitted_to = features.origin if features.given else "the weights alone"
    for name, tensor in projector.named_parameters():
        if not tensor.isfinite().all():
            raise ConfigError(
                f"{name} has NaN or infinite values as {tensor.dtype}, fitted to {fitted_to}: take a source in "
                "bfloat16 or float32, another rank, or features as the vision tower computes them, not scaled"
            )


def _fitted(
    teacher: Teacher, config: SPProjectorConfig, distill: int, say: Callable[[str], Any]
) -> tuple[SPProjector, list[Spectrum]]:
    full, features = teacher.full, teacher.features
    try:
        metric = metric_of(features.fitted, config) if features.given else plain_metric(config.vision_width)
    except ConfigError as error:
        raise ConfigError(f"{features.origin}: {error}") from error
    fit = METHODS[config.extractor](full, config, metric)
    student = with_head(full.projector, config)
    student.extractor.load_state_dict(fit.parameters)
    if features.given:
        known = [(getattr(features, part), teacher.z[part]) for part in ("fitted", "deciding")]
        refine(student.extractor, *known, full.split, say)
    if distill:
        known = [(getattr(features, part), teacher.tokens[part]) for part in ("fitted", "deciding")]
        distil(student, *known, distill, say)
    return student, fit.spectra


def with_head(projector: SPProjector, config: SPProjectorConfig) -> SPProjector:
    """A float32 projector of another extractor, whose other layers are this one's."""
    made = SPProjector(config, "torch", dtype=torch.float32)
    head = {name: t for name, t in projector.state_dict().items() if not name.startswith("extractor.")}
    made.load_state_dict(head, strict=False)
    return made


def _errors(teacher: Teacher, judged: SPProjector, head: SPProjector) -> list[Error]:
    z, tokens = teacher.z["held_out"], teacher.tokens["held_out"]
    return errors(teacher.full, z, tokens, judged.extractor, head, teacher.features.held_out)
