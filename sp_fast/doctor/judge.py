"""Which findings there are: pure functions of the facts, by topic. One that crashes is a finding itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from sp_fast.doctor import choices, machine, versions
from sp_fast.doctor.facts import Facts
from sp_fast.doctor.findings import Finding, Report, State, one_line

Probe = Callable[[Facts], Iterable[Finding]]


def unanswered(facts: Facts) -> Iterator[Finding]:
    """Sources that failed, other than torch, of which `versions` speaks."""
    for name, error in facts.failures.items():
        if facts.torch is not None or name not in ("torch", "places"):
            yield Finding(name.replace("_", " "), f"could not be found out: {error}", State.NOTE)


TOPICS: dict[str, tuple[Probe, ...]] = {
    "Versions": (versions.own, versions.packages, versions.torch, versions.leftovers, versions.interpreter),
    "Machine": (machine.host, machine.driver, machine.compiler, machine.kernels, unanswered),
    "Devices and choices": (choices.devices, choices.flash, choices.backends, choices.attention),
}


def judge(facts: Facts, topics: dict[str, tuple[Probe, ...]] = TOPICS) -> Report:
    """Every finding. Never raises: a probe that does becomes a problem, since it leaves needs unexamined."""
    return Report({topic: [row for probe in probes for row in _rows(probe, facts)] for topic, probes in topics.items()})


def _rows(probe: Probe, facts: Facts) -> list[Finding]:
    try:
        return list(probe(facts))
    except Exception as error:  # noqa: BLE001, a broken environment fails in any way, and is what is examined
        reason = one_line(f"{type(error).__name__}: {error}")
        remedy = f"pip install {error.name}" if isinstance(error, ModuleNotFoundError) else None
        return [Finding(probe.__name__, f"could not be judged: {reason}", State.PROBLEM, remedy)]
