"""What machine code must not do: rules for a compiled launch configuration, each with its limit and a way out."""

from __future__ import annotations

from dataclasses import dataclass

from sp_fast.bench.cases import DTYPES
from sp_fast.bench.sass import BULK_COPIES, LOADS, SPILLS, Loop
from sp_fast.bench.shipped import Configuration, Source
from sp_fast.kernels.tiles import LARGE

STREAM = "windowed_matmul_fwd"  # reads the weights, 1.8 GB: what limits small batches
WRITE_STREAM = "windowed_matmul_dweight"  # writes their gradient
COLUMNS = "windowed_matmul_columns"  # reads them once more, for the rows' gradient
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
    opcodes: Loop  # of the whole kernel
    copies: int  # asynchronous ones, in all loops
    wide_copies: int  # those of 128 bits a thread, or of the copy engine
    hint_kept: bool | None  # None: no L2 hint was asked for


def kinds(source: Source) -> list[str]:
    """Windows of one output, of many: each kind has its own loop in the weight stream. Other kernels have none."""
    return [kind for kind in ("SINGLE", "MANY") if source.kernel == STREAM and dict(source.constants)[kind]]


def _tile_bytes(source: Source, rows: int = 0) -> int:
    """Of a tile of the weight, and of as many rows beside it."""
    constants = dict(source.constants)
    return constants["BLOCK_K"] * (constants["BLOCK_D"] + rows) * DTYPES[source.dtype].itemsize


def pipeline_bytes(source: Source, kind: str) -> int:
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
    rules = {STREAM: _stream_breaches, WRITE_STREAM: _write_breaches, COLUMNS: _column_breaches}
    rule = rules.get(configuration.source.kernel)
    return found + (rule(configuration, figures) if rule else [])


def _products(source: Source) -> tuple[str, ...]:
    return EXACT_PRODUCTS if source.dtype == "float32" else (TENSOR_CORES.get(source.chip.capability, "HMMA"),)


def _way_out(source: Source) -> str:
    if source.dtype == "float32":
        return "keep input_precision='ieee'"
    return "take tiles, and a side for the weights, that it can have"


def _multiplies(configuration: Configuration, figures: Figures) -> list[str]:
    """Anywhere: short loops of a known length are unrolled."""
    products = _products(configuration.source)
    if any(map(figures.opcodes.get, products)):
        return []
    return [f"nothing multiplies with {' or '.join(products)}: {_way_out(configuration.source)}"]


def _write_breaches(configuration: Configuration, figures: Figures) -> list[str]:
    """Of the weight gradient: it leaves in pieces of 128 bits a thread. Both kinds of windows may share the stores."""
    found = _multiplies(configuration, figures)
    wide, narrow = (
        figures.opcodes.get("STG.128", 0),
        sum(figures.opcodes.get(opcode, 0) for opcode in ("STG", "STG.64")),
    )
    if narrow or not wide:
        found.append(
            f"{wide} stores are 128 bits wide and {narrow} narrower, where none may be: take tiles that divide the "
            "widths, and contiguous buffers"
        )
    return found


def _column_breaches(configuration: Configuration, figures: Figures) -> list[str]:
    """Of the row gradient's products: weights come asynchronously, 128 bits at a time."""
    found = _multiplies(configuration, figures)
    if not figures.opcodes.get("LDGSTS.128", 0) and not any(map(figures.opcodes.get, BULK_COPIES)):
        found.append("no weight is copied asynchronously and 128 bits at a time: take contiguous weights")
    return found


def _stream_breaches(configuration: Configuration, figures: Figures) -> list[str]:
    source, loops, found = configuration.source, figures.loops, []
    capability, count, weight = source.chip.capability, len(kinds(source)), _tile_bytes(source)
    products = _products(source)
    straight = {op: n - sum(loop.get(op, 0) for loop in loops) for op, n in figures.opcodes.items()}
    if unrolled := max(0, count - len(loops)):  # a short loop of a known length: judged as one, with what is around it
        loops = (*loops, *[straight] * unrolled)
    multiplying = sum(any(map(loop.get, products)) for loop in loops)
    if multiplying < count:
        found.append(f"{multiplying} of {count} main loops multiply with {' or '.join(products)}: {_way_out(source)}")
    copied = [16 * figures.threads * loop.get("LDGSTS.128", 0) for loop in loops]
    streaming = sum(n >= weight or any(map(loop.get, BULK_COPIES)) for n, loop in zip(copied, loops, strict=True))
    if streaming < count:
        found.append(
            f"{streaming} of {count} main loops copy a weight tile of {weight} bytes asynchronously and 128 bits at a "
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
