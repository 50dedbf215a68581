"""The windowed matmul's gradients on Triton kernels, in the interpreter."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sp_fast import SPProjectorConfig
from sp_fast.bench.accuracy import compare
from sp_fast.kernels import windowed_matmul_drows_triton as drows_module
from sp_fast.kernels.device import CHIPS, pretend
from sp_fast.kernels.tiles import outer_tiles
from sp_fast.kernels.window import Window, encode_windows
from sp_fast.kernels.windowed_matmul import windowed_matmul, windowed_matmul_dweight
from sp_fast.kernels.windowed_matmul_dweight_triton import windowed_matmul_dweight_triton
from tests.interpreter.test_windowed_matmul_triton import CHIPS_TRIED, DTYPES, TINIEST, WIDER, drawn_problem, sparse
from tests.test_windowed_matmul import LAYOUTS, by_convolution, problem

TINY = SPProjectorConfig("crop", (2, 4), detail_kernel=3, detail_stride=1, grid=5, vision_width=6, spatial_width=5)


def gradients(function, rows, weights, cotangent):
    """Of rows and weights."""
    leaves = [t.detach().clone().requires_grad_() for t in (rows, *weights)]
    return torch.autograd.grad(function(leaves[0], leaves[1:]), leaves, cotangent)


def on(backend, windows):
    encoded = encode_windows(windows)
    return lambda rows, weights: windowed_matmul(rows, weights, encoded, backend)


def cotangent_of(windows, batch, depth, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, sum(w.outputs for w in windows), depth, generator=generator).to(dtype)


def agree(rows, weights, windows, seed=0):
    """Half the digits of the type, beside convolutions in float64."""
    cotangent = cotangent_of(windows, len(rows), weights[0].shape[2], rows.dtype, seed)
    found = gradients(on("triton", windows), rows, weights, cotangent)
    exact = gradients(
        lambda x, w: by_convolution(x, w, windows), rows.double(), [w.double() for w in weights], cotangent.double()
    )
    for got, want in zip(found, exact, strict=True):
        scale = want.abs().max().item() if want.numel() else 0
        torch.testing.assert_close(got.double(), want, rtol=0, atol=scale * torch.finfo(rows.dtype).eps ** 0.5)


DAILY = [("sm_80", torch.float32), ("sm_90", torch.bfloat16)]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("chip", "dtype"),
    [
        pytest.param(*case, marks=() if case in DAILY else pytest.mark.campaign)
        for case in itertools.product(CHIPS_TRIED, DTYPES)
    ],
    ids=str,
)
def test_accuracy_beside_plain_torch(chip, dtype):
    """At most 1.5 times torch's own error in the same type and one ulp."""
    rows, weights, windows = problem(WIDER["crop+detail"], 8, dtype)
    cotangent = cotangent_of(windows, 8, 64, dtype)
    with CHIPS_TRIED[chip]():
        fast = gradients(on("triton", windows), rows, weights, cotangent)
    plain = gradients(on("torch", windows), rows, weights, cotangent)
    exact = gradients(
        lambda x, w: by_convolution(x, w, windows), rows.double(), [w.double() for w in weights], cotangent.double()
    )
    for label, *tensors in zip(("drows", "dweight 0", "dweight 1"), fast, plain, exact, strict=True):
        assert tensors[0].numel() >= 10_000
        result = compare(label, *(t.flatten() for t in tensors), dtype)
        assert result.passed, result
        assert result.fast_error < (4 if dtype == torch.float32 else 0.4) * result.eps, result  # rounded once


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("batch", [0, 1, 2, 33])
def test_every_batch_bucket(batch):
    rows, weights, windows = problem(TINY, batch, torch.float32)
    with pretend(CHIPS[90]):
        agree(rows, weights, windows)


