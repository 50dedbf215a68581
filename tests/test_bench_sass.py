"""Machine code as it is read, and how many blocks of it a multiprocessor holds."""

import pytest

from sp_fast.bench.sass import blocks_per_multiprocessor, read_sass
from sp_fast.kernels.device import CHIPS

SASS = """
        /*0000*/                   LDG.E.128 R4, desc[UR4][R2.64] ;      /* 0x00 */
        /*0010*/              @!P0 BRA 0x90 ;                            /* 0x00 */
        /*0020*/                   LDGSTS.E.BYPASS.128 [R19], [R10.64] ; /* 0x00 */
        /*0030*/              @!PT LDS RZ, [RZ] ;                        /* 0x00 */
        /*0040*/                   HGMMA.64x32x16.F32.BF16 R40, gdesc[UR8].tnspA, R40 ;
        /*0050*/               @P1 BRA 0xa0 ;                            /* 0x00 */
        /*0060*/                   LDS.64 R2, [R5] ;                     /* 0x00 */
        /*0070*/               @P3 BRA 0x20 ;                            /* 0x00 */
        /*0080*/                   STL [R1+0x8], R4 ;                    /* 0x00 */
        /*0090*/                   EXIT ;                                /* 0x00 */
        /*00a0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR5], R3 ;
        /*00b0*/              @!P0 BRA 0xa0 ;                            /* 0x00 */
        /*00c0*/                   BRA 0x60 ;                            /* 0x00 */
        /*00d0*/                   BRA 0xd0;                             /* 0x00 */
"""


def test_machine_code_is_read():
    """One loop: not the wait behind the exit, which branches back into it, nor what never runs."""
    code = read_sass(SASS, 72)
    assert code.loops == ({"BRA": 2, "LDGSTS.128": 1, "HGMMA": 1, "LDS.64": 1},)
    assert (code.registers, code.spills) == (72, 1)


@pytest.mark.parametrize(
    ("chip", "registers", "shared", "threads", "columns", "blocks"),
    [
        (90, 255, 96 * 1024, 128, 0, 2),  # 8 warps of 8192 registers; two of 97 KiB in 228
        (90, 168, 0, 128, 0, 3),
        (90, 64, 0, 256, 0, 4),
        (90, 81, 0, 128, 0, 5),  # registers come in eights
        (90, 16, 227 * 1024, 128, 0, 1),
        (90, 16, 228 * 1024, 128, 0, 0),
        (90, 16, 0, 32, 0, 32),
        (86, 16, 0, 32, 0, 16),
        (86, 16, 0, 256, 0, 6),
        (80, 16, 54 * 1024, 128, 0, 2),
        (100, 32, 16 * 1024, 128, 256, 2),
        (120, 32, 32 * 1024, 128, 0, 3),
    ],
)
def test_blocks_of_a_multiprocessor(chip, registers, shared, threads, columns, blocks):
    assert blocks_per_multiprocessor(CHIPS[chip], registers, shared, threads, columns) == blocks
