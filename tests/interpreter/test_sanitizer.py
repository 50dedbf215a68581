"""The sanitizer's own tests: bugs planted in small kernels are caught, and right kernels pass with right numbers."""

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, InterpreterError
from triton.tools.tensor_descriptor import TensorDescriptor

from tests.interpreter import sanitizer
from tests.interpreter.sanitizer import SanitizerError

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of infinities and NaN

ALL_BF16 = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)
INF = float("inf")


def same(actual, expected):
    """Equal bits, except that any NaN equals any other."""
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
    if expected.is_floating_point():  # assert_close takes -0 for 0
        signs = torch.signbit(actual) == torch.signbit(expected)
        assert (signs | expected.isnan()).all()


# --- bfloat16 ---


@triton.jit
def cast_kernel(x, y, ROUNDING: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + offsets, tl.load(x + offsets).to(y.dtype.element_ty, fp_downcast_rounding=ROUNDING))


def cast(x, dtype, rounding=None):
    y = torch.empty(x.shape, dtype=dtype)
    cast_kernel[x.numel() // 1024,](x, y, rounding, 1024)
    return y


def awkward_float32():
    """Random numbers, those next to a tie, subnormals, overflows, infinities, and NaNs of every payload."""
    bits = torch.randint(-(2**31), 2**31, (2**17,), dtype=torch.int64)
    upper = ALL_BF16.view(torch.int16).to(torch.int64) << 16
    ties = [upper + lower for lower in (0x7FFF, 0x8000, 0x8001, 1, 0xFFFF)]
    return torch.cat([bits, *ties]).to(torch.int32).view(torch.float32)


def finite(x, limit=3e38):
    return torch.where(x.float().abs() < limit, x, 0.5)


def test_every_bfloat16_becomes_the_same_float32():
    wide = cast(ALL_BF16, torch.float32)
    assert torch.equal(wide.view(torch.int32), ALL_BF16.float().view(torch.int32))  # NaN payloads too


def test_float32_rounds_to_the_nearest_even_bfloat16():
    x = awkward_float32()
    same(cast(x, torch.bfloat16), x.bfloat16())


def test_float32_rounds_towards_zero_on_request():
    x = awkward_float32()
    upper = (x.view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)
    same(cast(x, torch.bfloat16, "rtz"), torch.where(x.isnan(), torch.nan, upper))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_bfloat16_to_other_floats(dtype):
    same(cast(ALL_BF16, dtype), ALL_BF16.to(dtype))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.int64])
def test_bfloat16_to_integers(dtype):
    x = finite(ALL_BF16, 2 ** (torch.iinfo(dtype).bits - 1))
    same(cast(x, dtype), x.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int8, torch.int32, torch.int64])
def test_other_types_to_bfloat16(dtype):
    numbers = torch.randn(4096, dtype=torch.float64) * 2.0 ** torch.randint(-160, 160, (4096,))
    x = numbers.clamp(-120, 120).to(dtype) if dtype == torch.int8 else finite(numbers, 2e9).to(dtype)
    same(cast(x, torch.bfloat16), x.bfloat16())


@triton.jit
def binary_kernel(x, y, out, OP: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(x + offsets)
    b = tl.load(y + offsets)
    if OP == "add":
        result = a + b
    elif OP == "sub":
        result = a - b
    elif OP == "mul":
        result = a * b
    elif OP == "div":
        result = a / b
    elif OP == "neg":
        result = 1.0 - (-a)
    elif OP == "abs":
        result = tl.abs(a)
    elif OP == "maximum":
        result = tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)
    elif OP == "clamp":
        low, high = tl.full([BLOCK], -1.5, tl.bfloat16), tl.full([BLOCK], 2.5, tl.bfloat16)
        result = tl.clamp(a, low, high, propagate_nan=tl.PropagateNan.ALL)
    elif OP == "fma":
        result = tl.fma(a, b, tl.full([BLOCK], 1.0, tl.bfloat16))
    elif OP == "scalar":
        result = a * 1.7 + 2
    elif OP == "where":
        result = tl.where(a < b, a, 0.3)
    elif OP == "less":
        result = (a < b).to(tl.bfloat16)
    elif OP == "float32 less":
        result = (a.to(tl.float32) < b.to(tl.float32)).to(tl.bfloat16)
    elif OP == "not equal":
        result = (a != b).to(tl.bfloat16)
    elif OP == "nan":
        result = tl.where(a != a, 1.0, 0.0).to(tl.bfloat16)
    tl.store(out + offsets, result)