@pytest.mark.usefixtures("poisoned")
def test_more_windows_than_the_fold_unrolls(monkeypatch):
    monkeypatch.setattr(drows_module, "FEW_WINDOWS", 1)
    rows, weights, windows = problem(TINY, 2, torch.float32)
    assert max(w.outputs for w in windows) > 1
    with pretend(CHIPS[90]):
        agree(rows, weights, windows)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("width", "depth"),
    [(17, 130), (130, 16), *(pytest.param(*w, marks=pytest.mark.campaign) for w in ((16, 24), (100, 40)))],
)
def test_widths_that_tiles_do_not_divide(width, depth):
    config = SPProjectorConfig("crop", (2, 5), detail_kernel=3, grid=6, vision_width=width, spatial_width=depth)
    for dtype, chip in ((torch.float32, 80), (torch.float16, 90)):
        with pretend(CHIPS[chip]):
            agree(*problem(config, 3, dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_rows_and_of_the_upstream_gradient(layout):
    rows, weights, windows = problem(TINY, 3, torch.float32)
    strided = LAYOUTS[layout](rows)
    cotangent = LAYOUTS[layout](cotangent_of(windows, 3, 5, torch.float32))
    found, expected = [], []
    for backend, into in (("triton", found), ("torch", expected)):
        leaves = [t.detach().requires_grad_() for t in (strided, *weights)]
        into += torch.autograd.grad(on(backend, windows)(leaves[0], leaves[1:]), leaves, cotangent)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("examples", [3, pytest.param(30, marks=pytest.mark.campaign)])
def test_random_configurations_and_shapes(examples):
    @settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def check(data):
        found = drawn_problem(data.draw)
        with pretend(CHIPS[data.draw(st.sampled_from(sorted(CHIPS)))]):
            agree(*found)

    check()


@pytest.mark.parametrize("asked", list(itertools.product([False, True], repeat=3)))
def test_only_the_gradients_that_are_asked_for(asked):
    """A frozen weight has no programs, and no buffer."""
    rows, weights, windows = problem(TINY, 2, torch.float32)
    everything = gradients(on("triton", windows), rows, weights, torch.ones(2, 6, 5)) if any(asked) else [None] * 3
    tensors = [t.requires_grad_(wanted) for t, wanted in zip((rows, *weights), asked, strict=True)]
    out = on("triton", windows)(rows, weights)
    assert out.requires_grad is any(asked)
    if any(asked):
        out.sum().backward()
    for tensor, wanted, gradient in zip(tensors, asked, everything, strict=True):
        assert tensor.grad is None if not wanted else torch.equal(tensor.grad, gradient)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weight_gradients_in_a_buffer_and_added_to_it(dtype, backend):
    rows, weights, windows = problem(TINY, 3, dtype)
    encoded, grad = encode_windows(windows), cotangent_of(windows, 3, 5, dtype)
    expected = gradients(
        lambda x, w: by_convolution(x, w, windows), rows.double(), [w.double() for w in weights], grad.double()
    )[1:]
    for kind in {dtype, torch.float32}:
        buffers = [torch.full(w.shape, torch.nan, dtype=kind) for w in weights]
        windowed_matmul_dweight(grad, rows, buffers, encoded, backend=backend)
        once = [b.clone() for b in buffers]
        windowed_matmul_dweight(grad, rows, buffers, encoded, add=True, backend=backend)
        for got, twice, want in zip(once, buffers, expected, strict=True):
            torch.testing.assert_close(got.double(), want, rtol=8 * torch.finfo(kind).eps, atol=1e-5)
            torch.testing.assert_close(twice.double(), 2 * want, rtol=8 * torch.finfo(kind).eps, atol=2e-5)
        buffer = torch.full(weights[1].shape, torch.nan, dtype=kind)
        windowed_matmul_dweight(grad, rows, [None, buffer], encoded, backend=backend)
        assert torch.equal(buffer, once[1])


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_shared_cells_and_cells_that_no_window_meets(backend):
    """Nested weights, say: gradients of windows that share cells add up; other cells have none."""
    windows = [Window(0, 1, 0, 2, 2, 3, 1, 1, 1), Window(0, 2, 1, 2, 1, 3, 1, 2, 1), Window(0, 4, 3, 1, 1, 3, 1, 1, 1)]
    rows, weight = torch.randn(2, 9, 4), torch.randn(7, 4, 3)
    cotangent = cotangent_of(windows, 2, 3, torch.float32)
    found = gradients(on(backend, windows), rows, [weight], cotangent)
    torch.testing.assert_close(found, gradients(lambda x, w: by_convolution(x, w, windows), rows, [weight], cotangent))
    assert found[1][[0, 5, 6]].eq(0).all()
    buffer = torch.ones(7, 4, 3)
    windowed_matmul_dweight(cotangent, rows, [buffer], encode_windows(windows), add=True, backend=backend)
    torch.testing.assert_close(buffer, found[1] + 1)


def test_a_row_gradient_in_several_rounds(monkeypatch):
    rows, weights, windows = problem(TINY, 5, torch.float32)
    cotangent = cotangent_of(windows, 5, 5, torch.float32)
    whole = gradients(on("triton", windows), rows, weights, cotangent)
    monkeypatch.setattr(drows_module, "COLUMNS_BYTES", 2 * 4 * 6 * sum(w.cells * w.outputs for w in windows))
    torch.testing.assert_close(gradients(on("triton", windows), rows, weights, cotangent), whole)


def test_tiles_are_schedule_only():
    rows, weights, windows = problem(TINY, 3, torch.float32)
    grad = cotangent_of(windows, 3, 5, torch.float32)
    tiles = outer_tiles(CHIPS[90], rows.dtype, 3, 6, 5)
    found = []
    for change in ({}, {"block_c": 32}, {"block_d": 64}, {"block_single": 32, "stages": 3}):
        outs = [torch.empty_like(w) for w in weights]
        windowed_matmul_dweight_triton(grad, rows, outs, windows, False, replace(tiles, **change))
        found.append(outs)
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])


