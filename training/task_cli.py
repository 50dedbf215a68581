"""`sp-fast train make-task` and `score`: the spatial task. What they need is imported when they run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sp_fast.generate_cli import AttnOption, DeviceOption, DtypeOption, choices, load
from sp_fast.training.command import JsonOption, execute, say

if TYPE_CHECKING:
    from rich.console import Console


def make_task(
    out: Annotated[Path, typer.Option(help="The task's folder; it appears whole or not at all.")],
    seed: Annotated[int, typer.Option(help="Of everything in it.")] = 0,
    train: Annotated[int, typer.Option(help="Images with six questions each.")] = 8000,
    held_out: Annotated[int, typer.Option(help="Images with seven questions each, to be scored.")] = 1000,
    captions: Annotated[int, typer.Option(help="Images with a caption, for the first stage.")] = 8000,
    size: Annotated[int, typer.Option(help="Pixels of an image's side.")] = 96,
    workers: Annotated[int, typer.Option(help="Processes that draw; 0: this one.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Make a small visual-spatial data set: coloured shapes, six types of question, chance known for each.

    The same seed gives the same files. Exit code 0: done; 1: it could not be done; 130: interrupted. Nothing half-made
    is left.
    """

    def command(console: Console) -> int:
        from rich.progress import Progress

        from sp_fast.training.task.make import Task, make_task, print_task

        task = Task(seed, train, held_out, captions, size)
        with Progress(console=console, transient=True) as bar:
            images = bar.add_task("images", total=None)
            described = make_task(task, out, workers, lambda i, n: bar.update(images, completed=i, total=n))
        if as_json:
            print(json.dumps(described))
        else:
            print_task(described)
            say(console, f"written: {out}")
        return 0

    execute("make-task", command)


def make_parts(
    out: Annotated[Path, typer.Option(help="The parts' folder; it appears whole or not at all.")],
    scale: Annotated[str, typer.Option(help="tiny (two cores) or small (a GPU).")] = "tiny",
    size: Annotated[int, typer.Option(help="Pixels of an image's side, as of the task.")] = 96,
    seed: Annotated[int, typer.Option(help="Of everything in them.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Teach small vision towers and a small language model, which a LLaVA-SP model for the spatial task begins with.

    They are taught on scenes of their own, none of the task's, and without any projector; on a GPU where there is one.
    Exit code 0: done; 1: it could not be done; 130: interrupted. Nothing half-made is left.
    """

    def command(console: Console) -> int:
        from rich.progress import Progress, TextColumn

        from sp_fast.training.task.parts import PARTS, make_parts

        columns = (*Progress.get_default_columns(), TextColumn("loss {task.fields[loss]:.3f}"))
        with Progress(*columns, console=console, transient=True) as progress:
            bars = {part: progress.add_task(part, total=None, loss=float("nan")) for part in PARTS}
            described = make_parts(
                out, scale, size, seed,
                lambda part, i, n, loss: progress.update(bars[part], completed=i, total=n, loss=loss),
            )  # fmt: skip
        if as_json:
            print(json.dumps(described))
        else:
            for part, shares in described["accuracy"].items():
                print(f"{part}: {', '.join(f'{what} {share:.1%}' for what, share in shares.items())} right")
            say(console, f"written: {out}")
        return 0

    execute("make-parts", command)


def score(
    model: Annotated[Path, typer.Option(help="Folder of a whole LLaVA-SP model (sp-fast train merge makes one).")],
    task: Annotated[Path, typer.Option(help="Folder that sp-fast train make-task has made.")],
    images: Annotated[int | None, typer.Option(min=1, help="The first so many held-out images. Default: all.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions that run together.")] = 64,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    attn: AttnOption = "auto",
    out: Annotated[
        Path | None,
        typer.Option(help="File of JSON lines, a question each: id, type, expected, said, right."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite OUT.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Ask a model the held-out questions of the spatial task, greedily: its accuracy by type, and that of guessing.

    Questions of a type about the same image count as one, right where all of them are. Exit code 0: done; 1: it could
    not be done; 130: interrupted, and nothing is written.
    """

    def command(console: Console) -> int:
        from rich.progress import Progress

        with console.status("loading"):
            from sp_fast.training.task.answers import answer, read_questions, summarise
            from sp_fast.training.task.report import check_free, print_scores, scores_to_dict, write_answers

            if out is not None:
                check_free(out, force)
            rows = read_questions(task, images)
            loaded = load(model, device, dtype, attn)
        say(console, choices(loaded))
        with Progress(console=console, transient=True) as bar:
            asked = bar.add_task("questions", total=len(rows))
            said = answer(
                loaded.model, loaded.processor, rows, task, batch_size, lambda i, _: bar.update(asked, completed=i)
            )
        if out is not None:
            write_answers(out, rows, said)
        found = summarise(rows, said)
        if as_json:
            print(json.dumps({"model": str(model), "task": str(task), "types": scores_to_dict(found)}))
        else:
            print_scores(found)
        if out is not None:
            say(console, f"written: {out}")
        return 0

    execute("score", command)
