"""What a figure was measured on: part of every result."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import sp_fast
from sp_fast.bench.energy import Meter
from sp_fast.errors import ConfigError

COMMIT_VARIABLE = "SP_FAST_COMMIT"
_PACKAGES = ("triton", "transformers", "numpy", "safetensors")


def environment(device: torch.device) -> dict[str, Any]:
    """Machine, versions and commit."""
    return {
        "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,  # says which build it is; the installed version does not
        **{name: _version(name) for name in _PACKAGES},
        "sp_fast": sp_fast.__version__,
        "commit": _commit(),
        "source": source_hash(),
        **(_cuda(device) if device.type == "cuda" else {}),
    }


def _cuda(device: torch.device) -> dict[str, Any]:
    """Of the GPU's software; the driver's version is None without NVML."""
    properties = torch.cuda.get_device_properties(device)
    return {
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "driver": Meter(device).driver(),
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_mib": properties.total_memory // 2**20,
    }


def check_device(name: str) -> None:
    """Raises ConfigError for a device that torch does not know or cannot reach."""
    try:
        if torch.empty(0, device=name).device.type not in ("cpu", "cuda"):
            raise RuntimeError("it is neither cpu nor cuda")
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device {name!r} cannot be used ({reason}); without a working GPU, choose cpu") from error


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The checkout's commit, with "+changes" where files differ from it. Without git, what the copy's owner says it is
    (SP_FAST_COMMIT), or None."""
    root = Path(sp_fast.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return os.environ.get(COMMIT_VARIABLE)
    try:
        head = _git(root, "rev-parse", "--short=12", "HEAD")
        return head + ("+changes" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get(COMMIT_VARIABLE)


def source_hash() -> str:
    """Of this package's own files: two results with the same one come from the same code, committed or not."""
    root = Path(sp_fast.__file__).resolve().parent
    files = {path for folder in sp_fast.__path__ for path in Path(folder).glob("*.py") if folder == str(root)}
    for name in ("kernels", "bench", "llava_sp"):
        files |= {path for folder in sp_fast.__path__ for path in (Path(folder) / name).rglob("*.py")}
    digest = hashlib.sha256()
    for path in sorted(files, key=lambda path: (path.parent.name, path.name)):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def _git(root: Path, *words: str) -> str:
    return subprocess.run(["git", "-C", root, *words], capture_output=True, text=True, check=True).stdout.strip()
