"""FLOP and bytes of a model's stages: against torch's own counter, its parameters, and a hand count."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sp_fast.bench import model_shapes
from sp_fast.bench.model_cases import IMPLEMENTATIONS, LLAVA, SP_REFERENCE, STAGES, Lengths, ModelCase, model_cases
from sp_fast.bench.model_counts import Decoder, prompt_length, steps
from sp_fast.bench.model_shapes import LLMS, TOWERS, ModelShape
from sp_fast.bench.model_subject import ModelJob
from sp_fast.bench.model_suite import MODEL
from sp_fast.bench.roofline import Peaks
from sp_fast.errors import ConfigError

VICUNA = ModelShape("7b", "clip-l-336")
SHAPES = {  # language model and tower: grouped keys, biases, tied embeddings; CLS and none
    "llama and clip": ("tiny", "tiny"),
    "qwen2 and siglip": ("small-qwen2", "small-siglip"),
}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    qwen2 = {
        **LLMS["tiny"],
        "model_type": "qwen2",
        "hidden_size": 48,
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
    }
    siglip = {**TOWERS["tiny"], "model_type": "siglip_vision_model", "hidden_size": 32}
    monkeypatch.setitem(model_shapes.LLMS, "small-qwen2", qwen2)
    monkeypatch.setitem(model_shapes.TOWERS, "small-siglip", siglip)


def case_of(stage, shape=VICUNA, batch=1, dtype="bfloat16", prompt_tokens=58, new_tokens=4):
    return ModelCase(shape, stage, batch, dtype, prompt_tokens, new_tokens, "sdpa", "eager")


def subject_of(name, shape, tmp_path):
    return ModelJob(name, ModelShape(*shape), torch.float32, "cpu", 0, tmp_path).build()


def counted(subject, case):
    """What torch counts in one run, with the squares of a prefill's scores made triangles."""
    run, counter = subject.run(case), FlopCounterMode(display=False)
    with counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        run.before()
        run.timed()
    found = counter.get_total_flops()
    if case.stage in ("prefill", "ttft", "end_to_end"):
        decoder = Decoder.of(case.shape.config().text_config)
        length = prompt_length(case, subject._job.implementation)
        found -= case.batch * decoder.layers * 4 * decoder.queries * (length**2 - length * (length + 1) // 2)
    return found


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", [SP_REFERENCE, LLAVA])
def test_flop_agree_with_torchs_counter(name, shape, tmp_path):
    """The official form's, since the counter does not see into the package's own operations."""
    subject = subject_of(name, shape, tmp_path)
    measured = [
        stage for stage in STAGES if stage not in ("decode", *(("tower", "ttft", "end_to_end") * (name == LLAVA)))
    ]
    for stage in measured:
        case = case_of(stage, ModelShape(*shape), batch=2, prompt_tokens=5)
        assert sum(step.flop for step in steps(case, name)) == counted(subject, case) > 0, stage


def test_llavas_tower_runs_more_than_is_needed(tmp_path):
    """The count is of what is needed; transformers' LLaVA runs the last layer too."""
    case = case_of("tower", ModelShape("tiny", "tiny"))
    ours, theirs = (counted(subject_of(name, ("tiny", "tiny"), tmp_path), case) for name in (SP_REFERENCE, LLAVA))
    assert steps(case, LLAVA) == steps(case, SP_REFERENCE)
    assert ours < theirs < 2 * ours


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_weight_is_counted_once(shape, tmp_path):
    """Against the parameters themselves; embeddings give rows, and layers that are not run are not read."""
    model = subject_of(SP_REFERENCE, shape, tmp_path).module
    held = {part: sum(p.numel() for p in m.parameters()) for part, m in (
        ("tower", model.model.vision_tower), ("projector", model.model.multi_modal_projector),
        ("language model", model.model.language_model), ("head", model.lm_head),
        ("embeddings", model.get_input_embeddings()),
    )}  # fmt: skip
    tower = model.model.vision_tower
    unused = [tower.encoder.layers[-1], tower.post_layernorm, *([tower.head] if hasattr(tower, "head") else [])]
    held["tower"] -= sum(p.numel() for module in unused for p in module.parameters())
    assert Decoder.of(model.config.text_config).weights == held["language model"] - held["embeddings"] + held["head"]

    def elements(stage):
        return sum(step.bytes for step in steps(case_of(stage, ModelShape(*shape), dtype="float32"), SP_REFERENCE)) // 4

    config = model.config
    images, patches = 3 * config.vision_config.image_size**2, 576 * config.vision_config.hidden_size
    assert elements("tower") == held["tower"] + images + patches
    assert elements("projector") == held["projector"] + patches + 582 * config.text_config.hidden_size


def test_vicuna_by_hand():
    """PERFORMANCE's figures for 640 tokens on one H200: 10.6 ms of prefill, 317 tokens/s."""
    layer = 4 * 4096 * 4096 + 3 * 4096 * 11008
    weights = 32 * (layer + 2 * 4096) + 4096 + 32000 * 4096
    [prefill] = steps(case_of("prefill"), SP_REFERENCE)
    assert prefill.flop == 640 * 32 * 2 * layer + 32 * 4 * 4096 * 640 * 641 // 2 + 2 * 4096 * 32000
    assert prefill.bytes == 2 * (weights + 640 * 4096 + 2 * 32 * 640 * 4096 + 32000)
    [decode] = steps(case_of("decode", new_tokens=2), SP_REFERENCE)
    assert decode.flop == 32 * (2 * layer + 4 * 4096 * 641) + 2 * 4096 * 32000
    assert decode.bytes == 2 * (weights + 4096 + 2 * 32 * 641 * 4096 + 32000)
    peaks = Peaks(4000.0, 4300.0, {"bfloat16": 790.0})
    assert peaks.roof_ms(prefill, "bfloat16") == pytest.approx(10.6, rel=0.02)
    assert 1e3 / peaks.roof_ms(decode, "bfloat16") == pytest.approx(317, rel=0.002)
    assert [peaks.bound(prefill, "bfloat16"), peaks.bound(decode, "bfloat16")] == ["compute", "memory"]


def test_stages_add_up():
    for name in IMPLEMENTATIONS:
        parts = [steps(case_of(stage), name) for stage in ("tower", "projector", "prefill")]
        assert steps(case_of("ttft"), name) == [step for part in parts for step in part]
        whole, first = steps(case_of("end_to_end"), name), steps(case_of("ttft"), name)
        assert whole[:3] == first
        assert len(whole) == 3 + 4 - 1
        [mean] = steps(case_of("decode"), name)
        assert mean.bytes == sum(step.bytes for step in whole[3:]) // 3
    ours, llava = (sum(s.flop for s in steps(case_of("ttft"), name)) for name in (SP_REFERENCE, LLAVA))
    assert ours > llava  # six tokens, the convolutions and their attention


def test_bytes_follow_batch():
    one, two = (steps(case_of("decode", batch=batch), SP_REFERENCE)[0] for batch in (1, 2))
    assert two.flop == 2 * one.flop
    assert two.bytes - one.bytes == 2 * (4096 + 2 * 32 * 4096 * (640 + 2) + 32000)  # the cache, not the weights


@pytest.mark.parametrize("llm", LLMS)
def test_the_named_shapes_are_the_published_ones(llm):
    """Parameters without the embeddings' second copy, in billions."""
    published = {"tiny": 0.0001, "0.5b": 0.494, "1b": 1.100, "7b": 6.738, "13b": 13.016}
    text = ModelShape(llm, "clip-l-336").config().text_config
    decoder = Decoder.of(text)
    embeddings = 0 if text.tie_word_embeddings else decoder.vocabulary * decoder.width
    assert (decoder.weights + embeddings) / 1e9 == pytest.approx(published[llm], rel=0.002, abs=1e-4)


def test_memory_is_estimated_before_anything_is_built():
    """Parameters in their dtype, 500 MiB a process; float64 needs more than a process that waits."""
    cases = model_cases([VICUNA], ["ttft"], [1, 8], ["bfloat16"], {"bfloat16": ["sdpa"]}, ["eager"], Lengths())
    one, eight = MODEL.needs(cases[:1], IMPLEMENTATIONS), MODEL.needs(cases, IMPLEMENTATIONS)
    assert one.idle_mib == pytest.approx((6.738e9 + 0.304e9 + 0.9236e9) * 2 / 2**20 + 500, rel=0.002)
    assert one.idle_mib == eight.idle_mib < one.exact_mib < eight.exact_mib
    assert one.running_mib < eight.running_mib


def test_an_unknown_language_model_is_not_counted():
    from transformers import GPT2Config

    with pytest.raises(ConfigError, match=r"model_type 'gpt2', whose operations are not counted: known are llama"):
        Decoder.of(GPT2Config())
