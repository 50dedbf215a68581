"""Judges devices, and tells what sp_fast chooses on each: the projector's backend, and the models' attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

from sp_fast.attention import FLASH, PLACEHOLDER, VISION_TOWER, Attention, resolve_attention
from sp_fast.doctor.facts import Facts, Place
from sp_fast.doctor.findings import Finding, State, memory

if TYPE_CHECKING:
    import torch

    from sp_fast.backend import Backend


def devices(facts: Facts) -> Iterator[Finding]:
    """GPUs that torch reaches."""
    for place in facts.places:
        if place.total is not None:
            chip = f"compute capability {place.capability / 10}" if place.capability else "not NVIDIA's"
            yield Finding(place.device, f"{place.name}, {chip}, {memory(place.free, place.total)} free")


def backends(facts: Facts) -> Iterator[Finding]:
    """What `SPProjector(backend="auto")` runs on."""
    for place in facts.places:
        for choice, types in _alike(place, place.backends.__getitem__):
            state = State.NOTE if place.device != "cpu" and choice.name == "torch" else State.OK
            yield Finding(f"projector on {place.device}", f"{choice.name} for {types}: {choice.reason}", state)


def attention(facts: Facts) -> Iterator[Finding]:
    """What models are loaded with."""
    for place in facts.places:
        for choice, types in _alike(place, partial(_resolve, facts, place)):
            yield Finding(f"language model on {place.device}", f"{choice.name} for {types}: {choice.reason}")
    if facts.places:
        yield Finding("vision tower", f"{VISION_TOWER.name}: {VISION_TOWER.reason}")


def _resolve(facts: Facts, place: Place, dtype: torch.dtype) -> Attention:
    kind = place.device.split(":")[0]
    return resolve_attention("auto", device=kind, capability=place.capability, dtype=dtype, available=facts.flash)


def _alike(
    place: Place, choose: Callable[[torch.dtype], Backend | Attention]
) -> Iterator[tuple[Backend | Attention, str]]:
    """Each choice, and the types that it is made for."""
    chosen: dict[Backend | Attention, list[str]] = {}
    for dtype in place.backends:
        chosen.setdefault(choose(dtype), []).append(str(dtype).removeprefix("torch."))
    for choice, types in chosen.items():
        yield choice, ", ".join(types)


def flash(facts: Facts) -> Iterator[Finding]:
    """Flash packages. All are optional."""
    present = {name: one.distribution for name, one in FLASH.items() if one.distribution in facts.installed}
    for name, distribution in present.items():
        version, missing = facts.version(distribution), facts.flash.get(name)
        if missing is None:
            yield Finding(distribution, version)
        else:
            yield Finding(distribution, f"{version}, but it cannot be used: {missing}", State.NOTE)
    if PLACEHOLDER in facts.installed:
        found = f"{facts.version(PLACEHOLDER)}, an empty placeholder that hides FlashAttention-3"
        yield Finding(PLACEHOLDER, found, State.NOTE, f"pip uninstall -y {PLACEHOLDER}")
    elif not present:
        yield Finding("flash packages", "none, and none is needed")
