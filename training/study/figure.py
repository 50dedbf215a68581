"""A study's figures: the share of right answers by type, arm by arm, every seed a dot, beside what guessing has; and
against the parameters that it takes."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sp_fast.errors import TrainingError
from sp_fast.training.study.summary import MEAN, Summary

FIGURE, TRADE_OFF = "study.svg", "parameters.svg"
_ACROSS = 4
_FEW = 10_000  # spatial parameters up to which the scale is linear, since mlp has none


def draw(summary: Summary, path: Path) -> None:
    """Draws to an SVG file; an older one is replaced. Raises TrainingError where it cannot be written."""
    lines = -(-len(summary.columns) // _ACROSS)
    width = 1.2 + 0.22 * len(summary.rows)
    figure = Figure(figsize=(_ACROSS * max(2.2, width), lines * 2.8), layout="constrained")
    axes = figure.subplots(lines, _ACROSS, squeeze=False, sharex=True).ravel()
    for axis in axes[len(summary.columns) :]:
        axis.set_axis_off()
    for axis, column in zip(axes, summary.columns, strict=False):
        _draw(axis, summary, column)
    write_figure(figure, path)


def draw_trade_off(summary: Summary, path: Path) -> None:
    """Right answers against spatial parameters, mean and deviation over seeds: of the type that tells arms apart the
    most, and over all. Raises TrainingError where it cannot be written."""
    means = {kind: [row.spread(kind).mean for row in summary.rows] for kind in summary.columns if kind != MEAN}
    telling = max(means, key=lambda kind: max(means[kind]) - min(means[kind]))
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    for axis, column in zip(figure.subplots(1, 2), (telling, MEAN), strict=True):
        for row in summary.rows:
            mean, deviation = (100 * (value or 0) for value in row.spread(column))
            (dot, *_) = axis.errorbar(row.parameters["spatial"], mean, deviation, fmt="o", capsize=3, markersize=5)
            at = {"xytext": (6, 4), "textcoords": "offset points", "fontsize": 8, "color": dot.get_color()}
            axis.annotate(row.arm, (row.parameters["spatial"], mean), **at)
        axis.set_xscale("symlog", linthresh=_FEW, linscale=0.3)
        axis.set_xlim(-_FEW / 2, _FEW + 8 * max(row.parameters["spatial"] for row in summary.rows))
        axis.set_xlabel("spatial parameters", fontsize=8)
        axis.grid(axis="x", alpha=0.3)
        _finish(axis, summary, column)
    write_figure(figure, path)


def write_figure(figure: Figure, path: Path) -> None:
    """The same figure gives the same file. Raises TrainingError where it cannot be written."""
    aside = path.with_name(f".{path.name}")
    try:
        with matplotlib.rc_context({"svg.hashsalt": "sp_fast"}):
            figure.savefig(aside, format="svg", metadata={"Date": None})
        aside.replace(path)
    except OSError as error:
        raise TrainingError(f"{path} cannot be written ({error.strerror}): mend the folder's rights") from error


def _draw(axis: Axes, summary: Summary, column: str) -> None:
    for place, row in enumerate(summary.rows):
        shares = [100 * share for share in row.shares[column]]
        axis.plot([place] * len(shares), shares, "o", color="C0", alpha=0.6, markersize=4)
        axis.hlines(100 * row.spread(column).mean, place - 0.3, place + 0.3, color="C3", linewidth=1.8)
    axis.set_ylim(0, 100)
    axis.set_xticks(range(len(summary.rows)), [row.arm for row in summary.rows], rotation=90)
    axis.tick_params(labelbottom=True)
    _finish(axis, summary, column)


def _finish(axis: Axes, summary: Summary, column: str) -> None:
    """What guessing has, and the rest that all axes share."""
    axis.axhline(100 * summary.chance[column], color="0.4", linestyle="--", linewidth=0.9)
    axis.set_title(column, fontsize=9)
    axis.set_ylabel("right, %", fontsize=8)
    axis.tick_params(labelsize=8)
    axis.grid(axis="y", alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
