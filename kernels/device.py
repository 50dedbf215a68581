"""What the kernels know of a device: asked for once, when a kernel first runs there, never at import."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

OLDEST = 80  # bf16 products and asynchronous copies


@dataclass(frozen=True)
class Chip:
    """``capability`` as in sm_90, ``shared_memory`` in bytes that a block may have."""

    capability: int
    shared_memory: int


# The chips that the launch tables name: A100; A40, RTX 30; L40, RTX 40; H100, H200; B200; RTX 50.
CHIPS = {
    chip.capability: chip
    for chip in (
        Chip(80, 163 * 1024),
        Chip(86, 99 * 1024),
        Chip(89, 99 * 1024),
        Chip(90, 227 * 1024),
        Chip(100, 227 * 1024),
        Chip(120, 99 * 1024),
    )
}
INTERPRETED = Chip(0, 227 * 1024)
_override: list[Chip] = []


@contextmanager
def pretend(chip: Chip) -> Iterator[None]:
    """Launch choices as on ``chip``, whatever the device: for tests."""
    _override.append(chip)
    try:
        yield
    finally:
        _override.pop()


def chip_of(device: torch.device) -> Chip:
    """The chip that a launch on ``device`` is chosen for."""
    if _override:
        return _override[-1]
    if device.type != "cuda":
        return INTERPRETED
    return _query(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _query(index: int) -> Chip:
    properties = torch.cuda.get_device_properties(index)
    return Chip(properties.major * 10 + properties.minor, properties.shared_memory_per_block_optin)


@functools.cache
def has_triton() -> bool:
    """True where triton is installed; it is not imported."""
    return importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """True where Triton's kernels run in its interpreter, on tensors of any device."""
    return os.environ.get("TRITON_INTERPRET") == "1"


TYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_not_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    """One clause that says why Triton kernels cannot run on such tensors; None where they can."""
    if not has_triton():
        return "triton is not installed (pip install triton)"
    if dtype not in TYPES:
        return f"{dtype} is none of {', '.join(map(str, TYPES))}"
    if interpreting():
        return None
    if device.type != "cuda" or torch.version.hip is not None:
        return f"the tensors are on {device.type}, not on an NVIDIA GPU"
    chip = chip_of(device)
    if chip.capability < OLDEST:
        return f"the GPU has compute capability {chip.capability / 10}, below {OLDEST / 10}"
    return None
