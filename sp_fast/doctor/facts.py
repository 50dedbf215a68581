"""What is known of a machine before anything is judged. Every fact may be missing: its source can fail."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from sp_fast.backend import Backend


@dataclass(frozen=True)
class Own:
    """sp_fast itself: its version, and what its distribution says; None where it runs from a bare checkout."""

    version: str
    distribution: str | None = None
    python: str | None = None  # a specifier such as ">=3.11"
    requirements: tuple[str, ...] = ()


@dataclass(frozen=True)
class Torch:
    """The imported package. ``complaint`` is what it says where it finds no GPU."""

    version: str
    cuda: str | None = None  # that it was built with, such as "13.0"
    hip: str | None = None
    complaint: str | None = None


@dataclass(frozen=True)
class Place:
    """A device that torch reaches; ``capability`` as in sm_90, memory in bytes, both None on the CPU."""

    device: str
    backends: Mapping[torch.dtype, Backend]
    name: str | None = None
    capability: int | None = None
    free: int | None = None
    total: int | None = None


@dataclass(frozen=True)
class Driver:
    """NVIDIA's, with the newest CUDA version that it supports and the names of its GPUs; or why it does not answer."""

    version: str | None = None
    cuda: str | None = None
    gpus: tuple[str, ...] = ()
    error: str | None = None


@dataclass(frozen=True)
class Compiler:
    """The C compiler that Triton would call, where Python.h should be, and why a module could not be compiled."""

    command: str | None
    include: str
    headers: bool
    error: str | None = None


@dataclass(frozen=True)
class Host:
    """Memory in bytes, within the control group's limit."""

    cpu: str
    cores: int
    total: int
    available: int


@dataclass(frozen=True)
class KernelsModule:
    """What `import kernels` finds from the working directory, and Hugging Face's package, where it is installed."""

    found: str | None = None  # a folder, or a file
    runs_code: bool = False  # not so for a folder without __init__.py
    version: str | None = None
    home: str | None = None  # its folder


@dataclass(frozen=True)
class Facts:
    """``installed`` maps normalised distribution names to versions, the one that is imported first; ``flash`` is what
    ``find_attention`` returns; ``failures`` has the error of each source that failed, by the name of its field."""

    python: str
    own: Own | None = None
    installed: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    torch: Torch | None = None
    places: tuple[Place, ...] = ()
    visible_devices: str | None = None  # CUDA_VISIBLE_DEVICES
    driver: Driver | None = None
    compiler: Compiler | None = None
    host: Host | None = None
    kernels: KernelsModule | None = None
    flash: Mapping[str, str | None] = field(default_factory=dict)
    failures: Mapping[str, str] = field(default_factory=dict)

    @property
    def has_gpu(self) -> bool:
        """Whether there is an NVIDIA GPU, seen by torch or not."""
        return any(place.capability for place in self.places) or bool(self.driver and self.driver.gpus)

    def version(self, name: str) -> str | None:
        """Of an installed distribution; torch's own word counts, since it names the build."""
        if name == "torch" and self.torch is not None:
            return self.torch.version
        return next(iter(self.installed.get(name, ())), None)
