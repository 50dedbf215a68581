"""What every training step has in common: its clock, and the proof that an update is AdamW's."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sp_fast.bench.subject import SAMPLED, sampled
from sp_fast.bench.timing import Run
from sp_fast.bench.train_cases import ADAMW

FORWARD, BACKWARD, OPTIMIZER = "forward", "backward", "optimizer"


class Laps:
    """Milliseconds of the parts of a run, on the device's own clock; laps of one name add up."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = []

    def start(self) -> None:
        self._marks = []
        self.lap("")

    def lap(self, name: str) -> None:
        """Ends a lap of that name."""
        mark: Any = torch.cuda.Event(enable_timing=True) if self._cuda else time.perf_counter()
        if self._cuda:
            mark.record()
        self._marks.append((name, mark))

    def parts_ms(self) -> dict[str, float]:
        if self._cuda:
            self._marks[-1][1].synchronize()
        found: dict[str, float] = {}
        for (_, start), (name, end) in zip(self._marks, self._marks[1:], strict=False):
            elapsed = start.elapsed_time(end) if self._cuda else (end - start) * 1e3
            found[name] = found.get(name, 0.0) + elapsed
        return found

    def total_ms(self) -> float:
        return sum(self.parts_ms().values())


def step_run(
    optimizer: torch.optim.Optimizer,
    forward: Callable[[], tuple[Tensor, ...]],
    backward: Callable[[tuple[Tensor, ...]], object],
    device: torch.device,
) -> Run:
    """A step as a training loop has it: the last one's gradients go, forward, backward, update. One that is the
    first of its optimizer runs once before, for the states that it makes."""
    laps = Laps(device)

    def timed() -> tuple[Tensor, ...]:
        laps.start()
        optimizer.zero_grad()
        laps.lap(OPTIMIZER)
        outputs = forward()
        laps.lap(FORWARD)
        backward(outputs)
        laps.lap(BACKWARD)
        optimizer.step()
        laps.lap(OPTIMIZER)
        return outputs

    if not optimizer.state:
        timed()
    return Run(timed, own_ms=laps.total_ms, parts_ms=laps.parts_ms)


class Shadow:
    """torch's AdamW in float64 on a sample of every parameter, fed with the gradients that a step really had.

    Gradients have their own judgement. AdamW makes steps of full size of gradients that are nearly nothing, so that
    parameters after a step could not be held against float64's.
    """

    def __init__(self, parameters: Mapping[str, Tensor], seed: int, most: int = SAMPLED) -> None:
        self._parameters, self._seed, self._most = parameters, seed, most
        self._exact = {name: nn.Parameter(self._sample(p)) for name, p in parameters.items()}
        self._optimizer = torch.optim.AdamW(self._exact.values(), foreach=False, fused=False, **ADAMW)

    def step(self, gradients: Mapping[str, Tensor]) -> None:
        """What the optimizer is about to do with the gradients of these parameters."""
        for name, parameter in self._exact.items():
            parameter.grad = self._sample(gradients[name])
        self._optimizer.step()

    def results(self, place: Callable[[str], str]) -> dict[str, Tensor]:
        """``update.<place>``: the parameters as they are now; ``adamw.<place>``: as they should be; by place."""
        found: dict[str, list[Tensor]] = {}
        for name, exact in self._exact.items():
            found.setdefault(f"update.{place(name)}", []).append(self._sample(self._parameters[name]))
            found.setdefault(f"adamw.{place(name)}", []).append(exact.detach())
        return {name: torch.cat(parts) for name, parts in found.items()}

    def _sample(self, tensor: Tensor) -> Tensor:
        return sampled(tensor, self._seed, self._most)
