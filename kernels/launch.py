"""A launch of a Triton kernel: what every launcher hands to it, and a way to see launches without a GPU."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Launch:
    """A kernel with everything that its compilation depends on but the arguments' types."""

    kernel: Any
    grid: tuple[int, ...]
    constants: Mapping[str, Any]
    warps: int = 4
    registers: int | None = (
        None  # a thread may use; None leaves it to the assembler, which may spill to fit more blocks
    )

    @property
    def options(self) -> dict[str, Any]:
        """Triton's own. Contracted multiply-adds are said aloud: triton 3.10 changes the default, and the last bits."""
        limit = {} if self.registers is None else {"maxnreg": self.registers}
        return {"num_warps": self.warps, "enable_fp_fusion": True, **limit}

    def __call__(self, *arguments: Tensor | int | float) -> None:
        """Runs it on the current stream of the first argument's device, unless launches are being recorded."""
        if _recorders:
            _recorders[-1].append((self, arguments))
            return
        with torch.cuda.device_of(arguments[0]):
            self.kernel[self.grid](*arguments, **self.constants, **self.options)


Recorded = list[tuple[Launch, tuple[Tensor | int | float, ...]]]
_recorders: list[Recorded] = []


@contextmanager
def recording() -> Iterator[Recorded]:
    """Launches within are listed, not run: tensors may be on "meta", and a chip pretended (device.pretend)."""
    _recorders.append([])
    try:
        yield _recorders[-1]
    finally:
        _recorders.pop()
