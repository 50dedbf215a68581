"""What a caller hangs into ``generate``, shown the prompts as they were before they were padded to a bucket."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer


def unpadded(kwargs: dict[str, Any], pad: int) -> dict[str, Any]:
    """Of ``generate``'s arguments, the streamer and the stopping criteria without the ``pad`` columns in front.

    Logits processors are the model's own matter (modeling.py), whoever gave them.
    """
    found: dict[str, Any] = {}
    if kwargs.get("stopping_criteria"):
        found["stopping_criteria"] = StoppingCriteriaList(_Stopping(one, pad) for one in kwargs["stopping_criteria"])
    if kwargs.get("streamer") is not None:
        found["streamer"] = _Streamer(kwargs["streamer"], pad)
    return found


class _Stopping(StoppingCriteria):
    def __init__(self, inner: StoppingCriteria, pad: int) -> None:
        self._inner, self._pad = inner, pad

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        return self._inner(input_ids[:, self._pad :], scores, **kwargs)


class _Streamer(BaseStreamer):
    """Of what it is given, the prompt comes first."""

    def __init__(self, inner: BaseStreamer, pad: int) -> None:
        self._inner, self._pad = inner, pad

    def put(self, value: Tensor) -> None:
        """Hands on what has no padding."""
        self._inner.put(value[..., self._pad :])
        self._pad = 0

    def end(self) -> None:
        """Hands it on."""
        self._inner.end()
