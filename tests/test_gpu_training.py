"""What only a GPU can show of the gradients on Triton kernels: `make test-gpu`."""

import pytest
import torch

from sp_fast import SPProjectorConfig, geometry
from sp_fast.bench.accuracy import compare
from sp_fast.kernels.pooled_rows import pooled_rows
from sp_fast.kernels.tiles import BUCKETS
from sp_fast.kernels.window import encode_windows
from sp_fast.kernels.windowed_matmul import windowed_matmul, windowed_matmul_dweight
from tests.test_gpu import DTYPES, WIDE, _a_gpu, features, projector  # noqa: F401, the fixture sets this module up too

pytestmark = pytest.mark.gpu
FEW = SPProjectorConfig(
    kernel_sizes=(4, 12), map_size=24, text_width=512
)  # the published C and D; float64 gradients in 10 GB
WINDOWS = geometry.spatial_windows(WIDE) + geometry.detail_windows(WIDE)


def step(module, x, seed=0):
    """Gradients of everything, the input's first."""
    x = x.detach().requires_grad_()
    tokens = module(x)
    generator = torch.Generator("cuda").manual_seed(seed)
    cotangent = torch.randn(tokens.shape, device="cuda", generator=generator).to(tokens.dtype)
    return torch.autograd.grad(tokens, [x, *module.parameters()], cotangent)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", [*BUCKETS, 130])
def test_every_shipped_launch_of_the_windowed_gradients(batch, dtype):
    """By the accuracy rule, beside plain torch products of the same type; every element is written."""
    module, windows = projector(FEW, dtype), geometry.spatial_windows(FEW) + geometry.detail_windows(FEW)
    leaves = [module.extractor.spatial_weight, module.extractor.detail_weight]
    x, found = features(batch, FEW, dtype), {}
    outputs = sum(w.outputs for w in windows)
    grad = torch.randn(batch, outputs, FEW.spatial_width, device="cuda").to(dtype)
    for kind, backend, cast in (
        ("fast", "triton", dtype),
        ("plain", "torch", dtype),
        ("exact", "torch", torch.float64),
    ):
        rows, *weights = (t.detach().to(cast).requires_grad_() for t in (x, *leaves))
        out = windowed_matmul(rows, weights, encode_windows(windows), backend)
        found[kind] = torch.autograd.grad(out, [rows, *weights], grad.to(cast))
    for name, *tensors in zip(("drows", "dweight 0", "dweight 1"), *found.values(), strict=True):
        result = compare(name, *(t.flatten() for t in tensors), dtype)
        assert result.passed, result


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weight_gradients_are_added_to_a_buffer(dtype):
    x, encoded = features(3, dtype=dtype), encode_windows(WINDOWS)
    cells = (geometry.spatial_cells(WIDE), geometry.detail_cells(WIDE))
    grad = torch.randn(3, sum(w.outputs for w in WINDOWS), WIDE.spatial_width, device="cuda").to(dtype)
    once = [torch.empty(n, WIDE.vision_width, WIDE.spatial_width, device="cuda") for n in cells]
    windowed_matmul_dweight(grad, x, once, encoded, backend="triton")
    twice = [t.clone() for t in once]
    windowed_matmul_dweight(grad, x, twice, encoded, add=True, backend="triton")
    for a, b in zip(once, twice, strict=True):
        assert torch.equal(b, 2 * a)


@pytest.mark.parametrize("levels", [(4, 8, 12, 16, 20), (1, 5, 23)])
def test_pooled_rows(levels):
    found = []
    for backend in ("triton", "torch"):
        x = torch.randn(3, 576, 1024, device="cuda", generator=torch.Generator("cuda").manual_seed(0)).requires_grad_()
        out = pooled_rows(x, 24, 0, 24, levels, backend)
        found += torch.autograd.grad(out, x, torch.arange(out.numel(), device="cuda").view(out.shape) % 7 - 3.0)
    torch.testing.assert_close(*found)


def test_repeats_are_bitwise_equal():
    module, x = projector(), features(2)
    first = step(module, x)
    for _ in range(50):
        assert all(map(torch.equal, step(module, x), first))


def test_compiled_gradients():
    module = projector()
    compiled = torch.compile(module, fullgraph=True, dynamic=True)
    for batch in (2, 3):
        x = features(batch)
        tokens, expected = compiled(x), module(x)
        cotangent = torch.randn_like(expected)
        got = torch.autograd.grad(tokens, list(module.parameters()), cotangent)
        want = torch.autograd.grad(expected, list(module.parameters()), cotangent)
        for (name, _), a, b in zip(module.named_parameters(), got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=0.05, atol=0.02 * b.abs().max().item() + 1e-3, msg=name)


def test_a_training_step_in_a_cuda_graph():
    module, x = projector(), features(4)
    parameters = list(module.parameters())
    cotangent = torch.randn_like(module(x))
    expected = torch.autograd.grad(module(x), parameters, cotangent)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.autograd.grad(module(x), parameters, cotangent)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = torch.autograd.grad(module(x), parameters, cotangent)
    graph.replay()
    assert all(map(torch.equal, found, expected))


def test_a_frozen_extractor_writes_no_gradient():
    """Beyond what is saved and the head's own gradients, nothing near the 1.0 GB of the weights."""
    module, x = projector(), features(1)
    module.extractor.requires_grad_(False)
    module(x).sum().backward()
    module.zero_grad()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    module(x).sum().backward()
    torch.cuda.synchronize()
    head = sum(p.nbytes for p in module.parameters() if p.requires_grad)
    assert torch.cuda.max_memory_allocated() - before < 3 * head + 32 * 2**20


def test_nothing_waits_for_the_host():
    module, x = projector(), features(2)
    torch.use_deterministic_algorithms(False)  # filling uninitialised memory is no part of a step
    step(module, x)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(module, x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
