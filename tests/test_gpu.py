"""What only a GPU can show, on the Triton kernels: `make test-gpu`."""

import threading
from dataclasses import replace

import pytest
import torch

from sp_fast import SPProjector, SPProjectorConfig, geometry
from sp_fast.bench.accuracy import compare
from sp_fast.kernels.device import chip_of
from sp_fast.kernels.pooled_rows import pooled_rows
from sp_fast.kernels.tiles import BUCKETS, windowed_tiles
from sp_fast.kernels.windowed_matmul_torch import windowed_matmul_torch
from tests.helpers import ALL_VARIANTS, accuracy, features_for, randomised, small

pytestmark = pytest.mark.gpu
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
WIDE = SPProjectorConfig(kernel_sizes=(4, 12, 24), text_width=512)  # the published C and D, half of the weights


@pytest.fixture(autouse=True)
def _a_gpu(poisoned):
    """No GPU is an error here: these tests were asked for by name."""
    assert torch.cuda.is_available(), "make test-gpu needs an NVIDIA GPU; make test is for machines without one"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


def projector(config=WIDE, dtype=torch.bfloat16, seed=0, **options):
    return randomised(SPProjector(config, device="cuda", **options), seed).to(dtype).eval()


def features(batch, config=WIDE, dtype=torch.bfloat16, seed=0):
    return features_for(config, batch, dtype, seed).cuda()


def test_auto_picks_triton():
    assert projector().backend == ("triton", "auto: torch.bfloat16 on an NVIDIA GPU")
    assert projector(dtype=torch.float64).backend.name == "torch"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", [*BUCKETS, 130])
def test_every_shipped_launch_of_the_windowed_matmul(batch, dtype):
    """By the accuracy rule, beside plain torch products of the same type; every element is written."""
    from sp_fast.kernels.windowed_matmul_triton import windowed_matmul_triton

    module = projector(dtype=dtype)
    weights = [module.extractor.spatial_weight.detach(), module.extractor.detail_weight.detach()]
    windows = geometry.spatial_windows(WIDE) + geometry.detail_windows(WIDE)
    rows = features(batch, dtype=dtype)
    found = windowed_matmul_triton(rows, weights, windows)
    plain = windowed_matmul_torch(rows, weights, windows)
    exact = windowed_matmul_torch(rows[:8].double(), [w.double() for w in weights], windows)
    result = compare("out", found[:8], plain[:8], exact, dtype)
    assert result.passed, result
    assert found.isfinite().all()
    torch.testing.assert_close(found, plain, rtol=0.05, atol=0.05 * plain.float().std().item())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", ALL_VARIANTS)
def test_accuracy_of_every_variant(variant, dtype):
    """Every output and gradient, pooled over seeds."""
    config = small(
        variant, **({} if variant.startswith("tfm") else {"vision_width": 64, "spatial_width": 32}), text_width=64
    )
    for comparison in accuracy(lambda seed: projector(config, dtype, seed), dtype, seeds=8, batch=4):
        assert comparison.passed, comparison


@pytest.mark.parametrize("levels", [(4, 8, 12, 16, 20), (1, 5, 23)])
def test_pooled_rows(levels):
    x = torch.randn(3, 576, 1024, device="cuda")
    torch.testing.assert_close(
        pooled_rows(x, 24, 0, 24, levels, "triton"), pooled_rows(x, 24, 0, 24, levels), rtol=1e-6, atol=1e-6
    )


def test_spatial_tokens_do_not_depend_on_the_batch():
    module, x = projector(), features(64)
    with torch.no_grad():
        tokens = WIDE.spatial_tokens
        alone = module(x[5:6])[0, :tokens]
        for batch in (2, 3, 6, 8, 16, 33, 64):
            start = min(5, 64 - batch)
            assert torch.equal(module(x[start : start + batch])[5 - start, :tokens], alone), batch


def test_repeats_are_bitwise_equal():
    module, x = projector(), features(2)
    with torch.no_grad():
        first = module(x)
        assert all(torch.equal(module(x), first) for _ in range(200))


