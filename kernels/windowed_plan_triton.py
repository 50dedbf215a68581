"""What the windowed matmul's Triton kernels know of their windows, all compile-time constants: no work list lies in
memory, so nothing is built before a graph is captured and no load delays the first weights."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl

from sp_fast.kernels.window import Window

# Fields of a planned window.
OUTPUTS, OUT_WIDTH, STEP, ORIGIN, WIDTH, ROW_STRIDE, CELL, CELLS, WEIGHT, SPLITS, SLOT, FIRST = map(
    tl.constexpr, range(12)
)
Plan = tuple[tuple[int, ...], ...]
FEW_WINDOWS = 10  # whose numbers, and a tile's, a program has registers for


def plan_windows(windows: Sequence[Window], cells: tuple[int, int]) -> tuple[Plan, Plan]:
    """Windows of one output and windows of many, as the kernels take them.

    ``cells`` is the length of a split for either kind. SLOT counts the partial rows of an image before the window's
    own, FIRST its first output.
    """
    plans: tuple[list, list] = ([], [])
    slot = first = 0
    for w in windows:
        many = w.outputs > 1
        splits = -(-w.cells // cells[many])
        geometry = (w.outputs, w.out_width, w.step, w.origin, w.width, w.row_stride)
        plans[many].append((*geometry, w.cell, w.cells, w.weight, splits, slot, first))
        slot += splits * w.outputs
        first += w.outputs
    return tuple(plans[0]), tuple(plans[1])


def partial_rows(plan: Plan) -> int:
    """Rows of an image's partial results: one a split and output."""
    return sum(w[SPLITS.value] * w[OUTPUTS.value] for w in plan)


def count_units(plan: Plan, batch: int, block_m: int, tiles: int) -> int:
    """Programs for one kind: (window, split, one of ``tiles``, tile of ``block_m`` rows)."""
    return tiles * sum(w[SPLITS.value] * triton.cdiv(batch * w[OUTPUTS.value], block_m) for w in plan)


@triton.jit
def find_window(unit, batch, WINDOWS: tl.constexpr, TILES: tl.constexpr, BLOCK_M: tl.constexpr):  # noqa: ANN201
    """The window of a unit, the last whose first unit is not beyond it: its fields, and in place of SPLITS the unit's
    number in it."""
    # The first window's constants stay constants where it is the only one, and divisions by them multiplications.
    outputs, out_width, step = WINDOWS[0][OUTPUTS], WINDOWS[0][OUT_WIDTH], WINDOWS[0][STEP]
    origin, width, row_stride = WINDOWS[0][ORIGIN], WINDOWS[0][WIDTH], WINDOWS[0][ROW_STRIDE]
    cell, cells, weight = WINDOWS[0][CELL], WINDOWS[0][CELLS], WINDOWS[0][WEIGHT]
    slot, output, start = WINDOWS[0][SLOT], WINDOWS[0][FIRST], 0
    first = WINDOWS[0][SPLITS] * TILES * ((batch * WINDOWS[0][OUTPUTS] + BLOCK_M - 1) // BLOCK_M)
    for i in tl.static_range(1, len(WINDOWS)):
        if unit >= first:
            outputs = WINDOWS[i][OUTPUTS]
            out_width = WINDOWS[i][OUT_WIDTH]
            step = WINDOWS[i][STEP]
            origin = WINDOWS[i][ORIGIN]
            width = WINDOWS[i][WIDTH]
            row_stride = WINDOWS[i][ROW_STRIDE]
            cell = WINDOWS[i][CELL]
            cells = WINDOWS[i][CELLS]
            weight = WINDOWS[i][WEIGHT]
            slot = WINDOWS[i][SLOT]
            output = WINDOWS[i][FIRST]
            start = first
        first += WINDOWS[i][SPLITS] * TILES * ((batch * WINDOWS[i][OUTPUTS] + BLOCK_M - 1) // BLOCK_M)
    return outputs, out_width, step, origin, width, row_stride, cell, cells, weight, slot, output, unit - start


@triton.jit
def interleave(  # noqa: ANN201
    batch,
    SINGLE: tl.constexpr,
    MANY: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_SINGLE: tl.constexpr,
    BLOCK_MANY: tl.constexpr,
):
    """Which unit is this program's: (it is one of MANY, its number among its kind).

    Windows of one output wait for memory, those of many compute: the program order interleaves them, so that every
    multiprocessor has both at any time. The many come in the first part, since their units are longer and would be
    left over at the end.
    """
    singles, manys = 0, 0
    for i in tl.static_range(len(SINGLE)):
        singles += SINGLE[i][SPLITS] * TILES * ((batch * SINGLE[i][OUTPUTS] + BLOCK_SINGLE - 1) // BLOCK_SINGLE)
    for i in tl.static_range(len(MANY)):
        manys += MANY[i][SPLITS] * TILES * ((batch * MANY[i][OUTPUTS] + BLOCK_MANY - 1) // BLOCK_MANY)
    pid = tl.program_id(0)
    span = manys + singles * 3 // 4
    before = (tl.minimum(pid, span).to(tl.int64) * manys // tl.maximum(span, 1)).to(tl.int32)  # many-units before this
    after = (tl.minimum(pid + 1, span).to(tl.int64) * manys // tl.maximum(span, 1)).to(tl.int32)
    is_many = after > before
    return is_many, tl.where(is_many, before, pid - before)
