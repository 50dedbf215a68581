"""`sp-fast bench gpu`: the whole measurement of a machine with a GPU, one command in calls of minutes."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from sp_fast.bench.command import run
from sp_fast.bench.options import (
    DeviceOption,
    Format,
    FormatOption,
    JsonOption,
    ThreadsOption,
    format_name,
    show_records,
    thread_count,
    usable_device,
)


def gpu(
    out: Annotated[
        Path, typer.Option(help="Folder of result files, one a part. A second call goes on where the first stopped.")
    ],
    part: Annotated[
        list[str] | None,
        typer.Option(
            help="baselines, tests (what make test-gpu runs), projector (by stage), train (the projector's step), "
            "model, train_model, tune, compiled (the model), variants; accuracy (every variant, only when named). "
            "Repeatable."
        ),
    ] = None,
    minutes: Annotated[float, typer.Option(min=0.0, help="Of this call; no case begins that would not end in it.")] = 8,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what is left and what is missing, and end.")] = False,
    device: DeviceOption = "cuda",
    threads: ThreadsOption = None,
    tiny: Annotated[bool, typer.Option("--tiny", help="A rehearsal: widths of a few channels.")] = False,
    format_: FormatOption = Format.table,
    as_json: JsonOption = False,
) -> None:
    """Everything worth measuring on a machine with a GPU, the most important first: about 25 minutes on an H200.

    Needs only a checkout: python -m sp_fast.bench gpu --out DIR. Each call says what is left and how long that takes,
    by estimate; run it again to go on. Exit code 0: complete; 1: something is left, was withheld, failed, or lacks a
    module; 130: interrupted, what was finished is kept.
    """

    def command(console: Any) -> int:
        import torch

        from sp_fast.bench.environment import COMMIT_VARIABLE, environment
        from sp_fast.bench.gpu import CAMPAIGN, PARTS, Setting
        from sp_fast.bench.gpu_jobs import Call, job_of, missing_modules
        from sp_fast.bench.plan import check_names
        from sp_fast.errors import SPFastError

        check_names("part", part or (), tuple(PARTS))
        setting = Setting(usable_device(device), thread_count(threads), out, tiny)
        found = environment(torch.device(setting.device))
        call = Call(setting, found, console, time.monotonic() + 60 * minutes)
        chosen = tuple(dict.fromkeys(part or CAMPAIGN))
        missing = {name: lacking for name in chosen if (lacking := missing_modules(name))}
        for name, lacking in missing.items():
            words = " ".join({"PIL": "pillow"}.get(module, module) for module in lacking)
            console.print(
                f"{name} is left out: python has no {', '.join(lacking)}: pip install {words}",
                style="red",
                soft_wrap=True,
            )
        if found["commit"] is None:
            console.print(
                f"no git: results name no commit; set {COMMIT_VARIABLE}=REVISION before you measure", style="yellow"
            )
        jobs = [job_of(name, PARTS[name](setting)) for name in chosen if name not in missing]
        _say_what_is_left(jobs, call)
        if dry_run:
            return 0
        out.mkdir(parents=True, exist_ok=True)
        failed = bool(missing)
        for job in jobs:
            if not job.left(call) or not call.has(job.least(call)):
                continue
            try:
                outcome = job.run(call)
            except SPFastError as error:  # of one part, as where it does not fit into memory
                console.print(f"{job.name}: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
                failed = True
                continue
            if outcome.records:
                show_records(outcome.records, format_name(format_, as_json), None, False, console)
            failed |= outcome.failed
            if outcome.interrupted:
                return 130
        return int(_say_what_is_left(jobs, call) > 0 or failed)

    run("gpu", command)


def _say_what_is_left(jobs: list, call: Any) -> int:
    """On stderr, part by part, with estimates; gives the number of cases. What failed is left once nothing else is."""
    call.again = not any(job.left(call) for job in jobs)
    left = {job: len(job.left(call)) for job in jobs}
    for job, cases in left.items():
        if cases:
            again = " (once more: they failed)" if call.again else ""
            minutes = job.part.estimate.of(cases) / 60  # of an H200
            call.console.print(f"{job.name}: {cases} left, about {minutes:.1f} min{again}", highlight=False)
    total = sum(job.part.estimate.of(cases) for job, cases in left.items()) / 60
    words = f"left: about {total:.0f} min of an H200, run it again to go on" if total else "complete for these sources"
    call.console.print(words, highlight=False, style="yellow" if total else None)
    return sum(left.values())
