"""The body of a benchmark command: errors of the package become one line and an exit code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import typer


def run(name: str, command: Callable[[Any], int], failed: int = 1) -> NoReturn:
    """Runs a command's body; the package's own errors become one line and an exit code."""
    from rich.console import Console

    from sp_fast.errors import SPFastError

    console = Console(stderr=True)
    try:
        code = command(console)
    except SPFastError as error:
        console.print(f"sp-fast bench {name}: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        code = failed
    except KeyboardInterrupt:
        code = 130
    raise typer.Exit(code)
