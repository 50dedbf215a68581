"""The op against convolutions, its gradients, its contracts."""

import itertools
import warnings
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from sp_fast import SPProjectorConfig, geometry
from sp_fast.bench.accuracy import compare
from sp_fast.kernels.pooled_rows import pooled_rows
from sp_fast.kernels.window import Window, encode_windows
from sp_fast.kernels.windowed_matmul import windowed_matmul
from tests.helpers import small

GRID = 10
CONFIGS = {
    "crop+detail": SPProjectorConfig("crop", (3, 4, 8), detail_kernel=5, grid=GRID, vision_width=6, spatial_width=5),
    "pool+details": SPProjectorConfig("pool", (2, 7, 10), detail_kernel=(4, 3), grid=GRID, vision_width=6, spatial_width=5),
    "sliding": SPProjectorConfig("sliding", detail_kernel=None, map_size=6, grid=9, vision_width=6, spatial_width=5),
    "detail only": SPProjectorConfig("crop", (), detail_kernel=3, detail_stride=3, grid=7, vision_width=6, spatial_width=5),
}  # fmt: skip


def problem(config, batch=2, dtype=torch.float64, seed=0):
    """Rows, weights and windows of a configuration, and the maps that convolutions would see."""
    generator = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    count = config.patch_tokens + sum(k * k for k in geometry.pooled_levels(config))
    rows = make(batch, count, config.vision_width)
    counts = [n for n in (geometry.spatial_cells(config), geometry.detail_cells(config)) if n]
    weights = [make(n, config.vision_width, config.spatial_width) for n in counts]
    return rows, weights, geometry.spatial_windows(config) + geometry.detail_windows(config)


def by_convolution(rows, weights, windows):
    """Each window as nn.functional.conv2d on the rows laid out as a map."""
    outs = []
    for w in windows:
        reach_down = (w.out_height - 1) * w.step + w.height
        reach_right = (w.out_width - 1) * w.step + w.width
        index = torch.tensor([[w.origin + i * w.row_stride + j for j in range(reach_right)] for i in range(reach_down)])
        cells = weights[w.weight][w.cell : w.cell + w.cells]
        kernel = cells.unflatten(0, (w.height, w.width)).permute(3, 2, 0, 1)
        z = F.conv2d(rows[:, index].permute(0, 3, 1, 2), kernel, stride=w.step)
        outs.append(z.flatten(2).transpose(1, 2))
    return torch.cat(outs, dim=1)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("batch", [1, 3])
def test_forward_and_gradients_are_the_convolutions(name, batch):
    rows, weights, windows = problem(CONFIGS[name], batch)
    leaves = [t.clone().requires_grad_() for t in (rows, *weights)]
    other = [t.clone().requires_grad_() for t in (rows, *weights)]
    out = windowed_matmul(leaves[0], leaves[1:], encode_windows(windows))
    expected = by_convolution(other[0], other[1:], windows)
    torch.testing.assert_close(out, expected)
    cotangent = torch.randn_like(out)
    for got, want in zip(
        torch.autograd.grad(out, leaves, cotangent), torch.autograd.grad(expected, other, cotangent), strict=True
    ):
        torch.testing.assert_close(got, want)


@pytest.mark.usefixtures("poisoned")
def test_cells_that_no_window_meets_have_zero_gradient():
    rows, weight = torch.randn(2, 9, 4), torch.randn(6, 4, 3, requires_grad=True)
    windowed_matmul(rows, [weight], encode_windows([Window(0, 1, 0, 2, 2, 3, 1, 1, 1)])).sum().backward()
    assert weight.grad[[0, 5]].eq(0).all()
    assert weight.grad[1:5].ne(0).all()


def test_gradcheck():
    rows, weights, windows = problem(CONFIGS["crop+detail"], 2)
    small_rows = rows[:, :, :2].clone().requires_grad_()
    small_weights = [w[:, :2, :2].clone().requires_grad_() for w in weights]
    encoded = encode_windows(windows)
    assert torch.autograd.gradcheck(lambda x, *w: windowed_matmul(x, w, encoded), (small_rows, *small_weights))


