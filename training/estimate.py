"""The memory that a run will need, part by part, before anything of it is loaded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from sp_fast.doctor.gather import host
from sp_fast.llava_sp.assemble import Assembly
from sp_fast.training.flops import core_of
from sp_fast.training.recipe import Recipe
from sp_fast.training.rehearsal import TOWER, rehearse, shapes_of
from sp_fast.training.stage import dtype_of, part_of

Sharding = Literal["none", "zero2", "zero3", "fsdp2"]
GIB = 2**30
_STATES = 2  # of AdamW, each as large as what is trained
_GRADIENTS, _ADAMW, _BUCKETS = "gradients", "AdamW's states", "DDP's buckets"
# What the processes divide among them: parts that begin with these words.
_DIVIDED: dict[Sharding, tuple[str, ...]] = {
    "none": (),
    "zero2": (_GRADIENTS, _ADAMW),
    "zero3": ("frozen", "trained", _GRADIENTS, _ADAMW),
    "fsdp2": ("frozen", "trained", _GRADIENTS, _ADAMW),
}


@dataclass(frozen=True)
class Estimate:
    """Bytes of one process at the worst moment of a step: the backward of a batch that joins others in a step.

    CUDA's context (about half a GiB), the allocator's gaps and buffers of communication come on top.

    Args:
        parts: weights as ``frozen ...`` and ``trained ...``, ``gradients``, ``AdamW's states``, ``DDP's buckets``,
            ``copies`` of trained weights that autocast makes, ``saved: ...`` by a part's forward, and ``temporary``.
        largest_unit: parameters of the largest unit that is gathered where weights are divided, in the type that is
            computed in.
        samples, tokens: of a batch, and of each sample.
    """

    parts: Mapping[str, int]
    largest_unit: int
    samples: int
    tokens: int
    processes: int
    sharding: Sharding = "none"

    @property
    def total(self) -> int:
        """Bytes."""
        return sum(self.parts.values())

    def sharded(self, sharding: Sharding) -> Estimate:
        """Of the same run, where its processes divide weights, gradients or states. Of an estimate without sharding."""
        divided = _DIVIDED[sharding]
        parts = {
            name: -(-size // self.processes) if name.startswith(divided) else size
            for name, size in self.parts.items()
            if name != _BUCKETS or not divided
        }
        if "trained" in divided:
            parts["gathered weights"] = 2 * self.largest_unit  # one that computes, and the next
        return replace(self, parts=parts, sharding=sharding)

    def to_dict(self) -> dict[str, Any]:
        """For JSON, sizes in bytes."""
        return {
            "total_bytes": self.total, "parts_bytes": dict(self.parts), "batch_size": self.samples,
            "tokens": self.tokens, "processes": self.processes, "sharding": self.sharding,
        }  # fmt: skip

    def fitting(self, free_bytes: int) -> list[Sharding]:
        """The ways to divide it, or not to, with which it fits."""
        ways = _DIVIDED if self.processes > 1 else ("none",)
        return [way for way in ways if self.sharded(way).total <= free_bytes]

    def check(self, free_bytes: int) -> str | None:
        """A warning where this is more than there is, with what would help."""
        if self.total <= free_bytes:
            return None
        largest = max(self.parts, key=lambda name: self.parts[name])
        return (
            f"training needs about {self.total / GIB:,.1f} GiB a process, and {free_bytes / GIB:,.1f} GiB are free; "
            f"the most, {self.parts[largest] / GIB:,.1f} GiB, is for {largest}: choose a smaller batch_size (more "
            "batches then make a step) or max_length, gradient_checkpointing, LoRA (lora_rank) in finetune, or several "
            "GPUs that divide weights and states (fsdp2.yaml, zero2.yaml or zero3.yaml of accelerate launch)"
        )


def estimate(stage: str, recipe: Recipe, assembly: Assembly, processes: int = 1) -> Estimate:
    """Of a run, from shapes alone: nothing of the parts is read. Takes seconds for a 7B model.

    Batches are as long as the recipe allows, with an image in each sample: those of most data are shorter.
    """
    model = shapes_of(stage, recipe, assembly.config)
    weights: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        part = TOWER if "vision_tower." in name else part_of(name)
        weights[f"{'trained' if parameter.requires_grad else 'frozen'} {part}"] += parameter.nbytes
    trained = sum(size for name, size in weights.items() if name.startswith("trained"))
    unit = _largest_unit(model) * dtype_of(recipe).itemsize
    held = rehearse(model, recipe)
    parts = {
        **weights,
        _GRADIENTS: trained,
        _ADAMW: _STATES * trained,
        _BUCKETS: trained * (processes > 1),
        **held.saved,
        "temporary": held.temporary,
    }
    return Estimate({k: v for k, v in parts.items() if v}, unit, *held.batch, processes)


def free_memory() -> int:
    """Bytes that a run could take on this machine's current GPU, or else in its memory."""
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else host().available


def print_estimate(found: Estimate, free_bytes: int) -> None:
    """A table in GiB on stdout, with the ways to divide where there are several processes, and the warning."""
    columns = [found.sharded(kind) for kind in (_DIVIDED if found.processes > 1 else ("none",))]
    table = Table(title=f"GiB a process, batches of {found.samples} x {found.tokens:,} tokens", title_justify="left")
    table.add_column("part")
    for column in columns:
        table.add_column(column.sharding if found.processes > 1 else "GiB", justify="right")
    for name in dict.fromkeys(name for column in columns for name in column.parts):
        table.add_row(name, *(_gib(column.parts.get(name, 0)) for column in columns))
    table.add_section()
    table.add_row("together", *(_gib(column.total) for column in columns))
    console = Console()
    console.print(table)
    console.print(f"free: {_gib(free_bytes)} GiB", highlight=False)
    if (warning := found.check(free_bytes)) is not None:
        console.print(warning, style="yellow", highlight=False, soft_wrap=True)


def _gib(size: int) -> str:
    return f"{size / GIB:,.2f}"


def _largest_unit(model: nn.Module) -> int:
    """Elements of the projector, a layer, the embeddings or the head, whichever has most."""
    core = core_of(model)
    layers = [m for part in (core.model.vision_tower, core.model.language_model) for m in part.modules()]
    units = [layer for module in layers if isinstance(module, nn.ModuleList) for layer in module]
    units += [core.model.multi_modal_projector, core.get_input_embeddings(), core.lm_head]
    return max(sum(parameter.numel() for parameter in unit.parameters()) for unit in units)
