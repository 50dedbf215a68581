"""The field drawn: latency, and parameters, against the tokens that a projector gives."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from sp_fast.bench.field_formats import groups, label
from sp_fast.bench.field_projectors import PROJECTORS
from sp_fast.bench.field_rows import Spatial
from sp_fast.bench.plots import machine, write
from sp_fast.bench.record import Record, RecordError

MARKERS = "os^D"  # one for every ten colours
PANELS: dict[str, Callable[[Record], float]] = {
    "latency, ms (p50)": lambda r: r.ms_p50,
    "parameters, M": lambda r: r.parameters / 1e6,
}


def plot(records: list[Record], folder: Path, force: bool = False) -> list[Path]:
    """Writes ``field-<direction>-b<batch>-<dtype>.png`` and ``.svg``.

    Raises:
        RecordError: a file is there already (unless ``force``), the folder cannot be written, or nothing can be drawn.
    """
    drawn = {}
    for title, group in groups(r for r in records if r.ms_p50):
        figure = _field(group)
        figure.suptitle(f"{title}: {machine(group)}", fontsize=10)
        drawn[folder / _stem(group[0].direction, group[0].batch, group[0].dtype)] = figure
    if not drawn:
        raise RecordError("nothing can be drawn: no record has a figure")
    return write(drawn, folder, force)


def planned(folder: Path, directions: Iterable[str], batches: Iterable[int], dtypes: Iterable[str]) -> list[Path]:
    """What ``plot`` may write there."""
    names = itertools.product(directions, batches, dtypes)
    return [folder / f"{_stem(*name)}.{kind}" for name in names for kind in ("png", "svg")]


def _stem(direction: str, batch: int, dtype: str) -> str:
    return f"field-{direction}-b{batch}-{dtype}"


def _field(records: list[Record]) -> Figure:
    figure, axes = plt.subplots(1, len(PANELS), figsize=(11, 4.6), layout="constrained")
    for axis, (name, height) in zip(axes, PANELS.items(), strict=True):
        for number, r in enumerate(records):
            own = isinstance(PROJECTORS.get(r.variant), Spatial)
            point = (r.image_tokens, height(r))
            marker = MARKERS[number // 10 % len(MARKERS)]
            axis.plot(*point, marker, color=f"C{number % 10}", markersize=9 if own else 6, label=label(r.variant))
        axis.set(xscale="log", yscale="log", xlabel="tokens of one image", ylabel=name)
        axis.grid(alpha=0.3, which="both")
        ticks = sorted({r.image_tokens for r in records})
        axis.set_xticks(ticks, [str(n) for n in ticks], rotation=45)
        axis.minorticks_off()
    axes[-1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure
