"""`sp-fast convert`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from sp_fast.llava_sp.conversion import Conversion, Plan


def convert(
    source: Annotated[
        Path,
        typer.Argument(
            help="An official checkpoint, file or folder: a whole model, a projector (model.bin), or a LoRA folder. "
            "With --to official: a LLaVA-SP model of transformers."
        ),
    ],
    out: Annotated[Path, typer.Option(help="The folder to write; it appears whole or not at all.")],
    to: Annotated[Literal["ours", "official"], typer.Option(help="The form to write.")] = "ours",
    base: Annotated[
        Path | None, typer.Option(help="Folder of the language model, for a projector or a LoRA folder.")
    ] = None,
    vision_tower: Annotated[
        str | None,
        typer.Option(
            help="Folder of the CLIP or SigLIP vision tower, where the checkpoint has none, or not its shape. "
            "With --to official: what mm_vision_tower shall be."
        ),
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Folder of the tokenizer, where the language model's holds none.")
    ] = None,
    chat_template: Annotated[
        str | None,
        typer.Option(help="vicuna_v1 (default, unless another base than Llama has its own), plain, or a file."),
    ] = None,
    pyramid: Annotated[
        Literal["crop", "pool"] | None, typer.Option(help="Of a transformer variant, whose keys cannot tell.")
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(help="Type of all weights. Default: their own, where they share one."),
    ] = None,
    layout: Annotated[
        Literal["full", "projector"], typer.Option(help="With --to official: the whole model, or its model.bin.")
    ] = "full",
    shard_size: Annotated[str, typer.Option(help="Largest file, unless one tensor is larger.")] = "4GB",
    force: Annotated[bool, typer.Option("--force", help="Replace OUT, once the conversion has succeeded.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything but the data, print the plan, write nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as one JSON object (bytes).")] = False,
) -> None:
    """Convert official LLaVA-SP checkpoints to a folder that transformers loads, and back, bit for bit.

    Every tensor's name and shape is checked. Rows of the vocabulary are never added or removed: <image> becomes a
    special token of the tokenizer and needs no row, as the model never looks it up. Nothing is downloaded.

    Exit code 0: done; 1: it could not be done; 130: interrupted. Nothing half-made is left.
    """
    from rich.console import Console

    from sp_fast.errors import SPFastError

    errors = Console(stderr=True)
    try:
        with errors.status("reading names and shapes"):
            from sp_fast.llava_sp.convert import FromOfficial, plan_from_official
            from sp_fast.llava_sp.export import ToOfficial, plan_to_official
            from sp_fast.llava_sp.shards import parse_size

            size = parse_size(shard_size)
            if to == "ours":
                tower = Path(vision_tower) if vision_tower else None
                conversion = plan_from_official(
                    FromOfficial(source, out, base, tower, tokenizer, chat_template, pyramid, dtype, size)
                )
            else:
                conversion = plan_to_official(ToOfficial(source, out, layout, vision_tower, tokenizer, dtype, size))
            conversion.check_target(force)
        if not dry_run:
            _write(conversion, force, errors)
    except SPFastError as error:
        errors.print(f"sp-fast convert: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error
    except KeyboardInterrupt as error:
        raise typer.Exit(130) from error
    if as_json:
        print(json.dumps(conversion.plan.to_dict()))
    else:
        _print_plan(conversion.plan, Console(), written=not dry_run)


def _write(conversion: Conversion, force: bool, console: Console) -> None:
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=conversion.size)
        conversion.write(force, lambda size: progress.advance(task, size))


def _print_plan(plan: Plan, console: Console, written: bool) -> None:
    from rich import box
    from rich.table import Table

    def line(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    line(f"{plan.kind} checkpoint, {plan.variant}, {plan.dtype}")
    for role, path in plan.sources.items():
        line(f"{role}: {path}")
    table = Table("part", "tensors", "parameters", "MB", box=box.SIMPLE)
    for part in plan.parts:
        table.add_row(part.name, f"{part.tensors:,}", f"{part.parameters:,}", f"{part.bytes / 1e6:,.1f}")
    console.print(table)
    line(f"{'written' if written else 'would write'}: {plan.out}")
    for file, size in plan.files.items():
        line(f"  {file}" + ("" if size is None else f"  {size / 1e6:,.1f} MB"))
    for note in plan.notes:
        line(f"note: {note}")
    line(f"peak memory, estimated: {plan.peak_memory_estimate_bytes / 1e9:,.1f} GB")
