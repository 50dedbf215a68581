"""The pooling pyramid's Triton kernel in the interpreter: overlapping bins, layouts, large addresses."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sp_fast.kernels.pooled_rows import pooled_rows, pooled_rows_torch
from tests.test_windowed_matmul import LAYOUTS


def exact(x, *geometry):
    return pooled_rows_torch(x.double(), *geometry)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("levels", [(1,), (4, 6, 7), (5, 9)])
def test_overlapping_bins(levels, dtype):
    """Of a centred square and of the whole map: one rounding of the exact mean."""
    x = torch.randn(2, 81, 20).to(dtype)
    for origin, side in ((0, 9), (10, 7)):
        geometry = (9, origin, side, tuple(k for k in levels if k <= side))
        found, expected = pooled_rows(x, *geometry, "triton"), exact(x, *geometry)
        eps = torch.finfo(dtype).eps
        assert ((found.double() - expected).abs() <= eps * (0.51 * expected.abs() + 2 * (dtype == torch.float32))).all()
        assert torch.equal(found[:, :81], x)


@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_random_pyramids(data):
    grid = data.draw(st.integers(2, 9))
    side = data.draw(st.integers(1, grid))
    levels = tuple(sorted(data.draw(st.sets(st.integers(1, side), min_size=1, max_size=4))))
    origin = data.draw(st.integers(0, grid - side)) * (grid + 1)
    x = torch.randn(data.draw(st.integers(1, 3)), grid * grid, data.draw(st.integers(1, 70)))
    torch.testing.assert_close(
        pooled_rows(x, grid, origin, side, levels, "triton").double(),
        exact(x, grid, origin, side, levels),
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_and_gradients(layout):
    x = LAYOUTS[layout](torch.randn(3, 36, 10)).detach().requires_grad_()
    found, expected = (pooled_rows(x, 6, 0, 6, (1, 4), backend) for backend in ("triton", "torch"))
    torch.testing.assert_close(found, expected)
    cotangent = torch.randn(3, 53, 20)[:, :, ::2]
    torch.testing.assert_close(*(torch.autograd.grad(out, x, cotangent) for out in (found, expected)))


def test_empty_batch():
    assert pooled_rows(torch.zeros(0, 36, 4), 6, 0, 6, (2,), "triton").shape == (0, 40, 4)


def test_beyond_two_billion_elements(tmp_path):
    path, far = tmp_path / "sparse", 2**30 + 64  # fits an int32; twice as far does not
    with path.open("wb") as file:
        file.truncate(2 * (2 * far + 36 * 16))
    buffer = torch.from_file(str(path), shared=True, size=2 * far + 36 * 16, dtype=torch.float16)
    x = buffer.as_strided((3, 36, 16), (far, 16, 1))
    x.copy_(torch.randn(x.shape))
    torch.testing.assert_close(pooled_rows(x, 6, 0, 6, (4,), "triton"), pooled_rows(x, 6, 0, 6, (4,)))
