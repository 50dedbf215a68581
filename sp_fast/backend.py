"""Which implementation a projector runs on: the fastest that can run, with the reason."""

from __future__ import annotations

from typing import NamedTuple

import torch

from sp_fast.errors import BackendError
from sp_fast.kernels.device import has_triton, interpreting, why_not_triton

BACKENDS = ("auto", "triton", "torch")


class Backend(NamedTuple):
    """``name`` is what runs, ``reason`` one clause that says why."""

    name: str
    reason: str


def check_backend(requested: str) -> str:
    """``requested``, where it can run on this machine at all; tensors are looked at when they come.

    Raises:
        BackendError: an unknown name, or "triton" without Triton or without an NVIDIA GPU.
    """
    if requested not in BACKENDS:
        raise BackendError(f"backend={requested!r} is unknown; it must be 'auto', 'triton' or 'torch'")
    if requested == "triton":
        if not has_triton():
            raise _refusal(why_not_triton(torch.device("cuda"), torch.float32))
        if not interpreting() and not torch.cuda.is_available():
            raise _refusal("no NVIDIA GPU is visible")
    return requested


@torch.compiler.assume_constant_result
def choose_backend(requested: str, device: torch.device, dtype: torch.dtype) -> Backend:
    """What runs on tensors of this device and type. "auto" takes Triton where it can; a forced choice never falls back.

    Raises:
        BackendError: "triton" was requested, and cannot run on such tensors.
    """
    if requested == "torch":
        return Backend("torch", "requested")
    reason = why_not_triton(device, dtype)
    if requested == "triton":
        if reason is not None:
            raise _refusal(reason)
        return Backend("triton", "requested")
    if device.type != "cuda":
        reason = f"the tensors are on {device.type}"
    return (
        Backend("triton", f"auto: {dtype} on an NVIDIA GPU") if reason is None else Backend("torch", f"auto: {reason}")
    )


def _refusal(reason: str | None) -> BackendError:
    return BackendError(f"backend='triton' was requested, but {reason}: use backend='auto' or 'torch'")
