"""`sp-fast train`. What its commands need is imported when they run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sp_fast.training.command import JsonOption, execute, say
from sp_fast.training.recipe import DEFAULTS, HELP
from sp_fast.training.settings import published
from sp_fast.training.study_cli import study, study_paths, study_show
from sp_fast.training.task_cli import make_parts, make_task, score

if TYPE_CHECKING:
    from rich.console import Console

    from sp_fast.training.recipe import Recipe

app = typer.Typer(no_args_is_help=True, help="Train LLaVA-SP: both stages of the paper, on one GPU or many.")


def _settings(stage: str | None = None) -> str:
    """Every setting, with the value that a stage's published recipe gives it, or that it has in all."""
    values = DEFAULTS if stage is None else DEFAULTS | published(stage)
    what = "what holds where the recipe is silent" if stage is None else "what the published recipe says"
    head = f"Settings, each --NAME VALUE or a line of the recipe; in parentheses {what}:"
    lines = [
        f"--{name.replace('_', '-')}: {said}" + (f" ({str(values[name]).lower()})" if name in values else "")
        for name, said in HELP.items()
    ]
    return "\n\n".join([head, *lines])


_ANY = {"allow_extra_args": True, "ignore_unknown_options": True}
ConfigOption = Annotated[
    str | None, typer.Option(help="Recipe, a YAML file or a shipped one's name. Default: the stage's published one.")
]
StageArgument = Annotated[str, typer.Argument(help="pretrain or finetune.")]


@app.command(context_settings=_ANY, epilog=_settings("pretrain"))
def pretrain(context: typer.Context, config: ConfigOption = None) -> None:
    """Stage 1: the projector alone. What was interrupted goes on where it was.

    Names of the official scripts are understood too. On several GPUs: accelerate launch -m sp_fast.cli train pretrain
    ... Exit code 0: finished; 1: it could not run, or stopped with a reason; 130: interrupted.
    """
    _train("pretrain", config, context.args)


@app.command(context_settings=_ANY, epilog=_settings("finetune"))
def finetune(context: typer.Context, config: ConfigOption = None) -> None:
    """Stage 2: LoRA on the language model (or all of it), and the projector. What was interrupted goes on.

    Exit code 0: finished; 1: it could not run, or stopped with a reason; 130: interrupted.
    """
    _train("finetune", config, context.args)


@app.command(context_settings=_ANY, epilog=_settings())
def estimate(
    context: typer.Context,
    stage: StageArgument,
    config: ConfigOption = None,
    processes: Annotated[int, typer.Option(min=1, help="Processes that would train together.")] = 1,
    memory: Annotated[float | None, typer.Option(help="GiB of one device. Default: what is free here.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Memory that a run would need, part by part (GiB), before anything is loaded.

    Exit code 0: it would fit, if need be divided among the processes; 1: it would not, or the recipe cannot be used.
    """

    def command(console: Console) -> int:
        from sp_fast.training.estimate import estimate, free_memory, print_estimate

        recipe = _recipe(stage, config, context.args, output="unused", data="unused")
        with console.status("reading names and shapes"):
            from sp_fast.training.parts import read_parts

            found = estimate(stage, recipe, read_parts(recipe), processes)
        free = free_memory() if memory is None else int(memory * 2**30)
        warning, fitting = found.check(free), found.fitting(free)
        if as_json:
            print(json.dumps({**found.to_dict(), "free_bytes": free, "fits": fitting, "warning": warning}))
        else:
            print_estimate(found, free)
        return int(not fitting)

    execute("estimate", command)


@app.command("check-data", context_settings=_ANY, epilog=_settings())
def check_data(
    context: typer.Context,
    stage: StageArgument,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Read every sample as training would, images too, and list every bad one by its id.

    Exit code 0: all can be used; 1: some cannot, or nothing could be read; 130: interrupted.
    """

    def command(console: Console) -> int:
        from rich.progress import Progress

        from sp_fast.training.check_data import check_data
        from sp_fast.training.parts import read_examples, read_parts

        recipe = replace(_recipe(stage, config, context.args, output="unused"), bad_samples="skip")
        with Progress(console=console, transient=True) as bar:
            rows, samples = bar.add_task("rows", total=None), bar.add_task("samples", total=None)
            examples = read_examples(recipe, read_parts(recipe), lambda i, n: bar.update(rows, completed=i, total=n))
            report = check_data(
                examples, recipe.workers, progress=lambda i, n: bar.update(samples, completed=i, total=n)
            )
        if as_json:
            print(json.dumps(report.to_dict()))
        else:
            for one in report.bad:
                print(one)
            figures = {name: count for name, count in report.to_dict().items() if name != "bad"}
            print("  ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in figures.items()))
        return int(bool(report.bad))

    execute("check-data", command)


@app.command()
def merge(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    out: Annotated[Path, typer.Option(help="The model's folder; it appears whole or not at all.")],
    dtype: Annotated[str | None, typer.Option(help="Of all weights. Default: as they were in training.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT, once the merge has succeeded.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Make a whole model of a run: what it began with, its projector, its adapters merged.

    Exit code 0: done; 1: it could not be done; 130: interrupted. Nothing half-made is left.
    """

    def command(console: Console) -> int:
        from rich.progress import BarColumn, DownloadColumn, Progress

        with console.status("reading names and shapes"):
            from sp_fast.training.merge import plan_merge

            conversion = plan_merge(run, out, dtype)
        with Progress(BarColumn(), DownloadColumn(), console=console, transient=True) as bar:
            task = bar.add_task("", total=conversion.size)
            conversion.write(force, lambda size: bar.advance(task, size))
        if as_json:
            print(json.dumps(conversion.plan.to_dict()))
        else:
            say(console, f"written: {out}")
        return 0

    execute("merge", command)


@app.command()
def plot(run: Annotated[Path, typer.Argument(help="Folder of a run, finished or not.")]) -> None:
    """Draw a run's loss, learning rates and gradient norms (loss.svg in its folder).

    Exit code 0: drawn; 1: there is nothing to draw.
    """

    def command(console: Console) -> int:
        from sp_fast.training.log_file import plot

        say(console, f"written: {plot(run)}")
        return 0

    execute("plot", command)


app.command("make-task")(make_task)
app.command("make-parts")(make_parts)
app.command()(score)
app.command()(study)
app.command("study-show")(study_show)
app.command("study-paths")(study_paths)


def _train(stage: str, config: str | None, words: list[str]) -> None:
    def command(console: Console) -> int:
        recipe = _recipe(stage, config, words)
        with console.status("imports"):
            from transformers.utils import logging

            from sp_fast.training.progress import ProgressReport
            from sp_fast.training.run import train

        logging.disable_progress_bar()  # of loading, which would stand between two bars
        with ProgressReport(console) as report, _told(console):
            for path in train(stage, recipe, partial(say, console), [report]):
                say(console, f"written: {path}")
        return 0

    execute(stage, command)


def _recipe(stage: str, config: str | None, words: list[str], **unused: Any) -> Recipe:
    from sp_fast.training.settings import read_options, read_recipe

    return read_recipe(
        stage, config, read_options(words), {k: (Path(v),) if k == "data" else Path(v) for k, v in unused.items()}
    )


@contextmanager
def _told(console: Console) -> Iterator[None]:
    """Where a run goes on from, and what it skips or sets aside: what it would otherwise only log."""
    import logging

    class Teller(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            say(console, record.getMessage())

    logger, teller = logging.getLogger("sp_fast"), Teller()
    before = logger.level
    logger.addHandler(teller)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(teller)
        logger.setLevel(before)