def test_nonfinite_gradients_stay_where_they_belong():
    rows, weights, windows = problem(TINY, 3, torch.float32)
    cotangent = cotangent_of(windows, 3, 5, torch.float32)
    clean = gradients(on("triton", windows), rows, weights, cotangent)
    cotangent[1, 0] = torch.nan  # one image, and one window, which meets the first weight only
    drows, dweight0, dweight1 = gradients(on("triton", windows), rows, weights, cotangent)
    assert torch.equal(drows[[0, 2]], clean[0][[0, 2]])
    assert torch.equal(dweight1, clean[2])
    cells = windows[0].cells
    assert dweight0[:cells].isnan().all()
    assert torch.equal(dweight0[cells:], clean[1][cells:])


def test_weights_beyond_two_billion_elements(tmp_path):
    cells = 2**31 // (16 * 8) + 8
    buffer = sparse(cells * 16 * 8, tmp_path).view(cells, 16, 8)
    rows, grad = torch.randn(1, 9, 16).half(), torch.randn(1, 1, 8).half()
    far, near = (Window(0, cell, 1, 2, 2, 3, 1, 1, 1) for cell in (cells - 4, 0))
    windowed_matmul_dweight(grad, rows, [buffer], encode_windows([far]), add=True, backend="triton")
    expected = torch.zeros(4, 16, 8).half()
    windowed_matmul_dweight(grad, rows, [expected], encode_windows([near]), backend="torch")
    torch.testing.assert_close(buffer[-4:], expected)
    leaf = torch.zeros_like(rows, requires_grad=True)
    weight = buffer.detach()
    weight[-4:] = torch.randn(4, 16, 8)
    windowed_matmul(leaf, [weight], encode_windows([far]), "triton").backward(grad)
    other = torch.zeros_like(rows, requires_grad=True)
    windowed_matmul(other, [weight[-4:]], encode_windows([near]), "torch").backward(grad)
    torch.testing.assert_close(leaf.grad, other.grad)


def test_opcheck_of_the_gradients():
    rows, weights, windows = problem(TINIEST, 2, torch.float32)
    encoded, grad = encode_windows(windows), cotangent_of(windows, 2, 2, torch.float32)
    for cells in ([len(w) for w in weights], [0, len(weights[1])]):
        arguments = (grad, rows, cells, encoded, "triton")
        torch.library.opcheck(torch.ops.sp_fast.windowed_matmul_dweight.default, arguments)
    arguments = (grad, rows, weights, encoded, "triton")
    torch.library.opcheck(torch.ops.sp_fast.windowed_matmul_drows.default, arguments)


def test_buffers_that_cannot_be_written_are_refused():
    rows, weights, windows = problem(TINY, 2, torch.float32)
    encoded, grad = encode_windows(windows), cotangent_of(windows, 2, 5, torch.float32)
    good = [torch.empty_like(w) for w in weights]
    strided = torch.empty(len(weights[0]), 5, 6).transpose(1, 2)
    cases = {
        "one or two packed weights, not 3: use backend='torch'": (grad, rows, [*good, good[0]], encoded, "triton"),
        "backend='auto' is none of 'torch', 'triton'": (grad, rows, good, encoded, "auto"),
        "give at least one window": (grad, rows, good, [], "triton"),
        "does not belong to rows": (grad[:, 1:], rows, good, encoded, "torch"),
        "float64 is none of": (grad.double(), rows.double(), [g.double() for g in good], encoded, "triton"),
        "is written in torch.float32 or float32": (grad, rows, [g.half() for g in good], encoded, "triton"),
        "is a contiguous": (grad, rows, [strided, good[1]], encoded, "triton"),
        "leaves the weights": (grad, rows, [good[0][1:], good[1]], encoded, "triton"),
        "the gradient is on meta but the rows on cpu": (grad.to("meta"), rows, good, encoded, "torch"),
    }
    for message, (*arguments, backend) in cases.items():
        with pytest.raises(ValueError, match=message):
            windowed_matmul_dweight(*arguments, backend=backend)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_a_buffer_never_joins_the_graph(backend):
    """Of rows that want a gradient themselves: the vision tower is not frozen."""
    rows, weights, windows = problem(TINY, 2, torch.float32)
    encoded, grad = encode_windows(windows), cotangent_of(windows, 2, 5, torch.float32)
    outs = [torch.zeros_like(w) for w in weights]
    for add in (False, True):
        windowed_matmul_dweight(grad, rows.requires_grad_(), outs, encoded, add=add, backend=backend)
    assert not any(out.requires_grad for out in outs)
