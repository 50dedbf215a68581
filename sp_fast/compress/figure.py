"""The error of the spatial tokens against parameters, over the sizes that were tried."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from sp_fast.errors import ConfigError


def draw(points: Sequence[tuple[str, int, float]], full: int, title: str, path: Path) -> None:
    """An SVG file; an older one is replaced.

    Args:
        points: what was tried, its spatial parameters, the relative error.
        full: the full projector's spatial parameters.

    Raises:
        ConfigError: it cannot be written.
    """
    figure = Figure(figsize=(5.2, 3.8), layout="constrained")
    axis = figure.subplots()
    ordered = sorted(points, key=lambda point: point[1])
    axis.plot([size for _, size, _ in ordered], [error for *_, error in ordered], "o-", color="C3")
    for label, size, error in ordered:
        axis.annotate(label, (size, error), xytext=(4, 4), textcoords="offset points", fontsize=8, parse_math=False)
    axis.axvline(full, color="0.4", linestyle="--", linewidth=0.9)
    axis.annotate("full", (full, 1), xycoords=("data", "axes fraction"), xytext=(-4, -10), textcoords="offset points",
                  fontsize=8, ha="right")  # fmt: skip
    axis.set(xscale="log", yscale="log", xlabel="spatial parameters", ylabel="relative error of the spatial tokens")
    axis.set_title(title, fontsize=9, parse_math=False)  # which names a path: $ is no formula's
    axis.grid(alpha=0.3, which="both")
    aside = path.with_name(f".{path.name}")
    try:
        with matplotlib.rc_context({"svg.hashsalt": "sp_fast"}):  # the same data gives the same file
            figure.savefig(aside, format="svg", metadata={"Date": None})
        aside.replace(path)
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written ({error.strerror}), though all else was: choose another place for the plot"
        ) from error
