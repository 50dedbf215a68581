"""`sp-fast bench train`: training steps, of the projector alone and of a whole model with LoRA."""

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


def train(
    stage: Annotated[
        str, typer.Option(help="projector: its step on given features (default); step: a whole model's, with LoRA.")
    ] = "projector",
    variant: Annotated[
        str | None, typer.Option(help="crop, crop-dfi (default), pool, pool-dfi, or an official name.")
    ] = None,
    implementation: Annotated[
        list[str] | None,
        typer.Option(
            help="projector: fast, factored, reference, channels_last, linear, matmul, ... (default: all but "
            "compiled); step: sp_fast, sp_reference. Repeatable."
        ),
    ] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Images, a prompt each. Default: 1. Repeatable.")] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(help="float32 (default, and of the step on a CPU), bfloat16 (of the step on a GPU). Repeatable."),
    ] = None,
    llm: Annotated[
        str | None, typer.Option(help="Of the step: tiny, 0.5b (default on a CPU), 1b, 7b (default on a GPU), 13b.")
    ] = None,
    tower: Annotated[str | None, typer.Option(help="Of the step: clip-l-336 (default), siglip-l-384, tiny.")] = None,
    attn: Annotated[
        str, typer.Option(help="Of the step's language model: auto (default), sdpa, eager, flash_attention_2, ...")
    ] = "auto",
    recompute: Annotated[
        bool, typer.Option("--recompute", help="Gradient checkpointing of the step: every layer's forward again.")
    ] = False,
    prompt_tokens: Annotated[
        int | None, typer.Option(min=2, help="Of the step, text beside the image, half of it supervised. Default: 58.")
    ] = None,
    spatial_width: Annotated[
        int | None,
        typer.Option(min=1, help="Of the projector's step; below the published 512 it needs less memory."),
    ] = None,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    turns: Annotated[int, typer.Option(min=1, help="Turns of each implementation, at least one step each.")] = 3,
    seed: Annotated[int, typer.Option(min=0, help="Of random weights, features, upstream gradients, prompts.")] = 0,
    tiny: Annotated[bool, typer.Option("--tiny", help="A rehearsal: widths of a few channels, a tiny model.")] = False,
    out: Annotated[Path | None, typer.Option(help="Result file (.jsonl), a line as soon as it is there.")] = None,
    force: ForceOption = False,
    format_: FormatOption = Format.table,
    as_json: JsonOption = False,
) -> None:
    """Time (ms) and memory (MiB) of a training step, by its parts: forward, backward, optimizer.

    Every implementation trains in a process of its own with torch's fused AdamW; where two do not fit into memory, each
    is built anew for its turn. Gradients are judged against float64 in the same run, updates against AdamW on the same
    gradients; what is wrong is withheld and named. Exit code 0: all rows have figures; 1: some were withheld, or it
    could not be run; 130: interrupted, finished rows are kept.
    """

    def command(console: Any) -> int:
        from sp_fast.bench import train_cases as steps
        from sp_fast.bench.execute import execute
        from sp_fast.bench.model_cases import attentions_on
        from sp_fast.bench.model_shapes import chosen_shape
        from sp_fast.bench.plan import TINY, check_names
        from sp_fast.bench.record import Sink
        from sp_fast.bench.run import Plan
        from sp_fast.bench.train_suite import MODEL_STEP, PROJECTOR_STEP

        where = usable_device(device)

        def projector() -> tuple:
            _refuse("projector", llm=llm, tower=tower, recompute=recompute, prompt_tokens=prompt_tokens)
            overrides = {**(TINY if tiny else {}), **({"spatial_width": spatial_width} if spatial_width else {})}
            cases = steps.projector_steps([variant or "crop-dfi"], batch or [1], dtype or ["float32"], overrides)
            return cases, steps.projector_implementations(where, implementation or ()), PROJECTOR_STEP

        def step() -> tuple:
            _refuse("step", spatial_width=spatial_width)
            shape = chosen_shape(llm, tower, variant, where, tiny)
            dtypes = dtype or ["float32" if where == "cpu" else "bfloat16"]
            [(attention, reason)] = attentions_on(where, dtypes[0], [attn]).items()
            length = prompt_tokens or (8 if tiny else 58)
            cases = steps.model_steps(shape, batch or [1], dtypes, attention, steps.MODES[recompute], length)
            names = steps.model_step_implementations(implementation or ())
            console.print(f"{attention} attention: {reason}", highlight=False, soft_wrap=True)
            return cases, names, MODEL_STEP

        check_names("stage", [stage], steps.STAGES)
        cases, names, suite = {"projector": projector, "step": step}[stage]()
        sink = Sink(out, force=force)
        seconds = 0.02 if tiny else 5.0 if where == "cpu" else 0.25
        plan = Plan(cases, names, where, thread_count(threads), turns, seconds, seed=seed, suite=suite)
        outcome = execute(plan, sink, console, rehearsal=tiny)
        show_records(outcome.records, format_name(format_, as_json), None, False, console)
        return outcome.code

    run("train", command)


def _refuse(stage: str, **options: Any) -> None:
    """Raises ConfigError for options of the other stage, which would do nothing."""
    from sp_fast.errors import ConfigError

    if given := [name for name, value in options.items() if value]:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ConfigError(f"--stage {stage} has no {names}: leave it out, or choose the other stage")
