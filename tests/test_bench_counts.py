"""FLOP and bytes against a hand count and against torch's own counter, and the roof that is made of them."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sp_fast import ReferenceSPProjector, SPProjectorConfig
from sp_fast.bench.cases import DIRECTIONS, Case, stages_of
from sp_fast.bench.counts import Count, count
from sp_fast.bench.implementations import Reference
from sp_fast.bench.plan import projector_cases
from sp_fast.bench.roofline import Peaks
from sp_fast.checkpoint import official_shapes
from sp_fast.errors import ConfigError
from tests.helpers import ALL_VARIANTS, small

PUBLISHED = Case("crop-dfi", SPProjectorConfig(), "whole", "forward", 1, "bfloat16")


def at(stage, direction="forward", batch=1, dtype="bfloat16", config=None):
    return count(
        replace(
            PUBLISHED, stage=stage, direction=direction, batch=batch, dtype=dtype, config=config or PUBLISHED.config
        )
    )


def test_the_published_projector_by_hand():
    """C=1024, D=512, H=4096: cells 16+64+144+256+400+576 = 1456; 25 outputs of 256 cells; 576 patches."""
    cells, weights = 1456, 1456 * 1024 * 512
    assert weights == 763_363_328
    assert at("spatial") == Count(2 * weights, 2 * (weights + 576 * 1024 + 6 * 512))
    detail = 256 * 1024 * 512
    assert at("detail") == Count(2 * 25 * detail, 2 * (detail + 576 * 1024 + 25 * 512))
    mlp = 1024 * 4096 + 4096 * 4096
    assert at("mlp") == Count(2 * 576 * mlp, 2 * (mlp + 2 * 4096 + 576 * 1024 + 576 * 4096))
    # Q of 6 tokens, K and V of 25 outputs, Q K^T, A V, and the output layer on [Z, A V]
    tail = 2 * (6 + 25 + 25) * 512 * 512 + 2 * 2 * 6 * 25 * 512 + 2 * 6 * 1024 * 4096
    held = 3 * (512 * 512 + 512) + 3 * 2 * 512 + 1024 * 4096 + 4096
    assert at("tail") == Count(tail, 2 * (held + 31 * 512 + 6 * 4096))
    assert cells * 1024 * 512 + detail + mlp + 2 * 4096 + held == 923_550_208
    assert at("whole").flop == sum(at(stage).flop for stage in ("spatial", "detail", "mlp", "tail"))
    assert at("whole").bytes == 2 * (923_550_208 + 576 * 1024 + 582 * 4096)


def test_backward_by_hand():
    """Weight gradients everywhere; input gradients only behind something that is trained."""
    conv = 1456 * 1024 * 512
    assert at("spatial", "backward").flop == at("spatial").flop
    assert at("spatial", "both").bytes == 2 * 2 * (conv + 576 * 1024 + 6 * 512)
    first, second = 1024 * 4096, 4096 * 4096
    assert at("mlp", "backward", 3).flop == 2 * 3 * 576 * (first + 2 * second)
    # dW and biases written, the second layer's weight read again, features and upstream gradient read
    assert at("mlp", "backward").bytes == 2 * (first + second + 2 * 4096 + second + 4096 + 576 * 1024 + 576 * 4096)
    for stage in stages_of(PUBLISHED.config):
        forward, backward, both = (at(stage, d, 2) for d in DIRECTIONS)
        assert both == Count(forward.flop + backward.flop, forward.bytes + backward.bytes)


def counted(config, stage, direction, batch=2):
    """What torch counts on the reference, in float64 on zeros."""
    reference = ReferenceSPProjector(config, dtype=torch.float64).eval()
    function = Reference.stage(
        type("Held", (Reference,), {"__init__": lambda self: setattr(self, "module", reference)})(), stage
    )
    case = Case("x", config, stage, direction, batch, "float32")
    inputs = [x.detach().double().requires_grad_(x.requires_grad) for x in case.inputs(0, torch.device("cpu"))]
    counter = FlopCounterMode(display=False)
    with (
        torch.set_grad_enabled(direction != "forward"),
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    ):
        if direction == "backward":
            outputs = function(*inputs)
            with counter:
                torch.autograd.backward(outputs, [torch.ones_like(z) for z in outputs])
        else:
            with counter:
                outputs = function(*inputs)
                if direction == "both":
                    torch.autograd.backward(outputs, [torch.ones_like(z) for z in outputs])
    return counter.get_total_flops()


@pytest.mark.parametrize("variant", ALL_VARIANTS)
def test_flop_agree_with_torchs_counter(variant):
    config = small(variant)
    for stage in stages_of(config):
        for direction in DIRECTIONS:
            case = Case(variant, config, stage, direction, 2, "float32")
            expected = counted(config, stage, direction)
            assert expected > 0
            assert count(case).flop == expected, (stage, direction)


@pytest.mark.parametrize("variant", ALL_VARIANTS)
def test_every_weight_is_counted_once(variant):
    """Of the official tensors, all but a value projection that nothing uses."""
    config = small(variant)
    used = [
        k
        for k in official_shapes(config)
        if not (k.startswith("value_projector_mid") and len(config.detail_kernels) == 3)
    ]
    elements = sum(torch.Size(official_shapes(config)[k]).numel() for k in used)
    case = Case(variant, config, "whole", "forward", 1, "float32")
    activations = (
        config.patch_tokens * config.vision_width + (config.spatial_tokens + config.patch_tokens) * config.text_width
    )
    assert count(case).bytes == 4 * (elements + activations)


def test_bytes_follow_dtype_and_batch():
    half, full = at("whole"), at("whole", dtype="float32")
    assert full.bytes == 2 * half.bytes
    assert full.flop == half.flop
    step = at("whole", batch=2).bytes - half.bytes
    assert step == 2 * (576 * 1024 + 582 * 4096)
    assert at("whole", batch=9).bytes == half.bytes + 8 * step


def test_a_crop_reads_only_its_rows():
    config = SPProjectorConfig(kernel_sizes=(4, 8), detail_kernel=None)
    assert at("spatial", config=config).bytes == 2 * (80 * 1024 * 512 + 64 * 1024 + 2 * 512)


def test_the_roof_is_the_slower_of_the_two():
    peaks = Peaks(read_gbps=4000.0, copy_gbps=4300.0, tflops={"bfloat16": 790.0})
    # DESIGN's figures for one H200: 1.853 GB over 4.3 TB/s, and 8.3 TFLOP over 790 TFLOP/s
    assert peaks.roof_ms(at("whole"), "bfloat16") == pytest.approx(0.431, rel=0.002)
    assert peaks.bound(at("whole"), "bfloat16") == "memory"
    large = at("whole", batch=256)
    assert peaks.roof_ms(large, "bfloat16") == pytest.approx(large.flop / 790e9)
    assert peaks.roof_ms(large, "bfloat16") == pytest.approx(10.5, rel=0.01)
    assert peaks.bound(large, "bfloat16") == "compute"


def test_plans_hold_what_exists():
    cases = projector_cases(["crop", "crop-dfi"], ["whole", "detail"], ["forward"], [1, 8], ["float32", "bfloat16"], {})
    assert len(cases) == 12  # crop has no detail
    assert len({case.key for case in cases}) == 12
    assert [case.variant for case in cases] == ["crop"] * 4 + ["crop-dfi"] * 8
    assert {(c.config.spatial_width, c.config.vision_width) for c in projector_cases(
        ["crop", "tfm336"], ["whole"], ["forward"], [1], ["float32"], {"spatial_width": 32, "vision_width": 64}
    )} == {(32, 64), (64, 64)}  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["crop-dif"], ["whole"], ["forward"], [1], ["float32"]), "did you mean 'crop-dfi'"),
        ((["conv_block"], ["whole"], ["forward"], [1], ["float32"]), "BatchNorm"),
        ((["crop"], ["wole"], ["forward"], [1], ["float32"]), "'wole' is no stage; did you mean 'whole'"),
        ((["crop"], ["whole"], ["forwards"], [1], ["float32"]), "did you mean 'forward'"),
        ((["crop"], ["whole"], ["forward"], [0], ["float32"]), "batch 0 is no number of images"),
        ((["crop"], ["whole"], ["forward"], [1], ["fp8"]), "'fp8' is no dtype; known: float32"),
        ((["crop"], ["detail"], ["forward"], [1], ["float32"]), "crop has no stage detail"),
        ((["mlp"], ["spatial", "tail"], ["forward"], [1], ["float32"]), "mlp has no stage spatial, tail"),
    ],
)
def test_unknown_words(arguments, message):
    with pytest.raises(ConfigError, match=message):
        projector_cases(*arguments, {})
