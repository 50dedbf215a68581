"""`sp-fast bench static` and `tune`: the Triton kernels' launch configurations, judged and chosen."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from sp_fast.bench.command import run


def static(
    chip: Annotated[
        list[str] | None, typer.Option(help="80, 86, 89, 90, 100 or 120, as in sm_90. Default: all. Repeatable.")
    ] = None,
    dtype: Annotated[
        list[str] | None, typer.Option(help="float32, bfloat16, float16. Default: all. Repeatable.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object (sizes in bytes).")] = False,
) -> None:
    """Compile every launch configuration of the Triton kernels for its chip, without a GPU, and judge the machine code.

    Spills and shared memory (KiB) are judged; of the weight stream also copies, products and bytes in flight (KiB).
    All take minutes. Exit code 0: no breach; 1: breaches, listed last; 2: nothing could be judged; 130: interrupted.
    """

    def command(console: Any) -> int:
        import torch

        from sp_fast.bench.environment import environment
        from sp_fast.bench.shipped import configurations
        from sp_fast.bench.static import judge_all, print_table, to_json

        judgements = judge_all(configurations(chip or (), dtype or ()), console)
        found = environment(torch.device("cpu"))
        if as_json:
            sys.stdout.write(to_json(judgements, found))
        else:
            print_table(judgements, found)
        return int(any(judgement.breaches for judgement in judgements))

    run("static", command, failed=2)


def tune(
    batch: Annotated[
        list[int] | None, typer.Option(help="Batch buckets: 1, 2, 4, ... 64, or 256 for all beyond. Default: all.")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="bfloat16, float16 or float32: tiles depend on its size alone.")
    ] = "bfloat16",
    device: Annotated[str, typer.Option(help="cuda or cuda:N.")] = "cuda",
    table: Annotated[Path | None, typer.Option(help="Launch table to rewrite. Default: the package's own.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what was found; leave the table as it is.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object with every trial (ms).")] = False,
) -> None:
    """Time the windowed matmul's tiles on this GPU (ms) and rewrite kernels/launch_table.json, bucket by bucket.

    Minutes a bucket. Exit code 0: done; 1: it cannot run here; 130: interrupted, finished buckets are written.
    """

    def command(console: Any) -> int:
        import torch

        from sp_fast.bench.cases import DTYPES
        from sp_fast.bench.environment import check_device, environment
        from sp_fast.bench.tune import tune_bucket
        from sp_fast.errors import ConfigError, ResourceError
        from sp_fast.kernels.tiles import BUCKETS, TABLE

        if dtype not in DTYPES:
            raise ConfigError(f"dtype={dtype!r} is unknown; it must be one of {', '.join(DTYPES)}")
        check_device(device)
        if not device.startswith("cuda"):
            raise ResourceError(
                f"device={device!r} has no launch table: tiles are chosen for an NVIDIA GPU (--device cuda)"
            )
        for size in batch or ():
            if size not in (*BUCKETS, 256):
                raise ConfigError(f"batch={size} is no bucket's bound; it must be one of {(*BUCKETS, 256)}")
        found = []
        for size in batch or (*BUCKETS, 256):
            with console.status(f"B={size}"):
                tuned = tune_bucket(torch.device(device), dtype, size, None if dry_run else table or TABLE)
            console.print(tuned.line, highlight=False)
            found.append(asdict(tuned))
        if as_json:
            environment_ = environment(torch.device(device))
            sys.stdout.write(json.dumps({"environment": environment_, "buckets": found}) + "\n")
        return 0

    run("tune", command)