BINARY = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "neg": lambda a, b: 1 + a,
    "abs": lambda a, b: a.abs(),
    "maximum": torch.maximum,
    "clamp": lambda a, b: a.clamp(-1.5, 2.5),
    "fma": lambda a, b: (a.double() * b.double() + 1).bfloat16(),
    "scalar": lambda a, b: a * torch.tensor(1.7).bfloat16() + 2,
    "where": lambda a, b: torch.where(a < b, a, torch.tensor(0.3).bfloat16()),
    "less": lambda a, b: (a < b).bfloat16(),
    "float32 less": lambda a, b: (a < b).bfloat16(),
    "not equal": lambda a, b: (a != b).bfloat16(),
    "nan": lambda a, b: a.isnan().bfloat16(),
}


@pytest.mark.parametrize("op", BINARY)
def test_bfloat16_arithmetic(op):
    a, b = ALL_BF16, ALL_BF16[torch.randperm(2**16)]
    out = torch.empty_like(a)
    binary_kernel[16,](a, b, out, op, 4096)
    same(out, BINARY[op](a, b))


@triton.jit
def function_kernel(x, out, FUNCTION: tl.constexpr, BLOCK: tl.constexpr):
    a = tl.load(x + tl.arange(0, BLOCK)).to(tl.float32)
    if FUNCTION == "exp":
        result = tl.exp(a)
    elif FUNCTION == "erf":
        result = tl.erf(a)
    elif FUNCTION == "rsqrt":
        result = tl.rsqrt(a)
    elif FUNCTION == "log":
        result = tl.log(a)
    tl.store(out + tl.arange(0, BLOCK), result.to(tl.bfloat16))


@pytest.mark.parametrize("function", ["exp", "erf", "rsqrt", "log"])
def test_functions_of_bfloat16(function):
    x = torch.randn(1024).abs().bfloat16()
    out = torch.empty_like(x)
    function_kernel[1,](x, out, function, 1024)
    expected = getattr(torch, function)(x.double()).float()
    torch.testing.assert_close(out.float(), expected, rtol=2**-8, atol=1e-6)


@triton.jit
def add_up(a, b):
    return a + b


