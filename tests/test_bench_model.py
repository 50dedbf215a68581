"""The stages of a model, their gate and its planted faults, a compiled model."""

import logging
import time
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sp_fast.bench import model_weights
from sp_fast.bench.gate import GateError
from sp_fast.bench.model_cases import IMPLEMENTATIONS, STAGES
from sp_fast.bench.model_gate import ModelGate
from sp_fast.bench.model_subject import Clock, ModelJob, ModelSubject
from sp_fast.bench.model_suite import MODEL
from sp_fast.bench.model_summary import roof_tokens_per_second
from sp_fast.bench.timing import CpuTimer, Run
from sp_fast.bench.worker import Served
from tests.bench_model_helpers import TINY, cases_of, judged, measure

pytestmark = pytest.mark.usefixtures("few_inputs")


def test_every_stage_of_every_implementation_has_figures(finished):
    assert [(r.stage, r.implementation) for r in finished] == [(s, name) for s in STAGES for name in IMPLEMENTATIONS]
    for r in finished:
        assert r.withheld is None is r.note
        assert r.ms_p50 > 0 < r.peak_mib
        assert r.roof_ms == pytest.approx(r.serial_ms)  # each step waits for the one before
        assert r.roof_share == pytest.approx(r.roof_ms / r.ms_p50)
        assert (r.timer, r.direction, r.batch) == ("wall", "forward", 2)
        assert r.image_tokens == (576 if r.implementation == "llava" else 582)
        assert (r.error is None) is (r.implementation == "llava")
    found = {(r.stage, r.implementation): r for r in finished}
    whole, decode = found["end_to_end", "sp_fast"], found["decode", "sp_fast"]
    assert whole.tokens_per_second == pytest.approx(2 * 4 / whole.ms_p50 * 1e3)
    assert decode.tokens_per_second == pytest.approx(2 / decode.ms_p50 * 1e3)
    assert roof_tokens_per_second(decode) == pytest.approx(2 / decode.roof_ms * 1e3)
    assert {r.stage for r in finished if r.tokens_per_second} == {"decode", "end_to_end"}
    assert whole.weights_mib > found["end_to_end", "llava"].weights_mib


def test_without_spatial_tokens_the_rest_is_judged(tmp_path):
    shape, gate = replace(TINY, variant="mlp"), ModelGate("float32")
    (case,) = cases_of(["projector"], shape=shape)
    results = {}
    for name in ("sp_reference", "sp_fast"):
        results[name] = ModelJob(name, shape, torch.float32, "cpu", 0, tmp_path).build()._sampled(case, 0)
        assert results[name].keys() == {"patch_tokens", "logits"}
    gate.expect(case, results["sp_reference"])
    for name, found in results.items():
        assert gate._judge(name, case, {**found, "greedy": torch.zeros(1, 4)}).withheld is None
    wrong = {**results["sp_fast"], "patch_tokens": -results["sp_fast"]["patch_tokens"], "greedy": torch.zeros(1, 4)}
    assert "patch_tokens has an error of 2" in gate._judge("sp_fast", case, wrong).withheld


def test_stages_compute_what_generate_does(tmp_path):
    """What is timed apart is what is timed together: the prefill's logits choose the first token of all."""
    for name in IMPLEMENTATIONS:
        subject = ModelJob(name, TINY, torch.float32, "cpu", 0, tmp_path).build()
        out = {case.stage: subject.run(case).timed() for case in cases_of(set(STAGES) - {"decode"}, batches=(2,))}
        places = 576 if name == "llava" else 582
        assert out["tower"][0].shape == (2, 576, 64)
        assert out["projector"][0].shape == (2, places, 64)
        first = out["prefill"][0][:, -1].argmax(-1)
        assert torch.equal(out["ttft"][0][:, -1], first)
        assert out["ttft"][0].shape == (2, places + 8 + 1)
        assert torch.equal(out["end_to_end"][0][:, places + 8], first)
        assert out["end_to_end"][0].shape == (2, places + 8 + 4)


def test_the_language_models_attention_is_the_cases(tmp_path):
    """The tower keeps its own."""
    subject = ModelJob("sp_fast", TINY, torch.float32, "cpu", 0, tmp_path).build()
    for case in cases_of(["prefill"], attentions=("eager", "sdpa")):
        subject.run(case)
        assert subject.module.model.language_model.config._attn_implementation == case.attention
        assert subject.module.model.vision_tower.config._attn_implementation == "sdpa"


