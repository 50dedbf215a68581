"""What a kernel's machine code shows: registers, spills, what its loops do, and how often it fits a multiprocessor.

Read with triton's own cuobjdump, so that no CUDA toolkit is needed.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass

from sp_fast.kernels.device import Chip

PRODUCTS = ("HGMMA", "UTCHMMA", "HMMA", "FFMA", "FFMA2")
BULK_COPIES = ("UTMALDG", "UBLKCP")  # of the tensor memory accelerator
LOADS = ("LDG", "LDG.64", "LDG.128")
COPIES = ("LDGSTS", "LDGSTS.64", "LDGSTS.128", *BULK_COPIES)
SPILLS = ("STL", "LDL")  # cuobjdump's own LOCAL stays 0 with spills

# A multiprocessor's limits of threads and blocks, by compute capability.
THREADS_AND_BLOCKS = {
    80: (2048, 32), 86: (1536, 16), 89: (1536, 24), 90: (2048, 32), 100: (2048, 32), 120: (1536, 24),
}  # fmt: skip
QUARTER_REGISTERS = 16384  # a multiprocessor has four quarters
RESERVED_BYTES = 1024  # of shared memory, by every block; a multiprocessor has that much more than a block may have
TENSOR_COLUMNS = 512  # of sm_100's tensor memory

_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?\w+)\s+)?([A-Z][\w.]*)([^;]*);")
_MEMORY = re.compile(r"LDG|STG|LDS|STS|LDL|STL")
Loop = dict[str, int]


@dataclass(frozen=True)
class MachineCode:
    """Of one kernel. Opcodes are cut to their first word; those of memory keep a width beyond 32 bits: LDG.128.

    ``loops``: instructions of every loop that multiplies or loads, by opcode; ``opcodes``: of the whole kernel.
    """

    registers: int  # a thread
    spills: int  # instructions that write or read spilled registers
    loops: tuple[Loop, ...]
    opcodes: Loop


def read_cubin(cubin: bytes) -> MachineCode:
    """Raises RuntimeError where cuobjdump cannot read it."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-sass", "-res-usage", file.name]
        result = subprocess.run(command, capture_output=True, text=True)
    registers = re.search(r"REG:(\d+)", result.stdout)
    if result.returncode or registers is None:
        raise RuntimeError(f"cuobjdump cannot read the machine code: {result.stderr.strip()}")
    return read_sass(result.stdout, int(registers[1]))


def read_sass(text: str, registers: int) -> MachineCode:
    """Machine code as cuobjdump prints it. Instructions that never run (``@!PT``) are left out."""
    code = [
        (int(address, 16), _short(opcode), operands)
        for address, predicate, opcode, operands in _INSTRUCTION.findall(text)
        if predicate != "!PT"
    ]
    spills = sum(opcode.partition(".")[0] in SPILLS for _, opcode, _ in code)
    return MachineCode(registers, spills, _loops(code), dict(Counter(opcode for _, opcode, _ in code)))


def _short(opcode: str) -> str:
    first, *rest = opcode.split(".")
    width = next((word for word in rest if word in ("64", "128")), None)
    return f"{first}.{width}" if width and _MEMORY.match(first) else first


def _loops(code: list[tuple[int, str, str]]) -> tuple[Loop, ...]:
    """What lies between a branch and its target before it.

    Waits that lie behind the kernel's end branch back too, into the loop that they belong to; the exit in between tells
    them apart.
    """
    ends: dict[int, int] = {}
    for address, opcode, operands in code:
        target = re.findall(r"0x([0-9a-f]+)", operands) if opcode == "BRA" else []
        if target and int(target[-1], 16) <= address:
            ends[int(target[-1], 16)] = address
    bodies = [Counter(opcode for at, opcode, _ in code if start <= at <= end) for start, end in ends.items()]
    work = {*PRODUCTS, *LOADS, *COPIES}
    return tuple(dict(body.most_common()) for body in bodies if work & set(body) and not body["EXIT"])


def blocks_per_multiprocessor(chip: Chip, registers: int, shared_bytes: int, threads: int, columns: int = 0) -> int:
    """Blocks that fit at once: ``registers`` a thread, ``shared_bytes``, ``threads`` and tensor ``columns`` a block."""
    most_threads, most_blocks = THREADS_AND_BLOCKS[chip.capability]
    warps = 4 * (QUARTER_REGISTERS // (-(-registers // 8) * 256))  # a warp takes its registers in pieces of 256
    return min(
        most_blocks,
        most_threads // threads,
        warps // (threads // 32),
        (chip.shared_memory + RESERVED_BYTES) // (shared_bytes + RESERVED_BYTES),
        TENSOR_COLUMNS // max(columns, 1),
    )
