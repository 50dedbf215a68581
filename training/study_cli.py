"""`sp-fast train study`, `study-show` and `study-paths`. What they need is imported when they run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from sp_fast.training.command import JsonOption, execute, say

if TYPE_CHECKING:
    from rich.console import Console

TaskOption = Annotated[Path, typer.Option(help="Folder that sp-fast train make-task has made.")]
PartsOption = Annotated[
    Path, typer.Option(help="Folder of language-model and towers, as sp-fast train make-parts makes it.")
]
TowerOption = Annotated[
    Literal["vision-tower", "blind-tower"],
    typer.Option(help="Of the parts: patches of the blind one do not say where they lie."),
]
OutOption = Annotated[Path, typer.Option(help="The study's folder. What was interrupted goes on in it.")]
RecipeOption = Annotated[
    str, typer.Option(help="NAME of the shipped recipes NAME-pretrain and NAME-finetune, or of such YAML files.")
]

WorkersOption = Annotated[
    int, typer.Option(min=0, help="Runs at a time, which divide the cores; 0: one, in this process.")
]


def study(
    task: TaskOption,
    parts: PartsOption,
    out: OutOption,
    recipe: RecipeOption = "tiny",
    arm: Annotated[list[str] | None, typer.Option(help="An arm; may be repeated. Default: all.")] = None,
    headline: Annotated[bool, typer.Option("--headline", help="mlp, crop-dfi and pool-dfi.")] = False,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each arm.")] = 3,
    images: Annotated[int | None, typer.Option(min=1, help="The first so many held-out images. Default: all.")] = None,
    tower: TowerOption = "vision-tower",
    workers: WorkersOption = 2,
    as_json: JsonOption = False,
) -> None:
    """Train every arm from every seed in both stages, ask each the held-out questions, and compare.

    OUT has results.jsonl, a line a finished run, study.svg and parameters.svg, and models/ARM of seed 0, for sp-fast
    generate. Exit code 0: all runs are there; 1: some failed, which are named, or nothing could be run; 130:
    interrupted, and the same command goes on.
    """

    def command(console: Console) -> int:
        with console.status("imports"):
            from sp_fast.training.study.arms import chosen
            from sp_fast.training.study.conduct import conduct
            from sp_fast.training.study.study import Study

        failures = conduct(
            Study(task, parts, out, recipe, images, tower), chosen(arm or [], headline), seeds, workers, console
        )
        if failures and not _has_results(out):
            return 1
        _show(console, out, "json" if as_json else "table")
        for job, reason in failures.items():
            console.print(f"{job} failed: {reason}", style="red", markup=False, highlight=False, soft_wrap=True)
        return int(bool(failures))

    execute("study", command)


def study_paths(
    task: TaskOption,
    parts: PartsOption,
    out: OutOption,
    recipe: RecipeOption = "tiny",
    arm: Annotated[list[str] | None, typer.Option(help="An arm; may be repeated. Default: crop-dfi, pool-dfi.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Of the data's order and the first weights.")] = 3,
    steps: Annotated[int, typer.Option(min=1, help="Of stage 2.")] = 200,
    workers: WorkersOption = 2,
    as_json: JsonOption = False,
) -> None:
    """Train stage 2 with the fast projector, with the reference, and with the reference's sums in three other orders.

    In float32, without dropout, from random projectors (no stage 1). The rule: losses and trained parameters of the
    fast projector are at most twice as far from the reference's as those of the reorderings are. OUT has paths.jsonl
    and paths.svg. Exit code 0: it holds for every arm and seed; 1: it does not, or could not be tried; 130:
    interrupted, and the same command goes on.
    """

    def command(console: Console) -> int:
        with console.status("imports"):
            from sp_fast.training.study.arms import chosen
            from sp_fast.training.study.paths import PATHS, compare_paths
            from sp_fast.training.study.paths_report import FIGURE, draw, print_paths
            from sp_fast.training.study.results import read_lines
            from sp_fast.training.study.study import Study

        arms = chosen(arm or ["crop-dfi", "pool-dfi"], headline=False)
        failures = compare_paths(Study(task, parts, out, recipe), arms, seeds, steps, workers, console)
        if lines := read_lines(out / PATHS):
            print(json.dumps(lines)) if as_json else print_paths(lines)
            draw(lines, out / FIGURE)
            say(console, f"written: {out / FIGURE}")
        return int(bool(failures) or not all(line["holds"] for line in lines))

    execute("study-paths", command)


def study_show(
    out: Annotated[Path, typer.Argument(help="Folder of a study, finished or not.")],
    format: Annotated[Literal["table", "md", "json"], typer.Option(help="How they are printed.")] = "table",
) -> None:
    """Print a study's results, and draw study.svg and parameters.svg again.

    Exit code 0: done; 1: there are none yet.
    """

    def command(console: Console) -> int:
        _show(console, out, format)
        return 0

    execute("study-show", command)


def _has_results(out: Path) -> bool:
    from sp_fast.training.study.conduct import RESULTS
    from sp_fast.training.study.results import read_lines

    return bool(read_lines(out / RESULTS))


def _show(console: Console, out: Path, format: str) -> None:
    from sp_fast.training.study.conduct import RESULTS
    from sp_fast.training.study.figure import FIGURE, TRADE_OFF, draw, draw_trade_off
    from sp_fast.training.study.results import read_lines
    from sp_fast.training.study.show import markdown, print_study
    from sp_fast.training.study.summary import summarise

    summary = summarise(read_lines(out / RESULTS))
    printers = {
        "table": lambda: print_study(summary),
        "md": lambda: print(markdown(summary)),
        "json": lambda: print(json.dumps(summary.to_dict())),
    }
    printers[format]()
    draw(summary, out / FIGURE)
    draw_trade_off(summary, out / TRADE_OFF)
    say(console, f"written: {out / FIGURE}, {out / TRADE_OFF}")
