"""The quantised windowed matmul's Triton kernel in the interpreter: numbers, ragged widths, large addresses, refusals."""

import itertools
from dataclasses import replace

import pytest
import torch

from sp_fast import SPProjector, SPProjectorConfig
from sp_fast.kernels.device import CHIPS, pretend
from sp_fast.kernels.quantized import FP8
from sp_fast.kernels.window import Window, encode_windows
from sp_fast.kernels.windowed_matmul_quantized import windowed_matmul_quantized, windowed_matmul_quantized_torch
from sp_fast.kernels.windowed_matmul_quantized_triton import windowed_matmul_quantized_triton
from tests.helpers import features_for, randomised, shrunk
from tests.interpreter.test_windowed_matmul_triton import DTYPES, agrees, sparse
from tests.test_windowed_matmul import CONFIGS
from tests.test_windowed_matmul_quantized import NAMED, exact, pooled_accuracy, quantised_problem

DAILY = [("int8", torch.float32), ("fp8", torch.bfloat16), ("int4", torch.bfloat16)]
OTHERS = [pair for pair in itertools.product(NAMED, DTYPES) if pair not in DAILY]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("scheme", "dtype"), DAILY + [pytest.param(*p, marks=pytest.mark.campaign) for p in OTHERS])
def test_accuracy_on_the_dequantised_weights(scheme, dtype):
    config = replace(CONFIGS["crop+detail"], vision_width=16, spatial_width=64)
    with pretend(CHIPS[90]):
        result = pooled_accuracy(config, scheme, dtype, windowed_matmul_quantized_triton, 9)
    assert result.passed, result
    assert result.fast_error < (4 if dtype == torch.float32 else 0.4) * result.eps, result


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("scheme", NAMED)
@pytest.mark.parametrize(("width", "depth"), [(6, 24), (300, 17)])
def test_widths_that_tiles_and_groups_do_not_divide(scheme, width, depth):
    config = SPProjectorConfig("crop", (2, 5), detail_kernel=3, grid=6, vision_width=width, spatial_width=depth)
    rows, values, scales, windows, weights = quantised_problem(config, scheme, 3)
    with pretend(CHIPS[80]):
        agrees(windowed_matmul_quantized_triton(rows, values, scales, windows), rows, weights, windows)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("batch", [0, 1, 65])
def test_every_number_of_rows(batch):
    """Splits are longer beyond 64 images; the launch choice changes with the batch."""
    rows, values, scales, windows, weights = quantised_problem(CONFIGS["sliding"], "int4", batch)
    with pretend(CHIPS[90]):
        agrees(windowed_matmul_quantized_triton(rows, values, scales, windows), rows, weights, windows)


def test_every_stored_fp8_number():
    """In each type of features, by a product with one."""
    bits = torch.tensor([b for b in range(256) if b & 0x7F != 0x7F], dtype=torch.uint8)
    values = bits.view(FP8.dtype).view(1, -1, 1)
    scales, window = torch.ones(1, 1, len(bits)), [Window(0, 0, 0, 1, 1, 1, 1, 1, 1)]
    for dtype in DTYPES:
        found = windowed_matmul_quantized_triton(torch.ones(1, 1, 1, dtype=dtype), [values], [scales], window)
        assert torch.equal(found[0, 0].float(), bits.view(FP8.dtype).float())


def test_strided_rows_and_the_registered_op():
    rows, values, scales, windows, _ = quantised_problem(CONFIGS["crop+detail"], "int8", 3)
    wider = torch.cat([rows, rows], dim=2)[:, :, :6]
    found = windowed_matmul_quantized(wider, values, scales, encode_windows(windows), "triton")
    torch.testing.assert_close(found, windowed_matmul_quantized_torch(rows, values, scales, windows))


def test_weights_beyond_two_billion_elements(tmp_path):
    cells = 2**31 // (16 * 8) + 8
    values = sparse(cells * 16 * 8, tmp_path, torch.int8).view(cells, 8, 16)
    (tmp_path / "scales").mkdir()
    scales = sparse(cells * 8, tmp_path / "scales", torch.float32).view(cells, 1, 8)
    values[-4:], scales[-4:] = torch.randint(-127, 128, (4, 8, 16)), torch.rand(4, 1, 8)
    rows, window = torch.randn(1, 9, 16).half(), Window(0, cells - 4, 1, 2, 2, 3, 1, 1, 1)
    found = windowed_matmul_quantized_triton(rows, [values], [scales], [window])
    agrees(found, rows, [exact(values[-4:], scales[-4:])], [replace(window, cell=0)])


def test_a_projector():
    """Spatial tokens through the fused tail, beside plain torch."""
    made = randomised(SPProjector(shrunk("pool-dfi"), backend="triton")).quantized("int4")
    plain = randomised(SPProjector(shrunk("pool-dfi"), backend="torch")).quantized("int4")
    x = features_for(made.config, 1)
    with torch.no_grad():
        torch.testing.assert_close(made(x), plain(x), rtol=1e-4, atol=1e-5)


def test_refusals_name_the_way_out():
    rows, values, scales, windows, _ = quantised_problem(CONFIGS["crop+detail"], "int8", 1)
    with pytest.raises(ValueError, match="take one or two packed weights, not 3: use backend='torch'"):
        windowed_matmul_quantized(rows, [*values, values[0]], [*scales, scales[0]], encode_windows(windows), "triton")
    with pretend(replace(CHIPS[86], shared_memory=100)), pytest.raises(ValueError, match="this GPU .* has 100: use"):
        windowed_matmul_quantized_triton(rows, values, scales, windows)
