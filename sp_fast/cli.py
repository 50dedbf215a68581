"""The `sp-fast` program. Every command imports what it needs when it runs, so that --help answers at once."""

from __future__ import annotations

import enum
import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from sp_fast.bench.cli import app as bench
from sp_fast.compress_cli import compress
from sp_fast.convert_cli import convert
from sp_fast.generate_cli import generate
from sp_fast.training.cli import app as train
from sp_fast.version import __version__

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.add_typer(bench, name="bench")
app.add_typer(train, name="train")
app.command()(compress)
app.command()(convert)
app.command()(generate)


class Dtype(enum.StrEnum):
    """Of weights and features."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def _print_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """LLaVA-SP's projector, number for number, at the speed that the memory allows."""


@app.command()
def verify(
    image: Annotated[Path | None, typer.Option(help="A photograph. Default: matplotlib's sample portrait.")] = None,
    vision_tower: Annotated[
        Path | None,
        typer.Option(help="Folder with CLIP ViT-L/14-336. Default: the true architecture with seeded random weights."),
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Official LLaVA-SP checkpoint, file or folder. Default: seeded random weights.")
    ] = None,
    variant: Annotated[
        str | None,
        typer.Option(help="crop, crop-dfi (default), pool, pool-dfi, sliding, or an official name such as conv336."),
    ] = None,
    grid: Annotated[int | None, typer.Option(help="Patches along a side, where the checkpoint cannot tell.")] = None,
    spatial_width: Annotated[
        int | None, typer.Option(help="Width of the spatial features; below the published 512 it needs less memory.")
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="Type of weights and features.")] = Dtype.float32,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: every core.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images.")] = 1,
    runs: Annotated[int, typer.Option(min=1, help="Timed runs of each implementation; medians are reported.")] = 5,
    seed: Annotated[int, typer.Option(min=0, help="Of random weights and upstream gradients.")] = 0,
    backward: Annotated[
        bool, typer.Option("--backward", help="Also forward and backward together, with every weight's gradient.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object (times in ms, memory in MiB).")
    ] = False,
) -> None:
    """Compare the fast projector with the official form on a real photograph: errors, time (ms) and memory (MiB).

    Both are judged against float64. Exit code 0: they agree; 1: they do not, or it could not be run.
    """
    from rich.console import Console

    from sp_fast.errors import SPFastError

    errors = Console(stderr=True)
    try:
        with errors.status("imports") as status:
            from sp_fast.bench.report import print_report
            from sp_fast.bench.verify import Request, verify

            request = Request(
                image, vision_tower, checkpoint, variant, grid, spatial_width, dtype.value, device,
                threads or len(os.sched_getaffinity(0)), batch, runs, seed, backward,
            )  # fmt: skip
            report = verify(request, status.update)
    except SPFastError as error:
        errors.print(f"sp-fast verify: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error
    if as_json:
        print(json.dumps(report.to_dict()))
    else:
        print_report(report, Console())
    sys.exit(0 if report.agrees else 1)


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help='Print one JSON object: "ok" and the findings.')] = False,
) -> None:
    """Examine this environment: versions, compiler, driver, devices, what sp_fast chooses there, and how to mend it.

    Exit code 0: nothing that is needed here is missing; 1: something is.
    """
    from rich.console import Console

    from sp_fast.doctor.gather import gather
    from sp_fast.doctor.judge import judge
    from sp_fast.doctor.report import print_report

    with Console(stderr=True).status("looking around"):
        report = judge(gather())
    if as_json:
        print(json.dumps(report.to_dict()))
    else:
        print_report(report, Console())
    sys.exit(0 if report.ok else 1)


if __name__ == "__main__":
    app()
