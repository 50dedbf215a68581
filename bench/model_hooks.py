"""What is hung into `generate`: a clock, prescribed tokens, and an ear for warnings."""

from __future__ import annotations

import logging
import time

import torch
from torch import Tensor
from transformers import LogitsProcessor
from transformers.generation.streamers import BaseStreamer


class Clock(BaseStreamer):
    """When each token was there. A streamer gets tokens on the CPU, so that a GPU has finished them."""

    def __init__(self) -> None:
        self._seconds: list[float] = []

    def reset(self) -> None:
        self._seconds = []

    def put(self, value: Tensor) -> None:
        """The prompt comes first."""
        self._seconds.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is held back."""

    def ms_a_token(self, count: int) -> float:
        """Between the first and the last of ``count`` new tokens."""
        if len(self._seconds) != count + 1:
            raise RuntimeError(f"{len(self._seconds) - 1} tokens were generated instead of {count}")
        return (self._seconds[-1] - self._seconds[1]) * 1e3 / (count - 1)


class Warnings(logging.Handler):
    """What a logger has said."""

    def __init__(self, level: int = logging.WARNING) -> None:
        super().__init__(level)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


class Prescribed(LogitsProcessor):
    """The next token is ``answer``'s, ``[B, steps]``, whatever the logits say."""

    def __init__(self, answer: Tensor) -> None:
        self._answer, self._step = answer, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores ``[B, vocabulary]`` with one choice in each row."""
        chosen = torch.full_like(scores, -1.0).scatter_(1, self._answer[:, self._step, None], 1.0)
        self._step += 1
        return chosen