@triton.jit
def reduce_kernel(x, out, REDUCTION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    rows = tl.arange(0, ROWS)
    a = tl.load(x + rows[:, None] * COLUMNS + tl.arange(0, COLUMNS))
    if REDUCTION == "sum":
        result = tl.sum(a, axis=1)
    elif REDUCTION == "max":
        result = tl.max(a, axis=1)
    elif REDUCTION == "min":
        result = tl.min(a, axis=1)
    elif REDUCTION == "argmax":
        result = tl.argmax(a, axis=1).to(tl.bfloat16)
    elif REDUCTION == "custom":
        result = tl.reduce(a, 1, add_up)
    elif REDUCTION == "total":
        result = tl.zeros([ROWS], tl.bfloat16) + tl.sum(a)
    elif REDUCTION == "cumsum":
        result = tl.sum(tl.where(tl.arange(0, COLUMNS) == COLUMNS - 1, tl.cumsum(a, axis=1), 0), axis=1)
    elif REDUCTION == "cumprod":
        powers = tl.where(a < 0, -2.0, 0.5).to(tl.bfloat16)
        result = tl.sum(tl.where(tl.arange(0, COLUMNS) == COLUMNS - 1, tl.cumprod(powers, axis=1), 0), axis=1)
    tl.store(out + rows, result)


REDUCTIONS = {
    "sum": lambda x: x.sum(1),
    "max": lambda x: x.amax(1),
    "min": lambda x: x.amin(1),
    "argmax": lambda x: x.argmax(1),
    "custom": lambda x: x.sum(1),
    "total": lambda x: x.sum().expand(len(x)),
    "cumsum": lambda x: x.sum(1),
    "cumprod": lambda x: torch.where(x < 0, -2.0, 0.5).prod(1),
}


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_bfloat16_reductions(reduction):
    x = torch.randint(-7, 8, (8, 16)).double() / 4  # sums are exact in any order
    out = torch.empty(8, dtype=torch.bfloat16)
    reduce_kernel[1,](x.bfloat16(), out, reduction, 8, 16)
    same(out, REDUCTIONS[reduction](x).bfloat16())


@triton.jit
def dot_kernel(x, y, out, M: tl.constexpr, K: tl.constexpr, N: tl.constexpr):
    m, k, n = tl.arange(0, M), tl.arange(0, K), tl.arange(0, N)
    a = tl.load(x + m[:, None] * K + k)
    b = tl.load(y + n[:, None] * K + k)
    accumulator = tl.full([M, N], 0.125, tl.float32)
    accumulator = tl.dot(a, tl.trans(b), accumulator)
    tl.store(out + m[:, None] * N + n, tl.dot(a, b.T, accumulator))


def test_bfloat16_dot_accumulates_in_float32():
    x, y = torch.randn(32, 64).bfloat16(), torch.randn(16, 64).bfloat16()
    out = torch.empty(32, 16)
    dot_kernel[1,](x, y, out, 32, 64, 16)
    torch.testing.assert_close(out.double(), 2 * (x.double() @ y.double().T) + 0.125, rtol=1e-5, atol=1e-4)


@triton.jit
def shape_kernel(x, out, M: tl.constexpr, N: tl.constexpr):
    a = tl.load(x + tl.arange(0, M)[:, None] * N + tl.arange(0, N))
    column = tl.full([M, 1], -2.5, tl.bfloat16) + tl.zeros([M, 1], tl.bfloat16)
    a = tl.reshape(tl.trans(a + tl.broadcast_to(column, [M, N])), [M, N])
    tl.store(out + tl.arange(0, M)[:, None] * N + tl.arange(0, N), a)


def test_bfloat16_constants_and_shapes():
    x = torch.randn(8, 16).bfloat16()
    out = torch.empty_like(x)
    shape_kernel[1,](x, out, 8, 16)
    same(out, (x - 2.5).T.reshape(8, 16))


# --- bounds ---


@triton.jit
def copy_kernel(x, y, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + offsets, tl.load(x + offsets, mask=offsets < n, other=0), mask=offsets < n)


def apart(n, dtype=torch.float32):
    """Two tensors with room around them, so that an access outside of one does not meet the other."""
    return torch.arange(4 * n).to(dtype)[n : 2 * n], torch.zeros(4 * n, dtype=dtype)[n : 2 * n]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.int64])
def test_load_outside_of_its_tensor(dtype):
    x, y = apart(100, dtype)
    copy_kernel[4,](x, y, 100, 32)
    assert torch.equal(x, y)
    outside = 3 * x.element_size()
    with pytest.raises(SanitizerError, match=rf"bounds load: 3 lanes of program \(3, 0, 0\), up to {outside} bytes"):
        copy_kernel[4,](x[:97], y, 100, 32)


def test_store_outside_of_its_tensor():
    x, y = apart(100)
    with pytest.raises(SanitizerError, match=r"bounds store: 1 lanes of program \(3, 0, 0\), up to 4 bytes"):
        copy_kernel[4,](x, y[:99], 100, 32)
    assert y[99] == 0  # the store did not happen
    copy_kernel[4,](x[:99], y[:99], 99, 32)  # a launch that failed leaves nothing behind
    assert torch.equal(x[:99], y[:99])


