"""`sp-fast bench`: the benchmark commands. Each imports what it needs when it runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from sp_fast.bench.command import run
from sp_fast.bench.field_cli import projectors
from sp_fast.bench.gpu_cli import gpu
from sp_fast.bench.kernel_cli import static, tune
from sp_fast.bench.model_cli import model
from sp_fast.bench.options import (
    DeviceOption,
    ForceOption,
    Format,
    FormatOption,
    JsonOption,
    PlotOption,
    ThreadsOption,
    format_name,
    show_records,
    thread_count,
    usable_device,
)
from sp_fast.bench.train_cli import train

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


app.command()(static)
app.command()(tune)
app.command()(model)
app.command()(train)
app.command()(gpu)
app.command()(projectors)


@app.callback()
def main() -> None:
    """How fast, how much memory, how far from the machine's limit, and against what."""


@app.command()
def projector(
    variant: Annotated[
        list[str] | None,
        typer.Option(help="crop, crop-dfi (default), pool, pool-dfi, or an official name. Repeatable."),
    ] = None,
    stage: Annotated[
        list[str] | None,
        typer.Option(help="whole (default), spatial, detail, convolutions (both), tail or mlp. Repeatable."),
    ] = None,
    direction: Annotated[
        list[str] | None,
        typer.Option(help="forward, backward, both (forward and backward). Default: forward and both. Repeatable."),
    ] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Images. Default: 1 and 8. Repeatable.")] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(help="float32 (default on a CPU), bfloat16 (default on a GPU), float16. Repeatable."),
    ] = None,
    implementation: Annotated[
        list[str] | None,
        typer.Option(help="fast, reference, channels_last, linear, matmul, compiled, ... Default: all. Repeatable."),
    ] = None,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    turns: Annotated[int, typer.Option(min=1, help="Turns of each implementation, at least one run each.")] = 5,
    seed: Annotated[int, typer.Option(min=0, help="Of random weights, features and upstream gradients.")] = 0,
    spatial_width: Annotated[
        int | None,
        typer.Option(min=1, help="Width of the spatial features; below the published 512 it needs less memory."),
    ] = None,
    tiny: Annotated[bool, typer.Option("--tiny", help="A rehearsal: widths of a few channels.")] = False,
    out: Annotated[Path | None, typer.Option(help="Result file (.jsonl), a line as soon as it is there.")] = None,
    plot: PlotOption = None,
    force: ForceOption = False,
    format_: FormatOption = Format.table,
    as_json: JsonOption = False,
) -> None:
    """Time (ms) and memory (MiB) of the projector beside plain PyTorch's best forms, each in a process of its own.

    Every row is judged against float64 in the same run; one that is wrong is withheld and named. The speed-up is
    against the strongest baseline; the roof comes from peaks measured in the same run. Exit code 0: all rows have
    figures; 1: some were withheld, or it could not be run; 130: interrupted, finished rows are kept.
    """

    def command(console: Any) -> int:
        from sp_fast.bench.execute import execute
        from sp_fast.bench.plan import TINY, implementations, projector_cases
        from sp_fast.bench.record import Sink
        from sp_fast.bench.run import Plan

        where = usable_device(device)
        overrides = {**(TINY if tiny else {}), **({"spatial_width": spatial_width} if spatial_width else {})}
        cases = projector_cases(
            variant or ["crop-dfi"], stage or ["whole"], direction or ["forward", "both"], batch or [1, 8],
            dtype or ["float32" if where == "cpu" else "bfloat16"], overrides,
        )  # fmt: skip
        chosen = implementations(where, implementation or ())
        if plot is not None and not force:
            from sp_fast.bench.plots import check_free, planned

            check_free(planned(plot, {case.variant for case in cases}, {case.dtype for case in cases}))
        sink = Sink(out, force=force)
        seconds = 0.02 if tiny else 0.25
        plan = Plan(cases, chosen, where, thread_count(threads), turns, turn_seconds=seconds, seed=seed)
        outcome = execute(plan, sink, console, rehearsal=tiny)
        show_records(outcome.records, format_name(format_, as_json), plot, force, console)
        return outcome.code

    run("projector", command)


@app.command()
def show(
    results: Annotated[Path, typer.Argument(help="Result file, or a folder of them.")],
    plot: PlotOption = None,
    force: ForceOption = False,
    format_: FormatOption = Format.table,
    as_json: JsonOption = False,
) -> None:
    """Print and draw results that were measured before."""

    def command(console: Any) -> int:
        from sp_fast.bench.record import read_records

        show_records(read_records(results), format_name(format_, as_json), plot, force, console)
        return 0

    run("show", command)


@app.command(context_settings={"ignore_unknown_options": True})
def compare(
    a: Annotated[str, typer.Argument(help="Before: result file, folder of them, checkout, or git revision.")],
    b: Annotated[str, typer.Argument(help="After: likewise. Checkouts and revisions are measured, in turns.")],
    options: Annotated[
        list[str] | None, typer.Argument(help="What to measure, as for bench projector, after `--`: -- --batch 8.")
    ] = None,
    threshold: Annotated[float, typer.Option(min=0.0, help="Slower by more than this share counts.")] = 0.05,
    format_: FormatOption = Format.table,
    as_json: JsonOption = False,
) -> None:
    """Compare two results or two commits. Exit code 0: nothing got worse; 1: something is slower or larger, or has lost
    its figure; 2: they cannot be compared.

    A time counts as slower beyond the threshold only where the p20 to p80 ranges do not overlap.
    """

    def command(console: Any) -> int:
        from sp_fast.bench.compare import BAD, changes, load, machines_differ, missing
        from sp_fast.bench.formats import CHANGE_FORMATS

        with console.status("reading") as status:
            before, after = load(a, b, options or (), status.update)
        if warning := machines_differ(before, after):
            console.print(warning, style="yellow", highlight=False)
        if alone := missing(before, after):
            console.print(f"only in one of the two, not compared: {', '.join(alone)}", style="yellow", highlight=False)
        found = changes(before, after, threshold)
        sys.stdout.write(CHANGE_FORMATS[format_name(format_, as_json)](found))
        return int(any(change.verdict in BAD for change in found))

    run("compare", command, failed=2)
