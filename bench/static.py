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

from sp_fast.bench.cases import DTYPES
from sp_fast.bench.sass import BULK_COPIES, COPIES, LOADS, PRODUCTS, SPILLS, Loop, blocks_per_multiprocessor, read_cubin
from sp_fast.bench.shipped import Configuration, Source
from sp_fast.errors import ResourceError
from sp_fast.kernels.launch import Launch
from sp_fast.kernels.tiles import LARGE

STREAM = "windowed_matmul_fwd"  # reads the weights, 1.8 GB: what limits small batches
STREAM_BYTES = 64 * 1024  # on their way to a multiprocessor: twice what 4.3 TB/s over 132 of them need at 1 us latency
TENSOR_CORES = {90: "HGMMA", 100: "UTCHMMA"}  # of 16-bit products; elsewhere HMMA
EXACT_PRODUCTS = ("FFMA", "FFMA2")  # of float32, which is not to be rounded to tf32
WIDE_COPIES = ("LDGSTS.128", *BULK_COPIES)
KEEPS_HINTS = (3, 9)  # triton's first version whose asynchronous copies keep an L2 hint, from sm_90 on


@dataclass(frozen=True)
class Figures:
    """What a compiled kernel needs and does."""

    registers: int  # a thread
    spills: int  # instructions
    shared_bytes: int  # a block
    threads: int  # a block
    blocks_per_multiprocessor: int
    bytes_in_flight: int | None  # to a multiprocessor, of weights and rows; None: not the weight stream
    loops: tuple[Loop, ...]
    copies: int  # asynchronous ones, in all loops
    wide_copies: int  # those of 128 bits a thread, or of the copy engine
    hint_kept: bool | None  # None: no L2 hint was asked for


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
    kinds = _kinds(source)
    hints = sum(constants[f"EVICT_{kind}"] == "evict_first" for kind in kinds)
    policies = set(re.findall(r"cp\.async\S*L2::cache_hint [^;]*(%\w+);", compiled.asm["ptx"]))  # one a kind
    return Figures(
        registers=code.registers,
        spills=code.spills,
        shared_bytes=needs.shared,
        threads=threads,
        blocks_per_multiprocessor=blocks,
        bytes_in_flight=min((blocks * _pipeline_bytes(source, kind) for kind in kinds), default=None),
        loops=code.loops,
        copies=sum(copied.values()),
        wide_copies=sum(copied[opcode] for opcode in WIDE_COPIES),
        hint_kept=len(policies) >= hints if hints else None,
    )


def _kinds(source: Source) -> list[str]:
    """Windows of one output, of many: each kind has its own loop in the weight stream. Other kernels have none."""
    return [kind for kind in ("SINGLE", "MANY") if source.kernel == STREAM and dict(source.constants)[kind]]


def _tile_bytes(source: Source, rows: int = 0) -> int:
    """Of a tile of the weight, and of as many rows beside it."""
    constants = dict(source.constants)
    return constants["BLOCK_K"] * (constants["BLOCK_D"] + rows) * DTYPES[source.dtype].itemsize


def _pipeline_bytes(source: Source, kind: str) -> int:
    """That a block has on their way: one stage's have arrived and are being multiplied."""
    constants = dict(source.constants)
    return (constants[f"STAGES_{kind}"] - 1) * _tile_bytes(source, constants[f"BLOCK_{kind}"])


def breaches(configuration: Configuration, figures: Figures) -> list[str]:
    """What is wrong, one sentence each: value, limit, way out."""
    chip, found = configuration.source.chip, []
    if figures.spills:
        within = sum(n for loop in figures.loops for opcode, n in loop.items() if opcode.startswith(SPILLS))
        found.append(
            f"{figures.spills} instructions spill, {within} of them in main loops, where none is allowed, at "
            f"{figures.registers} registers a thread: take more warps or smaller tiles"
        )
    if figures.shared_bytes > chip.shared_memory:
        found.append(
            f"{figures.shared_bytes} bytes of shared memory, where a block on sm_{chip.capability} has "
            f"{chip.shared_memory}: take fewer stages or smaller tiles"
        )
    return found + (_stream_breaches(configuration, figures) if configuration.source.kernel == STREAM else [])


def _stream_breaches(configuration: Configuration, figures: Figures) -> list[str]:
    source, loops, found = configuration.source, figures.loops, []
    capability, kinds, weight = source.chip.capability, len(_kinds(source)), _tile_bytes(source)
    exact = source.dtype == "float32"
    products = EXACT_PRODUCTS if exact else (TENSOR_CORES.get(capability, "HMMA"),)
    multiplying = sum(any(map(loop.get, products)) for loop in loops)
    if multiplying < kinds:
        way_out = "keep input_precision='ieee'" if exact else "take tiles, and a side for the weights, that it can have"
        found.append(f"{multiplying} of {kinds} main loops multiply with {' or '.join(products)}: {way_out}")
    copied = [16 * figures.threads * loop.get("LDGSTS.128", 0) for loop in loops]
    streaming = sum(n >= weight or any(map(loop.get, BULK_COPIES)) for n, loop in zip(copied, loops, strict=True))
    if streaming < kinds:
        found.append(
            f"{streaming} of {kinds} main loops copy a weight tile of {weight} bytes asynchronously and 128 bits at a "
            f"time; so copied are {copied} bytes: take 2 stages or more, and contiguous weights"
        )
    if waiting := sum(loop.get(opcode, 0) for loop in loops for opcode in LOADS):
        found.append(
            f"{waiting} loads in the main loops wait for memory, where none is allowed: copy asynchronously, and "
            "compute indices instead of looking them up"
        )
    if capability == 90 and configuration.buckets != (LARGE,) and figures.bytes_in_flight < STREAM_BYTES:
        found.append(
            f"{figures.bytes_in_flight} bytes on their way to a multiprocessor, where the weight stream needs "
            f"{STREAM_BYTES}: take more stages, larger tiles, or fewer registers for more blocks"
        )
    if figures.hint_kept is False and _keeps_hints(capability):
        found.append("the L2 hint evict_first is lost, which this triton can keep: load the weights without a mask")
    return found


def _keeps_hints(capability: int) -> bool:
    import triton

    return capability >= 90 and tuple(map(int, triton.__version__.split(".")[:2])) >= KEEPS_HINTS


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
