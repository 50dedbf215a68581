"""AdamW on the projector's convolutions without gradients of their size.

    dW[cell + q] = X_q^T dZ        X_q [B * O, C]: the rows that cell q reads;  dZ [B * O, D]: the outputs' gradient

The factors are thousands of times smaller than dW. Autograd stops at them; ``step`` multiplies a few cells of dW at a
time into a buffer that stays in the cache, and updates these cells while it is there. Weights and states are read and
written once, and no gradient is: at the published widths 3.6 GB less memory, and 7.2 GB less traffic a step.

Steps that are accumulated are factors laid one after the other, and clipping scales dZ, since dW is linear in it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.adamw import adamw

from sp_fast import SPProjector
from sp_fast.errors import TrainingError
from sp_fast.extractors import WindowedExtractor
from sp_fast.kernels.window import Window, encode_windows
from sp_fast.kernels.windowed_matmul import windowed_matmul_dweight
from sp_fast.training.gradient_norm import gradient_norm

BUFFER_BYTES = 4 * 2**20  # of dW at a time: what a core's share of the last-level cache holds


class FactoredAdamW(AdamW):
    """torch's fused AdamW, whose packed weights never have a ``.grad``.

    States are torch's own, so that a ``state_dict`` of either optimizer loads into the other. One process: factors are
    not summed over ranks.

    Args:
        params: parameters or groups, as AdamW takes them, with the projector's packed weights among them.
        projector: whose packed weights leave autograd, until ``release``; those that are frozen stay frozen.
        lr, betas, eps, weight_decay: as AdamW's; groups may differ.

    Raises:
        TrainingError: the projector has no packed weight that is trained, or ``params`` lacks one.
    """

    def __init__(
        self,
        params: Iterable[Any],
        projector: SPProjector,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)
        self._projector = projector
        self._weights = _packed(projector)
        known = {id(p) for group in self.param_groups for p in group["params"]}
        if absent := [i for i, weight in enumerate(self._weights) if weight.requires_grad and id(weight) not in known]:
            raise TrainingError(
                f"the optimizer has {len(absent)} of the projector's trained packed weights not among its parameters: "
                "give it all of projector.parameters(), or freeze those first"
            )
        self._taken = [weight.requires_grad for weight in self._weights]
        for weight in self._weights:
            weight.requires_grad_(False)
        self._factors: list[tuple[Tensor, Tensor]] = []  # rows [B, R, C] and outputs' gradients [B, O, D]
        self._hook = projector.extractor.register_forward_hook(self._watch)

    def release(self) -> None:
        """Gives the packed weights back to autograd."""
        self._hook.remove()
        self._factors.clear()
        for weight, taken in zip(self._weights, self._taken, strict=True):
            weight.requires_grad_(taken)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's; the factors go."""
        super().zero_grad(set_to_none)
        self._factors.clear()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """As torch's: the dense parameters first, then the packed weights, where a backward has left factors, which are
        used up."""
        loss = super().step(closure)
        groups = {id(p): group for group in self.param_groups for p in group["params"]}
        before = {id(weight): self._next_step(weight) for weight in self.packed} if self._factors else {}
        for weight, cells, gradient in self._chunks():
            state, group = self.state[weight], groups[id(weight)]
            adamw(
                [weight[cells]], [gradient], [state["exp_avg"][cells]], [state["exp_avg_sq"][cells]], [],
                [before[id(weight)].clone()], fused=True, amsgrad=False, beta1=group["betas"][0],
                beta2=group["betas"][1], lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"],
                maximize=False,
            )  # fmt: skip
        self._factors.clear()  # transformers' Trainer zeroes the model's gradients, of which these are none
        return loss

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """torch's ``clip_grad_norm_`` over all parameters of the optimizer, the packed weights included, whose products
        are then computed once more. Returns the norm before."""
        dense = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        total = gradient_norm(itertools.chain(dense, (gradient for *_, gradient in self._chunks())))
        share = (max_norm / (total + 1e-6)).clamp(max=1.0)
        for gradient in dense:
            gradient.mul_(share.to(gradient.dtype))
        self._factors = [(rows, grad * share.to(grad.dtype)) for rows, grad in self._factors]
        return total

    @torch.no_grad()
    def gradient(self, weight: Tensor) -> Tensor:
        """The dense gradient ``[cells, C, D]`` of a packed weight, for whoever wants to see it."""
        dense = torch.zeros_like(weight)
        for other, cells, gradient in self._chunks():
            if other is weight:
                dense[cells] = gradient
        return dense

    @property
    def packed(self) -> list[nn.Parameter]:
        """The packed weights that are trained here."""
        return [weight for weight, taken in zip(self._weights, self._taken, strict=True) if taken]

    def _watch(self, extractor: WindowedExtractor, inputs: tuple, z: Tensor) -> None:
        """After the extractor's forward: what its backward will meet."""
        if not torch.is_grad_enabled():
            return
        if not z.requires_grad:  # its weights are out of autograd, and the features usually are
            z.requires_grad_()
        rows = extractor.rows(*inputs).detach().to(z.dtype)
        z.register_hook(lambda grad: self._factors.append((rows, grad)))

    def _next_step(self, weight: Tensor) -> Tensor:
        """The count of updates before this one."""
        state = self.state[weight]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=weight.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(weight), torch.zeros_like(weight)
        before = state["step"].clone()
        state["step"] += 1
        return before

    def _chunks(self) -> Iterator[tuple[Tensor, slice, Tensor]]:
        """Packed weight, cells, and their gradient ``[cells, C, D]``, which the next one overwrites."""
        if not self._factors:
            return
        rows, grad = (torch.cat(parts) for parts in zip(*self._factors, strict=True))
        backend, first = self._projector.backend.name, 0
        for w in self._projector.extractor.windows:
            dz = grad[:, first : first + w.outputs].contiguous()
            first += w.outputs
            weight = self._weights[w.weight]
            if not self._taken[w.weight]:
                continue
            most = max(1, BUFFER_BYTES // (weight[0].numel() * weight.element_size()))
            buffer = torch.empty_like(weight[: min(most, w.width)])
            for cell, part in _parts(w, most):
                out = buffer[: part.width]
                windowed_matmul_dweight(dz, rows, [out], encode_windows([part]), backend=backend)
                yield weight, slice(cell, cell + part.width), out


def _packed(projector: SPProjector) -> list[nn.Parameter]:
    """In the order that windows name them by. Raises TrainingError where there is none to train."""
    extractor = projector.extractor
    weights = list(extractor.parameters()) if isinstance(extractor, WindowedExtractor) else []
    if not any(weight.requires_grad for weight in weights):
        raise TrainingError(
            f"the projector ({projector.config.extractor} extractor) has no packed weight that is trained: use "
            "torch.optim.AdamW, which computes the same"
        )
    return weights


def _parts(w: Window, most: int) -> Iterator[tuple[int, Window]]:
    """A window in pieces of at most ``most`` cells of one of its rows: their first cell, and a window on them alone."""
    for down in range(w.height):
        for right in range(0, w.width, most):
            width = min(most, w.width - right)
            origin = w.origin + down * w.row_stride + right
            yield w.cell + down * w.width + right, replace(w, weight=0, cell=0, origin=origin, width=width, height=1)
