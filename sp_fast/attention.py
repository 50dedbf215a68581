"""Which attention a model is loaded with: the fastest that is installed and runs there, with the reason.

transformers imports a flash package when a model is loaded, and a missing one is an ImportError then: so it is chosen
before. Importing this imports neither torch nor a flash package.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable, Mapping
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from sp_fast.errors import BackendError

if TYPE_CHECKING:
    import torch


class Attention(NamedTuple):
    """``name`` is what transformers takes as attn_implementation, ``reason`` one clause that says why."""

    name: str
    reason: str


class Flash(NamedTuple):
    """A flash package: who distributes it, its import name, the compute capabilities (majors) that it runs on and those
    where "auto" takes it, how it is installed, and the oldest version that transformers takes."""

    distribution: str
    module: str
    runs_on: range
    auto_on: range
    install: str
    oldest: str = "0"


# The best first. Capabilities are those that the packages' own code accepts.
FLASH = {
    # On 12.x (RTX 50) it runs Ampere's instructions, without determinism or paged caches: "auto" leaves that to FA2.
    "flash_attention_4": Flash(
        "flash-attn-4", "flash_attn", range(9, 13), range(9, 12), "pip install --pre flash-attn-4"
    ),
    # It has no kernels for Blackwell, and on Ampere it gains little over FA2.
    "flash_attention_3": Flash(
        "flash-attn-3", "flash_attn_interface", range(8, 10), range(9, 10),
        "build hopper/ of github.com/Dao-AILab/flash-attention",
    ),
    "flash_attention_2": Flash(
        "flash-attn", "flash_attn", range(8, 100), range(8, 100), "pip install flash-attn --no-build-isolation", "2.3.3"
    ),
}  # fmt: skip
ORDER = (*FLASH, "sdpa", "eager")
PLACEHOLDER = "flash-attn-interface"  # on PyPI: an empty package with the import name of FlashAttention-3
VISION_TOWER = Attention("sdpa", "the tower is frozen and reads 577 tokens without a mask: torch's own kernels suffice")
_TYPES = ("torch.bfloat16", "torch.float16")  # by name: this module stays light


def resolve_attention(
    requested: str,
    *,
    device: str,
    capability: int | None,
    dtype: torch.dtype,
    available: Mapping[str, str | None],
) -> Attention:
    """What to load a language model with. "auto" takes the best that runs there; a forced choice never falls back.

    Args:
        requested: "auto" or one of ``ORDER``.
        device: the kind alone, as in ``torch.device.type``.
        capability: the GPU's, as in sm_90; None without an NVIDIA GPU.
        dtype: of the model's weights.
        available: what ``find_attention`` returns, less what the model's class lacks: None, or why it is missing.

    Raises:
        BackendError: an unknown name, or a forced one that cannot run there.
    """
    if requested not in ("auto", *ORDER):
        raise BackendError(f"attention={requested!r} is unknown; it must be 'auto' or one of {', '.join(ORDER)}")
    no_flash = _why_no_flash(device, capability, dtype)

    def why_not(name: str, majors: Callable[[Flash], range]) -> str | None:
        if name not in FLASH:
            return available.get(name)
        if no_flash is None and capability // 10 not in majors(FLASH[name]):
            return f"{FLASH[name].distribution} does not run on compute capability {capability / 10}"
        return no_flash or available[name]

    if requested != "auto":
        reason = why_not(requested, lambda flash: flash.runs_on)
        if reason is not None:
            raise BackendError(f"attention={requested!r} was requested, but {reason}: use attention='auto'")
        return Attention(requested, "requested")
    name = next(name for name in ORDER if why_not(name, lambda flash: flash.auto_on) is None)
    if name == "eager":
        return Attention(name, f"auto: {available['sdpa']}")
    if no_flash is not None:
        return Attention(name, f"auto: {no_flash}")
    chip = f"compute capability {capability / 10}"
    if name in FLASH:
        return Attention(name, f"auto: {FLASH[name].distribution} is installed and suits {chip}")
    return Attention(name, f"auto: torch's own flash or cuDNN kernel, no flash package that suits {chip} is installed")


def attention_on(requested: str, device: torch.device, dtype: torch.dtype) -> Attention:
    """``resolve_attention`` for this machine. Raises BackendError as it does."""
    import torch

    capability = None
    if device.type == "cuda" and torch.version.hip is None:
        major, minor = torch.cuda.get_device_capability(device)
        capability = 10 * major + minor
    return resolve_attention(
        requested, device=device.type, capability=capability, dtype=dtype, available=find_attention()
    )


def _why_no_flash(device: str, capability: int | None, dtype: torch.dtype) -> str | None:
    """Why no flash package at all can run there; None where one may."""
    if device != "cuda":
        return f"the model is on {device}"
    if capability is None:
        return "the GPU is not NVIDIA's"
    if str(dtype) not in _TYPES:
        return f"{dtype} is neither {' nor '.join(_TYPES)}"
    oldest = min(flash.runs_on.start for flash in FLASH.values())
    return None if capability // 10 >= oldest else f"the GPU has compute capability {capability / 10}, below {oldest}.0"


def find_attention() -> dict[str, str | None]:
    """What this environment has, by the names in ``ORDER`` that need something: None, or one clause that says why it is
    missing, with the way out.

    As in transformers, the distribution that owns an import name decides: FlashAttention 2 and 4 share one.
    """
    return {**{name: _why_missing(flash) for name, flash in FLASH.items()}, "sdpa": None}


def _why_missing(flash: Flash) -> str | None:
    spec = importlib.util.find_spec(flash.module)  # of a top-level name: nothing is imported
    if spec is None:
        return f"{flash.distribution} is not installed ({flash.install})"
    owners = {name.replace("_", "-") for name in importlib.metadata.packages_distributions().get(flash.module, ())}
    # Beside the real package, the placeholder's folder goes before the real module, and transformers does not notice.
    if PLACEHOLDER in owners and not _mentions(spec, "flash_attn_func"):
        return f"{flash.module} is that of {PLACEHOLDER}, an empty placeholder (pip uninstall -y {PLACEHOLDER})"
    if flash.distribution not in owners:
        return f"{flash.distribution} is not installed ({flash.install})"
    from packaging.version import Version

    version = importlib.metadata.version(flash.distribution)
    if Version(version) < Version(flash.oldest):
        return f"{flash.distribution} {version} is older than {flash.oldest} ({flash.install} --upgrade)"
    return None


def _mentions(spec: ModuleSpec, name: str) -> bool:
    """Whether the module's source has the name: enough to tell it from an empty one without running it."""
    return spec.origin is not None and name in Path(spec.origin).read_text(errors="replace")
