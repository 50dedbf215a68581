"""The op on quantised weights against float64 on the dequantised ones, its storage, its contracts."""

import pytest
import torch

from sp_fast.bench.accuracy import compare
from sp_fast.kernels import windowed_matmul_quantized as module
from sp_fast.kernels.quantized import FP8, INT4, SCHEMES, dequantize_cells, quantize_cells
from sp_fast.kernels.window import Window, encode_windows
from sp_fast.kernels.windowed_matmul_quantized import windowed_matmul_quantized
from tests.test_windowed_matmul import CONFIGS, LAYOUTS, by_convolution, problem

NAMED = {scheme.name: scheme for scheme in SCHEMES.values()}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def quantised_problem(config, scheme, batch=2, dtype=torch.float32, seed=0):
    """Rows, values, scales, windows, and the exact weights ``[cells, C, D]`` in float64."""
    rows, weights, windows = problem(config, batch, dtype, seed)
    values, scales = zip(*(quantize_cells(w, NAMED[scheme]) for w in weights), strict=True)
    return rows, list(values), list(scales), windows, [exact(v, s) for v, s in zip(values, scales, strict=True)]


def exact(values, scales):
    cells, depth, stored = values.shape
    out = torch.empty(cells, depth, stored * SCHEMES[values.dtype].channels, dtype=torch.float64)
    return dequantize_cells(values, scales, out).transpose(1, 2)


def pooled_accuracy(config, scheme, dtype, forward, batch=40):
    """A comparison with plain torch on the dequantised weights in ``dtype``, pooled to 10,000 elements."""
    pools = ([], [], [])
    for seed in range(100):
        rows, values, scales, windows, weights = quantised_problem(config, scheme, batch, dtype, seed)
        pools[0].append(forward(rows, values, scales, windows).flatten())
        pools[1].append(by_convolution(rows, [w.to(dtype) for w in weights], windows).flatten())
        pools[2].append(by_convolution(rows.double(), weights, windows).flatten())
        if sum(map(len, pools[2])) >= 10_000:
            break
    return compare(f"{scheme} {dtype}", *map(torch.cat, pools), dtype)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", NAMED)
@pytest.mark.parametrize("name", ["crop+detail", "pool+details"])
def test_accuracy_on_the_dequantised_weights(name, scheme, dtype):
    """At most 1.5 times the error of plain torch in the same type and one ulp."""
    result = pooled_accuracy(
        CONFIGS[name], scheme, dtype, lambda r, v, s, w: windowed_matmul_quantized(r, v, s, encode_windows(w))
    )
    assert result.passed, result
    assert result.fast_error < (4 if dtype == torch.float32 else 0.4) * result.eps, result  # rounded once, at the end


