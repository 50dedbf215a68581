"""Figures of a result file: latency against batch with the roof, memory, and the roofline. PNG and SVG of each."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display is needed, or opened

from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

from sp_fast.bench import summary
from sp_fast.bench.implementations import OURS
from sp_fast.bench.record import Record, RecordError
from sp_fast.bench.summary import LABELS, Row

TITLES = {"forward": "forward", "backward": "backward", "both": "forward + backward"}
COLOURS = dict(zip(LABELS, ("C3", "C0", "C9", "C1", "C8", "C2", "C4", "C5"), strict=True))
PARTS = {"weights_mib": "weights", "gradients_mib": "gradients", "temporary_mib": "beyond, at the peak"}


def plot(records: list[Record], folder: Path, force: bool = False) -> list[Path]:
    """Writes ``<figure>-<variant>-<dtype>.png`` and ``.svg``; a figure without data is left out.

    Raises:
        RecordError: a file is there already (unless ``force``), the folder cannot be written, or nothing can be drawn.
    """
    drawn: dict[Path, Figure] = {}
    rows = summary.rows(records)
    for variant, dtype in dict.fromkeys((row.any.variant, row.any.dtype) for row in rows):
        group = [row for row in rows if (row.any.variant, row.any.dtype) == (variant, dtype)]
        for name, draw in FIGURES.items():
            if (figure := draw(group)) is not None:
                figure.suptitle(f"{variant}, {dtype}: {machine(records)}", fontsize=10)
                drawn[folder / f"{name}-{variant}-{dtype}"] = figure
    if not drawn:
        raise RecordError("nothing can be drawn: no record has a figure")
    return write(drawn, folder, force)


def write(drawn: dict[Path, Figure], folder: Path, force: bool) -> list[Path]:
    """Figures by their paths without ending, as PNG and SVG. Raises RecordError as ``plot`` does."""
    paths = [Path(f"{stem}.{kind}") for stem in drawn for kind in ("png", "svg")]
    if not force:
        check_free(paths)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with matplotlib.rc_context({"svg.hashsalt": "sp_fast"}):  # the same data gives the same file
            for path in paths:
                drawn[path.with_suffix("")].savefig(
                    path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None
                )
    except OSError as error:
        raise RecordError(f"{folder} cannot be written ({error.strerror}): choose another folder") from error
    finally:
        plt.close("all")
    return paths


def planned(folder: Path, variants: Iterable[str], dtypes: Iterable[str]) -> list[Path]:
    """What ``plot`` may write there."""
    names = itertools.product(FIGURES, variants, dtypes, ("png", "svg"))
    return [folder / f"{name}-{variant}-{dtype}.{kind}" for name, variant, dtype, kind in names]


def check_free(paths: Iterable[Path]) -> None:
    """Raises RecordError for a file that is there."""
    if there := [path for path in paths if path.exists()]:
        raise RecordError(f"{there[0]} exists: choose another folder, or overwrite with --force")


def machine(records: list[Record]) -> str:
    """Machine and commits, each once."""
    first = records[0]
    threads = f", {first.threads} threads" if first.device == "cpu" else ""
    machines = dict.fromkeys(str(r.environment.get("machine")) for r in records)
    commits = dict.fromkeys(str(r.environment.get("commit")) for r in records)
    return f"{', '.join(machines)}{threads}, commit {', '.join(commits)}"


def latency(rows: list[Row]) -> Figure | None:
    """The whole projector: time against batch, an axis a direction, the roof drawn; p20 to p80 as error bars."""
    whole = [row for row in rows if row.any.stage == "whole" and any(r.ms_p50 for r in row.records.values())]
    directions = list(dict.fromkeys(row.any.direction for row in whole))
    if not directions:
        return None
    figure, axes = plt.subplots(
        1, len(directions), figsize=(4.6 * len(directions), 4.2), squeeze=False, layout="constrained"
    )
    for axis, direction in zip(axes[0], directions, strict=True):
        chosen = [row for row in whole if row.any.direction == direction]
        for name in summary.present(chosen):
            points = [(row.any.batch, row.records[name]) for row in chosen if name in row.records]
            points = [(batch, r) for batch, r in points if r.ms_p50]
            if points:
                ms = [r.ms_p50 for _, r in points]
                spread = [[r.ms_p50 - r.ms_p20 for _, r in points], [r.ms_p80 - r.ms_p50 for _, r in points]]
                axis.errorbar([batch for batch, _ in points], ms, spread, label=LABELS[name], color=COLOURS[name],
                              marker="o", capsize=2, linewidth=2.5 if name == OURS else 1.2)  # fmt: skip
        roofs = {row.any.batch: r.roof_ms for row in chosen for r in row.records.values() if r.roof_ms}
        if roofs:
            axis.plot(roofs.keys(), roofs.values(), "k--", marker="_", label="roof (measured peaks)")
        axis.set(xscale="log", yscale="log", xlabel="images in a batch", ylabel="ms", title=TITLES[direction])
        axis.set_xticks([row.any.batch for row in chosen], [str(row.any.batch) for row in chosen])
        axis.xaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.yaxis.set_major_formatter("{x:,g}")
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.grid(alpha=0.3, which="both")
    axes[0][-1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def memory(rows: list[Row]) -> Figure | None:
    """Stacked bars of what a run holds, for the smallest batch of each direction of the whole projector."""
    whole = [row for row in rows if row.any.stage == "whole" and any(r.peak_mib for r in row.records.values())]
    chosen = {row.any.direction: row for row in sorted(whole, key=lambda row: -row.any.batch)}
    if not chosen:
        return None
    figure, axes = plt.subplots(
        len(chosen), 1, figsize=(7.5, 2.6 * len(chosen)), squeeze=False, sharex=True, layout="constrained"
    )
    for axis, (direction, row) in zip(axes[:, 0], chosen.items(), strict=True):
        names = [name for name in reversed(row.records) if row.records[name].peak_mib]
        left = [0.0] * len(names)
        for part, label in PARTS.items():
            widths = [getattr(row.records[name], part) or 0.0 for name in names]
            axis.barh([LABELS[name] for name in names], widths, left=left, label=label)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        axis.set_title(f"{TITLES[direction]}, batch {row.any.batch}", fontsize=10)
        axis.grid(alpha=0.3, axis="x")
    axes[-1][0].set_xlabel("MiB")
    axes[0][0].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def roofline(rows: list[Row]) -> Figure | None:
    """Rate against intensity: our stages and the strongest baseline's under the measured peaks."""
    points = [(row, r) for row in rows for r in (row.our, row.baselines.get(row.best or "")) if r and r.tflops]
    peaks = next((r.peaks for _, r in points if r.peaks), None)
    if not peaks or not points:
        return None
    rate, gbps = peaks["tflops"][points[0][1].dtype], max(peaks["read_gbps"], peaks["copy_gbps"])
    intensities = [r.flop / r.bytes for _, r in points]
    ridge = rate * 1e3 / gbps
    low, high = min(*intensities, ridge) / 2, max(*intensities, ridge) * 2
    figure, axis = plt.subplots(figsize=(7.5, 4.6), layout="constrained")
    axis.plot([low, ridge, high], [low * gbps / 1e3, rate, rate], "k--", label=f"{gbps:.3g} GB/s, {rate:.3g} TFLOP/s")
    for row, r in points:
        ours = r.implementation == OURS
        axis.plot(
            r.flop / r.bytes,
            r.tflops,
            "o" if ours else "x",
            color=COLOURS[r.implementation],
            label=LABELS[r.implementation],
        )
        if ours:
            note = f"{row.any.stage}, {TITLES[row.any.direction]}, B={row.any.batch}"
            axis.annotate(note, (r.flop / r.bytes, r.tflops), fontsize=6, xytext=(4, 3), textcoords="offset points")
    axis.set(xscale="log", yscale="log", xlabel="FLOP a byte", ylabel="TFLOP/s")
    axis.grid(alpha=0.3, which="both")
    handles = dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))  # each label once
    axis.legend(handles.values(), handles.keys(), fontsize=8, loc="lower right")
    return figure


FIGURES: dict[str, Callable[[list[Row]], Figure | None]] = {"latency": latency, "memory": memory, "roofline": roofline}
