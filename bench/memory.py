"""Memory: of this process and of the machine, as Linux counts it, or of the CUDA allocator."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sp_fast.bench.timing import Run

MIB = 2**20


@dataclass(frozen=True)
class Memory:
    """Of one run, MiB."""

    weights_mib: float
    gradients_mib: float
    saved_mib: float  # what the forward keeps for the backward, without weights and inputs
    temporary_mib: float  # at the peak beyond weights, inputs, outputs and gradients; with a backward, saved included
    peak_mib: float  # of the CUDA allocator; on a CPU of the whole process, python and libraries included
    optimizer_mib: float | None = None  # its states, where there is one


def measure_memory(
    module: nn.Module,
    inputs: Sequence[Tensor],
    run: Run,
    forward: Callable[[], object],
    direction: str,
    optimizer: Optimizer | None = None,
) -> Memory:
    """``forward`` is the run's forward alone; ``optimizer`` that of a training step, whose states are there already.
    Gradients may be there too: what a run keeps for the next counts as theirs, and not as beyond."""
    trains, backward_alone = direction != "forward", direction == "backward"
    device = inputs[0].device
    saved = saved_bytes([*module.parameters(), *inputs], forward) if trains else 0
    run.before()
    release(device)
    held = _gradient_bytes(module)
    before = current_mib(device)
    reset_peak(device)
    result = run.timed()
    peak = peak_mib(device)
    outputs = _unique_bytes([t for t in result or () if isinstance(t, Tensor)])
    gradients = _gradient_bytes(module)
    run.after()
    weights = _unique_bytes(module.parameters())
    outputs = 0 if backward_alone else outputs  # they were there before
    beyond = peak - before - (outputs + gradients - held) / MIB
    states = None if optimizer is None else _unique_bytes(_state_tensors(optimizer)) / MIB
    return Memory(weights / MIB, gradients / MIB, saved / MIB, max(0.0, beyond), peak, states)


def _gradient_bytes(module: nn.Module) -> int:
    return _unique_bytes([p.grad for p in module.parameters() if p.grad is not None])


def _state_tensors(optimizer: Optimizer) -> list[Tensor]:
    return [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]


def saved_bytes(known: Iterable[Tensor], forward: Callable[[], object]) -> int:
    """Bytes that autograd keeps between forward and backward, each storage once; what is ``known`` does not count."""
    own = {t.untyped_storage().data_ptr() for t in known}
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> None:
        """Holds the storage, so that its address stays its own. The graph gets nothing back: a tensor that was returned
        here would keep the node that made it alive, and with it everything before, for ever."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda nothing: nothing):
        forward()
    return sum(storage.nbytes() for storage in storages.values())


def _unique_bytes(tensors: Iterable[Tensor]) -> int:
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def release(device: torch.device) -> None:
    """Gives back what is no longer used: to the device, or to the system."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
    else:
        with contextlib.suppress(OSError, AttributeError):  # glibc only
            ctypes.CDLL("libc.so.6").malloc_trim(0)


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


def current_mib(device: torch.device) -> float:
    """What is held now, counted as ``peak_mib`` counts."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / MIB
    return status_mib("VmRSS")


def reset_peak(device: torch.device) -> None:
    """Starts a new measurement of ``peak_mib``."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak_mib(device: torch.device) -> float:
    """Largest since ``reset_peak``: the allocator's on CUDA, else the process's resident set, imports included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) / MIB
    return status_mib("VmHWM")
