"""Judges versions: each package against what sp_fast's distribution asks for, and torch's build against the machine."""

from __future__ import annotations

from collections.abc import Iterator

from sp_fast.doctor.facts import Facts
from sp_fast.doctor.findings import OLDEST_CUDA, Finding, State, install_torch, major, needed, requirement

ONLY_WITH_GPU = ("triton",)  # a CPU build of torch brings none
OPTIONAL = ("nvidia-ml-py",)
HIDING = ("", "-1")  # values of CUDA_VISIBLE_DEVICES
# What a bare checkout is asked for, which says nothing of its needs.
NAMED = ("torch", "triton", "transformers", "peft", "accelerate", "safetensors", "numpy")
# They all own the folder triton/, and overwrite each other's files.
TRITONS = ("triton", "pytorch-triton", "pytorch-triton-rocm", "pytorch-triton-xpu", "triton-nightly", "triton-windows")


def own(facts: Facts) -> Iterator[Finding]:
    """Python and sp_fast itself."""
    from packaging.specifiers import SpecifierSet

    if facts.own is None:
        return
    wanted = SpecifierSet(facts.own.python or "")
    if wanted.contains(facts.python, prereleases=True):
        yield Finding("python", f"{facts.python} ({wanted})" if wanted else facts.python)
    else:
        remedy = f"make an environment with python {wanted}"
        yield Finding("python", f"{facts.python}, but {wanted} is needed", State.PROBLEM, remedy)
    version, distribution = facts.own.version, facts.own.distribution
    if distribution is None:
        found = f"{version}, not installed as a distribution: no minima are checked"
        yield Finding("sp_fast", found, State.NOTE, "pip install .")
    elif distribution != version:
        found = f"{version}, beside an installed {distribution}, whose minima are checked"
        yield Finding("sp_fast", found, State.NOTE, "pip install .")
    else:
        yield Finding("sp_fast", version)


def torch(facts: Facts) -> Iterator[Finding]:
    """Whether it can be imported, and whether its build suits the machine."""
    if facts.torch is None:
        version = facts.version("torch")
        reason = facts.failures.get("torch", "no reason is known")
        found = f"{version} cannot be imported: {reason}" if version else f"not installed ({reason})"
        yield Finding("torch", found, State.PROBLEM, install_torch(facts, over=version is not None))
        return
    gpus = ", ".join(facts.driver.gpus) if facts.driver else ""
    cuda, seen = facts.torch.cuda, [place for place in facts.places if place.device != "cpu"]
    build = f"built for CUDA {cuda}"
    if facts.torch.hip is not None:
        yield Finding("torch build", f"built for ROCm {facts.torch.hip}: the kernels need an NVIDIA GPU", State.NOTE)
    elif cuda is None and gpus:
        yield Finding("torch build", f"for the CPU, beside {gpus}", State.PROBLEM, install_torch(facts))
    elif cuda is None:
        yield Finding("torch build", "for the CPU, and there is no NVIDIA GPU")
    elif seen:
        yield Finding("torch build", f"{build}, and sees {len(seen)} GPU{'s' if len(seen) > 1 else ''}")
    elif not gpus:
        broken = facts.driver is not None and facts.driver.error is not None
        found = f"{build}, but no NVIDIA GPU answers: the CPU's build is a tenth of the size"
        yield Finding("torch build", found, State.NOTE, None if broken else install_torch(facts))
    elif facts.visible_devices in HIDING:
        found = f"{build}, but CUDA_VISIBLE_DEVICES={facts.visible_devices!r} hides {gpus}"
        yield Finding("torch build", found, State.NOTE, "unset CUDA_VISIBLE_DEVICES")
    else:
        yield _blind(facts, f"{build}, but does not see {gpus}")


def _blind(facts: Facts, found: str) -> Finding:
    """A build for CUDA that reaches no GPU although the driver has one."""
    newest = facts.driver.cuda if facts.driver else None
    if newest is not None and major(facts.torch.cuda) > major(newest):
        found = f"{found}: the driver supports CUDA up to {newest}"
        wheels = f"{install_torch(facts)}, or " if major(newest) >= OLDEST_CUDA else ""
        return Finding("torch build", found, State.PROBLEM, f"{wheels}install a newer NVIDIA driver")
    reason = facts.torch.complaint or facts.failures.get("places")
    found = f"{found}: {reason}" if reason else found
    return Finding("torch build", found, State.PROBLEM, "python -c 'import torch; torch.cuda.init()'  # says more")


def packages(facts: Facts) -> Iterator[Finding]:
    """What sp_fast requires, and what it can use."""
    from packaging.requirements import Requirement

    stated = [Requirement(words) for words in (facts.own.requirements if facts.own else ())]
    required = [one for one in stated if one.marker is None or one.marker.evaluate({"extra": ""})]
    for one in required:
        if one.name == "torch" and facts.torch is None:
            continue  # said below
        version, must = facts.version(one.name), one.name not in ONLY_WITH_GPU or facts.has_gpu
        remedy = f'pip install "{requirement(facts, one.name)}"'
        if version is None:
            yield Finding(one.name, f"not installed ({one.specifier or 'any version'} is needed)", needed(must), remedy)
        elif not one.specifier.contains(version, prereleases=True):
            yield Finding(one.name, f"{version}, but {one.specifier} is needed", needed(must), remedy)
        else:
            yield Finding(one.name, f"{version} ({one.specifier})" if one.specifier else version)
    for name in (*(() if required else NAMED), *OPTIONAL):
        if name == "torch" and facts.torch is None:
            continue
        version = facts.version(name)
        yield Finding(name, version) if version else Finding(name, "not installed", State.NOTE, f"pip install {name}")


def leftovers(facts: Facts) -> Iterator[Finding]:
    """Installations over one another."""
    present = [name for name in TRITONS if name in facts.installed]
    if len(present) > 1:
        found = f"{' and '.join(present)} are installed into one folder"
        remedy = f'pip uninstall -y {" ".join(present)}; pip install "{requirement(facts, "triton")}"'
        yield Finding("triton leftovers", found, needed(facts.has_gpu), remedy)
    for name in ("torch", "triton"):
        versions = facts.installed.get(name, ())
        if len(versions) > 1:
            found = f"{' and '.join(versions)} are on the path, the first is imported"
            yield Finding(f"{name} leftovers", found, State.NOTE, f"pip uninstall {name}, until none is left")


def interpreter(facts: Facts) -> Iterator[Finding]:
    """Triton's interpreter, which only the tests of the kernels use."""
    from packaging.version import Version

    triton, numpy = facts.version("triton"), facts.version("numpy")
    if triton and numpy and Version(triton) < Version("3.7") and Version(numpy) >= Version("2.4"):
        found = f"triton {triton} cannot interpret kernels with numpy {numpy}: the kernels' own tests fail"
        yield Finding("triton's interpreter", found, State.NOTE, 'pip install "numpy<2.4"')