@pytest.mark.parametrize("scheme", NAMED)
@pytest.mark.parametrize("width", [2, 6, 130, 300])
def test_storage(scheme, width):
    """Groups of 128 channels, a last one that is not whole, half a step at most, and the largest exactly."""
    weight = torch.randn(5, width, 3) * torch.logspace(-30, 30, 15).view(5, 1, 3)
    weight[2, :, 1] = 0
    values, scales = quantize_cells(weight, NAMED[scheme])
    assert (tuple(values.shape), tuple(scales.shape)) == NAMED[scheme].shapes(5, width, 3)
    assert values.is_contiguous()
    assert scales.is_contiguous()
    found = exact(values, scales)
    channel = torch.arange(width)
    groups = channel % (width // 2) // 64 if scheme == "int4" else torch.zeros_like(channel)
    assert scales.shape[1] == groups.max() + 1
    for group in range(scales.shape[1]):
        part, got = weight[:, groups == group].double(), found[:, groups == group]
        largest = part.abs().amax(1, keepdim=True)
        step = largest / {"int8": 127, "int4": 7, "fp8": 14}[scheme]  # of fp8 between 224 and 448, the widest
        assert ((got - part).abs() <= 0.5001 * step).all()
        torch.testing.assert_close(got.abs().amax(1, keepdim=True), largest, rtol=1e-6, atol=0)
    assert found[2, :, 1].eq(0).all()


def test_every_stored_value_means_what_it_should():
    every = torch.arange(256, dtype=torch.uint8).view(1, 1, 256)
    one = torch.ones(1, 1, 1)
    fp8 = every.view(torch.float8_e4m3fn)
    expected = fp8.double()
    finite = expected.isfinite()[0, 0]
    assert torch.equal(exact(fp8, one)[0, finite, 0], expected[0, 0, finite])
    assert int(finite.sum()) == 254
    int4 = exact(every, torch.ones(1, 4, 1))[0, :, 0]
    assert torch.equal(int4[:256], (every[0, 0] % 16).double() - 8)
    assert torch.equal(int4[256:], (every[0, 0] // 16).double() - 8)


def test_pieces_are_schedule_only(monkeypatch):
    for scheme in NAMED:
        rows, values, scales, windows, _ = quantised_problem(CONFIGS["crop+detail"], scheme)
        whole = windowed_matmul_quantized(rows, values, scales, encode_windows(windows))
        monkeypatch.setattr(module, "PIECE_BYTES", 3 * 4 * 30)  # three cells, which divide no window's width of 4
        torch.testing.assert_close(windowed_matmul_quantized(rows, values, scales, encode_windows(windows)), whole)
        monkeypatch.undo()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_rows(layout):
    rows, values, scales, windows, weights = quantised_problem(CONFIGS["crop+detail"], "int4", 3, torch.float64)
    strided = LAYOUTS[layout](rows)
    found = windowed_matmul_quantized(strided, values, scales, encode_windows(windows))
    torch.testing.assert_close(found, by_convolution(strided, weights, windows))


@pytest.mark.parametrize("scheme", NAMED)
def test_opcheck(scheme):
    rows, values, scales, windows, _ = quantised_problem(CONFIGS["sliding"], scheme)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")[scheme == "fp8" :]  # schema multiplies fp8
    arguments = (rows, values, scales, encode_windows(windows), "torch")
    torch.library.opcheck(torch.ops.sp_fast.windowed_matmul_quantized.default, arguments, test_utils=tests)


def test_errors_name_the_mismatch():
    rows, values, scales, windows, _ = quantised_problem(CONFIGS["crop+detail"], "int8")
    encoded = encode_windows(windows)
    changed = [scales[0], scales[1].half()]
    for arguments, message in (
        ((rows, [], [], encoded), "at least one weight and one window"),
        ((rows, values, scales[:1], encoded), "2 values, 1 scales"),
        ((rows, values, scales, []), "at least one weight and one window"),
        ((rows[0], values, scales, encoded), r"rows must be \[batch"),
        ((rows.int(), values, scales, encoded), "in floating point, not torch.int32"),
        ((rows, [v.int() for v in values], scales, encoded), "torch.int32, which is none of torch.int8"),
        ((rows[:, :, :5], values, scales, encoded), r"are not int8's \(89, 5, 5\)"),
        ((rows, [values[0], values[1][:, :4]], scales, encoded), r"are not int8's \(25, 5, 6\)"),
        ((rows, values, [scales[0], scales[1][:, :, :4]], encoded), r"are not int8's"),
        ((rows, [values[0], values[1].view(torch.uint8)], scales, encoded), "must be torch.int8, as all are"),
        ((rows, values, changed, encoded), "with scales torch.float16 must be"),
        ((rows, [v.mT.contiguous().mT for v in values], scales, encoded), "must be contiguous"),
        ((rows, values, [s.to("meta") for s in scales], encoded), "scales on meta must be"),
        ((rows[:, :7], values, scales, encoded), r"leaves the 7 rows: it reads row \d+"),
        ((rows, values, scales, encode_windows([Window(2, 0, 0, 1, 1, 1, 1, 1, 1)])), "leaves the weights"),
        ((rows, values, scales, encoded, "cuda"), "backend='cuda' is none of 'torch', 'triton'"),
    ):
        with pytest.raises(ValueError, match=message):
            windowed_matmul_quantized(*arguments)
    _, values, scales, _, _ = quantised_problem(CONFIGS["crop+detail"], "int4")
    with pytest.raises(ValueError, match="int4 stores 2 channels a byte, which 5 channels do not fill"):
        windowed_matmul_quantized(rows[:, :, :5], values, scales, encoded)


def test_memory_stays_a_piece():
    """Nothing of a weight's size is allocated: one window of 64 cells, 16 MiB widened."""
    values, scales = torch.zeros(64, 256, 256, dtype=FP8.dtype), torch.ones(64, 1, 256)
    rows, window = torch.randn(1, 64, 256), encode_windows([Window(0, 0, 0, 8, 8, 8, 1, 1, 1)])
    with torch.profiler.profile(profile_memory=True) as profile:
        windowed_matmul_quantized(rows, [values], [scales], window)
    assert max(event.self_cpu_memory_usage for event in profile.events()) <= module.PIECE_BYTES
    assert INT4.shapes(1, 256, 8) == ((1, 8, 128), (1, 2, 8))
