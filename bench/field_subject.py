"""A projector of the field in its process, and what judges it: itself in float64, or LLaVA-SP's official form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sp_fast.bench.cases import Case
from sp_fast.bench.field_exact import Streamed
from sp_fast.bench.field_peers import Shape, import_blocks
from sp_fast.bench.field_projectors import PROJECTORS
from sp_fast.bench.field_rows import Peer, Spatial
from sp_fast.bench.implementations import EXACT, OURS, YARDSTICK, Exact, Implementation, View, Weights, sum_in_float32
from sp_fast.bench.memory import release
from sp_fast.bench.subject import ProjectorJob, ProjectorSubject
from sp_fast.bench.weights import random_tensor
from sp_fast.compact_config import COMPACT
from sp_fast.quantize import BY_NAME, QuantizedWeight, quantize
from sp_fast.stored_tensor import StoredTensor

BUILT = "projector"  # the process of whichever projector it is
PLAIN = "plain."  # before the results of the official form in the row's own dtype


@dataclass(frozen=True)
class FieldJob(ProjectorJob):
    """What a worker builds: a row of PROJECTORS, as it is or (``implementation`` EXACT) what judges it."""

    projector: str = ""
    shrink: int = 1

    def build(self) -> ProjectorSubject | SpatialJudge:
        import_blocks()
        row = PROJECTORS[self.projector]
        if isinstance(row, Peer):
            return PeerSubject(self)
        if self.implementation == EXACT:
            return SpatialJudge(self, row)
        subject = QuantizedSubject if row.quantization else ProjectorSubject
        return subject(replace(self, implementation=row.implementation))


class PeerSubject(ProjectorSubject):
    """A projector of others, on seeded random weights."""

    _job: FieldJob

    def _build(self, weights: Weights) -> Implementation:
        """``weights`` are LLaVA-SP's, and of no use here."""
        job, config = self._job, self._job.config
        sum_in_float32()
        shape = Shape(config.grid, config.vision_width, config.text_width, job.shrink)
        module = filled(PROJECTORS[job.projector].make, shape, job.dtype, job.seed, self._device)
        return Plain(module.double() if job.implementation == EXACT else module)


class Plain(Implementation):
    """A module whose parameters are their own official layout."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def gradient_keys(self) -> list[str]:
        return [key for key, parameter in self.module.named_parameters() if parameter.grad is not None]

    def place(self, key: str) -> tuple[nn.Parameter, View]:
        return self.module.get_parameter(key), lambda tensor: tensor

    def accept(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        dtype = next(self.module.parameters()).dtype
        return tuple(x.to(dtype) for x in inputs)


def filled(
    make: Callable[[Shape], nn.Module], shape: Shape, dtype: torch.dtype, seed: int, device: torch.device
) -> nn.Module:
    """A projector whose parameters come from their names and the seed, the same in every process."""
    with torch.device("meta"):
        module = make(shape)
    module = module.to(dtype).to_empty(device=device).eval()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(random_tensor(name, tuple(parameter.shape), seed, device))
        for part in module.modules():
            if hasattr(part, "lay_positions"):
                part.lay_positions()
    return module


class QuantizedSubject(ProjectorSubject):
    """Ours with packed weights that are quantised from the same numbers."""

    _job: FieldJob

    def _build(self, weights: Weights) -> Implementation:
        found = super()._build(weights)
        found.module = quantize(found.module, PROJECTORS[self._job.projector].quantization)
        return found


class OfficialSubject(ProjectorSubject):
    """The official form, with what a quantised row's weights hold where it judges one."""

    _job: FieldJob

    def _build(self, weights: Weights) -> Implementation:
        scheme = PROJECTORS[self._job.projector].quantization
        return self._official(dequantized(weights, scheme) if scheme else weights)

    def _official(self, weights: Weights) -> Implementation:
        return super()._build(weights)


class StreamedSubject(OfficialSubject):
    """The official form in float64; a compact one, which is small, whole."""

    def _official(self, weights: Weights) -> Implementation:
        kind = Exact if self._job.config.extractor in COMPACT else Streamed
        return kind(self._job.config, weights, self._device)


def dequantized(weights: Weights, scheme: str) -> Weights:
    """Weights of which each convolution's are quantised when they are read, and given back in float64."""

    def load(stored: StoredTensor) -> Tensor:
        weight = stored.load()
        packed = weight.permute(2, 3, 1, 0).flatten(0, 1)
        cells = QuantizedWeight.of(packed, BY_NAME[scheme]).dequantized(torch.float64)
        return cells.unflatten(0, weight.shape[2:]).permute(3, 2, 0, 1)

    return {
        key: replace(stored, load=lambda stored=stored: load(stored)) if len(stored.shape) == 4 else stored
        for key, stored in weights.items()
    }


class SpatialJudge:
    """Float64 of the official form, and for ours that form's results in the row's own dtype: its yardstick. One after
    the other, so that they need no more memory than what they judge."""

    def __init__(self, job: FieldJob, row: Spatial) -> None:
        self.module = nn.Module()
        self._job, self._row = job, row

    def results(self, case: Case) -> str:
        exact = self._results(StreamedSubject, EXACT, case)
        plain = self._results(OfficialSubject, YARDSTICK, case) if self._row.implementation == OURS else {}
        path = self._job.folder / f"{EXACT}.{case.key}.safetensors"
        save_file(exact | {PLAIN + name: tensor for name, tensor in plain.items()}, path)
        return str(path)

    def _results(self, subject: type[ProjectorSubject], name: str, case: Case) -> dict[str, Tensor]:
        path = Path(subject(replace(self._job, implementation=name)).results(case))
        release(torch.device(self._job.device))
        found = load_file(path)
        path.unlink()
        return found
