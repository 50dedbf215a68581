"""Training side by side: one task, one teacher, one run for each implementation."""

import copy
from dataclasses import dataclass

import torch

from sp_fast import SPProjector
from sp_fast.training.study.drift import EPS, Run, drift, official_parameters, permuted, reorderings
from tests.helpers import features_for, randomised, reference_of, shrunk

# Every mechanism, and few programs: an interpreted step takes a quarter of a second.
TINY = {"grid": 3, "kernel_sizes": (2, 3), "detail_kernel": 2, "detail_stride": 1}
WIDTHS = {"vision_width": 6, "spatial_width": 5, "text_width": 7}
CONFIGS = {variant: shrunk(variant, **TINY, **WIDTHS) for variant in ("crop-dfi", "pool-dfi")}
TINIEST = {"grid": 2, "kernel_sizes": (1, 2), "detail_kernel": 1, "detail_stride": 1}

BATCH, RATE = 4, 1e-2
TORCH_EPS = 1e-8
EXACT = 1e-9  # what float64 may differ by, in losses and in parameters
REORDERINGS = 5


def student(variant, seed, dtype, backend="torch"):
    """The projector that all runs of a seed begin as."""
    return randomised(SPProjector(CONFIGS[variant], backend, dtype=dtype), seed).train()


def batch_of(config, seed, step):
    """Fresh images, each of another size, so that none stands in for another."""
    images = features_for(config, BATCH, torch.float64, 10_000 * seed + step)
    return images * torch.linspace(0.5, 1.5, BATCH, dtype=torch.float64)[:, None, None]


def teacher_of(config):
    return reference_of(randomised(SPProjector(config, dtype=torch.float64), 4711))


def loss_on(module, teacher, seed, step, reorder=None):
    """Regression on what the teacher says of a step's images; ``reorder`` says how ``module`` is permuted, if it is."""
    images = batch_of(module.config, seed, step)
    with torch.no_grad():
        targets = teacher(images)
    if reorder is not None:
        images = images[reorder["B"]][..., reorder["C"]]
        targets = targets[reorder["B"]][..., reorder["H"]]
    dtype = next(module.parameters()).dtype
    return (module(images.to(dtype)) - targets.to(dtype)).square().mean()


def train(module, seed, steps, eps=EPS, reorder=None):
    teacher, losses = teacher_of(module.config), []
    optimizer = torch.optim.AdamW(module.parameters(), lr=RATE, eps=eps)
    for step in range(steps):
        loss = loss_on(module, teacher, seed, step, reorder)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return Run(torch.stack(losses).double(), official_parameters(module, reorder))


@dataclass
class Race:
    """One seed: the reference's run, the largest drift of its reorderings, and the drift of each backend."""

    variant: str
    seed: int
    eps: float
    reference: Run
    fall: float  # of the loss over the last steps: before any training, over during them
    reordered: torch.Tensor
    found: dict[str, torch.Tensor]

    def __str__(self):
        drifts = {"reordered": self.reordered, **self.found}
        cells = [f"{name} {losses:.1e} {parameters:.1e}" for name, (losses, parameters) in drifts.items()]
        loss = f"loss {self.reference.losses[-1]:.4f}, 1/{self.fall:.1f}"
        return " | ".join([f"{self.variant:8} eps {self.eps:.0e} seed {self.seed}", loss, *cells])


def race(variant, seed, steps, backends, dtype=torch.float32, eps=EPS):
    """Everybody from the same start over the same batches."""
    start = reference_of(student(variant, seed, dtype)).train()
    reference = train(copy.deepcopy(start), seed, steps, eps)
    last = range(max(0, steps - 5), steps)
    untrained = sum(loss_on(start, teacher_of(start.config), seed, step).item() for step in last)
    fall = untrained / reference.losses[last.start :].sum().item()
    again = [
        train(permuted(start, order), seed, steps, eps, order)
        for order in reorderings(start.config, REORDERINGS, BATCH)
    ]
    reordered = torch.stack([drift(run, reference) for run in again]).amax(0)
    runs = {backend: train(student(variant, seed, dtype, backend), seed, steps, eps) for backend in backends}
    found = {backend: drift(run, reference) for backend, run in runs.items()}
    return Race(variant, seed, eps, reference, fall, reordered, found)


def with_fault(healthy, name, steps, backend="torch"):
    """The drift of a projector one of whose gradients is a thousandth too large, in the race that others ran well."""
    projector = student(healthy.variant, healthy.seed, torch.float32, backend)
    projector.get_parameter(name).register_hook(lambda gradient: gradient * 1.001)
    return drift(train(projector, healthy.seed, steps), healthy.reference)
