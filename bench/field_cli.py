"""`sp-fast bench projectors`: the field of vision-language projectors on the same patch features."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sp_fast.bench.command import run
from sp_fast.bench.options import (
    DeviceOption,
    ForceOption,
    Format,
    FormatOption,
    JsonOption,
    ThreadsOption,
    format_name,
    show_records,
    thread_count,
    usable_device,
)


def projectors(
    projector: Annotated[
        list[str] | None,
        typer.Option(
            help="linear, llava-mlp, deco, c-abstractor, blip2-qformer, instructblip-qformer, qwen-resampler, ldpv2, "
            "llava-sp (its official form), crop-dfi, pool-dfi, compact-5m, compact-50m, depthwise, grouped, separable, "
            "nested, crop-dfi-int8, crop-dfi-fp8, crop-dfi-int4. Default: all. Repeatable."
        ),
    ] = None,
    direction: Annotated[
        list[str] | None,
        typer.Option(help="forward (default), backward, both (forward and backward). Repeatable."),
    ] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Images. Default: 1. Repeatable.")] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(help="float32 (default on a CPU), bfloat16 (default on a GPU), float16. Repeatable."),
    ] = None,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    turns: Annotated[int, typer.Option(min=1, help="Turns of each projector, at least one run each.")] = 5,
    seed: Annotated[int, typer.Option(min=0, help="Of random weights, features and upstream gradients.")] = 0,
    spatial_width: Annotated[
        int | None,
        typer.Option(min=1, help="Of LLaVA-SP's spatial features; below the published 512 it needs less memory."),
    ] = None,
    tiny: Annotated[bool, typer.Option("--tiny", help="A rehearsal: widths of a few channels.")] = False,
    out: Annotated[Path | None, typer.Option(help="Result file (.jsonl), a line as soon as it is there.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Folder for figures, PNG and SVG: latency and parameters against tokens.")
    ] = None,
    force: ForceOption = False,
    format_: FormatOption = Format.table,
    as_json: JsonOption = False,
) -> None:
    """Tokens, parameters, bytes, FLOP, time (ms) and peak memory (MiB) of projectors, side by side on the same
    features: [1, 576, 1024] of CLIP ViT-L/14-336, to a language model of width 4096.

    Each is alone in its process and judged against float64 in the same run; one that is wrong is withheld and named.
    Printed parameter counts are listed with their sources. Exit code 0: all rows have figures; 1: some were withheld,
    or it could not be run; 130: interrupted, finished rows are kept.
    """

    def command(console: Any) -> int:
        from sp_fast.bench.execute import execute
        from sp_fast.bench.field_projectors import field_cases
        from sp_fast.bench.field_subject import BUILT
        from sp_fast.bench.field_suite import FIELD
        from sp_fast.bench.record import Sink
        from sp_fast.bench.run import Plan

        where = usable_device(device)
        directions, batches = direction or ["forward"], batch or [1]
        dtypes = dtype or ["float32" if where == "cpu" else "bfloat16"]
        cases = field_cases(projector or (), directions, batches, dtypes, spatial_width, tiny)
        if plot is not None and not force:
            from sp_fast.bench.field_plots import planned
            from sp_fast.bench.plots import check_free

            check_free(planned(plot, directions, batches, dtypes))
        sink = Sink(out, force=force)
        seconds = 0.02 if tiny else 0.25
        plan = Plan(cases, (BUILT,), where, thread_count(threads), turns, seconds, seed=seed, suite=FIELD)
        outcome = execute(plan, sink, console, rehearsal=tiny)
        show_records(outcome.records, format_name(format_, as_json), plot, force, console)
        return outcome.code

    run("projectors", command)
