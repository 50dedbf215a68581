"""What a finding is, and the commands that several of them name."""

from __future__ import annotations

import enum
import re
from dataclasses import asdict, dataclass
from typing import Any

from sp_fast.doctor.facts import Facts


class State(enum.StrEnum):
    """``NOTE``: nothing that is needed here is missing, but it is worth knowing."""

    OK = "ok"
    NOTE = "note"
    PROBLEM = "problem"


@dataclass(frozen=True)
class Finding:
    """A row: what was looked at, what was found, and the way out where there is something to mend."""

    name: str
    found: str
    state: State = State.OK
    remedy: str | None = None


@dataclass(frozen=True)
class Report:
    """Findings by topic."""

    topics: dict[str, list[Finding]]

    @property
    def findings(self) -> list[Finding]:
        """All of them."""
        return [finding for findings in self.topics.values() for finding in findings]

    @property
    def ok(self) -> bool:
        """Whether nothing that is needed is missing."""
        return all(finding.state is not State.PROBLEM for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: "ok", and "findings" with topic, name, found, state and remedy."""
        rows = [{"topic": topic, **asdict(row)} for topic, findings in self.topics.items() for row in findings]
        return {"ok": self.ok, "findings": rows}


def one_line(text: str) -> str:
    """The first line with something in it, of a message that may be long."""
    return next((line.strip()[:300] for line in text.splitlines() if line.strip()), "no message")


def memory(available: int, total: int) -> str:
    """Of bytes."""
    return f"{available / 2**30:.1f} of {total / 2**30:.1f} GiB"


def needed(by_this_machine: bool) -> State:
    """The state of something that is missing."""
    return State.PROBLEM if by_this_machine else State.NOTE


def major(version: str) -> int:
    """13 of "13.0"."""
    return int(version.split(".")[0])


OLDEST_CUDA = 12  # that torch is built for


def install_torch(facts: Facts, over: bool = True) -> str:
    """The command for the build of torch that suits this machine, ``over`` the one that is there."""
    index = "cpu"
    if facts.has_gpu:
        # A build for CUDA 12.6 or 13.0 runs with every driver of the same major version.
        cuda = facts.driver.cuda if facts.driver else None
        index = "cu130" if cuda is None or major(cuda) >= 13 else "cu126"
    words = "pip install --force-reinstall" if over else "pip install"
    return f'{words} "{requirement(facts, "torch")}" --index-url https://download.pytorch.org/whl/{index}'


def requirement(facts: Facts, name: str) -> str:
    """As sp_fast's distribution states it, such as "torch>=2.11"; the bare name where there is none."""
    stated = (words.split(";")[0].strip() for words in (facts.own.requirements if facts.own else ()))
    return next((words for words in stated if re.match(rf"{re.escape(name)}(?![\w.-])", words)), name)
