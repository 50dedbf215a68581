"""Launch configurations compiled ahead of time and judged by their machine code: without a GPU, where they are made.

What no test of results shows and every run pays for: a spill, a pipeline that fell apart, products that miss the
tensor cores, a row of the launch table that a chip has no room for.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import multiprocessing
import os
import re
import signal
import sys
import textwrap
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.table import Table

from sp_fast.bench.breaches import WIDE_COPIES, Figures, breaches, kinds, pipeline_bytes
from sp_fast.bench.sass import COPIES, LOADS, PRODUCTS, Loop, blocks_per_multiprocessor, read_cubin
from sp_fast.bench.shipped import Configuration, Source
from sp_fast.errors import ResourceError
from sp_fast.kernels.launch import Launch
from sp_fast.kernels.tiles import LARGE


@dataclass(frozen=True)
class Judgement:
    """``breaches`` are sentences; there are no figures of what does not compile."""

    configuration: Configuration
    figures: Figures | None
    breaches: tuple[str, ...]

    @property
    def label(self) -> str:
        """``windowed_matmul_fwd sm_90 bfloat16 crop-dfi, B=4 (bucket 4 8)``."""
        c = self.configuration
        words = (c.source.kernel, f"sm_{c.source.chip.capability}", c.source.dtype, "+".join(c.variants))
        return f"{' '.join(words)}, B={c.batch} (bucket {_buckets(c)})"

    def to_dict(self) -> dict[str, Any]:
        c, source = self.configuration, self.configuration.source
        return {
            "kernel": source.kernel, "chip": source.chip.capability, "dtype": source.dtype, "variants": c.variants,
            "buckets": c.buckets, "batch": c.batch, "shared_limit": source.chip.shared_memory,
            **(asdict(self.figures) if self.figures else {}), "breaches": self.breaches,
        }  # fmt: skip


def judge_all(found: Sequence[Configuration], console: Console) -> list[Judgement]:
    """In processes, one a core, with a progress bar on ``console``.

    Raises:
        ResourceError: a process died.
    """
    pool = ProcessPoolExecutor(len(os.sched_getaffinity(0)), multiprocessing.get_context("spawn"))
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited: Ctrl-C is for the parent
    futures = [pool.submit(judge, configuration) for configuration in found]
    signal.signal(signal.SIGINT, handler)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        with Bar(*columns, console=console, transient=True) as bar:
            for _ in bar.track(as_completed(futures), len(futures), description="compiling"):
                pass
        return [future.result() for future in futures]
    except BrokenProcessPool:
        raise ResourceError("a compiling process died, usually because memory ran out: close other programs") from None
    finally:
        pool.shutdown(cancel_futures=True)


def judge(configuration: Configuration) -> Judgement:
    """Compiles it. A failure is a breach."""
    try:
        figures = _compile(configuration.source)
    except Exception as error:  # noqa: BLE001, whatever the compiler meets is what this is for
        cause: BaseException = error
        while cause.__cause__:
            cause = cause.__cause__
        point = getattr(cause, "error_message", None) or cause  # triton's own errors quote a page of source first
        message = textwrap.shorten(f"{type(cause).__name__}: {point}", 500)
        return Judgement(configuration, None, (f"it does not compile: {message}",))
    return Judgement(configuration, figures, tuple(breaches(configuration, figures)))


def _compile(source: Source) -> Figures:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    chip, constants, threads = source.chip, dict(source.constants), 32 * source.warps
    kernel = getattr(importlib.import_module(source.module), source.function)
    attributes = {(position,): [["tt.divisibility", 16]] for position in source.aligned}
    program = ASTSource(kernel, dict(source.signature), constants, attributes)
    options = Launch(kernel, (), {}, source.warps, source.registers).options
    with contextlib.redirect_stdout(io.StringIO()):  # triton prints a program that ptxas refuses
        compiled = triton.compile(program, target=GPUTarget("cuda", chip.capability, 32), options=options)
    code, needs = read_cubin(compiled.asm["cubin"]), compiled.metadata
    blocks = blocks_per_multiprocessor(chip, code.registers, needs.shared, threads, needs.tmem_size)
    copied = {opcode: sum(loop.get(opcode, 0) for loop in code.loops) for opcode in COPIES}
    loops = kinds(source)
    hints = sum(constants[f"EVICT_{kind}"] == "evict_first" for kind in loops)
    policies = set(re.findall(r"cp\.async\S*L2::cache_hint [^;]*(%\w+);", compiled.asm["ptx"]))  # one a kind
    return Figures(
        registers=code.registers,
        spills=code.spills,
        shared_bytes=needs.shared,
        threads=threads,
        blocks_per_multiprocessor=blocks,
        bytes_in_flight=min((blocks * pipeline_bytes(source, kind) for kind in loops), default=None),
        loops=code.loops,
        opcodes=code.opcodes,
        copies=sum(copied.values()),
        wide_copies=sum(copied[opcode] for opcode in WIDE_COPIES),
        hint_kept=len(policies) >= hints if hints else None,
    )


def to_json(judgements: Sequence[Judgement], environment: dict[str, Any]) -> str:
    """One object: versions, and every configuration with its figures and breaches."""
    found = [judgement.to_dict() for judgement in judgements]
    return json.dumps({"environment": environment, "configurations": found}) + "\n"


_COLUMNS = (
    "kernel", "chip", "dtype", "variant", "bucket", "from B", "registers", "spills", "shared, KiB", "blocks",
    "in flight, KiB", "wide copies", "hint", "loops",
)  # fmt: skip


def print_table(judgements: Sequence[Judgement], environment: dict[str, Any]) -> None:
    """For people: a row a configuration, breaches last."""
    console = Console(width=None if sys.stdout.isatty() else 300)  # so that in a file no cell is folded
    table = Table(*_COLUMNS, box=box.SIMPLE)
    for judgement in judgements:
        table.add_row(*_row(judgement), style="red" if judgement.breaches else None)
    console.print(f"triton {environment['triton']}, commit {environment['commit']}", highlight=False)
    console.print(table)
    for judgement in judgements:
        for breach in judgement.breaches:
            console.print(f"{judgement.label}: {breach}", highlight=False, markup=False, soft_wrap=True)
    count = sum(len(judgement.breaches) for judgement in judgements)
    console.print(f"{len(judgements)} configurations, {count} breaches", highlight=False)


def _row(judgement: Judgement) -> list[str]:
    c, f = judgement.configuration, judgement.figures
    row = [
        c.source.kernel,
        str(c.source.chip.capability),
        c.source.dtype,
        "+".join(c.variants),
        _buckets(c),
        str(c.batch),
    ]
    if f is None:
        return row
    words = {True: "kept", False: "lost", None: "-"}
    return [
        *row, str(f.registers), str(f.spills), f"{f.shared_bytes / 1024:.0f}", str(f.blocks_per_multiprocessor),
        "-" if f.bytes_in_flight is None else f"{f.bytes_in_flight / 1024:.0f}",
        f"{f.wide_copies} of {f.copies}", words[f.hint_kept], "; ".join(map(_mix, f.loops)),
    ]  # fmt: skip


def _mix(loop: Loop) -> str:
    """Products, loads and copies, of all instructions."""
    work = ", ".join(f"{loop[opcode]} {opcode}" for opcode in (*PRODUCTS, *LOADS, *COPIES) if opcode in loop)
    return f"{work} of {sum(loop.values())}"


def _buckets(configuration: Configuration) -> str:
    return " ".join("large" if bucket == LARGE else str(bucket) for bucket in configuration.buckets)
