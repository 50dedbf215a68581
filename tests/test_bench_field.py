"""The field of projectors: parameters, bytes and FLOP against printed ones, by hand and by torch's counter."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sp_fast.bench import field_peers
from sp_fast.bench.field_projectors import PROJECTORS, field_cases
from sp_fast.bench.field_rows import Peer, elements, on_meta
from sp_fast.errors import ConfigError
from tests.field_cases import QUANTIZED, case_of

KINDS = ("depthwise", "grouped", "separable", "nested")
PEERS = {name: row for name, row in PROJECTORS.items() if isinstance(row, Peer)}
PRINTED = [(name, published) for name, row in PROJECTORS.items() for published in row.published]


@pytest.mark.parametrize(("name", "published"), PRINTED, ids=lambda value: getattr(value, "source", value))
def test_parameters_are_those_that_papers_print(name, published):
    """To less than one of the last digit: papers round, and cut off."""
    shape = field_peers.Shape(vision=published.vision, text=published.text)
    found = elements(PROJECTORS[name].make, shape, published.part)
    assert abs(found - published.count) < published.unit
    assert published.source


def test_parameters_by_hand():
    """C=1024, H=4096, 576 patches; a Q-Former of 768 channels, 12 layers, half of which look at the patches."""
    c, h, q = 1024, 4096, 768
    mlp = (c + 1) * h + (h + 1) * h
    block = 2 * c * c + 9 * c + (c + 1) * c // 4 + (c // 4 + 1) * c + 3 * 2 * c
    layer = 4 * (q + 1) * q + (q + 1) * 4 * q + (4 * q + 1) * q + 2 * 2 * q
    cross = 2 * (q + 1) * q + 2 * (c + 1) * q + 2 * q
    former = 12 * layer + 6 * cross + 2 * q + 32 * q + (q + 1) * h
    words = (30_523 + 512) * q + 12 * ((q + 1) * 4 * q + (4 * q + 1) * q + 2 * q)
    resampler = c * h + 4 * (h + 1) * h + 256 * h + 2 * 2 * h
    sides, cells, d, r = (4, 8, 12, 16, 20, 24, 16), 1456 + 256, 512, 64  # of all six kernels and the detail's
    rest = 923_550_208 - cells * c * d  # patch MLP, attention, output
    expected = {
        "linear": (c + 1) * h, "llava-mlp": mlp, "deco": mlp, "ldpv2": mlp + 10 * h,
        "c-abstractor": 6 * block + 576 * c + mlp, "blip2-qformer": former, "instructblip-qformer": former + words,
        "qwen-resampler": resampler + 2 * h + h * h,
        "llava-sp": 923_550_208, "crop-dfi": 923_550_208, "pool-dfi": 923_546_112,
        "compact-5m": mlp + 4_462_848, "compact-50m": mlp + 47_112_704, **dict.fromkeys(QUANTIZED, 923_550_208),
        "depthwise": rest + cells * c + len(sides) * c * d, "grouped": rest + cells * c * d // 8,
        "separable": rest + sum(sides) * r * (c + d), "nested": rest + c * r + 24**2 * r * d,
    }  # fmt: skip
    assert {name: row.parameters(case_of(name)) for name, row in PROJECTORS.items()} == expected
    assert mlp == 20_979_712
    tokens = {name: row.image_tokens(case_of(name)) for name, row in PROJECTORS.items()}
    assert tokens == {
        "linear": 576, "llava-mlp": 576, "deco": 144, "c-abstractor": 144, "blip2-qformer": 32, "instructblip-qformer": 32,
        "qwen-resampler": 256, "ldpv2": 144, "llava-sp": 582, "crop-dfi": 582, "pool-dfi": 582,
        "compact-5m": 582, "compact-50m": 582, **dict.fromkeys((*QUANTIZED, *KINDS), 582),
    }  # fmt: skip
    for name in expected.keys() - set(QUANTIZED):
        row = PROJECTORS[name]
        positions = (256 + 576) * h if name == "qwen-resampler" else 0
        assert row.weight_bytes(case_of(name, dtype="bfloat16")) == 2 * (expected[name] + positions)


def test_quantised_bytes_are_read_in_place_of_the_types():
    dense = PROJECTORS["crop-dfi"]
    for name, most in {"crop-dfi-int8": 0.51, "crop-dfi-fp8": 0.51, "crop-dfi-int4": 0.28}.items():
        case, row = case_of(name, dtype="bfloat16"), PROJECTORS[name]
        packed = 2 * 897_581_056
        saved = dense.weight_bytes(case) - row.weight_bytes(case)
        assert dense.count(case).bytes - row.count(case).bytes == saved
        assert dense.count(case).flop == row.count(case).flop
        assert most - 0.02 < 1 - saved / packed < most


def test_quantised_rows_have_no_backward():
    assert not set(QUANTIZED) & {case.variant for case in field_cases((), ("both",), (1,), ("float32",))}
    with pytest.raises(ConfigError, match="crop-dfi-int4 has quantised weights, which have no backward: ask for"):
        field_cases(("crop-dfi-int4",), ("forward", "both"), (1,), ("float32",))


# torch's counter takes the weight gradient of a grouped convolution for an ungrouped one's: those are counted forward.
COUNTED = [(name, "forward") for name in PEERS] + [
    (name, "both") for name in PEERS if name not in ("c-abstractor", "ldpv2", "instructblip-qformer")
]


@pytest.mark.parametrize(("name", "direction"), COUNTED)
def test_flop_agree_with_torchs_counter(name, direction):
    """At the published widths, on tensors without data."""
    case = case_of(name, direction, batch=2)
    module = on_meta(PEERS[name].make, case.shape).eval()
    x = torch.empty(2, case.shape.patches, case.shape.vision, device="meta")
    counter = FlopCounterMode(display=False)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), counter:
        tokens = module(x)
        if direction == "both":
            tokens.sum().backward()
    assert tokens.shape == (2, PEERS[name].image_tokens(case), case.shape.text)
    assert PEERS[name].count(case).flop == counter.get_total_flops() > 0


@pytest.mark.parametrize("name", PEERS)
def test_what_products_leave_over_are_norms_queries_and_positions(name):
    case, row = case_of(name, tiny=True), PEERS[name]
    runs = on_meta(row.runs or row.make, case.shape)
    norms = [p for m in runs.modules() if isinstance(m, nn.LayerNorm) for p in m.parameters()]
    learned = [p for key, p in runs.named_parameters() if key.split(".")[-1] in ("query", "query_tokens", "positions")]
    vectors = sum(p.numel() for p in [*norms, *learned])
    held = sum(p.weights for p in row.products(case.shape, 1))
    assert held + vectors == sum(p.numel() for p in runs.parameters())
    batches = [row.count(replace(case, batch=batch)).bytes for batch in (1, 2)]
    assert batches[1] - batches[0] == 4 * (576 * 64 + row.image_tokens(case) * 64)


def test_narrow_features_are_for_all_whom_they_fit():
    width = lambda name, asked: field_cases([name], ("forward",), (1,), ("float32",), asked)[0].config.spatial_width  # noqa: E731
    assert [width(name, 384) for name in ("crop-dfi", "compact-5m", "compact-50m")] == [384, 256, 384]
    assert [width("compact-5m", asked) for asked in (None, 128)] == [256, 128]
    with pytest.raises(
        ConfigError, match="grouped, sp_fast: groups=8 does not divide spatial_width=100: .* or name other"
    ):
        field_cases((), ("forward",), (1,), ("float32",), 100)
