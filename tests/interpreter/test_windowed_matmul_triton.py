"""The windowed matmul's Triton kernels in the interpreter: numbers, layouts, large addresses, refusals."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sp_fast import SPProjectorConfig, geometry
from sp_fast.bench.accuracy import compare
from sp_fast.kernels.device import CHIPS, pretend
from sp_fast.kernels.tiles import split_cells, windowed_tiles
from sp_fast.kernels.window import Window, encode_windows
from sp_fast.kernels.windowed_matmul import windowed_matmul
from sp_fast.kernels.windowed_matmul_torch import windowed_matmul_torch
from sp_fast.kernels.windowed_matmul_triton import windowed_matmul_triton
from sp_fast.kernels.windowed_plan_triton import partial_rows, plan_windows
from tests.test_windowed_matmul import CONFIGS, LAYOUTS, by_convolution, problem

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDER = {name: replace(config, vision_width=16, spatial_width=64) for name, config in CONFIGS.items()}
TINIEST = SPProjectorConfig("crop", (2,), detail_kernel=2, detail_stride=1, grid=3, vision_width=3, spatial_width=2)
CHIPS_TRIED = {"sm_80": lambda: pretend(CHIPS[80]), "sm_90": lambda: pretend(CHIPS[90])}


def exactly(rows, weights, windows):
    return by_convolution(rows.double(), [w.double() for w in weights], windows)


def agrees(found, rows, weights, windows):
    """Half the digits of the type: a wrong index is off by far more, a rounding by far less."""
    expected = exactly(rows, weights, windows)
    scale = expected.abs().max().item() if expected.numel() else 0
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=scale * torch.finfo(rows.dtype).eps ** 0.5)


# Every type, chip and pyramid once; the campaign has all.
DAILY = [
    ("crop+detail", "sm_80", torch.float32),
    ("crop+detail", "sm_90", torch.bfloat16),
    ("pool+details", "sm_90", torch.float16),
]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("name", "chip", "dtype"),
    [
        pytest.param(*case, marks=() if case in DAILY else pytest.mark.campaign)
        for case in itertools.product(["crop+detail", "pool+details"], CHIPS_TRIED, DTYPES)
    ],
    ids=str,
)
def test_accuracy_beside_plain_torch(name, chip, dtype):
    """At most 1.5 times torch's own error in the same type and one ulp, pooled to 10,000 elements."""
    pools = ([], [], [])
    for seed in itertools.count():
        rows, weights, windows = problem(WIDER[name], 8, dtype, seed)
        with CHIPS_TRIED[chip]():
            pools[0].append(windowed_matmul_triton(rows, weights, windows).flatten())
        pools[1].append(windowed_matmul_torch(rows, weights, windows).flatten())
        pools[2].append(exactly(rows, weights, windows).flatten())
        if sum(map(len, pools[2])) >= 10_000:
            break
    result = compare(name, *map(torch.cat, pools), dtype)
    assert result.passed, result
    assert result.fast_error < (4 if dtype == torch.float32 else 0.4) * result.eps, result  # rounded once, at the end


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    "batch", [0, 1, 5, 33, 65, *(pytest.param(batch, marks=pytest.mark.campaign) for batch in (2, 9, 17, 70))]
)
def test_every_batch_bucket(batch):
    """Beyond 64 images splits are longer; the launch choice changes at every power of two."""
    rows, weights, windows = problem(CONFIGS["sliding"], batch, torch.float32)
    with pretend(CHIPS[90]):
        agrees(windowed_matmul_triton(rows, weights, windows), rows, weights, windows)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("width", "depth"),
    [
        (16, 24),
        (17, 40),
        (100, 40),
        (130, 200),
        *(pytest.param(*widths, marks=pytest.mark.campaign) for widths in ((17, 200), (64, 16), (130, 24))),
    ],
)
def test_widths_that_tiles_do_not_divide(width, depth):
    config = SPProjectorConfig("crop", (2, 5), detail_kernel=3, grid=6, vision_width=width, spatial_width=depth)
    rows, weights, windows = problem(config, 3, torch.float32)
    for chip in (80, 90):
        with pretend(CHIPS[chip]):
            agrees(windowed_matmul_triton(rows, weights, windows), rows, weights, windows)


def test_tiles_are_schedule_only():
    rows, weights, windows = problem(CONFIGS["crop+detail"], 3, torch.float32)
    tiles = windowed_tiles(CHIPS[90], rows.dtype, 3, rows.shape[2], weights[0].shape[2])
    for change in ({}, {"block_single": 2}, {"block_many": 16}, {"block_d": 32}, {"stages_single": 2, "warps": 8}):
        agrees(windowed_matmul_triton(rows, weights, windows, replace(tiles, **change)), rows, weights, windows)


