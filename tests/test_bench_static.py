"""`sp-fast bench static`: real launches compiled for real, and planted faults, each of which must be named."""

import ast
import functools
import json
import multiprocessing
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompilationError, make_backend
from triton.runtime.jit import create_function_from_signature
from typer.testing import CliRunner

from sp_fast import SPProjectorConfig
from sp_fast.bench import shipped, static
from sp_fast.bench.breaches import COLUMNS, STREAM, STREAM_BYTES, WRITE_STREAM, breaches
from sp_fast.bench.cases import DTYPES
from sp_fast.bench.sass import blocks_per_multiprocessor, read_sass
from sp_fast.bench.shipped import COMPACT_VARIANTS, VARIANTS, configurations
from sp_fast.bench.static import judge, to_json
from sp_fast.cli import app
from sp_fast.kernels.device import CHIPS, Chip
from sp_fast.kernels.tiles import BUCKETS, LARGE, bucket_of
from tests.helpers import ALL_VARIANTS

ROOT = Path(__file__).resolve().parent.parent
KEEPS_HINTS = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9)
FEWER = shipped.QUANTIZED_BATCHES  # of each bucket what is a multiple of 16 and what is none, in place of 256 batches
configured = functools.cache(lambda chip, dtype: configurations([str(chip)], [dtype]))


@pytest.fixture(scope="module", autouse=True)
def _no_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        patch.setattr(shipped, "BATCHES", FEWER)
        yield


def shipped_for(chip, batch, dtype="bfloat16", kernel=STREAM):
    """What crop-dfi launches at that batch, which is a bucket's bound."""
    users = [c for c in configured(chip, dtype) if c.source.kernel == kernel and "crop-dfi" in c.variants]
    return max((c for c in users if bucket_of(batch) in c.buckets and c.batch <= batch), key=lambda c: c.batch)


def planted(configuration, constants=(), **fields):
    """With some constants or fields of its source replaced."""
    source = configuration.source
    return replace(configuration, source=replace(source, constants=tuple({**dict(source.constants), **dict(constants)}.items()), **fields))  # fmt: skip


judged_once = functools.cache(judge)


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


@pytest.mark.parametrize(
    "batches", [FEWER, pytest.param(shipped.BATCHES, marks=pytest.mark.campaign)], ids=["some", "all"]
)
def test_every_row_of_the_launch_table_is_compiled(monkeypatch, batches):
    """For both variants, and for every kernel; other ways to compile in a bucket are configurations of their own."""
    monkeypatch.setattr(shipped, "BATCHES", batches)
    found = configurations()
    files = [path for path in ROOT.glob("kernels/*_triton.py") if "_kernel(" in path.read_text()]
    modules = {f"sp_fast.kernels.{path.stem}" for path in files}
    for chip in CHIPS:
        for dtype in ("float32", "bfloat16", "float16"):
            here = [c for c in found if (c.source.chip.capability, c.source.dtype) == (chip, dtype)]
            assert {c.source.module for c in here} == modules
            for variant in VARIANTS:
                streams = [c for c in here if c.source.kernel == STREAM and variant in c.variants]
                assert {b for c in streams for b in c.buckets} == {*BUCKETS, LARGE}
                for bucket in (16, 32, 64, LARGE):  # multiples of 16, and what is none
                    users = [c.source for c in streams if bucket in c.buckets]
                    batch = [name for name, _ in users[0].signature].index("batch")
                    assert {batch in source.aligned for source in users} == {True, False}
    assert len({c.source for c in found}) == len(found)


@pytest.mark.parametrize(
    "variant",
    ["crop", *(pytest.param(v, marks=pytest.mark.campaign) for v in ("conv336_adptive_pooling_multifuse_q", "all"))],
)
def test_other_variants_compile_too(variant):
    """The interpreter runs what the compiler refuses. Attention is the kernel whose branches differ by variant."""
    if variant == "all":
        launching = [v for v in ALL_VARIANTS if SPProjectorConfig.variant(v).extractor == "full"]
        found = configurations((), ["bfloat16"], launching, [3])
    else:
        found = configurations(["90"], ["bfloat16"], [variant], [3])
        found = [configuration for configuration in found if "attend" in configuration.source.kernel]
    assert found
    for configuration in found:
        judgement = judge(configuration)
        assert judgement.figures is not None, judgement.breaches
        assert judgement.breaches == (), configuration


