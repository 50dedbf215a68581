"""`sp-fast generate`: ask a model about images. What it needs is imported when it runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from sp_fast.llava_sp.answering import Request, Settings
    from sp_fast.llava_sp.loading import Loaded


LENGTH_STEP = 128  # prompts are compiled for lengths of whole steps
AttnOption = Annotated[
    str,
    typer.Option(
        help="Attention of the language model: auto, flash_attention_4, flash_attention_3, flash_attention_2, "
        "sdpa or eager."
    ),
]
DtypeOption = Annotated[str, typer.Option(help="auto (the files' own), float32, bfloat16 or float16.")]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda, cuda:N, or auto: a GPU where there is one.")]


def generate(
    model: Annotated[Path, typer.Option(help="Folder of a LLaVA-SP model (sp-fast convert makes one).")],
    image: Annotated[
        list[Path] | None, typer.Option(help="Image file. Repeatable; in the order of <image> in the prompt.")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="The question. Images stand where it has <image>, or before it.")
    ] = None,
    batch: Annotated[
        Path | None,
        typer.Option(help='Instead: a file of JSON lines, {"prompt": ..., "image" or "images": ..., "id": ...}.'),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts of the file that run together.")] = 8,
    attn: AttnOption = "auto",
    compile_: Annotated[
        bool, typer.Option("--compile", help="Compile first, which takes minutes and pays for many prompts.")
    ] = False,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate, at most.")] = 512,
    temperature: Annotated[float, typer.Option(min=0.0, help="Of sampling; 0 takes the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Of sampling.")] = 0,
    raw: Annotated[bool, typer.Option("--raw", help="Take prompts as they are, without the chat template.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object a line: answer, tokens, seconds (times in s).")
    ] = False,
) -> None:
    """Answer a question about images, or a file of them. Text streams to a terminal as it comes.

    Exit code 0: answered; 1: it could not be; 130: interrupted, finished answers are printed.
    """
    from rich.console import Console

    from sp_fast.errors import SPFastError

    console = Console(stderr=True)
    try:
        with console.status("loading"):
            from sp_fast.llava_sp.answering import Settings

            requests = _requests(prompt, image or [], batch)
            settings = Settings(max_new_tokens, temperature, batch_size, seed, chat=not raw)
            loaded = load(model, device, dtype, attn, compile_)
        console.print(choices(loaded), style="dim", highlight=False, soft_wrap=True)
        compilation = _compile(loaded, requests, settings, console) if compile_ else None
        _print_answers(loaded, requests, settings, as_json)
        if compilation is not None and compilation.recompilations:
            console.print(f"compiled again during the run: {dict(compilation.recompilations)}", style="yellow")
    except (SPFastError, ValueError) as error:
        console.print(f"sp-fast generate: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def _requests(prompt: str | None, images: list[Path], batch: Path | None) -> list[Request]:
    from sp_fast.errors import ConfigError
    from sp_fast.llava_sp.answering import Request, read_requests

    if (prompt is None) == (batch is None) or (batch is not None and images):
        raise ConfigError("give --prompt, with an --image or several, or a --batch file alone")
    return [Request(prompt, tuple(images))] if batch is None else read_requests(batch)


def load(model: Path, device: str, dtype: str, attention: str, compiled: bool = False) -> Loaded:
    """As ``loading.load_model``, without its progress bar; device "auto" is a GPU where there is one."""
    import torch
    from transformers.utils import logging

    from sp_fast.llava_sp.loading import load_model

    logging.disable_progress_bar()
    where = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    return load_model(model, device=where, dtype=dtype, attention=attention, compiled=compiled)


def choices(loaded: Loaded) -> str:
    """What was chosen for a model, and why, in a line."""
    chosen, kind = loaded.attention, str(loaded.model.dtype).removeprefix("torch.")
    return f"{loaded.model.device}, {kind} ({loaded.dtype_reason}), attention {chosen.name} ({chosen.reason})"


def _compile(loaded: Loaded, requests: list[Request], settings: Settings, console: Console) -> Any:
    """Compiled for these prompts: their lengths, and how many prompts and images run together."""
    from sp_fast import compile_model
    from sp_fast.llava_sp.answering import batches, prompt_tokens

    longest, context = settings.max_new_tokens, loaded.model.config.context
    lengths = {prompt_tokens(loaded, request, settings.chat) for request in requests}
    buckets = {(length // LENGTH_STEP + 1) * LENGTH_STEP for length in lengths}
    if max(buckets) + longest > context:
        console.print(f"not compiled: prompts and {longest} new tokens reach beyond the context of {context}")
        return None
    compilation = compile_model(loaded.model, buckets=tuple(buckets), max_new_tokens=longest)
    together = {(len(batch), sum(len(r.images) for r in batch)) for batch in batches(requests, settings.batch_size)}
    with console.status("compiling") as status:
        for prompts, images in sorted(together):
            compilation.warm_up(prompts, images, status.update)
    return compilation


def _print_answers(loaded: Loaded, requests: list[Request], settings: Settings, as_json: bool) -> None:
    from transformers import TextStreamer

    from sp_fast.llava_sp.answering import answer

    streams = len(requests) == 1 and not as_json and sys.stdout.isatty()
    streamer = TextStreamer(loaded.processor.tokenizer, skip_prompt=True, skip_special_tokens=True) if streams else None
    for found in answer(loaded, requests, settings, streamer):
        if as_json:
            print(json.dumps(found.to_dict()), flush=True)
        elif not streams:
            print(found.text if found.id is None else f"{found.id}: {found.text}", flush=True)
