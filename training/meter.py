"""What a line of the log says of speed and memory, measured without waiting for the device at every step."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerState, TrainingArguments

from sp_fast.training.encoding import IGNORED
from sp_fast.training.flops import measured_peak, model_flop


class Meter(TrainerCallback):
    """Counts batches, and gives the figures since the last line of the log. One in each process."""

    def __init__(self, model: nn.Module) -> None:
        self._flop = model_flop(model)
        self._rates: dict[str, float] = {}
        self._begin: float | None = None  # of the steps that are counted; none before the first batch is there
        self._forget()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Measures what the device can do, in a fraction of a second."""
        self._device, self._step = args.device, state.global_step
        self._peak = measured_peak(args.device, torch.bfloat16 if args.bf16 else torch.float32)

    def on_pre_optimizer_step(self, *args: Any, optimizer: Optimizer, **kwargs: Any) -> None:
        """Notes the learning rates, which are the next step's when the log is written."""
        self._rates = {group["name"]: group["lr"] for group in optimizer.param_groups}

    def add(self, batch: Mapping[str, Tensor]) -> None:
        """Of this process, before its forward; nothing is read back from the device."""
        if self._begin is None:
            self._begin = time.perf_counter()
        tokens = batch["attention_mask"].sum(1)
        supervised = (batch["labels"][:, 1:] != IGNORED).sum()  # a token is predicted from those before it
        self._sums = self._sums + torch.stack([tokens.sum(), (tokens * (tokens + 1)).sum() // 2, supervised])
        self._images += len(batch["pixel_values"])

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens in here is no part of a step."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._left_out += time.perf_counter() - begin

    def line(
        self, step: int, norms: Mapping[str, Tensor], skipped: int, gather: Callable[[Tensor], Tensor]
    ) -> dict[str, float]:
        """The figures since the last line, for every process to ask for at once.

        ``step_seconds`` is the mean wall time of a step; ``tokens_per_second`` real tokens, images' included;
        ``supervised_tokens`` all since the last line; ``mfu`` the share that ``flops`` of this has of the measured
        peak; these of all processes. ``peak_memory_mib`` is the most that a process has had: of the CUDA allocator, or
        resident. ``gradient_norm_<part>`` and ``learning_rate_<part>`` are the last step's, ``skipped`` the bad samples
        since the process began.

        Args:
            step: how many have been taken.
            norms: of gradients by part.
            skipped: samples of this process.
            gather: ``[1, n]`` of each process to ``[processes, n]``.
        """
        now = time.perf_counter()
        seconds, steps = now - self._begin - self._left_out, step - self._step
        own = torch.tensor([self._images, skipped, self._peak, self._memory()], dtype=torch.float64)
        rows = gather(torch.cat([self._sums.to(self._device, torch.float64), own.to(self._device)])[None]).cpu()
        tokens, pairs, supervised, images, skipped, peak, _ = rows.sum(0).tolist()
        self._begin, self._step = now, step
        self._forget()
        return {
            "step_seconds": seconds / steps,
            "tokens_per_second": tokens / seconds,
            "supervised_tokens": int(supervised),
            "mfu": self._flop.of(tokens, pairs, images) / (seconds * peak),
            "peak_memory_mib": rows[:, -1].max().item(),
            **{f"gradient_norm_{_key(part)}": float(norm) for part, norm in norms.items()},
            **{f"learning_rate_{_key(part)}": rate for part, rate in self._rates.items()},
            "skipped": int(skipped),
        }

    def _forget(self) -> None:
        self._sums: Tensor | int = 0  # real tokens, pairs of them that attend, supervised ones
        self._images, self._left_out = 0, 0.0

    def _memory(self) -> float:
        """The most since the process began, MiB."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) / 2**20
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def _key(part: str) -> str:
    return part.replace(" ", "_")
