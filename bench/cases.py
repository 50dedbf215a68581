"""What is measured: one stage of a projector, in one direction, at one batch and dtype."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sp_fast import SPProjectorConfig
from sp_fast.compact_config import COMPACT

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

#: The parts of a projector, each measured alone, and what several of them come to in one call:
#: spatial: the SFE, pooling included; detail: the DFI's convolution; tail: attention and output layer; mlp: patch MLP
STAGES = ("whole", "spatial", "detail", "convolutions", "tail", "mlp")
COMPOSED = {"whole": ("spatial", "detail", "tail", "mlp"), "convolutions": ("spatial", "detail")}

#: forward without gradients; the backward alone; both together. The patch features need no gradient, as in training.
DIRECTIONS = ("forward", "backward", "both")


@dataclass(frozen=True)
class Case:
    """One row of a table, for every implementation that takes part."""

    variant: str
    config: SPProjectorConfig
    stage: str
    direction: str
    batch: int
    dtype: str

    @property
    def key(self) -> str:
        """Unique in a plan, and a file name."""
        return f"{self.variant}.{self.stage}.{self.direction}.b{self.batch}.{self.dtype}"

    @property
    def gate(self) -> Case:
        """The case whose results judge this one: a backward alone is judged with its forward."""
        return replace(self, direction="both") if self.direction == "backward" else self

    @property
    def exact(self) -> Case:
        """The case whose float64 results judge this one."""
        return self.gate

    def inputs(self, seed: int, device: torch.device) -> tuple[Tensor, ...]:
        """Seeded random inputs of the stage, the same in every process: ``[B, N, C]`` with a mean a channel, as CLIP's
        have, or the tail's z."""
        generator = torch.Generator(device).manual_seed(seed)
        config, dtype = self.config, DTYPES[self.dtype]
        if self.stage == "tail":
            outputs = [side * side for side in config.detail_sides] if config.attends else []
            shapes = [(self.batch, count, config.spatial_width) for count in (config.spatial_tokens, *outputs)]
            tensors = [torch.randn(shape, generator=generator, device=device).to(dtype) for shape in shapes]
            return tuple(z.requires_grad_(self.direction != "forward") for z in tensors)
        mean = torch.randn(config.vision_width, generator=generator, device=device)
        shape = (self.batch, config.patch_tokens, config.vision_width)
        return (torch.randn(shape, generator=generator, device=device).add_(mean).to(dtype),)


def stages_of(config: SPProjectorConfig) -> tuple[str, ...]:
    """The stages that a configuration has. A compact extractor is one, and is measured within the whole."""
    compact = config.extractor in COMPACT
    absent = {
        "spatial": not config.levels or compact,
        "detail": not config.detail_kernels or compact,
        "convolutions": not (config.levels and config.detail_kernels) or compact,
        "tail": not config.spatial_tokens,
    }
    return tuple(stage for stage in STAGES if not absent.get(stage, False))


def parts_of(case: Case) -> tuple[str, ...]:
    """The stages that the case's consists of: those that it has of several, or itself."""
    present = stages_of(case.config)
    return tuple(stage for stage in COMPOSED.get(case.stage, (case.stage,)) if stage in present)
