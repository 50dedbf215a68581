"""The log of a run in its folder: a line of JSON for each line of the log, and a figure of them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from transformers import TrainerCallback, TrainerState

from sp_fast.errors import TrainingError

LOG, FIGURE = "log.jsonl", "loss.svg"
_SHARE, _FEWEST = 0.05, 5  # of a running mean: so much of all lines, and no fewer to each side
_COLOURS = {"projector": "C3", "language model": "C0"}


class LogFile(TrainerCallback):
    """Writes ``log.jsonl`` while a run goes on, a line about steps in each, and ``loss.svg`` at its end; on the main
    process.

    A run that goes on begins with the lines up to its checkpoint: what came after is done, and logged, once more.

    Raises:
        TrainingError: the folder cannot be written.
    """

    def __init__(self, run: Path) -> None:
        self._run = run

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Writes what the state remembers."""
        if state.is_world_process_zero:
            self._run.mkdir(parents=True, exist_ok=True)
            _replace(self._run / LOG, "".join(map(_json, _of_steps(state))))

    def on_log(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Adds the newest line."""
        if not state.is_world_process_zero or "loss" not in state.log_history[-1]:
            return
        try:
            with (self._run / LOG).open("a", encoding="utf-8") as file:
                file.write(_json(state.log_history[-1]))
        except OSError as error:
            raise _unwritable(self._run / LOG, error) from error

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Draws, where there is anything to draw."""
        if state.is_world_process_zero and _of_steps(state):
            plot(self._run)


def plot(run: Path) -> Path:
    """Draws ``loss.svg`` from a run's ``log.jsonl``, whether it has ended or not; an older figure is replaced.

    Raises:
        TrainingError: no log, a damaged one, or an empty one; a folder that cannot be written.
    """
    lines = read_log(run)
    if not lines:
        raise TrainingError(f"{run / LOG} has no line yet: wait for the first steps")
    figure = _draw(run.resolve().name, lines)
    aside = run / f".{FIGURE}"
    try:
        with matplotlib.rc_context({"svg.hashsalt": "sp_fast"}):  # the same log gives the same file
            figure.savefig(aside, format="svg", metadata={"Date": None})
        aside.replace(run / FIGURE)
    except OSError as error:
        raise _unwritable(run / FIGURE, error) from error
    return run / FIGURE


def read_log(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's ``log.jsonl``, without a last one that is being written.

    Raises:
        TrainingError: there is none, or it cannot be read.
    """
    path = run / LOG
    try:
        whole = path.read_text(encoding="utf-8").split("\n")[:-1]
    except (OSError, UnicodeDecodeError) as error:
        raise TrainingError(f"{path} cannot be read ({error}): give the folder of a training run") from error
    found = []
    for number, text in enumerate(whole, 1):
        try:
            line = json.loads(text)
        except ValueError as error:
            raise TrainingError(f"{path}, line {number} is no JSON ({error}): mend or remove that line") from error
        if not isinstance(line, dict) or not {"step", "loss"} <= line.keys():
            raise TrainingError(f"{path}, line {number} has no step or no loss: mend or remove that line")
        found.append(line)
    return found


def running_mean(values: np.ndarray) -> np.ndarray:
    """``[n]``: of the values around each, a twentieth of all (at least 5 to each side), fewer at both ends."""
    reach = max(_FEWEST, round(_SHARE / 2 * len(values)))
    sums = np.cumsum(np.concatenate([[0.0], values]))
    places = np.arange(len(values))
    first, last = np.maximum(0, places - reach), np.minimum(len(values), places + reach + 1)
    return (sums[last] - sums[first]) / (last - first)


def _of_steps(state: TrainerState) -> list[dict[str, Any]]:
    """Without the Trainer's summary, which would be its last step's second line."""
    return [line for line in state.log_history if "loss" in line]


def _draw(name: str, lines: list[dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(7.5, 6.5), layout="constrained")
    loss, rate, norm = figure.subplots(3, 1, sharex=True, height_ratios=(3, 1, 1))
    steps, losses = _series(lines, "loss")
    loss.plot(steps, losses, color="0.65", linewidth=0.8, marker="." if len(steps) < 50 else "", label="loss")
    loss.plot(steps, running_mean(losses), color="C0", linewidth=1.8, label="running mean")
    loss.set_ylabel("loss")
    loss.legend(fontsize=8, frameon=False)
    for axis, prefix, label in ((rate, "learning_rate", "learning rate"), (norm, "gradient_norm", "gradient norm")):
        _draw_parts(axis, lines, prefix)
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
    if rate.lines:
        rate.legend(fontsize=8, frameon=False)
    rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    norm.set_xlabel("step")
    for axis in (loss, rate, norm):
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    figure.suptitle(f"{name}, {steps[-1]:.0f} steps", fontsize=10)
    return figure


def _draw_parts(axis: Axes, lines: list[dict[str, Any]], prefix: str) -> None:
    for part, colour in _COLOURS.items():
        steps, values = _series(lines, f"{prefix}_{part.replace(' ', '_')}")
        if len(steps):
            axis.plot(steps, values, color=colour, linewidth=1.0, label=part)


def _series(lines: Iterable[Mapping[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the lines that have one; a value that was not finite is a gap."""
    points = [(line["step"], math.nan if line[name] is None else line[name]) for line in lines if name in line]
    found = np.array(points, dtype=float).reshape(-1, 2)
    return found[:, 0], found[:, 1]


def _json(line: Mapping[str, Any]) -> str:
    """One line; JSON has no word for what is not finite."""
    plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
    return json.dumps({"step": plain["step"], "epoch": plain.get("epoch"), **plain}) + "\n"


def _replace(path: Path, text: str) -> None:
    aside = path.with_name(f".{path.name}")
    try:
        aside.write_text(text, encoding="utf-8")
        aside.replace(path)
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> TrainingError:
    return TrainingError(
        f"{path} cannot be written ({error.strerror}): make room, or mend the folder's rights, and start the same "
        "command again, which goes on from the last checkpoint"
    )
