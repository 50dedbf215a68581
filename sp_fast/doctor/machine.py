"""Judges what lies below the packages: driver, C compiler, Python headers, memory, and what is named `kernels`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from sp_fast.doctor.facts import Facts
from sp_fast.doctor.findings import Finding, State, memory, needed


def host(facts: Facts) -> Iterator[Finding]:
    """Cores and memory."""
    if facts.host is not None:
        free = memory(facts.host.available, facts.host.total)
        yield Finding("host", f"{facts.host.cpu}, {facts.host.cores} cores, {free} available")


def driver(facts: Facts) -> Iterator[Finding]:
    """NVIDIA's."""
    if "driver" in facts.failures:
        return
    if facts.driver is None:
        yield Finding("NVIDIA driver", "none")
    elif facts.driver.error is not None:
        # With a CPU build of torch, this may be a machine without a GPU whose image brings the driver's tools.
        cuda = facts.torch is not None and facts.torch.cuda is not None
        remedy = "restart the machine, or install the driver again"
        yield Finding("NVIDIA driver", f"does not answer: {facts.driver.error}", needed(cuda), remedy)
    else:
        gpus = ", ".join(facts.driver.gpus) or "no GPU"
        yield Finding("NVIDIA driver", f"{facts.driver.version}, for CUDA up to {facts.driver.cuda}: {gpus}")


def compiler(facts: Facts) -> Iterator[Finding]:
    """Triton compiles a launcher in C the first time that a kernel runs."""
    if facts.compiler is None:
        return
    found, must = facts.compiler, needed(facts.has_gpu)
    why = "" if facts.has_gpu else "; only needed with an NVIDIA GPU"
    compiled = found.command is not None and found.error is None
    if compiled:
        yield Finding("C compiler", f"{found.command} compiles a Python module")
    elif found.command is None:
        remedy = "apt-get install gcc (dnf install gcc), or set CC"
        yield Finding("C compiler", f"no gcc, no clang, and CC is not set{why}", must, remedy)
    elif found.headers:
        remedy = "set CC to a compiler that works, as in export CC=gcc; arguments do not belong there"
        yield Finding("C compiler", f"{found.command} compiles no Python module: {found.error}{why}", must, remedy)
    else:
        yield Finding("C compiler", f"{found.command}, not tried without headers")
    if found.headers or compiled:
        yield Finding("Python headers", found.include if found.headers else "found by the compiler")
    else:
        python = ".".join(facts.python.split(".")[:2])
        remedy = f"apt-get install python{python}-dev (dnf install python{python}-devel)"
        yield Finding("Python headers", f"no Python.h in {found.include}{why}", must, remedy)


def kernels(facts: Facts) -> Iterator[Finding]:
    """transformers imports whatever is named so, and means Hugging Face's package."""
    if facts.kernels is None:
        return
    found, version, home = facts.kernels.found, facts.kernels.version, facts.kernels.home
    remedy = f"rename {found}, or start python elsewhere or with -P"
    if home is not None and (found is None or Path(found).is_relative_to(home)):
        yield Finding("kernels module", f"Hugging Face's, {version}")
    elif found is None:
        yield Finding("kernels module", "none")
    elif not facts.kernels.runs_code:
        yield Finding("kernels module", f"{found}, a folder that every installed package goes before")
    elif version is not None:
        hidden = f"{found} hides Hugging Face's {version}: importing transformers fails"
        yield Finding("kernels module", hidden, State.PROBLEM, remedy)
    else:
        foreign = f"{found} is not Hugging Face's package, but transformers runs it"
        yield Finding("kernels module", foreign, State.NOTE, remedy)