STEPS = ((1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (3, 2, 1), (1, 3, 2))
ORDERS = tuple(itertools.permutations(range(3)))
LAID_OUT = [
    *((order, step, (0, 1, 16)) for order, step in zip(ORDERS, STEPS, strict=True)),
    *(pytest.param(*pair, range(18), marks=pytest.mark.campaign) for pair in itertools.product(ORDERS, STEPS)),
]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("order", "step", "offsets"), LAID_OUT, ids=str)
def test_strided_and_offset_rows(order, step, offsets):
    """Every order of dimensions in memory, gaps between elements, and eighteen offsets: 648 layouts in all, 18 daily."""
    rows, weights, windows = problem(CONFIGS["detail only"], 2, torch.float32)
    expected = windowed_matmul_torch(rows, weights, windows)
    sizes = [rows.shape[d] * step[d] for d in order]
    for offset in offsets:
        buffer = torch.full((offset + sizes[0] * sizes[1] * sizes[2],), float("nan"))
        places = buffer[offset:].view(sizes).permute([order.index(d) for d in range(3)])
        strided = places[tuple(slice(None, None, s) for s in step)]
        strided.copy_(rows)
        torch.testing.assert_close(windowed_matmul_triton(strided, weights, windows), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_rows(layout):
    rows, weights, windows = problem(CONFIGS["crop+detail"], 3, torch.float32)
    strided = LAYOUTS[layout](rows)
    agrees(windowed_matmul_triton(strided, weights, windows), strided, weights, windows)


def drawn_problem(draw):
    """Rows, weights and windows of any configuration, in any type."""
    grid = draw(st.integers(3, 8))
    pyramid = draw(st.sampled_from(["crop", "pool"]))
    sizes = sorted(draw(st.sets(st.integers(1, grid), max_size=3)))
    detail = draw(st.one_of(st.none() if sizes else st.integers(1, grid), st.integers(1, grid)))
    detail = min(detail, max(sizes, default=grid)) if detail and pyramid == "crop" else detail
    config = SPProjectorConfig(
        pyramid, tuple(sizes), detail_kernel=detail, detail_stride=draw(st.integers(1, 3)), grid=grid,
        vision_width=draw(st.integers(1, 40)), spatial_width=draw(st.integers(1, 40)),
    )  # fmt: skip
    dtype = draw(st.sampled_from(DTYPES))
    return problem(config, draw(st.integers(1, 5)), dtype, draw(st.integers(0, 99)))


@pytest.mark.parametrize("examples", [10, pytest.param(100, marks=pytest.mark.campaign)])
def test_random_configurations_and_shapes(examples):
    @settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def check(data):
        rows, weights, windows = drawn_problem(data.draw)
        with pretend(CHIPS[data.draw(st.sampled_from(sorted(CHIPS)))]):
            agrees(windowed_matmul_triton(rows, weights, windows), rows, weights, windows)

    check()


def sparse(elements, tmp_path, dtype=torch.float16):
    """A tensor of zeros that takes address space, and memory only where it is written."""
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(elements * dtype.itemsize)
    return torch.from_file(str(path), shared=True, size=elements, dtype=dtype)


def test_rows_beyond_two_billion_elements(tmp_path):
    windows = [Window(0, 0, 1, 2, 2, 3, 1, 1, 1)]
    far = 2**30 + 64  # fits an int32; twice as far does not
    rows = sparse(2 * far + 9 * 16, tmp_path).as_strided((3, 9, 16), (far, 16, 1))
    rows.copy_(torch.randn(rows.shape))
    weights = [torch.randn(4, 16, 8).half()]
    agrees(windowed_matmul_triton(rows, weights, windows), rows, weights, windows)


def test_weights_beyond_two_billion_elements(tmp_path):
    cells = 2**31 // (16 * 8) + 8
    weight = sparse(cells * 16 * 8, tmp_path).view(cells, 16, 8)
    weight[-4:] = torch.randn(4, 16, 8)
    rows = torch.randn(1, 9, 16).half()
    found = windowed_matmul_triton(rows, [weight], [Window(0, cells - 4, 1, 2, 2, 3, 1, 1, 1)])
    agrees(found, rows, [weight[-4:]], [Window(0, 0, 1, 2, 2, 3, 1, 1, 1)])


def test_plan_of_the_published_windows():
    """Splits and partial rows by hand: sums of ceil(k * k / 4), and 32 splits of 25 outputs."""
    config = SPProjectorConfig()
    windows = geometry.spatial_windows(config) + geometry.detail_windows(config)
    single, many = plan_windows(windows, split_cells(1, torch.bfloat16))
    assert partial_rows(single + many) == (4 + 16 + 36 + 64 + 100 + 144) + 32 * 25
    assert split_cells(64, torch.float16) == split_cells(1, torch.float16) != split_cells(65, torch.float16)


def test_gradients_behind_the_triton_forward():
    rows, weights, windows = problem(CONFIGS["crop+detail"], 2, torch.float32)
    found = []
    for backend in ("triton", "torch"):
        leaves = [t.clone().requires_grad_() for t in (rows, *weights)]
        out = windowed_matmul(leaves[0], leaves[1:], encode_windows(windows), backend)
        found.append(torch.autograd.grad(out, leaves, torch.ones_like(out)))
    torch.testing.assert_close(*found)


def test_opcheck():
    rows, weights, windows = problem(TINIEST, 2, torch.float32)
    inputs = [t.requires_grad_() for t in (rows, *weights)]
    arguments = (inputs[0], inputs[1:], encode_windows(windows), "triton")
    torch.library.opcheck(torch.ops.sp_fast.windowed_matmul.default, arguments)


def test_refusals_name_the_way_out():
    rows, weights, windows = problem(CONFIGS["crop+detail"], 1, torch.float32)
    with pytest.raises(ValueError, match=r"need contiguous packed weights.*call \.contiguous\(\) once"):
        windowed_matmul_triton(rows, [weights[0].transpose(1, 2).contiguous().transpose(1, 2), weights[1]], windows)
    with pytest.raises(ValueError, match="take one or two packed weights, not 3: use backend='torch'"):
        windowed_matmul(rows, [*weights, weights[0]], encode_windows(windows), "triton")
    with pretend(replace(CHIPS[86], shared_memory=1000)), pytest.raises(ValueError, match="this GPU .* has 1000: use"):
        windowed_matmul_triton(rows, weights, windows)
