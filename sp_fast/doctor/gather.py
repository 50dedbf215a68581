"""Asks the machine. Only torch is imported, and only here: transformers would execute whatever is named `kernels`."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import warnings
from collections.abc import Callable
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from sp_fast.attention import find_attention
from sp_fast.doctor.facts import Compiler, Driver, Facts, Host, KernelsModule, Own, Place, Torch
from sp_fast.doctor.findings import one_line
from sp_fast.version import __version__

TIMEOUT = 30  # seconds, for the driver's tool and for the compiler
_MODULE = """#include <Python.h>
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "probe", NULL, -1, NULL};
PyMODINIT_FUNC PyInit_probe(void) { return PyModule_Create(&module); }
"""


def gather() -> Facts:
    """Everything that is judged. A source that fails leaves its field empty, and its error in ``failures``."""
    found: dict[str, Any] = {}
    failures: dict[str, str] = {}
    for name, source in SOURCES.items():
        try:
            found[name] = source()
        except Exception as error:  # noqa: BLE001, a broken environment fails in any way, and is what is examined
            failures[name] = one_line(f"{type(error).__name__}: {error}")
    return Facts(**found, failures=failures)


def own() -> Own:
    """sp_fast's own distribution says what is needed: setup.py is not there once it is installed."""
    try:
        distribution = importlib.metadata.distribution("sp_fast")
    except importlib.metadata.PackageNotFoundError:
        return Own(__version__)
    requirements = tuple(distribution.requires or ())
    return Own(__version__, distribution.version, distribution.metadata["Requires-Python"], requirements)


def installed() -> dict[str, tuple[str, ...]]:
    """Every distribution on sys.path."""
    versions: dict[str, dict[str, None]] = {}
    for distribution in importlib.metadata.distributions():
        if name := distribution.metadata["Name"]:
            versions.setdefault(re.sub(r"[-_.]+", "-", name).lower(), {})[distribution.version] = None
    return {name: tuple(found) for name, found in versions.items()}


def torch_build() -> Torch:
    """Imports torch. Raises whatever that raises."""
    import torch

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.is_available()
    complaint = one_line(str(caught[-1].message)) if caught else None
    return Torch(str(torch.__version__), torch.version.cuda, torch.version.hip, complaint)


def places() -> tuple[Place, ...]:
    """The CPU and every GPU that torch reaches, with what a projector would run on there."""
    import torch

    from sp_fast.backend import choose_backend
    from sp_fast.kernels.device import TYPES, chip_of

    found = [Place("cpu", {dtype: choose_backend("auto", torch.device("cpu"), dtype) for dtype in TYPES})]
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        backends = {dtype: choose_backend("auto", device, dtype) for dtype in TYPES}
        capability = chip_of(device).capability if torch.version.hip is None else None
        free, total = torch.cuda.mem_get_info(device)
        found.append(Place(str(device), backends, torch.cuda.get_device_name(device), capability, free, total))
    return tuple(found)


def driver() -> Driver | None:
    """From NVML where its bindings are installed, otherwise from nvidia-smi; None where there is neither."""
    try:
        import pynvml
    except ImportError:
        return _driver_of_smi()
    try:
        pynvml.nvmlInit()
        cuda = pynvml.nvmlSystemGetCudaDriverVersion()
        handles = map(pynvml.nvmlDeviceGetHandleByIndex, range(pynvml.nvmlDeviceGetCount()))
        return Driver(
            pynvml.nvmlSystemGetDriverVersion(),
            f"{cuda // 1000}.{cuda % 1000 // 10}",
            tuple(pynvml.nvmlDeviceGetName(handle) for handle in handles),
        )
    except pynvml.NVMLError_LibraryNotFound:
        return None
    except pynvml.NVMLError as error:
        return Driver(error=one_line(str(error)))


def _driver_of_smi() -> Driver | None:
    if shutil.which("nvidia-smi") is None:
        return None
    result = subprocess.run(["nvidia-smi", "-q"], capture_output=True, text=True, timeout=TIMEOUT)
    if result.returncode:
        return Driver(error=one_line(result.stdout + result.stderr))

    def values(label: str) -> list[str]:
        return re.findall(rf"^\s*{label}\s*:\s*(.+?)\s*$", result.stdout, re.MULTILINE)

    version, cuda = values("Driver Version"), values("CUDA.* Version")
    return Driver(version[0] if version else None, cuda[0] if cuda else None, tuple(values("Product Name")))


def compiler() -> Compiler:
    """As Triton finds it for its launchers: $CC as one word, then gcc, then clang. It compiles a small module."""
    command = os.environ.get("CC", shutil.which("gcc") or shutil.which("clang"))
    scheme = sysconfig.get_default_scheme()
    include = sysconfig.get_paths("posix_prefix" if scheme == "posix_local" else scheme)["include"]
    headers = (Path(include) / "Python.h").is_file()
    if command is None:
        return Compiler(None, include, headers)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.c"
        source.write_text(_MODULE)
        words = [command, str(source), "-O3", "-shared", "-fPIC", f"-I{include}", "-o", str(source.with_suffix(".so"))]
        try:
            result = subprocess.run(words, capture_output=True, text=True, timeout=TIMEOUT)
        except (OSError, subprocess.TimeoutExpired) as error:
            return Compiler(command, include, headers, one_line(str(error)))
    return Compiler(command, include, headers, one_line(result.stderr) if result.returncode else None)


def host() -> Host:
    """As Linux counts."""
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    total, available = (int(fields[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file() and (text := limit.read_text().strip()) != "max":
        total = min(total, int(text))
        available = min(available, int(text) - int(used.read_text()))
    cpu = names[0].split(":", 1)[1].strip() if names else platform.machine()
    return Host(cpu, len(os.sched_getaffinity(0)), total, available)


def kernels_module() -> KernelsModule:
    """What `python -c "import kernels"` would find here: looked for, never imported."""
    path = sys.path if sys.flags.safe_path else [str(Path.cwd()), *sys.path]
    spec = PathFinder.find_spec("kernels", path)
    found = spec and next(iter(spec.submodule_search_locations or ()), spec.origin)
    runs_code = spec is not None and spec.origin is not None
    try:
        distribution = importlib.metadata.distribution("kernels")
    except importlib.metadata.PackageNotFoundError:
        return KernelsModule(found, runs_code)
    return KernelsModule(found, runs_code, distribution.version, str(distribution.locate_file("kernels")))


SOURCES: dict[str, Callable[[], Any]] = {
    "python": platform.python_version,
    "own": own,
    "installed": installed,
    "torch": torch_build,
    "places": places,
    "visible_devices": lambda: os.environ.get("CUDA_VISIBLE_DEVICES"),
    "driver": driver,
    "compiler": compiler,
    "host": host,
    "kernels": kernels_module,
    "flash": find_attention,
}