def test_parts_are_shared(tmp_path):
    """The same weights wherever the models share a part; LLaVA's MLP is that of the patch tokens; nothing is unfilled."""
    fast, reference, llava = (
        ModelJob(name, TINY, torch.float32, "cpu", 3, tmp_path).build().module for name in IMPLEMENTATIONS
    )
    for name, parameter in llava.named_parameters():
        assert parameter.isfinite().all()
        assert parameter.std() > 0
        if "multi_modal_projector" not in name:
            assert torch.equal(parameter, fast.get_parameter(name)), name
            assert torch.equal(parameter, reference.get_parameter(name)), name
    features = torch.randn(1, 576, 64)
    patches = llava.model.multi_modal_projector(features)
    for model in (fast, reference):
        torch.testing.assert_close(model.model.multi_modal_projector(features)[:, 6:], patches)
    other = ModelJob("llava", TINY, torch.float32, "cpu", 4, tmp_path).build().module
    assert not torch.equal(other.lm_head.weight, llava.lm_head.weight)


def test_float64_is_float64(tmp_path):
    """One layer at a time gives what a whole model in float64 gives, and leaves the weights as they were."""
    subject = ModelJob("exact", TINY, torch.bfloat16, "cpu", 0, tmp_path).build()
    case, prompts = cases_of(["end_to_end"], dtype="bfloat16")[0], None
    prompts = subject._prompts(case, 0)
    with torch.no_grad():
        found = subject._logits(case, prompts)
        assert found.dtype == torch.float64
        plain = ModelJob("sp_reference", TINY, torch.bfloat16, "cpu", 0, tmp_path).build()
        plain.module.double()
        ids = torch.cat([prompts.ids, prompts.answer[:, :-1]], dim=1)
        tokens = plain.module.model.encode_images(prompts.pixels.double())
        expected = plain.module(inputs_embeds=plain._embeds(ids, tokens), use_cache=False, logits_to_keep=4).logits
    assert 0 < (found - expected).norm() / expected.norm() < 1e-6  # of transformers' RMSNorm in float32
    assert {p.dtype for p in subject.module.model.language_model.parameters()} == {torch.bfloat16}


@pytest.mark.usefixtures("local_workers")
class TestGate:
    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_half_precision_passes(self, dtype):
        assert [r.withheld for r in judged(dtype=dtype).values()] == [None] * 3

    @pytest.mark.parametrize(
        ("named", "fault"),
        [
            ("patch_tokens", lambda model: model.model.multi_modal_projector.patch_mlp[2].weight.mul_(1.001)),
            ("spatial_tokens", lambda model: model.model.multi_modal_projector.output.weight[:1].mul_(1.01)),
            ("logits", lambda model: model.lm_head.weight.mul_(1.0001)),
            ("logits", lambda model: model.model.language_model.layers[1].mlp.up_proj.weight.mul_(1.001)),
            ("patch_tokens", lambda model: model.model.multi_modal_projector.patch_mlp[0].bias.fill_(float("nan"))),
        ],
    )
    def test_a_wrong_model_is_withheld_and_named(self, monkeypatch, named, fault):
        self._break(monkeypatch, "sp_fast", fault)
        found = judged(["sp_fast", "sp_reference"])
        assert f"accuracy: {named} has an error of" in found["sp_fast"].withheld
        assert found["sp_reference"].withheld is None

    @pytest.mark.parametrize("name", ["sp_fast", "sp_reference", "llava"])
    def test_one_that_is_not_finite(self, monkeypatch, name):
        self._break(monkeypatch, name, lambda model: model.lm_head.weight[7].fill_(float("nan")))
        found = judged([name, "sp_reference"])
        assert "logits" in found[name].withheld
        assert found["sp_reference"].withheld is None or name == "sp_reference"

    def test_a_wrong_yardstick_judges_nothing(self, monkeypatch):
        self._break(monkeypatch, "sp_reference", lambda model: model.lm_head.weight.mul_(2))
        found = judged(["sp_fast", "sp_reference"])
        assert "it judges nothing" in found["sp_reference"].withheld
        assert "not judged: the official form" in found["sp_fast"].withheld

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_other_tokens_are_a_fault_in_float32_and_a_note_below(self, monkeypatch, dtype):
        original = ModelSubject._new

        def other(self, case, ids):
            tokens = original(self, case, ids).clone()
            tokens[:, 2] += self._job.implementation == "sp_fast"
            return tokens

        monkeypatch.setattr(ModelSubject, "_new", other)
        ours = judged(["sp_fast", "sp_reference"], dtype)["sp_fast"]
        said = ours.withheld if dtype == "float32" else ours.note
        assert "greedy tokens differ from the official form's, first at new token 3" in said
        assert (ours.withheld is None) is (dtype == "bfloat16")

    def test_tokens_of_another_shape(self, monkeypatch):
        original = ModelSubject._encode
        monkeypatch.setattr(ModelSubject, "_encode", lambda self, pixels: original(self, pixels)[:, 1:])
        found = judged(["sp_fast", "sp_reference"])
        assert found["sp_fast"].withheld == "accuracy: the image tokens have shape (1, 581, 64), not (1, 582, 64)"

    def _break(self, monkeypatch, name, fault):
        build = model_weights.MODELS[name]

        def broken(*arguments):
            model = build(*arguments)
            with torch.no_grad():
                fault(model)
            return model

        monkeypatch.setitem(model_weights.MODELS, name, broken)


