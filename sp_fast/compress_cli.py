"""`sp-fast compress`. What it needs is imported when it runs."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer


def compress(
    source: Annotated[
        Path,
        typer.Argument(
            help="A trained full projector: an official checkpoint (file or folder), the folder of "
            "SPProjector.save_pretrained, or of a whole LLaVA-SP model (sp-fast convert makes one)."
        ),
    ],
    out: Annotated[
        Path, typer.Option(help="The folder to write, of a projector, or of a whole model where one came in.")
    ],
    to: Annotated[
        str | None,
        typer.Option(
            help="bottleneck, depthwise, grouped, separable, nested or resampled; may be left out with --quantize."
        ),
    ] = None,
    rank: Annotated[
        int | None, typer.Option(help="Channels between the two factors: bottleneck, separable, nested, resampled.")
    ] = None,
    groups: Annotated[int | None, typer.Option(help="Groups of channels: grouped.")] = None,
    base_kernel: Annotated[int | None, typer.Option(help="Side of the one kernel, in patches: resampled.")] = None,
    quantize: Annotated[str | None, typer.Option(help="Store weights as int8, fp8 or int4.")] = None,
    images: Annotated[
        Path | None,
        typer.Option(help="Folder of images to fit to, and to judge by: at least 4 to fit, at most 256 are used."),
    ] = None,
    vision_tower: Annotated[
        Path | None, typer.Option(help="Folder of the CLIP or SigLIP tower for --images; a whole model has its own.")
    ] = None,
    features: Annotated[
        Path | None,
        typer.Option(help="Instead of images: safetensors with patch features [images, patches, width], CLS removed."),
    ] = None,
    grid: Annotated[
        int | None, typer.Option(help="Patches along a side, where an official checkpoint cannot tell.")
    ] = None,
    distill: Annotated[
        int, typer.Option(min=0, help="Steps of AdamW against the full projector's spatial tokens, after the fit.")
    ] = 0,
    plot: Annotated[
        Path | None, typer.Option(help="SVG file: error against parameters, over other ranks or groups (takes longer).")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace OUT, and PLOT, once the compression has succeeded.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check, print the plan, write nothing; no weights are read.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object (bytes; errors are relative).")
    ] = False,
) -> None:
    """Make a trained projector smaller: a compact extractor, quantised weights, or both; with the error that it made.

    With images or features the extractor is fitted to what they show, by least squares, else to the weights alone.
    Patch MLP, attention and output layer are copied (--distill trains the output layer too). Errors are relative, on
    images that nothing was fitted to. Nothing is downloaded; it runs on the CPU, in float32.

    Exit code 0: done; 1: it could not be done; 130: interrupted. Nothing half-made is left.
    """
    from rich.console import Console

    from sp_fast.errors import SPFastError

    errors = Console(stderr=True)
    outcome = None
    try:
        with errors.status("reading names and shapes") as status:
            from sp_fast.compress.job import Compression
            from sp_fast.compress.report import print_outcome, print_plan
            from sp_fast.compress.request import Request

            request = Request(
                source=source,
                out=out,
                to=to,
                rank=rank,
                groups=groups,
                base_kernel=base_kernel,
                quantize=quantize,
                grid=grid,
                images=images,
                vision_tower=vision_tower,
                features=features,
                distill=distill,
                plot=plot,
            )
            compression = Compression(request, force)
            if not dry_run:
                outcome = compression.run(status.update)
                compression.write(outcome, force, status.update)
    except SPFastError as error:
        errors.print(f"sp-fast compress: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error
    except KeyboardInterrupt as error:
        raise typer.Exit(130) from error
    if as_json:
        print(json.dumps({**asdict(compression.plan), **(outcome.to_dict() if outcome else {})}))
        return
    print_plan(compression.plan, Console(), written=outcome is not None)
    if outcome is not None:
        print_outcome(outcome, Console())
