"""A projector under measurement, in the process where it lives: its stages as runs, and their results for the gate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sp_fast import SPProjectorConfig
from sp_fast.bench.cases import Case
from sp_fast.bench.implementations import IMPLEMENTATIONS, Implementation, Weights
from sp_fast.bench.timing import Run
from sp_fast.bench.weights import random_weights
from sp_fast.checkpoint import official_tensors

SAMPLED = 2**20  # elements compared of one tensor, drawn by seed
POOLED, MOST_SEEDS = 10_000, 8


@dataclass(frozen=True)
class ProjectorJob:
    """What a worker builds. ``folder`` receives the results."""

    implementation: str
    config: SPProjectorConfig
    dtype: torch.dtype
    device: str
    seed: int
    folder: Path
    checkpoint: str | None = None  # None: seeded random weights
    features: Path | None = None  # None: seeded random features

    def build(self) -> ProjectorSubject:
        return ProjectorSubject(self)


class ProjectorSubject:
    """One method a question that a worker is asked."""

    def __init__(self, job: ProjectorJob) -> None:
        self._job, self._device = job, torch.device(job.device)
        weights = random_weights(job.config, job.seed, job.dtype, self._device)
        if job.checkpoint is not None:
            stored = official_tensors(job.checkpoint)
            weights = {
                key: replace(stored[key], dtype=job.dtype, load=lambda key=key: stored[key].load().to(job.dtype))
                for key in weights
            }
        self._implementation = self._build(weights)
        self.module = self._implementation.module
        self._prepared: tuple[Case | None, tuple] = (None, ())

    def _build(self, weights: Weights) -> Implementation:
        return IMPLEMENTATIONS[self._job.implementation](self._job.config, weights, self._device)

    def inputs(self, case: Case) -> tuple[Tensor, ...]:
        return self._prepare(case)[0]

    def forward(self, case: Case) -> Callable[[], tuple[Tensor, ...]]:
        """The case's forward, as autograd sees it where the case has a backward."""
        inputs, function, _ = self._prepare(case)
        if case.direction != "forward":
            return lambda: function(*inputs)

        def without_gradients() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return function(*inputs)

        return without_gradients

    def run(self, case: Case) -> Run:
        """What is timed; gradients are freed after every run, so that each allocates its own."""
        forward, free = self.forward(case), lambda: self._free(case)
        if case.direction == "forward":
            return Run(forward)
        _, _, cotangents = self._prepare(case)
        if case.direction == "both":
            return Run(lambda: backward(forward(), cotangents), after=free)
        held: list[tuple[Tensor, ...]] = []
        return Run(lambda: backward(held.pop(), cotangents), before=lambda: held.append(forward()), after=free)

    def results(self, case: Case) -> str:
        """What the case computes: outputs, and where it has a backward, gradients. A seeded sample of each tensor.

        Gradients come in the official layout and pooled by module, because some vanish identically (softmax is blind
        to the key's bias): alone, such a tensor is rounding noise on both sides and has no relative error. Where they
        are few they are of as many inputs as the outputs: a depthwise kernel's repeat a few numbers in every cell.
        """
        found, inputs = self._outputs(case)
        if case.direction != "forward":
            first = self._gradients(case, 0)
            few = sum(map(len, first.values())) < SAMPLED
            more = [self._gradients(case, offset) for offset in range(1, inputs if few else 1)]
            found |= pooled([first, *more])
        return self._save(case.key, found)

    def _outputs(self, case: Case) -> tuple[dict[str, Tensor], int]:
        """Of enough inputs that the smallest has elements to judge by, and how many those are."""
        self._free(case)
        poison(self._device)
        first = {name: self._sample(tensor) for name, tensor in _named(case, self.forward(case)()).items()}
        count = seeds_for(first) if self._job.features is None else 1
        found = [first]
        for offset in range(1, count):
            inputs, function = self._inputs(case, offset), self._prepare(case)[1]
            with torch.set_grad_enabled(case.direction != "forward"):
                more = _named(case, function(*inputs))
            found.append({name: self._sample(more[name]) for name in first})
        return pooled(found), count

    def _gradients(self, case: Case, offset: int) -> dict[str, Tensor]:
        """Of one input. Gradients of inputs are named by place."""
        inputs, (_, function, cotangents) = self._inputs(case, offset), self._prepare(case)
        self._free(case)
        backward(function(*inputs), cotangents)
        found = gradients(self._implementation, self._job.seed)
        wanted = (x for x in inputs if x.grad is not None)
        found |= {f"grad.in.{i}": self._sample(x.grad) for i, x in enumerate(wanted)}
        self._free(case)
        return found

    def _inputs(self, case: Case, offset: int) -> tuple[Tensor, ...]:
        """Those that are timed, or others."""
        if offset == 0:
            return self.inputs(case)
        return self._implementation.accept(case.inputs(self._job.seed + offset, self._device))

    def intermediates(self, case: Case) -> str:
        """Everything that the forward computes, level by level."""
        with torch.no_grad():
            output = self._implementation.intermediates(*self.inputs(case))
        named = {f"z_small.{i}": output.z_small[:, i] for i in range(output.z_small.shape[1])}
        named |= {f"z_big.{i}": z for i, z in enumerate(output.z_big)}
        named |= {f"attention.{i}": a for i, a in enumerate(output.attention)}
        named |= token_parts(output.tokens, case.config.spatial_tokens)
        return self._save("intermediates", {name: self._sample(tensor) for name, tensor in named.items()})

    def _prepare(self, case: Case) -> tuple:
        """Inputs, function and upstream gradients of a case, kept until another case comes."""
        if self._prepared[0] != case:
            self._prepared = (None, ())
            inputs = case.inputs(self._job.seed, self._device)
            if self._job.features is not None:
                inputs = (load_file(self._job.features)["patch_features"].to(self._device, self._job.dtype),)
            inputs = self._implementation.accept(inputs)
            function = self._implementation.stage(case.stage)
            self._prepared = (case, (inputs, function, self._cotangents(case, function, inputs)))
        return self._prepared[1]

    def _cotangents(self, case: Case, function: Callable, inputs: tuple[Tensor, ...]) -> list[Tensor]:
        """Seeded upstream gradients, where the case has a backward."""
        if case.direction == "forward":
            return []
        shapes = [z.shape for z in function(*inputs)]
        generator = torch.Generator(self._device).manual_seed(self._job.seed)
        drawn = (torch.randn(shape, generator=generator, device=self._device) for shape in shapes)
        return [c.to(self._job.dtype) for c in drawn]

    def _sample(self, tensor: Tensor) -> Tensor:
        return sampled(tensor, self._job.seed)

    def _free(self, case: Case) -> None:
        self.module.zero_grad(set_to_none=True)
        for x in self._prepared[1][0] if self._prepared[0] == case else ():
            x.grad = None

    def _save(self, name: str, tensors: dict[str, Tensor]) -> str:
        path = self._job.folder / f"{self._job.implementation}.{name}.safetensors"
        save_file(tensors, path)
        return str(path)


