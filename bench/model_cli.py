"""`sp-fast bench model`: a whole LLaVA-SP, from pixels to an answer."""

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


def model(
    llm: Annotated[
        str | None,
        typer.Option(
            help="Shape of the language model: tiny, 0.5b (default on a CPU), 1b, 7b (default on a GPU), 13b."
        ),
    ] = None,
    tower: Annotated[
        str | None, typer.Option(help="Shape of the vision tower: clip-l-336 (default), siglip-l-384, tiny.")
    ] = None,
    variant: Annotated[
        str | None, typer.Option(help="crop, crop-dfi (default), pool, pool-dfi, or an official name.")
    ] = None,
    folder: Annotated[
        Path | None, typer.Option("--model", help="A LlavaSp folder, instead of a shape with seeded random weights.")
    ] = None,
    stage: Annotated[
        list[str] | None,
        typer.Option(help="tower, projector, prefill, ttft, decode, end_to_end. Default: all. Repeatable."),
    ] = None,
    implementation: Annotated[
        list[str] | None, typer.Option(help="sp_fast, sp_reference, llava. Default: all. Repeatable.")
    ] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Prompts of one image each. Default: 1. Repeatable.")] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(help="float32 (default on a CPU), bfloat16 (default on a GPU), float16. Repeatable."),
    ] = None,
    attn: Annotated[
        list[str] | None,
        typer.Option(help="The language model's: auto (default), sdpa, eager, flash_attention_2, ... Repeatable."),
    ] = None,
    mode: Annotated[
        list[str] | None, typer.Option(help="eager (default) or compiled (ttft, decode, end_to_end only). Repeatable.")
    ] = None,
    prompt_tokens: Annotated[int | None, typer.Option(min=1, help="Of text beside the image. Default: 64.")] = None,
    new_tokens: Annotated[int | None, typer.Option(min=2, help="Of an answer. Default: 32.")] = None,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    turns: Annotated[int, typer.Option(min=1, help="Turns of each implementation, at least one run each.")] = 3,
    seed: Annotated[int, typer.Option(min=0, help="Of random weights, images and prompts.")] = 0,
    tiny: Annotated[bool, typer.Option("--tiny", help="A rehearsal: a tiny model and short answers.")] = False,
    out: Annotated[Path | None, typer.Option(help="Result file (.jsonl), a line as soon as it is there.")] = None,
    force: ForceOption = False,
    format_: FormatOption = Format.table,
    as_json: JsonOption = False,
) -> None:
    """Time (ms), tokens/s and memory (MiB) of a whole model: TTFT, TPOT, E2E and the parts before the first token.

    LLaVA-SP as this package runs it, LLaVA-SP with the official form of its projector, and LLaVA-1.5, which is another
    model: each in a process of its own, taking turns. Image tokens and logits are judged against float64 in the same
    run; what is wrong is withheld and named. The roof comes from peaks measured in the same run. Exit code 0: all rows
    have figures; 1: some were withheld, or it could not be run; 130: interrupted, finished rows are kept.
    """

    def command(console: Any) -> int:
        from sp_fast.bench.execute import execute
        from sp_fast.bench.model_cases import STAGES, Lengths, attentions_on, model_cases, model_implementations
        from sp_fast.bench.model_shapes import chosen_shape, folder_shape
        from sp_fast.bench.model_suite import MODEL
        from sp_fast.bench.record import Sink
        from sp_fast.bench.run import Plan
        from sp_fast.errors import ConfigError

        where = usable_device(device)
        if folder is not None and (llm or tower or variant):
            raise ConfigError(f"--model {folder} has its own parts: leave --llm, --tower and --variant out")
        shape = folder_shape(folder) if folder else chosen_shape(llm, tower, variant, where, tiny)
        dtypes = dtype or ["float32" if where == "cpu" else "bfloat16"]
        lengths = Lengths(prompt_tokens or (8 if tiny else 64), new_tokens or (4 if tiny else 32))
        chosen = model_implementations(implementation or ())
        attentions = {dtype: attentions_on(where, dtype, attn or ["auto"]) for dtype in dtypes}
        cases = model_cases([shape], stage or STAGES, batch or [1], dtypes, attentions, mode or ["eager"], lengths)
        for name, reason in {key: text for found in attentions.values() for key, text in found.items()}.items():
            console.print(f"{name} attention: {reason}", highlight=False, soft_wrap=True)
        sink = Sink(out, force=force)
        seconds = 0.02 if tiny else 0.25
        plan = Plan(cases, chosen, where, thread_count(threads), turns, seconds, seed=seed, suite=MODEL)
        outcome = execute(plan, sink, console, rehearsal=tiny)
        show_records(outcome.records, format_name(format_, as_json), None, False, console)
        return outcome.code

    run("model", command)