def test_tiles_are_schedule_only():
    from sp_fast.kernels.windowed_matmul_triton import windowed_matmul_triton

    module, x = projector(), features(2)
    weights = [module.extractor.spatial_weight.detach(), module.extractor.detail_weight.detach()]
    windows = geometry.spatial_windows(WIDE) + geometry.detail_windows(WIDE)
    tiles = windowed_tiles(chip_of(x.device), x.dtype, 2, 1024, 512)
    first = windowed_matmul_triton(x, weights, windows, tiles)
    for change in ({"block_d": 64}, {"block_many": 128, "stages_many": 2}, {"stages_single": 3}, {"block_k": 32}):
        assert torch.equal(windowed_matmul_triton(x, weights, windows, replace(tiles, **change)), first), change


@pytest.mark.parametrize("batch", [1, 8])
def test_cuda_graph(batch):
    module, x = projector(), features(batch)
    with torch.no_grad():
        expected = module(x)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            module(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            tokens = module(x)
        for seed in (0, 1):
            x.copy_(features(batch, seed=seed))
            tokens.fill_(float("nan"))
            graph.replay()
            assert torch.equal(tokens, module(x)), seed
        x.copy_(features(batch))
        graph.replay()
        assert torch.equal(tokens, expected)


def test_streams_do_not_share_scratch():
    module = projector()
    inputs = [features(1, seed=seed) for seed in range(4)]
    with torch.no_grad():
        expected = [module(x) for x in inputs]
    streams, found = [torch.cuda.Stream() for _ in inputs], [[] for _ in inputs]

    def work(i):
        with torch.no_grad(), torch.cuda.stream(streams[i]):
            found[i] += [module(inputs[i]) for _ in range(20)]

    torch.cuda.synchronize()
    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.cuda.synchronize()
    assert all(torch.equal(tokens, want) for many, want in zip(found, expected, strict=True) for tokens in many)


def test_compile_fullgraph_with_a_dynamic_batch():
    module = projector()
    compiled = torch.compile(module, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for batch in (2, 3, 8):
            x = features(batch)
            torch.testing.assert_close(compiled(x), module(x), rtol=1e-2, atol=1e-2)


def test_nothing_waits_for_the_host():
    module, x = projector(), features(2)
    torch.use_deterministic_algorithms(False)  # filling uninitialised memory is no part of a forward
    with torch.no_grad():
        module(x)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            module(x)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_temporary_memory_at_one_image():
    config = SPProjectorConfig()
    module = SPProjector(config, device="cuda", dtype=torch.bfloat16).eval()
    x = features(1, config)
    with torch.no_grad():
        module(x)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        tokens = module(x)
        torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before - tokens.nbytes <= 16 * 2**20


def test_cut_off_class_tokens_and_strides():
    module, x = projector(), features(3)
    with torch.no_grad():
        expected = module(x)
        cut = torch.cat([x[:, :1], x], dim=1)[:, 1:]
        assert torch.equal(module(cut), expected)
        assert torch.equal(module(x.transpose(1, 2).contiguous().transpose(1, 2)), expected)
        assert module(x[:0]).shape == (0, *expected.shape[1:])


def test_autocast_is_the_half_precision_forward():
    module = projector(dtype=torch.float32)
    x = features(2, dtype=torch.float32)
    half = projector()
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        found = module(x)
    assert found.dtype == torch.bfloat16
    tokens = WIDE.spatial_tokens
    torch.testing.assert_close(found[:, :tokens], half(x.bfloat16())[:, :tokens], rtol=0.05, atol=0.02)


def test_beyond_two_billion_elements():
    """The last images of a batch whose rows alone have more than 2**31 elements."""
    config = SPProjectorConfig(
        kernel_sizes=(2, 4), detail_kernel=3, grid=24, map_size=4, vision_width=1024, spatial_width=32, text_width=32
    )
    module = projector(config)
    batch = 2**31 // (576 * 1024) + 5
    x = torch.zeros(1, 576, 1024, device="cuda", dtype=torch.bfloat16).expand(batch, -1, -1).contiguous()
    x[-2:] = features(2, config)
    with torch.no_grad():
        assert torch.equal(module(x)[-2:, :2], module(x[-130:])[-2:, :2])