@pytest.mark.parametrize("asked", list(itertools.product([False, True], repeat=3)))
def test_only_the_gradients_that_are_asked_for(asked):
    rows, weights, windows = problem(CONFIGS["crop+detail"])
    tensors = [t.requires_grad_(wanted) for t, wanted in zip((rows, *weights), asked, strict=True)]
    out = windowed_matmul(rows, weights, encode_windows(windows))
    assert out.requires_grad is any(asked)
    if any(asked):
        out.sum().backward()
    assert [t.grad is not None for t in tensors] == list(asked)


def test_a_frozen_weight_costs_no_gradient_buffer():
    rows, weights, windows = problem(small("crop-dfi", vision_width=64, spatial_width=64), 1, torch.float32)
    weights[1].requires_grad_()
    out = windowed_matmul(rows, weights, encode_windows(windows))
    with torch.profiler.profile(profile_memory=True) as profile, warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns where a skipped weight's empty gradient is written after all
        out.sum().backward()
    allocated = sum(max(event.self_cpu_memory_usage, 0) for event in profile.events())
    assert weights[1].nbytes <= allocated < 2 * weights[1].nbytes < weights[0].nbytes  # of a window row, operands too


def test_double_backward_is_refused():
    rows, weights, windows = problem(CONFIGS["sliding"])
    rows.requires_grad_()
    out = windowed_matmul(rows, weights, encode_windows(windows))
    (gradient,) = torch.autograd.grad((out**2).sum(), rows, create_graph=True)
    with pytest.raises(RuntimeError):
        gradient.sum().backward()


def test_backward_twice_with_retain_graph():
    rows, weights, windows = problem(CONFIGS["sliding"])
    weights[0].requires_grad_()
    out = windowed_matmul(rows, weights, encode_windows(windows)).sum()
    out.backward(retain_graph=True)
    once = weights[0].grad.clone()
    out.backward()
    torch.testing.assert_close(weights[0].grad, 2 * once)


@pytest.mark.parametrize("name", CONFIGS)
def test_opcheck(name):
    rows, weights, windows = problem(CONFIGS[name], dtype=torch.float32)
    for t in (rows, *weights):
        t.requires_grad_()
    torch.library.opcheck(torch.ops.sp_fast.windowed_matmul.default, (rows, weights, encode_windows(windows), "torch"))


