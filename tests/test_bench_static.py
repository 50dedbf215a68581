"""What `sp-fast bench static` holds against machine code: real launches compiled for real, and planted faults, each of
which must be named."""

import ast
from dataclasses import replace

import pytest
import triton
from triton.compiler import CompilationError

from sp_fast.bench import static
from sp_fast.bench.breaches import COLUMNS, STREAM_BYTES, WRITE_STREAM, breaches
from sp_fast.bench.cases import DTYPES
from sp_fast.bench.shipped import configurations
from sp_fast.bench.static import judge
from sp_fast.kernels.device import CHIPS, Chip
from tests.static_cases import judged_once, planted, shipped_for

pytestmark = pytest.mark.usefixtures("fewer_batches")
KEEPS_HINTS = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9)


def judged(chip, batch, dtype="bfloat16"):
    return judged_once(shipped_for(chip, batch, dtype))


@pytest.mark.parametrize(
    ("chip", "batch", "dtype", "product"),
    [
        (80, 1, "bfloat16", "HMMA"),
        pytest.param(86, 1, "bfloat16", "HMMA", marks=pytest.mark.campaign),
        (90, 1, "bfloat16", "HGMMA"),
        pytest.param(90, 8, "bfloat16", "HGMMA", marks=pytest.mark.campaign),
        (100, 1, "bfloat16", "UTCHMMA"),
        (80, 1, "float32", "FFMA"),
    ],
)
def test_the_weight_stream_is_sound(chip, batch, dtype, product):
    found = judged(chip, batch, dtype)
    figures = found.figures
    assert found.breaches == ()
    assert figures.spills == 0 < figures.registers <= 255
    assert figures.shared_bytes <= CHIPS[chip].shared_memory
    assert len(figures.loops) == 2
    tiles = dict(found.configuration.source.constants)
    for loop in figures.loops:
        assert loop[product] > 0
        assert loop["LDGSTS.128"] * 16 * figures.threads >= tiles["BLOCK_K"] * tiles["BLOCK_D"] * DTYPES[dtype].itemsize
        assert "LDG" not in loop
    assert figures.copies >= figures.wide_copies >= 2
    assert figures.blocks_per_multiprocessor >= 1
    assert figures.bytes_in_flight >= STREAM_BYTES or chip != 90
    assert figures.hint_kept is (KEEPS_HINTS and chip >= 90)