@triton.jit
def shift_kernel(x, y, shift, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(y + offsets, tl.load(x + offsets + shift))


def test_load_before_its_tensor():
    x, y = apart(32)
    shift_kernel[1,](x, y, 0, 32)
    assert torch.equal(x, y)
    with pytest.raises(SanitizerError, match="bounds load: 5 lanes .* up to 20 bytes"):
        shift_kernel[1,](x, y, -5, 32)


@triton.jit
def atomic_kernel(counts, bins, n, CAS: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    if CAS:
        tl.atomic_cas(counts + offsets, tl.zeros([BLOCK], tl.int32), tl.full([BLOCK], 1, tl.int32))
    else:
        tl.atomic_add(counts + tl.load(bins + offsets), 1, mask=offsets < n)


@pytest.mark.parametrize("cas", [False, True])
def test_atomic_outside_of_its_tensor(cas):
    _, counts = apart(16, torch.int32)
    bins = torch.arange(16, dtype=torch.int32)
    atomic_kernel[1,](counts, bins, 16, cas, 16)
    assert torch.equal(counts, torch.ones_like(counts))
    with pytest.raises(SanitizerError, match="bounds atomic: 4 lanes .* up to 16 bytes"):
        atomic_kernel[1,](counts[:12], bins, 16, cas, 16)
    if not cas:
        atomic_kernel[1,](counts[:12], bins, 12, cas, 16)


@triton.jit
def pair_kernel(pair, out, SCALE: tl.constexpr):
    offsets = tl.arange(0, 16)
    tl.store(out + offsets, (tl.load(pair[0] + offsets) + tl.load(pair[1] + offsets)) * SCALE)


def test_tensors_in_tuples_and_keyword_arguments():
    x, out = apart(16)
    pair_kernel[1,]((x, x), out=out, SCALE=3)
    assert torch.equal(out, 6 * x)
    with pytest.raises(SanitizerError, match="bounds load: 1 lanes"):
        pair_kernel[1,]((x[:15], x[:15]), out=out, SCALE=3)
    with pytest.raises(SanitizerError, match="bounds store: 1 lanes"):
        pair_kernel[1,]((x, x), out=out[:15], SCALE=3)


@triton.jit
def descriptor_kernel(x, out):
    out.store([0, 0], x.load([0, 0]))


def test_tensor_descriptors():
    x, out = (tensor.view(8, 16) for tensor in apart(128))
    padded = TensorDescriptor(x, [5, 16], [16, 1], [8, 16])
    descriptor_kernel[1,](padded, TensorDescriptor.from_tensor(out, [8, 16]))
    assert torch.equal(out[:5], x[:5])
    assert not out[5:].any()
    too_tall = TensorDescriptor(x[:6], [8, 16], [16, 1], [8, 16])
    with pytest.raises(SanitizerError, match="bounds load: 32 lanes"):
        descriptor_kernel[1,](too_tall, TensorDescriptor.from_tensor(out, [8, 16]))


@triton.jit
def column_kernel(x, y, stride, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(y + offsets, tl.load(x + offsets * stride))


def test_strided_tensors():
    x, y = apart(256)
    column = x.view(16, 16)[:, 3]
    column_kernel[1,](column, y, 16, 16)
    assert torch.equal(y[:16], column)
    with pytest.raises(SanitizerError, match="bounds load: 1 lanes .* up to 60 bytes"):
        column_kernel[1,](column, y, 17, 16)


# --- races ---


@triton.jit
def rows_kernel(x, STRIDE: tl.constexpr, BLOCK: tl.constexpr):
    program = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    tl.store(x + program * STRIDE + tl.arange(0, BLOCK), program)


def test_two_programs_store_to_one_address():
    x = torch.empty(64, dtype=torch.int32)
    rows_kernel[2, 2](x, 16, 16)
    assert torch.equal(x, torch.arange(4, dtype=torch.int32).repeat_interleave(16))
    with pytest.raises(SanitizerError, match=r"write-write race: 4 bytes of programs \(0, 0, 0\) and \(0, 1, 0\)"):
        rows_kernel[2, 2](x, 15, 16)


@triton.jit
def repeat_kernel(x, REPEATS: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(x + offsets // REPEATS, offsets)


def test_one_store_writes_an_address_twice():
    x = torch.zeros(16, dtype=torch.int32)
    repeat_kernel[1,](x, 1, 16)
    assert torch.equal(x, torch.arange(16, dtype=torch.int32))
    with pytest.raises(SanitizerError, match=r"duplicate store: one store of program \(0, 0, 0\)"):
        repeat_kernel[1,](x, 2, 16)


@triton.jit
def neighbour_kernel(x, y, distance, BLOCK: tl.constexpr):
    offsets = (tl.program_id(0) + 1) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + offsets, tl.load(x + offsets))
    tl.store(y + offsets, tl.load(y + offsets) + tl.load(x + offsets + distance))


@pytest.mark.parametrize("distance", [1, 16, -1])
def test_a_program_reads_what_another_stores(distance):
    x, y = torch.arange(64).float(), torch.zeros(64)
    neighbour_kernel[2,](x, y, distance, 16)
    assert torch.equal(y[16:48], x[16:48] + x[16 + distance : 48 + distance])
    neighbour_kernel[2,](y, y, 0, 16)  # a program may read what it stores itself
    assert torch.equal(y[16:48], 2 * (x[16:48] + x[16 + distance : 48 + distance]))
    with pytest.raises(SanitizerError, match="read-write race: .* bytes of programs"):
        neighbour_kernel[2,](y, y, distance, 16)


@triton.jit
def interleaved_kernel(x, y, READS: tl.constexpr, BLOCK: tl.constexpr):
    blocks = tl.arange(0, 4) * 2 + tl.program_id(0)
    tl.store(x + blocks[:, None] * BLOCK + tl.arange(0, BLOCK), 1)
    rows = tl.arange(0, READS) * (8 // READS) + tl.program_id(0)
    tl.store(y + tl.program_id(0), tl.sum(tl.load(x + rows[:, None] * BLOCK + tl.arange(0, BLOCK))))


def test_a_program_reads_between_its_own_stores():
    x, y = torch.zeros(9 * 16, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    interleaved_kernel[2,](x, y, 4, 16)
    assert y.tolist() == [64, 64]
    with pytest.raises(SanitizerError, match=r"read-write race: 64 bytes of programs \(0, 0, 0\) and \(1, 0, 0\)"):
        interleaved_kernel[2,](x, y, 8, 16)


@triton.jit
def total_kernel(total, RESET: tl.constexpr):
    if RESET and tl.program_id(0) == 0:
        tl.store(total, 0)
    tl.atomic_add(total, 1)


def test_atomics_of_programs_do_not_race_but_stores_do():
    total = torch.zeros(1, dtype=torch.int32)
    total_kernel[5,](total, False)
    assert total.item() == 5
    with pytest.raises(SanitizerError, match="read-write race: 4 bytes"):
        total_kernel[5,](total, True)


# --- masked lanes ---


@triton.jit
def tail_kernel(x, y, n, OTHER: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(y + offsets, tl.load(x + offsets, mask=offsets < n, other=OTHER))


POISON = {
    torch.float16: torch.nan,
    torch.bfloat16: torch.nan,
    torch.float32: torch.nan,
    torch.float64: torch.nan,
    torch.int8: 0x7F,
    torch.int32: 0x7F7F7F7F,
    torch.int64: 0x7F7F7F7F7F7F7F7F,
}


@pytest.mark.parametrize("dtype", POISON)
def test_masked_lanes_are_poisoned(dtype):
    x, y = apart(16, dtype)
    tail_kernel[1,](x, y, 10, 0, 16)
    same(y, torch.where(torch.arange(16) < 10, x, 0))
    tail_kernel[1,](x, y, 10, None, 16)
    same(y, torch.where(torch.arange(16) < 10, x, torch.tensor(POISON[dtype], dtype=dtype)))


@triton.jit
def gather_kernel(x, indices, y, n, stride, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    index = tl.load(indices + offsets, mask=offsets < n)
    source = x + (2 * index + 1) * stride  # overflows in poisoned lanes, which is no error
    value = tl.load(source, mask=offsets < n) if MASKED else tl.load(source)
    tl.store(y + offsets, value, mask=offsets < n)


def test_a_masked_lane_used_as_an_index():
    x, y = apart(2**12)
    indices = torch.randperm(16, dtype=torch.int32)
    gather_kernel[1,](x, indices, y, 11, 128, True, 16)
    assert torch.equal(y[:11], x[(2 * indices[:11] + 1) * 128])
    gather_kernel[1,](x, indices, y, 16, 128, False, 16)
    with pytest.raises(SanitizerError, match="bounds load: 5 lanes"):
        gather_kernel[1,](x, indices, y, 11, 128, False, 16)


@triton.jit
def switch_kernel(x, y, n, bound, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    mask = (offsets < n) & (tl.load(x).to(bound.dtype.element_ty) < tl.load(bound))
    tl.store(y + offsets, tl.load(x + offsets, mask=mask, other=-1), mask=mask | (offsets < 4))


@pytest.mark.parametrize("dtype", [torch.int32, torch.bfloat16])
def test_a_scalar_comparison_in_a_mask(dtype):
    x, y = apart(16)
    for bound, expected in ((1e4, [*x[:10].tolist(), *6 * [0]]), (2, [*4 * [-1], *12 * [0]])):
        switch_kernel[1,](x, y.zero_(), 10, torch.tensor([bound], dtype=dtype), 16)
        assert y.tolist() == expected


# --- overflow ---


@triton.jit
def compute(a, b, OP: tl.constexpr):
    if OP == "add":
        return a + b
    if OP == "sub":
        return a - b
    return a * b


@triton.jit
def integer_kernel(x, y, out, OP: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    a, b = tl.load(x + offsets).to(DTYPE), tl.load(y + offsets).to(DTYPE)
    tl.store(out + offsets, compute(a, b, OP))


OVERFLOWS = {"add": (2**31 - 10, 10), "sub": (-(2**31) + 10, 11), "mul": (2**16, 2**15)}
EXACT = {"add": torch.add, "sub": torch.sub, "mul": torch.mul}


@pytest.mark.parametrize("op", OVERFLOWS)
def test_int32_overflow(op):
    x, y = torch.arange(8, dtype=torch.int32), torch.arange(3, 11, dtype=torch.int32)
    out = torch.empty(8, dtype=torch.int64)
    integer_kernel[1,](x, y, out, op, tl.int32, 8)
    assert torch.equal(out, EXACT[op](x.long(), y.long()))
    x[5], y[5] = OVERFLOWS[op]
    integer_kernel[1,](x, y, out, op, tl.int64, 8)
    assert torch.equal(out, EXACT[op](x.long(), y.long()))
    integer_kernel[1,](x, y, out, op, tl.uint32, 8)
    assert torch.equal(out, EXACT[op](x.long(), y.long()) % 2**32)
    with pytest.raises(SanitizerError, match=rf"int32 overflow in {op}: 1 lanes of program \(0, 0, 0\)"):
        integer_kernel[1,](x, y, out, op, tl.int32, 8)


@triton.jit
def offset_kernel(x, row, stride, WIDE: tl.constexpr):
    if WIDE:
        row = row.to(tl.int64)
    tl.store(x + (row * stride - 2**33), 1.0)


def test_overflow_of_an_address():
    x = torch.zeros(4)
    offset_kernel[1,](x, 2**16, 2**17, True)
    assert x.tolist() == [1, 0, 0, 0]
    with pytest.raises(SanitizerError, match="int32 overflow in mul: 1 lanes .* such as 8589934592"):
        offset_kernel[1,](x, 2**16, 2**17, False)


# --- the patches themselves ---


@triton.jit
def wrong_kernel(x):
    tl.static_assert(x.dtype.element_ty == tl.int8, "not int8")


def test_other_errors_of_a_kernel_stay_as_they_are():
    with pytest.raises(InterpreterError, match="not int8"):
        wrong_kernel[1,](torch.zeros(1))


def test_a_second_install_changes_nothing():
    patched = dict(vars(InterpreterBuilder))
    sanitizer.install()
    assert dict(vars(InterpreterBuilder)) == patched
