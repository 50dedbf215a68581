"""Which implementation a projector runs on: decided once, with the reason."""

from __future__ import annotations

from typing import NamedTuple

from sp_fast.errors import BackendError


class Backend(NamedTuple):
    """``name`` is what runs, ``reason`` one clause that says why."""

    name: str
    reason: str


def choose_backend(requested: str) -> Backend:
    """ "auto" takes the fastest that can run; a forced choice fails rather than falls back.

    Raises:
        BackendError: an unknown name, or a backend that this installation cannot run.
    """
    if requested == "auto":
        return Backend("torch", "auto: this release has no Triton kernels")
    if requested == "torch":
        return Backend("torch", "requested")
    if requested == "triton":
        raise BackendError(
            "backend='triton' was requested, but this release has no Triton kernels: use backend='auto' or 'torch'"
        )
    raise BackendError(f"backend={requested!r} is unknown; it must be 'auto', 'triton' or 'torch'")
