"""What the lines of a study say: means and spreads over seeds, differences to the baseline, and two checks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from statistics import fmean, stdev
from typing import Any, NamedTuple

from sp_fast.errors import TrainingError
from sp_fast.training.study.arms import ARMS, BASELINE
from sp_fast.training.task.words import TYPES

MEAN = "mean"
_TIMES_CHANCE, _SATURATED = 2.0, 0.95


class Spread(NamedTuple):
    """Of shares over seeds: their mean, and their sample standard deviation (None of a single one)."""

    mean: float
    deviation: float | None

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Of one value or more."""
        found = list(values)
        return cls(fmean(found), stdev(found) if len(found) > 1 else None)


@dataclass(frozen=True)
class Row:
    """An arm's shares of right answers by column (types, and their mean), a value a seed."""

    arm: str
    table: str
    seeds: tuple[int, ...]
    parameters: Mapping[str, int]
    shares: Mapping[str, tuple[float, ...]]

    def spread(self, column: str) -> Spread:
        """Over seeds."""
        return Spread.of(self.shares[column])

    def beyond(self, other: Row, column: str) -> Spread | None:
        """By how much it is better than another arm, paired by seed; None where they share no seed."""
        theirs = dict(zip(other.seeds, other.shares[column], strict=True))
        pairs = zip(self.seeds, self.shares[column], strict=True)
        differences = [own - theirs[seed] for seed, own in pairs if seed in theirs]
        return Spread.of(differences) if differences else None


@dataclass(frozen=True)
class Check:
    """A demand on the study as a whole, by type: what was found, and whether that will do."""

    name: str
    holds: bool
    by_type: Mapping[str, str]


@dataclass(frozen=True)
class Summary:
    """Arms in the order of ``ARMS``; ``chance`` by column is the better of a uniform guess and the best constant."""

    columns: tuple[str, ...]
    chance: Mapping[str, float]
    rows: tuple[Row, ...]

    @property
    def baseline(self) -> Row | None:
        """The arm without spatial tokens, where it has run."""
        return next((row for row in self.rows if row.arm == BASELINE), None)

    def checks(self) -> list[Check]:
        """Whether the task can be learnt, and is not too easy to tell arms apart."""
        types = self.columns[:-1]
        best = max(self.rows, key=lambda row: row.spread(MEAN).mean)
        times = {kind: best.spread(kind).mean / self.chance[kind] for kind in types}
        lowest = {kind: min(row.spread(kind).mean for row in self.rows) for kind in types}
        return [
            Check(
                f"the best arm, {best.arm}, has twice what guessing has on every type",
                all(value >= _TIMES_CHANCE for value in times.values()),
                {kind: f"{value:.1f} times" for kind, value in times.items()},
            ),
            Check(
                f"no type is answered by all arms to {_SATURATED:.0%} or more",
                all(value < _SATURATED for value in lowest.values()),
                {kind: f"the lowest {value:.1%}" for kind, value in lowest.items()},
            ),
        ]

    def to_dict(self) -> dict[str, Any]:
        """For JSON; shares from 0 to 1."""
        arms = []
        for row in self.rows:
            shares = {
                column: {**row.spread(column)._asdict(), "by_seed": list(row.shares[column])} for column in self.columns
            }
            beyond = {
                column: found._asdict()
                for column in self.columns
                if self.baseline and (found := row.beyond(self.baseline, column))
            }
            arms.append({**asdict(row), "shares": shares, f"beyond_{BASELINE}": beyond})
        return {"chance": dict(self.chance), "arms": arms, "checks": [asdict(check) for check in self.checks()]}


def summarise(lines: Iterable[Mapping[str, Any]]) -> Summary:
    """Of the lines of ``results.jsonl``.

    Raises:
        TrainingError: there are none.
    """
    by_arm: dict[str, list[Mapping[str, Any]]] = {}
    for line in sorted(lines, key=lambda line: line["seed"]):
        by_arm.setdefault(line["arm"], []).append(line)
    if not by_arm:
        raise TrainingError("there is no result yet: start it with sp-fast train study, or wait for its first run")
    any_line = next(iter(by_arm.values()))[0]
    types = [kind for kind in TYPES if kind in any_line["types"]]
    guesses = {kind: any_line["types"][kind]["chance"].values() for kind in types}
    chance = {kind: max(share for share in some if share is not None) for kind, some in guesses.items()}
    rows = []
    for name in (name for name in ARMS if name in by_arm):
        some = by_arm[name]
        shares = {kind: tuple(line["types"][kind]["accuracy"] for line in some) for kind in types}
        shares[MEAN] = tuple(line["mean"] for line in some)
        seeds = tuple(line["seed"] for line in some)
        rows.append(Row(name, ARMS[name].table, seeds, some[0]["parameters"], shares))
    return Summary((*types, MEAN), {**chance, MEAN: fmean(chance.values())}, tuple(rows))
