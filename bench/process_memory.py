"""Memory of this process and of the machine, as Linux counts it."""

from __future__ import annotations

from pathlib import Path

import torch

MIB = 2**20


def available_mib(device: torch.device) -> float:
    """Memory that new work can take: the GPU's, or the machine's, or its control group's where that is less."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / MIB
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) / 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file() and (text := limit.read_text().strip()) != "max":
        cache = dict(line.split() for line in Path("/sys/fs/cgroup/memory.stat").read_text().splitlines())
        used_bytes = int(used.read_text()) - int(cache["inactive_file"])  # cached file pages give way
        available = min(available, (int(text) - used_bytes) / MIB)
    return available


def status_mib(field: str) -> float:
    """A field of /proc/self/status: RssAnon, VmHWM, ..."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise KeyError(field)


def reset_peak(device: torch.device) -> None:
    """Starts a new measurement of ``peak_mib``."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak_mib(device: torch.device) -> float:
    """Largest since ``reset_peak``: the allocator's on CUDA, else the process's resident set, imports included."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / MIB
    return status_mib("VmHWM")
