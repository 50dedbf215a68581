"""How far two trainings of one model lie apart, and how far rounding alone may bring them.

"Within rounding" has a yardstick of its own: the reference against itself with its sums in another order. Its channels,
spatial features, hidden units, text channels (and images, where a batch is permuted too) are permuted, which changes
nothing but the rounding.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sp_fast.checkpoint import reference_entries, reference_state_dict
from sp_fast.config import SPProjectorConfig
from sp_fast.projector import SPProjector
from sp_fast.reference import ReferenceSPProjector

#: AdamW's eps for paths that are compared. It divides every gradient by its own size plus eps. With torch's 1e-8 it is
#: all but blind to the scale of a gradient, and makes whole steps of the key's biases' gradients, which vanish but for
#: rounding: parameters drift by 1e-2. With a larger one they drift by 1e-7, and a factor of 1.001 on any gradient
#: leaves the band.
EPS = 1e-2
#: What is permuted by axis: images, channels, spatial features, the patch MLP's hidden units, text channels.
Order = Mapping[str, Tensor]
_AXES = {"conv_linear.1": "HD", "mm_projector.0": "MC", "mm_projector.2": "HM"}


@dataclass
class Run:
    """The loss of each step, ``[steps]`` float64, and the parameters after the last one, by name or module."""

    losses: Tensor
    parameters: dict[str, Tensor]


class Reordered(nn.Module):
    """The reference with its sums in another order: the same tokens of the same features, up to rounding.

    Args:
        order: one of ``reorderings``.
    """

    def __init__(self, reference: ReferenceSPProjector, order: Order) -> None:
        super().__init__()
        self.inner, self.order = permuted(reference, order), order

    def forward(self, features: Tensor) -> Tensor:
        """``[B, N, C]`` to ``[B, T + N, H]``."""
        return self.inner(features[..., self.order["C"]])[..., self.order["H"].argsort()]


def reference_of(projector: SPProjector, dtype: torch.dtype | None = None) -> ReferenceSPProjector:
    """The reference with the same weights, in evaluation mode."""
    state = reference_state_dict(projector)
    reference = ReferenceSPProjector(projector.config, dtype=dtype or next(iter(state.values())).dtype)
    reference.load_state_dict(state)
    return reference.eval()


def reorderings(config: SPProjectorConfig, count: int, batch: int = 1) -> Iterator[Order]:
    """Permutations, the same for the same widths.

    Args:
        batch: images that are permuted too.
    """
    sizes = {"B": batch, "C": config.vision_width, "D": config.spatial_width}
    sizes |= {"M": config.text_width, "H": config.text_width}
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        yield {axis: torch.randperm(size, generator=generator) for axis, size in sizes.items()}


def permuted(reference: ReferenceSPProjector, order: Order) -> ReferenceSPProjector:
    """The same function of permuted features, its tokens permuted too: only its sums run in another order.

    Without transformer blocks, whose heads may not be mixed.
    """
    reference = copy.deepcopy(reference)
    for name, parameter in reference.named_parameters():
        layer = name.rpartition(".")[0]
        axes = _AXES.get(layer, "DC" if layer.startswith(("conv", "window")) else "DD")
        for dim, axis in enumerate(axes[: parameter.dim()]):
            # The output layer reads several blocks of D features side by side.
            blocks = torch.arange(parameter.shape[dim]).view(-1, len(order[axis]))
            parameter.data = parameter.data.index_select(dim, blocks[:, order[axis]].flatten().to(parameter.device))
    return reference


def official_parameters(module: nn.Module, order: Order | None = None) -> dict[str, Tensor]:
    """Parameters by official name, float64 on the CPU.

    Args:
        order: by which a reference was permuted, which is undone.
    """
    if isinstance(module, SPProjector):
        ours = dict(module.named_parameters())
        return {e.official: e.view(ours[e.ours]).detach().double().cpu() for e in reference_entries(module)}
    if order is not None:
        module = permuted(module, {axis: found.argsort() for axis, found in order.items()})
    return {name: parameter.detach().double().cpu() for name, parameter in module.named_parameters()}


def drift(run: Run, other: Run) -> Tensor:
    """``[2]``: the largest relative difference of a loss, and of a parameter in Frobenius norm."""
    losses = (run.losses - other.losses).abs() / other.losses
    parameters = [
        (run.parameters[name] - expected).norm() / expected.norm() for name, expected in other.parameters.items()
    ]
    return torch.stack([losses.max(), torch.stack(parameters).max()])


def within_rounding(found: Tensor, reordered: Tensor) -> bool:
    """The rule for float32: at most twice the reference's own drift, and an ulp where there is next to none."""
    return bool((found <= 2 * reordered + torch.finfo(torch.float32).eps).all())