@pytest.mark.campaign
@pytest.mark.usefixtures("local_workers")
def test_a_compiled_model_is_compiled_and_judged(monkeypatch, tmp_path):
    """With a compiler that gives Python back; what `generate` would not compile has no figure."""
    import sp_fast

    original, made = sp_fast.compile_model, []

    def compile_model(model, **options):
        made.append(original(model, backend="eager", **options))
        return made[-1]

    monkeypatch.setattr(sp_fast, "compile_model", compile_model)
    cases = cases_of(["tower", "ttft", "decode"], modes=("eager", "compiled"))
    assert [(case.mode, case.stage) for case in cases] == [
        ("eager", "tower"), ("eager", "ttft"), ("eager", "decode"), ("compiled", "ttft"), ("compiled", "decode"),
    ]  # fmt: skip
    records = measure(cases, ["sp_fast", "sp_reference"])
    assert [r.withheld for r in records] == [None] * 10
    assert [compilation.buckets for compilation in made] == [(640,), (640,)]
    assert made[0].graphs["prefill"] > 0 < made[0].graphs["decode"]


def test_what_generate_does_not_compile_has_no_figure(monkeypatch, tmp_path):
    import sp_fast

    original = sp_fast.compile_model
    monkeypatch.setattr(
        sp_fast, "compile_model", lambda model, buckets, max_new_tokens: original(model, buckets=[100], backend="eager")
    )
    subject = ModelJob("sp_fast", TINY, torch.float32, "cpu", 0, tmp_path).build()
    eager, compiled = cases_of(["ttft"], modes=("eager", "compiled"))
    for case in (compiled, replace(compiled, batch=2)):
        with pytest.raises(
            GateError, match="uncompiled: a prompt of 590 tokens is not shorter than the largest bucket"
        ):
            subject.results(case)
    subject.run(eager)
    assert subject._compilation is None
    assert "generate" not in vars(subject.module)
    assert subject._warnings not in logging.getLogger("sp_fast").handlers


def test_a_compiled_model_is_forgotten():
    """Its memory is another's turn: torch would hold the model by what listens to its compiler."""
    served = Served()
    [case] = cases_of(["ttft"], modes=("compiled",))
    served.build(replace(MODEL.job(case, "cpu", 0, Path()), implementation="sp_fast"))
    served.subject.run(case)
    held = weakref.ref(served.subject.module)
    served.forget()
    assert held() is None


def test_a_clock_of_the_runs_own():
    """From the first token to the last, whatever came before."""
    clock = Clock()

    def generate():
        for seconds in (0.0, 0.05, 0.01, 0.01):
            time.sleep(seconds)
            clock.put(None)

    times = CpuTimer(torch.device("cpu")).time(
        "x", Run(generate, clock.reset, own_ms=lambda: clock.ms_a_token(3)), 0, 1
    )
    assert 10 <= times.ms[0] < 30
    with pytest.raises(RuntimeError, match="3 tokens were generated instead of 4"):
        clock.ms_a_token(4)
