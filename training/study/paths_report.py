"""Paths that were compared: a table, and a figure of their losses and of how far they drift apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console

from sp_fast.bench.tables import Section, figure, rich_table
from sp_fast.training.log_file import running_mean
from sp_fast.training.study.figure import write_figure
from sp_fast.training.study.paths import DRIFTS

FIGURE = "paths.svg"
_WIDTH = 110  # of the table, whose figures no terminal cuts

#: A line of ``paths.jsonl``.
Line = Mapping[str, Any]


def print_paths(lines: Sequence[Line]) -> None:
    """A row each arm and seed, on stdout."""
    rows = []
    for line in lines:
        losses, drifts = line["losses"]["reference"], line["drift"]
        cells = [f"{drifts[form][what]:.1e}" for what in DRIFTS for form in ("fast", "reordered")]
        rows.append(
            [
                *(line["arm"], str(line["seed"]), f"{figure(losses[0])} to {figure(losses[-1])}"),
                *(*cells, "holds" if line["holds"] else "BROKEN"),
            ]
        )
    columns = ["", "seed", "loss", "losses: fast", "reordered", "parameters: fast", "reordered", "the rule"]
    title = "largest relative drift from the reference's path; fast may have twice what the reordered sums have"
    console = Console()
    console.width = max(console.width, _WIDTH)
    console.print(rich_table(Section(title, columns, rows)))


def draw(lines: Sequence[Line], path: Path) -> None:
    """Draws to an SVG file; an older one is replaced.

    Losses (running means) of the fast projector lie on the reference's; below, the largest relative difference up to
    each step, and the largest that reordered sums have. Raises TrainingError where it cannot be written.
    """
    arms = list(dict.fromkeys(line["arm"] for line in lines))
    drawn = Figure(figsize=(4.2 * len(arms), 5.5), layout="constrained")
    axes = drawn.subplots(2, len(arms), squeeze=False, sharex=True, height_ratios=(3, 2))
    for place, arm in enumerate(arms):
        loss, apart = axes[:, place]
        for line in (line for line in lines if line["arm"] == arm):
            _draw(loss, apart, line)
        loss.set_title(arm, fontsize=10)
        loss.set_ylabel("loss")
        apart.set_ylabel("largest difference so far")
        apart.set_xlabel("step")
        apart.set_ylim(bottom=0)
        loss.legend(fontsize=7, frameon=False)
        apart.legend(*_first(apart, 2), fontsize=7, frameon=False)
        for axis in (loss, apart):
            axis.grid(alpha=0.3)
            axis.spines[["top", "right"]].set_visible(False)
            axis.tick_params(labelsize=8)
    write_figure(drawn, path)


def _draw(loss: Axes, apart: Axes, line: Line) -> None:
    losses = {name: np.array(values) for name, values in line["losses"].items()}
    reference, steps, colour = losses.pop("reference"), np.arange(1, len(losses["fast"]) + 1), f"C{line['seed'] % 10}"
    loss.plot(steps, running_mean(reference), color=colour, linewidth=3, alpha=0.35, label=f"reference {line['seed']}")
    loss.plot(steps, running_mean(losses["fast"]), color=colour, linewidth=1, label=f"fast {line['seed']}")
    differences = {name: np.maximum.accumulate(abs(some - reference) / reference) for name, some in losses.items()}
    apart.plot(steps, differences.pop("fast"), color=colour, linewidth=1, label="fast")
    most = np.stack(list(differences.values())).max(0)
    apart.plot(steps, most, color=colour, linewidth=1, linestyle=":", label="reordered, the largest")


def _first(axis: Axes, count: int) -> tuple[list[Any], list[str]]:
    """Of what every seed has alike, one."""
    handles, labels = axis.get_legend_handles_labels()
    return handles[:count], labels[:count]