LAYOUTS = {
    "contiguous": lambda x: x,
    "cut-off CLS": lambda x: torch.cat([x[:, :1], x], dim=1)[:, 1:],
    "offset": lambda x: torch.cat([x.flatten()[:3], x.flatten()])[3:].view(x.shape),
    "every other image": lambda x: x.repeat_interleave(2, dim=0)[::2],
    "expanded": lambda x: x[:1].expand(x.shape),
    "every other channel": lambda x: x.repeat_interleave(2, dim=2)[:, :, ::2],
    "wider rows": lambda x: torch.cat([x, x], dim=2)[:, :, : x.shape[2]],
    "one channel, expanded": lambda x: x[:, :, :1].expand(x.shape),
    "channels first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "batch inside": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CONFIGS)
def test_layouts(layout, name):
    rows, weights, windows = problem(CONFIGS[name], batch=3)
    strided = LAYOUTS[layout](rows).detach().requires_grad_()
    plain = strided.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
    transposed = [w.transpose(1, 2).contiguous().transpose(1, 2) for w in weights]
    encoded = encode_windows(windows)
    got, expected = windowed_matmul(strided, transposed, encoded), windowed_matmul(plain, weights, encoded)
    torch.testing.assert_close(got, expected)
    cotangent = torch.randn_like(got).transpose(0, 1).contiguous().transpose(0, 1)
    torch.testing.assert_close(
        torch.autograd.grad(got, strided, cotangent), torch.autograd.grad(expected, plain, cotangent)
    )


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("name", CONFIGS)
def test_empty_batch(name):
    rows, weights, windows = problem(CONFIGS[name], batch=0)
    weights = [w.requires_grad_() for w in weights]
    out = windowed_matmul(rows.requires_grad_(), weights, encode_windows(windows))
    assert out.shape == (0, sum(w.outputs for w in windows), 5)
    out.sum().backward()
    assert all(w.grad.eq(0).all() for w in weights)
    assert rows.grad.shape == rows.shape


DAILY = [("crop+detail", torch.float32), ("crop+detail", torch.bfloat16), ("pool+details", torch.float16)]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(*case, marks=() if case in DAILY else pytest.mark.campaign)
        for case in itertools.product(["crop+detail", "pool+details"], [torch.float32, torch.bfloat16, torch.float16])
    ],
    ids=str,
)
def test_accuracy_against_the_convolutions_own_error(name, dtype):
    """At most 1.5 times torch's own error in the same dtype and one ulp, pooled over seeds to 10,000 elements."""
    pools = {}
    for seed in range(80):
        rows, weights, windows = problem(CONFIGS[name], 4, dtype, seed)
        cotangent = torch.randn(4, sum(w.outputs for w in windows), 5, dtype=torch.float64).to(dtype)
        for kind, function, cast in (
            ("fast", lambda x, w: windowed_matmul(x, w, encode_windows(windows)), lambda t: t),  # noqa: B023
            ("torch", lambda x, w: by_convolution(x, w, windows), lambda t: t),  # noqa: B023
            ("exact", lambda x, w: by_convolution(x, w, windows), lambda t: t.double()),  # noqa: B023
        ):
            leaves = [cast(t).clone().requires_grad_() for t in (rows, *weights)]
            out = function(leaves[0], leaves[1:])
            found = [out, *torch.autograd.grad(out, leaves, cast(cotangent))]
            for label, tensor in zip(("out", "drows", "dweight 0", "dweight 1"), found, strict=True):
                pools.setdefault(label, {}).setdefault(kind, []).append(tensor.detach().flatten())
    for label, pool in pools.items():
        fast, plain, exact = (torch.cat(pool[kind]) for kind in ("fast", "torch", "exact"))
        assert exact.numel() >= 10_000
        comparison = compare(label, fast, plain, exact, dtype)
        assert comparison.passed, comparison
        # Half precision is rounded once, at the end (drows: its parts too); one rounding is an error of 0.2 eps.
        assert comparison.fast_error < (4 if dtype == torch.float32 else 0.4) * comparison.eps, comparison


def test_long_sums_are_at_least_as_exact_as_the_convolutions():
    """One image, K = 147,456, features with a common mean: a single thin product is ten times worse here."""
    config = SPProjectorConfig(kernel_sizes=(24,), detail_kernel=None, vision_width=256, spatial_width=64)
    (window,) = geometry.spatial_windows(config)
    rows = torch.randn(1, 576, 256) + 3 * torch.randn(256)
    weight = torch.empty(576, 256, 64).uniform_(-1, 1)
    fast, plain = (f.flatten() for f in (windowed_matmul(rows, [weight], encode_windows([window])),
                                         by_convolution(rows, [weight], [window])))  # fmt: skip
    exact = by_convolution(rows.double(), [weight.double()], [window]).flatten()
    comparison = compare("long sum", fast, plain, exact, torch.float32)
    assert comparison.passed, comparison
    assert comparison.fast_error < 16 * comparison.eps, comparison


@pytest.mark.parametrize("levels", [(), (3,), (1, 4, 6)])
def test_pooled_rows(levels):
    x = torch.randn(2, 81, 5)
    got = pooled_rows(x, grid=9, origin=10, side=6, levels=levels)
    square = x.view(2, 9, 9, 5)[:, 1:7, 1:7].permute(0, 3, 1, 2)
    pools = [torch.nn.AdaptiveAvgPool2d(k)(square).flatten(2).transpose(1, 2) for k in levels]
    torch.testing.assert_close(got, torch.cat([x, *pools], dim=1))
    assert got is x or levels