@pytest.mark.parametrize(("chip", "scheme", "product"), [(80, "fp8", "HMMA"), (90, "int4", "HGMMA")])
def test_the_quantised_stream_is_sound(chip, scheme, product):
    """sm_80 has no fp8, and moves its bits. Half of the bytes copied, and loads that wait, are breaches."""
    found = configurations([str(chip)], ["bfloat16"], ["crop-dfi"], [1])
    (configuration,) = (c for c in found if dict(c.source.constants).get("SCHEME") == scheme)
    figures = judge(configuration).figures
    assert breaches(configuration, figures) == []
    assert figures.spills == 0
    assert len(figures.loops) == 2
    assert all(loop[product] > 0 and "LDG" not in loop for loop in figures.loops)
    copies = ("LDGSTS.128", "LDGSTS.64")
    fewer = [{opcode: n // 3 if opcode in copies else n for opcode, n in loop.items()} for loop in figures.loops]
    (named,) = breaches(configuration, replace(figures, loops=tuple(fewer)))
    tile = 128 * 128 if scheme == "fp8" else 64 * 128
    assert f"0 of 2 main loops copy a weight tile of {tile} bytes asynchronously and 64 bits at a time" in named


@pytest.mark.parametrize("kernel", [WRITE_STREAM, COLUMNS])
def test_the_gradients_streams_are_sound(kernel):
    configuration = shipped_for(90, 1, kernel=kernel)
    found = judge(configuration)
    assert found.breaches == ()
    opcodes = found.figures.opcodes
    changes = {"HGMMA": "nothing multiplies with HGMMA"}
    changes |= (
        {"STG.128": "0 stores are 128 bits wide and 0 narrower"}
        if kernel == WRITE_STREAM
        else {"LDGSTS.128": "no weight is copied"}
    )
    for opcode, sentence in changes.items():
        without = replace(found.figures, opcodes={key: n for key, n in opcodes.items() if key != opcode})
        (named,) = breaches(configuration, without)
        assert sentence in named
    if kernel == WRITE_STREAM:
        (named,) = breaches(configuration, replace(found.figures, opcodes={**opcodes, "STG.64": 2}))
        assert "and 2 narrower" in named


FAULTS = {
    "a chip with too little shared memory": (
        {"chip": Chip(90, 16 * 1024)},
        "bytes of shared memory, where a block on sm_90 has 16384: take fewer stages or smaller tiles",
    ),
    "weights on the wrong side": ({"constants": {"SWAPPED": False}}, "of 2 main loops multiply with HGMMA: take"),
    "one stage": (
        {"constants": {"STAGES_SINGLE": 1, "STAGES_MANY": 1}},
        "0 bytes on their way to a multiprocessor, where the weight stream needs 65536: take more stages",
    ),
    "one stage, and nothing is asynchronous": (
        {"constants": {"STAGES_SINGLE": 1, "STAGES_MANY": 1}},
        "0 of 2 main loops copy a weight tile of ",
    ),
    "weights that lie anywhere": ({"aligned": ()}, "0 of 2 main loops copy a weight tile of "),
    "too large a tile for one warp": (
        {"chip": CHIPS[86], "warps": 1, "constants": {"BLOCK_D": 128, "BLOCK_MANY": 64, "SWAPPED": False}},
        "of them in main loops, where none is allowed, at 255 registers a thread: take more warps",
    ),
    "a tile that is no power of two": (
        {"constants": {"BLOCK_D": 96}},
        "it does not compile: ValueError: arange's range must be a power of 2",
    ),
}


@pytest.mark.parametrize(("changes", "sentence"), FAULTS.values(), ids=FAULTS)
def test_a_planted_fault_is_named(changes, sentence):
    found = judged_once(planted(shipped_for(90, 1), **changes))
    assert any(sentence in breach for breach in found.breaches), found.breaches


def test_an_error_comes_to_the_point(monkeypatch):
    """Triton's name the line by quoting all before it."""

    def fail(source):
        raise CompilationError("x = 1\n" * 100, ast.parse("\n" * 99 + "K = 2").body[0], "K is already defined")

    monkeypatch.setattr(static, "_compile", fail)
    assert judge(shipped_for(90, 1)).breaches == ("it does not compile: CompilationError: K is already defined",)


@pytest.mark.parametrize(
    ("chip", "dtype", "changes", "sentence"),
    [
        (90, "bfloat16", {"LDG": 2}, "2 loads in the main loops wait for memory, where none is allowed"),
        (90, "bfloat16", {"LDG.128": 1}, "1 loads in the main loops wait"),
        (90, "bfloat16", {"LDGSTS.128": 1}, "1 of 2 main loops copy"),
        (90, "bfloat16", {"LDGSTS.128": 0, "UBLKCP": 1}, None),
        (90, "bfloat16", {"HGMMA": 0, "HMMA": 8}, "1 of 2 main loops multiply with HGMMA"),
        (100, "bfloat16", {"UTCHMMA": 0, "HMMA": 8}, "1 of 2 main loops multiply with UTCHMMA"),
        (80, "float32", {"FFMA": 0, "HMMA": 8}, "1 of 2 main loops multiply with FFMA or FFMA2: keep input_precision"),
    ],
)
def test_each_loop_is_judged(chip, dtype, changes, sentence):
    found = judged(chip, 1, dtype)
    first, second = found.figures.loops
    figures = replace(found.figures, loops=({**first, **changes}, second))
    named = breaches(found.configuration, figures)
    assert len(named) == (sentence is not None)
    assert sentence is None or sentence in named[0]


def test_bytes_in_flight_count_for_small_batches_on_sm_90():
    for chip, batch, count in ((90, 1, 1), (90, 256, 0), (80, 1, 0)):
        few = replace(judged(90, 1).figures, bytes_in_flight=STREAM_BYTES - 1)
        configuration = shipped_for(chip, batch)
        named = [b for b in breaches(configuration, few) if "on their way" in b]
        assert len(named) == count, (chip, batch)


@pytest.mark.parametrize(
    ("version", "chip", "kept", "count"),
    [("3.9.0", 90, False, 1), ("3.10.1", 90, False, 1), ("3.7.1", 90, False, 0), ("3.9.0", 80, False, 0),
     ("3.9.0", 90, True, 0), ("3.9.0", 90, None, 0)],
)  # fmt: skip
def test_a_lost_hint_counts_where_it_can_be_kept(monkeypatch, version, chip, kept, count):
    figures = replace(judged(chip, 1).figures, hint_kept=kept)
    monkeypatch.setattr(triton, "__version__", version)
    named = breaches(shipped_for(chip, 1), figures)
    assert len(named) == count
    assert all("evict_first is lost" in breach for breach in named)