def pooled(found: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors of the same names, one after the other."""
    parts: dict[str, list[Tensor]] = {}
    for one in found:
        for name, tensor in one.items():
            parts.setdefault(name, []).append(tensor)
    return {name: torch.cat(some) for name, some in parts.items()}


def gradients(implementation: Implementation, seed: int) -> dict[str, Tensor]:
    """A sample of all that a backward has given, by official module."""
    found: dict[str, list[Tensor]] = {}
    for key in sorted(implementation.gradient_keys()):
        found.setdefault(f"grad.{key.split('.')[0]}", []).append(sampled(implementation.gradient(key), seed))
    return {name: torch.cat(parts) for name, parts in found.items()}


def sampled(tensor: Tensor, seed: int, most: int = SAMPLED) -> Tensor:
    """Flat and in float64: all elements, or ``most`` of them, the same for every implementation."""
    tensor = tensor.detach()
    if tensor.numel() <= most:
        return tensor.double().flatten().cpu()
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(tensor.numel(), (most,), generator=generator).to(tensor.device)
    return tensor[torch.unravel_index(chosen, tensor.shape)].double().cpu()


def poison(device: torch.device) -> None:
    """What the allocator hands out next holds NaN, so that an element that nobody writes shows."""
    if device.type == "cuda":
        for size in (2**16, 2**20, 2**24, 2**28):
            torch.full((size,), math.nan, device=device)


def _named(case: Case, outputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    if case.stage != "whole":
        return {f"out.{i}": z for i, z in enumerate(outputs)}
    return token_parts(outputs[0], case.config.spatial_tokens)


def token_parts(tokens: Tensor, spatial: int) -> dict[str, Tensor]:
    """Of ``[B, T + N, H]``, spatial and patch tokens apart, where there are any: an error of the few would drown in the
    many."""
    parts = {"spatial_tokens": tokens[:, :spatial], "patch_tokens": tokens[:, spatial:]}
    return {name: part for name, part in parts.items() if part.shape[1]}


def seeds_for(found: dict[str, Tensor]) -> int:
    """How many inputs it takes until the smallest output has POOLED elements: on few, equal implementations differ by
    chance."""
    return min(MOST_SEEDS, math.ceil(POOLED / max(1, min(map(len, found.values())))))


def backward(outputs: tuple[Tensor, ...], cotangents: list[Tensor]) -> tuple[Tensor, ...]:
    """With upstream gradients; gives the outputs back."""
    torch.autograd.backward(outputs, [c.to(z.dtype) for c, z in zip(cotangents, outputs, strict=True)])
    return outputs