def test_errors_name_the_mismatch():
    rows, weights, windows = problem(CONFIGS["crop+detail"])
    encoded = encode_windows(windows)
    with pytest.raises(ValueError, match="must be \\[batch"):
        windowed_matmul(rows[0], weights, encoded)
    with pytest.raises(ValueError, match="is not \\[cells, 6, 5\\]"):
        windowed_matmul(rows, [weights[0], weights[1][:, :3]], encoded)
    with pytest.raises(ValueError, match="is not \\[cells, 6, 5\\]"):
        windowed_matmul(rows, [weights[0], weights[1][:, :, :4]], encoded)
    for change in ({"origin": -1}, {"cell": -4}, {"weight": -1}, {"weight": 2}):
        with pytest.raises(ValueError, match="leaves the weights"):
            windowed_matmul(rows, weights, encode_windows([replace(windows[0], **change)]))
    last = max(w.last_source for w in windows)
    windowed_matmul(rows[:, : last + 1], weights, encoded)
    with pytest.raises(ValueError, match=f"reads row {last}"):
        windowed_matmul(rows[:, :last], weights, encoded)
    for nothing in (([], encoded), (weights, [])):
        with pytest.raises(ValueError, match="nothing to multiply"):
            windowed_matmul(rows, *nothing)
    with pytest.raises(ValueError, match="float32.*float64"):
        windowed_matmul(rows.float(), weights, encoded)
    with pytest.raises(ValueError, match=r"leaves the 7 rows: it reads row \d+"):
        windowed_matmul(rows[:, :7], weights, encoded)
    with pytest.raises(ValueError, match="cells"):
        windowed_matmul(rows, [weights[0][:-1], weights[1]], encoded)
    with pytest.raises(ValueError, match="cpu.*meta"):
        windowed_matmul(rows, [w.to("meta") for w in weights], encoded)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_computes_in_its_dtype_and_returns_float32_gradients(dtype):
    rows, weights, windows = problem(CONFIGS["crop+detail"], dtype=torch.float32)
    weights[0].requires_grad_()
    encoded = encode_windows(windows)
    with torch.autocast("cpu", dtype=dtype):
        out = windowed_matmul(rows, weights, encoded)
    assert out.dtype == dtype
    torch.testing.assert_close(out, windowed_matmul(rows.to(dtype), [w.to(dtype) for w in weights], encoded))
    out.float().sum().backward()
    assert weights[0].grad.dtype == torch.float32


def test_autocast_leaves_float64_and_the_backward_alone():
    rows, weights, windows = problem(CONFIGS["crop+detail"])
    encoded = encode_windows(windows)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(windowed_matmul(rows, weights, encoded), by_convolution(rows, weights, windows))
    rows, weights = rows.float().requires_grad_(), [w.float() for w in weights]
    out = windowed_matmul(rows, weights, encoded)
    (expected,) = torch.autograd.grad(out.sum(), rows, retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (got,) = torch.autograd.grad(out.sum(), rows)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_half_precision_bounds_its_im2col(monkeypatch):
    rows, weights, windows = problem(CONFIGS["crop+detail"], batch=5, dtype=torch.bfloat16)
    encoded = encode_windows(windows)
    expected = windowed_matmul(rows, weights, encoded)
    monkeypatch.setattr("sp_fast.kernels.windowed_matmul_torch.COLUMNS_BYTES", 1)
    torch.testing.assert_close(windowed_matmul(rows, weights, encoded), expected)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_projectors_weight_gradients_are_one_pass(name, monkeypatch):
    """Each further pass would read the rows, and add to the buffers, once more."""
    from sp_fast.kernels import windowed_matmul as module

    rows, weights, windows = problem(CONFIGS[name])
    passes = []
    monkeypatch.setitem(module._DWEIGHTS, "torch", lambda *given: passes.append(given))
    outputs = sum(w.outputs for w in windows)
    grad = rows.new_ones(len(rows), outputs, weights[0].shape[2])
    module.windowed_matmul_dweight(grad, rows, [torch.empty_like(w) for w in weights], encode_windows(windows))
    assert len(passes) == 1


def test_import_twice_registers_once():
    import importlib

    from sp_fast.kernels import windowed_matmul as module

    again = importlib.reload(module)
    rows, weights, windows = problem(CONFIGS["sliding"])
    encoded = encode_windows(windows)
    torch.testing.assert_close(again.windowed_matmul(rows, weights, encoded), by_convolution(rows, weights, windows))
