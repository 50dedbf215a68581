"""The body of a training command: errors of the package become one line and an exit code."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

if TYPE_CHECKING:
    from rich.console import Console

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def execute(name: str, command: Callable[[Console], int]) -> NoReturn:
    """Runs a command's body on a console of stderr, and exits with the code that it returns."""
    from rich.console import Console

    from sp_fast.errors import SPFastError

    console = Console(stderr=True)
    try:
        code = command(console)
    except SPFastError as error:
        console.print(f"sp-fast train {name}: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        code = 1
    except KeyboardInterrupt:
        code = 130
    raise typer.Exit(code)


def say(console: Console, text: str) -> None:
    """A line beside the result."""
    console.print(text, style="dim", markup=False, highlight=False, soft_wrap=True)
