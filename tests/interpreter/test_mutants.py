"""Ops on inputs that tell mutants apart: several tiles a side, none of them full."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from sp_fast.kernels.device import CHIPS, pretend
from sp_fast.kernels.launch import recording
from sp_fast.kernels.pooled_rows import pooled_rows, pooled_rows_torch
from sp_fast.kernels.token_head import token_head
from sp_fast.kernels.window import Window, encode_windows
from sp_fast.kernels.windowed_matmul import windowed_matmul
from sp_fast.kernels.windowed_matmul_torch import _has_half_products
from tests.test_windowed_matmul import by_convolution

EPS = 0.3  # large enough to see
BATCH, SPATIAL, PATCHES, WIDTH, HIDDEN, TEXT = 4, 5, 7, 72, 300, 40


def close(found, expected):
    """Half the digits of the type, as in test_windowed_matmul_triton."""
    scale = max(expected.abs().max().item(), 0.1)  # the gradient of a key's bias vanishes
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=scale * torch.finfo(found.dtype).eps ** 0.5)


def project(x, norm_weight, norm_bias, weight, bias):
    return F.linear(F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, EPS), weight, bias)


def definition(z, patches, details, projections, output, mlp, concat, finite, largest):
    """Tokens, and the attention of each detail."""
    parts = z.split([SPATIAL, *details], dim=1)
    small, *maps = (p.nan_to_num(0, largest, -largest) if finite[i > 0] else p for i, p in enumerate(parts))
    attentions, attended = [], []
    for i, big in enumerate(maps):
        tensors = projections[12 * i : 12 * (i + 1)]
        q, k, v = project(small, *tensors[:4]), project(big, *tensors[4:8]), project(big, *tensors[8:])
        attentions.append((q @ k.mT * WIDTH**-0.5).softmax(-1))
        attended.append(attentions[-1] @ v)
    if attended and not concat:
        attended = [sum(attended)]
    spatial = F.linear(F.gelu(torch.cat([small, *attended], dim=-1)), *output)
    return [torch.cat([spatial, F.linear(F.gelu(F.linear(patches, *mlp[:2])), *mlp[2:])], dim=1), *attentions]


HEADS = {
    "concat": ((9, 20), True, (True, True, True), True, torch.float32),
    "added": ((20, 9, 1), False, (True, True, True), True, torch.float32),
    "no details": ((), True, (True, True, True), False, torch.float32),
    "half": ((20,), True, (True, True, False), False, torch.float16),
    "not finite, spatial": ((9,), True, (True, False, False), True, torch.float16),
    "not finite, detail": ((9,), True, (False, True, False), True, torch.float16),
}


def problem(details, concat, has_bias, dtype):
    """z, patches, projections, output layer and patch MLP, at random."""
    matrix = lambda *shape: torch.randn(shape) * shape[-1] ** -0.5  # noqa: E731
    layer = lambda: [1 + torch.randn(WIDTH) / 2, torch.randn(WIDTH), matrix(WIDTH, WIDTH), torch.randn(WIDTH)]  # noqa: E731
    columns = WIDTH * (1 + (len(details) if concat else 1))
    tensors = (
        [torch.randn(BATCH, SPATIAL + sum(details), WIDTH) + torch.randn(WIDTH), torch.randn(BATCH, PATCHES, 20)],
        [t for _ in range(3 * len(details)) for t in layer()],
        [matrix(TEXT, columns), torch.randn(TEXT)][: 1 + has_bias],
        [matrix(HIDDEN, 20), torch.randn(HIDDEN), matrix(TEXT, HIDDEN), torch.randn(TEXT)],
    )
    return [[t.to(dtype) for t in part] for part in tensors]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("name", HEADS)
def test_head_is_its_definition(name):
    details, concat, finite, has_bias, dtype = HEADS[name]
    parts = problem(details, concat, has_bias, dtype)
    if name.startswith("not finite"):
        row = 0 if finite[0] else SPATIAL + 3
        for image, value in ((1, torch.nan), (2, torch.inf), (3, -torch.inf)):
            parts[0][0][image, row, 70] = value
    found, exact = [], []
    for results, cast in ((found, lambda t: t), (exact, torch.Tensor.double)):
        leaves = [[cast(t).clone().requires_grad_() for t in part] for part in parts]
        (z, patches), projections, output, mlp = leaves
        if cast is torch.Tensor.double:
            largest = torch.finfo(dtype).max
            results += definition(z, patches, details, projections, output, mlp, concat, finite, largest)
        else:
            output = (output[0], output[1] if has_bias else None)
            tokens, attention = token_head(
                z, patches, details, projections, output, mlp, concat=concat, finite=finite, eps=EPS
            )
            results += [tokens, *attention]
        if dtype == torch.float32:
            generator = torch.Generator().manual_seed(0)
            cotangents = [cast(torch.randn(result.shape, generator=generator)) for result in results]
            results += torch.autograd.grad(results, [t for part in leaves for t in part], cotangents)
    # By token: where an infinity was replaced, one is far larger than all others.
    for one, other in zip(found[0].flatten(0, 1), exact[0].flatten(0, 1), strict=True):
        close(one, other)
    for one, other in zip(found[1:], exact[1:], strict=True):
        close(one, other)


def test_projections_under_autocast():
    """LayerNorm's tensors stay as they are, the linear layers' become half."""
    (z, _), projections, output, _ = problem((9,), True, True, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16), recording() as launches:
        token_head(z, None, (9,), projections, output, [], concat=True, finite=(True,) * 3, eps=EPS)
    _, *found = (t.dtype for t in launches[0][1][:13])
    assert found == 3 * [torch.float32, torch.float32, torch.bfloat16, torch.bfloat16]


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_pooling_runs_where_it_is_asked_to(backend):
    with recording() as launches:
        pooled_rows(torch.randn(1, 36, 4), 6, 0, 6, (2,), backend)
    assert bool(launches) == (backend == "triton")


def test_pooling_and_gradients_in_several_tiles_of_channels():
    x = torch.randn(2, 36, 100, requires_grad=True)
    cotangent = torch.randn(2, 36 + 1 + 4 + 9, 100)
    found, exact = (
        [out, *torch.autograd.grad(out, x, cotangent.to(out.dtype))]
        for out in (pooled_rows(x, 6, 7, 5, (1, 2, 3), "triton"), pooled_rows_torch(x.double(), 6, 7, 5, (1, 2, 3)))
    )
    for one, other in zip(found, exact, strict=True):
        close(one, other.double())


def test_pooling_is_traced_in_its_shapes():
    with FakeTensorMode():
        x = torch.empty(2, 36, 4, requires_grad=True)
        out = pooled_rows(x, 6, 0, 6, (1, 3), "triton")
        assert out.shape == (2, 36 + 1 + 9, 4)
        assert torch.autograd.grad(out.sum(), x)[0].shape == x.shape


ONE, MANY, FULL = (
    Window(0, 0, 0, 12, 12, 12, 1, 1, 1),
    Window(1, 0, 0, 2, 1, 12, 11, 12, 1),
    Window(1, 0, 0, 2, 1, 12, 8, 12, 1),
)
TILES = {
    "more splits than are unrolled": ([ONE], 1, False),
    "more splits than are unrolled, images": ([ONE], 2, False),
    "more outputs than a tile": ([replace(ONE, width=2, height=1), MANY], 2, True),
    "full tiles": ([replace(ONE, width=2, height=1), FULL], 4, True),
}


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("name", TILES)
def test_tiles_of_windows(name):
    """36 partial sums, where 32 are unrolled, or 16; 132 outputs an image; 4 images and 384 outputs, tiles of 4 and 64."""
    windows, batch, gradients = TILES[name]
    tensors = [torch.randn(batch, 144, 16), *(torch.randn(w.cells, 16, 16) for w in windows)]
    found, exact = [], []
    for results, wide in ((found, False), (exact, True)):
        rows, *weights = leaves = [(t.double() if wide else t.clone()).requires_grad_() for t in tensors]
        with pretend(CHIPS[90]):
            if wide:
                out = by_convolution(rows, weights, windows)
            else:
                out = windowed_matmul(rows, weights, encode_windows(windows), "triton")
            results.append(out)
            if gradients:
                cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(out.dtype)
                results += torch.autograd.grad(out, leaves, cotangent)
    for one, other in zip(found, exact, strict=True):
        close(one, other)


def test_half_products_run_where_a_device_has_them():
    """bfloat16 everywhere, float16 on a device other than a CPU, never float32; "meta" is such a device."""
    expected = {torch.bfloat16: [True, True], torch.float16: [False, True], torch.float32: [False, False]}
    for dtype, asked in expected.items():
        assert [_has_half_products(torch.empty(1, dtype=dtype, device=device)) for device in ("cpu", "meta")] == asked