@pytest.mark.parametrize("variant", ["compact-5m", "nested", pytest.param("all", marks=pytest.mark.campaign)])
def test_compact_projectors_compile_too(variant):
    """Their streams are short: LLVM may unroll a loop, which is then judged without one."""
    whole = variant == "all"
    found = configurations(
        ["80", "90"], ["bfloat16"], [*COMPACT_VARIANTS] if whole else [variant], () if whole else [1]
    )
    found = [c for c in found if whole or (c.source.kernel == STREAM and c.source.chip.capability == 90)]
    assert found
    for configuration in found:
        judgement = judge(configuration)
        assert judgement.figures is not None, judgement.breaches
        assert judgement.breaches == (), configuration
    if variant == "compact-5m":
        assert judgement.figures.loops == ()
        (breach, *_) = judge(planted(found[0], {"STAGES_MANY": 1})).breaches
        assert "copy a weight tile" in breach


@pytest.mark.parametrize("batch", [1, 8, 16])
def test_arguments_are_specialised_as_triton_does(batch):
    backend = make_backend(GPUTarget("cuda", 90, 32))
    for variant in VARIANTS:
        launches = shipped._launches(SPProjectorConfig.variant(variant), CHIPS[90], torch.bfloat16, batch)
        for launch, arguments in launches:
            source = shipped._source(launch, arguments, CHIPS[90], "bfloat16")
            kernel, options = launch.kernel, {**launch.constants, "num_warps": launch.warps}
            bound = create_function_from_signature(kernel.signature, kernel.params, backend)(*arguments, **options)
            _, signature, constants, attributes = kernel._pack_args(backend, options, *bound)
            assert dict(source.signature) == signature
            assert {(kernel.arg_names.index(name),): value for name, value in source.constants} == constants
            assert {(position,) for position in source.aligned} == {at for at, known in attributes.items() if known}


def bench(*arguments):
    return CliRunner().invoke(app, ["bench", "static", *arguments])


@pytest.fixture
def small(monkeypatch):
    """Two quick kernels in place of all."""
    found = [shipped_for(90, 1, kernel=kernel) for kernel in ("windowed_matmul_reduce", "spatial_attend_fwd")]
    monkeypatch.setattr(shipped, "configurations", lambda *_: found)
    return found


def test_the_command_without_a_breach(small):
    """With a real process."""
    small.pop()
    result = bench("--json")
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout)
    assert values["environment"]["triton"] == triton.__version__
    (reduce,) = values["configurations"]
    assert (reduce["kernel"], reduce["chip"], reduce["dtype"]) == ("windowed_matmul_reduce", 90, "bfloat16")
    assert "crop-dfi" in reduce["variants"]
    assert 1 in reduce["buckets"]
    assert reduce["registers"] > 0 == reduce["spills"]
    assert any(opcode.startswith("LDG") for opcode in reduce["loops"][0])
    assert (reduce["bytes_in_flight"], reduce["breaches"]) == (None, [])


def test_the_command_with_breaches(small, monkeypatch):
    """They are listed last, by name."""
    monkeypatch.setattr(static, "judge_all", lambda found, console: list(map(judge, found)))  # in this process
    attend = small[1]
    small[1:] = [planted(attend, chip=Chip(90, 1024)), planted(attend, {"BLOCK_K": 48})]
    result = bench()
    assert result.exit_code == 1, result.output
    *_, no_room, no_code, last = result.stdout.splitlines()
    with_attention = "crop-dfi+pool-dfi+compact-50m+depthwise+grouped+separable+nested"
    label = f"spatial_attend_fwd sm_90 bfloat16 {with_attention}, B=1 (bucket 1 2 4 8 16 32 64 large)"
    assert re.match(rf"{re.escape(label)}: \d+ bytes of shared memory, where a block on sm_90 has 1024:", no_room)
    assert no_code.startswith(f"{label}: it does not compile: ")
    assert last == "3 configurations, 2 breaches"


def test_ctrl_c_leaves_no_process(small, monkeypatch):
    def interrupted(futures):
        raise KeyboardInterrupt

    monkeypatch.setattr(static, "as_completed", interrupted)
    small.pop()
    result = bench()
    assert (result.exit_code, result.stdout) == (130, "")
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--chip", "91"), "'91' is no chip; known: 80, 86, 89, 90, 100, 120"),
        (("--dtype", "bf16"), "'bf16' is no dtype; did you mean 'bfloat16'?; known: float32, bfloat16, float16"),
    ],
)
def test_unknown_names_are_exit_code_2(arguments, message):
    result = bench(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stdout == ""


def test_nothing_is_compiled_in_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    result = bench("--chip", "90")
    assert result.exit_code == 2
    assert "TRITON_INTERPRET=1 interprets kernels, and compiles none: unset it" in result.stderr


def test_json_has_what_does_not_compile():
    found = judged_once(planted(shipped_for(90, 1), {"BLOCK_D": 96}))
    (values,) = json.loads(to_json([found], {}))["configurations"]
    assert "registers" not in values
    assert len(values["breaches"]) == 1
