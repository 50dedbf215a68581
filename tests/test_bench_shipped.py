"""The launches that ship: all of them are found, described as triton specialises them, and compile for every kind."""

from pathlib import Path

import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from sp_fast import SPProjectorConfig
from sp_fast.bench import shipped
from sp_fast.bench.breaches import STREAM
from sp_fast.bench.shipped import COMPACT_VARIANTS, VARIANTS, configurations
from sp_fast.bench.static import judge
from sp_fast.kernels.device import CHIPS
from sp_fast.kernels.tiles import BUCKETS, LARGE
from tests.helpers import ALL_VARIANTS
from tests.static_cases import FEWER, planted

ROOT = Path(__file__).resolve().parent.parent
EVERY = shipped.BATCHES
pytestmark = pytest.mark.usefixtures("fewer_batches")


@pytest.mark.parametrize("batches", [FEWER, pytest.param(EVERY, marks=pytest.mark.campaign)], ids=["some", "all"])
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


@pytest.mark.parametrize(
    ("kernel", "chip", "dtype", "variant", "batch"),
    [
        ("windowed_matmul_fwd", 86, "bfloat16", "nested", 1),
        ("windowed_matmul_columns", 120, "bfloat16", "nested", 16),
        ("windowed_matmul_dweight", 120, "float32", "grouped", 1),
        ("windowed_matmul_quantized", 80, "float32", "crop-dfi", 2),
        ("windowed_matmul_quantized", 100, "float16", "crop-dfi", 1),
    ],
)
def test_registers_suffice(kernel, chip, dtype, variant, batch):
    """Where ptxas spilled, left to itself or with more registers than these."""
    found = [c for c in configurations([str(chip)], [dtype], [variant], [batch]) if c.source.kernel == kernel]
    assert found
    for configuration in found:
        assert judge(configuration).breaches == (), configuration


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
