"""Training side by side: one task, one teacher, one run for each implementation, and how far two runs lie apart.

"Within rounding" has a yardstick of its own: the reference against itself with its sums in another order. Its channels,
spatial features, hidden units, text channels and images are permuted, which changes nothing but the rounding.
"""

import copy
from dataclasses import dataclass

import torch

from sp_fast import SPProjector
from sp_fast.checkpoint import official_entries
from tests.helpers import features_for, randomised, reference_of, shrunk

# Every mechanism, and few programs: an interpreted step takes a quarter of a second.
TINY = {"grid": 3, "kernel_sizes": (2, 3), "detail_kernel": 2, "detail_stride": 1}
WIDTHS = {"vision_width": 6, "spatial_width": 5, "text_width": 7}
CONFIGS = {variant: shrunk(variant, **TINY, **WIDTHS) for variant in ("crop-dfi", "pool-dfi")}
TINIEST = {"grid": 2, "kernel_sizes": (1, 2), "detail_kernel": 1, "detail_stride": 1}

BATCH, RATE = 4, 1e-2
# AdamW divides every gradient by its own size plus eps. With torch's eps it is all but blind to the scale of a gradient,
# and makes whole steps of the key's biases' gradients, which vanish but for rounding: parameters drift by 1e-2. With a
# larger one they drift by 1e-7, and a factor of 1.001 on any gradient leaves the band.
EPS, TORCH_EPS = 1e-2, 1e-8
EXACT = 1e-9  # what float64 may differ by, in losses and in parameters
REORDERINGS = 5


@dataclass
class Run:
    """The loss of each step, and the parameters after the last one by official name."""

    losses: torch.Tensor
    parameters: dict[str, torch.Tensor]


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


def official_parameters(module, reorder=None):
    """Final parameters by official name, permutations undone."""
    if isinstance(module, SPProjector):
        ours = dict(module.named_parameters())
        return {e.official: e.view(ours[e.ours]).detach().double() for e in official_entries(module)}
    if reorder is not None:
        module = permuted(module, {axis: order.argsort() for axis, order in reorder.items()})
    return {name: parameter.detach().double() for name, parameter in module.named_parameters()}


def reorderings(config):
    """Permutations of images, channels, spatial features, the patch MLP's hidden units and text channels."""
    sizes = {"B": BATCH, "C": config.vision_width, "D": config.spatial_width}
    sizes |= {"M": config.text_width, "H": config.text_width}
    for seed in range(REORDERINGS):
        generator = torch.Generator().manual_seed(seed)
        yield {axis: torch.randperm(size, generator=generator) for axis, size in sizes.items()}


AXES = {"conv_linear.1": "HD", "mm_projector.0": "MC", "mm_projector.2": "HM"}


def permuted(reference, reorder):
    """The same function of permuted features, its tokens permuted too: only its sums run in another order."""
    reference = copy.deepcopy(reference)
    for name, parameter in reference.named_parameters():
        layer = name.rpartition(".")[0]
        axes = AXES.get(layer, "DC" if layer.startswith("conv") else "DD")
        for dim, axis in enumerate(axes[: parameter.dim()]):
            # The output layer reads several blocks of D features side by side.
            blocks = torch.arange(parameter.shape[dim]).view(-1, len(reorder[axis]))
            parameter.data = parameter.data.index_select(dim, blocks[:, reorder[axis]].flatten())
    return reference


def drift(run, other):
    """How far two runs lie apart: the largest relative difference of a loss, and of a parameter in Frobenius norm."""
    losses = (run.losses - other.losses).abs() / other.losses
    parameters = [
        (run.parameters[name] - expected).norm() / expected.norm() for name, expected in other.parameters.items()
    ]
    return torch.stack([losses.max(), torch.stack(parameters).max()])


def within_rounding(found, reordered):
    """The rule for float32: at most twice the reference's own drift, and an ulp where there is next to none."""
    return bool((found <= 2 * reordered + torch.finfo(torch.float32).eps).all())


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
    again = [train(permuted(start, order), seed, steps, eps, order) for order in reorderings(start.config)]
    reordered = torch.stack([drift(run, reference) for run in again]).amax(0)
    runs = {backend: train(student(variant, seed, dtype, backend), seed, steps, eps) for backend in backends}
    found = {backend: drift(run, reference) for backend, run in runs.items()}
    return Race(variant, seed, eps, reference, fall, reordered, found)


def with_fault(healthy, name, steps, backend="torch"):
    """The drift of a projector one of whose gradients is a thousandth too large, in the race that others ran well."""
    projector = student(healthy.variant, healthy.seed, torch.float32, backend)
    projector.get_parameter(name).register_hook(lambda gradient: gradient * 1.001)
    return drift(train(projector, healthy.seed, steps), healthy.reference)
