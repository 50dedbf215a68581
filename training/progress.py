"""How far a run is: a bar on a terminal, a line for each line of the log anywhere else."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerState

_FIGURES = ("loss {loss:.4f}", "{step_seconds:.3g} s/step", "{tokens_per_second:,.0f} tokens/s")


class ProgressReport(TrainerCallback):
    """Steps, loss, speed and time left, on the main process.

    A context manager, so that the terminal is as it was after a run that fails.

    Args:
        console: by default the process's stderr.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._bar: Progress | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._close()

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Draws the bar; of a run that goes on, with the steps that it has."""
        if state.is_world_process_zero and self._console.is_terminal:
            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
            self._bar = Progress(*columns, console=self._console)
            self._task = self._bar.add_task("", total=state.max_steps, completed=state.global_step)
            self._bar.start()

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Moves the bar."""
        if self._bar is not None:
            self._bar.update(self._task, completed=state.global_step)

    def on_log(
        self, args: Any, state: TrainerState, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Shows the figures."""
        if not state.is_world_process_zero or "loss" not in (logs or {}):
            return
        figures = "  ".join(_FIGURES).format(**logs)
        if self._bar is not None:
            self._bar.update(self._task, description=figures)
            return
        left = timedelta(seconds=round((state.max_steps - state.global_step) * logs["step_seconds"]))
        place = f"step {state.global_step}/{state.max_steps}"
        self._console.print(f"{place}  {figures}  {left} left", highlight=False, soft_wrap=True)

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Leaves the bar as it stands."""
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
