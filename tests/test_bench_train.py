"""Training steps under measurement: their parts, their gate and its planted faults, turns of whole processes."""

import pickle
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sp_fast.bench import implementations, pool, train_model
from sp_fast.bench.execute import blank_record
from sp_fast.bench.model_cases import SP_FAST, SP_REFERENCE
from sp_fast.bench.model_counts import Decoder
from sp_fast.bench.model_shapes import ModelShape
from sp_fast.bench.run import Bench, Plan, Progress
from sp_fast.bench.train_cases import FACTORED, JUDGED_BATCH, MODEL_IMPLEMENTATIONS, model_steps, projector_steps
from sp_fast.bench.train_counts import adapter_elements, model_step, projector_step
from sp_fast.bench.train_formats import mfu
from sp_fast.bench.train_suite import MODEL_STEP, PROJECTOR_STEP
from sp_fast.errors import ResourceError
from sp_fast.training.factored import FactoredAdamW
from tests.bench_helpers import PEAKS, watch

pytestmark = pytest.mark.usefixtures("local_workers", "one_input")
NAMES = ("fast", FACTORED, "reference", "linear")
WIDTHS = {"vision_width": 32, "spatial_width": 16, "text_width": 32}
TINY_MODEL = ModelShape("tiny", "tiny")


def campaign(*values, **more):
    """A fault that is planted outside the daily suite."""
    return pytest.param(*values, marks=pytest.mark.campaign, **more)


def projector_case(batch=1, dtype="float32"):
    return projector_steps(["crop-dfi"], [batch], [dtype], WIDTHS)[0]


def model_case(batch=1, dtype="float32", mode="eager", shape=TINY_MODEL):
    return model_steps(shape, [batch], [dtype], "sdpa", mode, 8)[0]


def measure(case, names, suite, turns=1):
    found = []
    chosen = Plan((case,), tuple(names), suite=suite, turns=turns, turn_seconds=0.0)
    blank = replace(blank_record(chosen, {}), peaks=asdict(PEAKS))
    Bench(chosen, PEAKS, blank, found.append, Progress(0, lambda *_: None)).run()
    return found


def judged(case, names, suite):
    return {r.implementation: r.withheld for r in measure(case, names, suite, turns=0)}


class TestProjector:
    def test_a_step_by_its_parts_and_its_memory(self):
        found = {r.implementation: r for r in measure(projector_case(), NAMES, PROJECTOR_STEP)}
        assert list(found) == list(NAMES)
        for r in found.values():
            assert r.withheld is None is r.note
            assert (r.benchmark, r.stage, r.direction, r.runs, r.timer) == ("train", "projector", "step", 1, "wall")
            parts = (r.forward_ms_p50, r.backward_ms_p50, r.optimizer_ms_p50)
            assert min(parts) > 0
            assert sum(parts) == pytest.approx(r.ms_p50)
            assert r.optimizer_mib == pytest.approx(2 * r.weights_mib, rel=1e-3)
            assert r.roof_ms < r.ms_p50
            assert mfu(r) == pytest.approx(r.tflops / PEAKS.tflops["float32"])
        assert found["fast"].gradients_mib == pytest.approx(found["fast"].weights_mib)
        dense = sum(p.numel() for p in implementations.SPProjector(projector_case().config).parameters() if p.dim() < 3)
        assert found[FACTORED].gradients_mib == pytest.approx(dense * 4 / 2**20)

    @pytest.mark.campaign
    def test_half_precision(self):
        assert set(judged(projector_case(dtype="bfloat16"), NAMES, PROJECTOR_STEP).values()) == {None}

    @pytest.mark.parametrize(
        ("module", "fault"),
        [
            ("conv_8", lambda weight, grad: grad[16:80].mul_(1.001)),
            campaign("conv_CM", lambda weight, grad: grad[-1:].zero_()),
            campaign("conv_24", lambda weight, grad: grad.mul_(torch.nan)),
        ],
    )
    def test_a_wrong_gradient_is_withheld_and_named(self, monkeypatch, module, fault):
        """Of the convolutions that fast and factored both compute by the same op."""
        from sp_fast.kernels import windowed_matmul

        original = windowed_matmul._DWEIGHTS["torch"]

        def wrong(grad, rows, outs, windows, add):
            original(grad, rows, outs, windows, add)
            place = 1 if module == "conv_CM" else 0
            if len(outs) == 2 and outs[place] is not None:
                fault(None, outs[place])

        monkeypatch.setitem(windowed_matmul._DWEIGHTS, "torch", wrong)
        found = judged(projector_case(), ("fast", "reference"), PROJECTOR_STEP)
        assert found["reference"] is None
        assert f"accuracy: grad.{module} has an error of" in found["fast"] or module == "conv_24"
        assert found["fast"].startswith("accuracy: grad.conv")

    @pytest.mark.parametrize(
        ("name", "fault"),
        [
            campaign("fast", lambda o: o.param_groups[0].update(lr=1.001e-3), id="lr"),
            pytest.param("fast", lambda o: o.param_groups[0].update(betas=(0.9, 0.998)), id="beta2"),
            campaign("fast", lambda o: o.param_groups[0].update(betas=(0.89, 0.999)), id="beta1"),
            campaign("linear", lambda o: o.param_groups[0].update(weight_decay=0.1, lr=0.011), id="decay"),
            campaign(FACTORED, lambda o: o.param_groups[0].update(eps=1e-5), id="eps"),
            pytest.param(FACTORED, lambda o: o.register_step_pre_hook(lambda *_: o._factors.clear()), id="no factors"),
            campaign(FACTORED, lambda o: o._taken.__setitem__(1, False), id="no detail convolution"),
            campaign("reference", lambda o: setattr(o, "step", lambda: None), id="no step"),
        ],
    )
    def test_a_wrong_update_is_withheld_and_named(self, monkeypatch, name, fault):
        from sp_fast.bench import train_subject

        original = train_subject.StepSubject.__init__

        def broken(self, job):
            original(self, job)
            if job.implementation == name:
                fault(self.optimizer)

        monkeypatch.setattr(train_subject.StepSubject, "__init__", broken)
        found = judged(projector_case(), dict.fromkeys((name, "reference")), PROJECTOR_STEP)
        assert "AdamW's update of" in found[name] or "results differ in kind" in found[name]

    def test_where_two_do_not_fit_each_is_built_for_its_turn(self, monkeypatch):
        case = projector_case()
        needs = PROJECTOR_STEP.needs([case], NAMES)
        monkeypatch.setattr(pool, "available_mib", lambda _: (1.2 * needs.idle_mib + needs.running_mib) / pool.SHARE)
        asked = watch(monkeypatch)
        found = measure(case, ("fast", "reference"), PROJECTOR_STEP, turns=2)
        assert [(r.implementation, r.heat, r.withheld, r.runs) for r in found] == [
            ("fast", 0, None, 2), ("reference", 0, None, 2),
        ]  # fmt: skip
        alive, most = set(), 0
        for name, question in asked:
            alive = alive - {name} if question == "forget" else alive | {name} if question == "build" else alive
            most = max(most, len(alive))
        assert most == 1
        order = [(name, question) for name, question in asked if question in ("memory", "time")]
        turn = [("fast", "time"), ("reference", "time")]
        assert order == [("fast", "memory"), turn[0], ("reference", "memory"), turn[1], *turn]
        monkeypatch.setattr(pool, "available_mib", lambda _: needs.idle_mib)
        with pytest.raises(ResourceError, match=r"a training step of crop-dfi in float32 at batch 1 needs about"):
            measure(case, ("fast",), PROJECTOR_STEP)

    def test_every_case_begins_with_its_own_weights(self, tmp_path):
        jobs = [PROJECTOR_STEP.job(projector_case(batch), "cpu", 0, tmp_path) for batch in (1, 2)]
        assert jobs[0] != jobs[1]
        assert PROJECTOR_STEP.weights(projector_case(1)) != PROJECTOR_STEP.weights(projector_case(2))
        assert pickle.loads(pickle.dumps(jobs[0])) == jobs[0]
        cases = [model_case(1), model_case(1, mode="recompute")]
        assert len({MODEL_STEP.job(case, "cpu", 0, tmp_path) for case in cases}) == 2

    def test_the_floor_by_hand(self):
        """Weights read, and with their two states read and written; the second MLP layer and the tail read again."""
        case = projector_steps(["crop-dfi"], [1], ["float32"], {})[0]
        forward, rest = projector_step(case)
        weights, again = 923_550_208, 4096 * 4096 + 4096 + 3 * (512 * 512 + 512) + 1024 * 4096 + 4096
        activations = 576 * 1024 + 582 * 4096
        assert forward.bytes == 4 * (weights + activations)
        assert rest.bytes == 4 * (6 * weights + again + activations)
        assert rest.flop < 2 * forward.flop


class TestModel:
    def test_a_step_has_figures(self):
        found = measure(model_case(), MODEL_IMPLEMENTATIONS, MODEL_STEP)
        found += measure(model_case(mode="recompute"), [SP_FAST], MODEL_STEP)
        assert [(r.implementation, r.mode) for r in found] == [
            (SP_FAST, "eager"), (SP_REFERENCE, "eager"), (SP_FAST, "recompute"),
        ]  # fmt: skip
        for r in found:
            assert r.withheld is None is r.note
            assert (r.benchmark, r.stage, r.lora_rank, r.image_tokens) == ("train", "step", 128, 582)
            assert r.forward_ms_p50 + r.backward_ms_p50 + r.optimizer_ms_p50 == pytest.approx(r.ms_p50)
            assert r.tokens_per_second == pytest.approx(590 / r.ms_p50 * 1e3)
            assert r.optimizer_mib == pytest.approx(2 * r.gradients_mib, rel=1e-3)
            assert 0 < r.gradients_mib < r.weights_mib
            assert r.flop == found[0].flop
        assert found[2].saved_mib < found[0].saved_mib / 3

    @pytest.mark.campaign
    def test_half_precision(self):
        assert set(judged(model_case(dtype="bfloat16"), MODEL_IMPLEMENTATIONS, MODEL_STEP).values()) == {None}

    @pytest.mark.parametrize(
        ("named", "fault"),
        [
            campaign("logits", lambda s: s.module.lm_head.weight.mul_(1.0001)),
            campaign("grad.mm_projector", lambda s: _scaled(s.module.model.multi_modal_projector.patch_mlp[2].weight)),
            ("lora_B", lambda s: _scaled(s.module.model.language_model.layers[1].mlp.up_proj.lora_B.default.weight)),
            campaign("lora_", lambda s: s.optimizer.param_groups[0].update(lr=1.1e-3)),
            campaign("update of conv_", lambda s: s.optimizer.param_groups[1].update(betas=(0.8, 0.999))),
        ],
    )
    def test_a_wrong_step_is_withheld_and_named(self, monkeypatch, named, fault):
        original = train_model.ModelStepSubject.__init__

        def broken(self, job):
            original(self, job)
            if job.implementation == SP_FAST:
                with torch.no_grad():
                    fault(self)

        monkeypatch.setattr(train_model.ModelStepSubject, "__init__", broken)
        found = judged(model_case(), MODEL_IMPLEMENTATIONS, MODEL_STEP)
        assert named in found[SP_FAST]
        assert found[SP_REFERENCE] is None

    def test_what_is_trained(self, tmp_path):
        """Adapters on the language model's linear layers alone, and the projector; the text after the image is
        supervised."""
        built = replace(MODEL_STEP.job(model_case(), "cpu", 0, tmp_path), implementation=SP_FAST).build()
        trained = {name for name, p in built.module.named_parameters() if p.requires_grad}
        adapters = {name for name in trained if "lora_" in name}
        assert len(adapters) == 2 * 7 * 2
        assert all("language_model.layers" in name for name in adapters)
        assert all("multi_modal_projector" in name for name in trained - adapters)
        held = sum(built.module.get_parameter(name).numel() for name in adapters)
        assert held == adapter_elements(Decoder.of(built.module.config.text_config))
        prompts = built._prompts(model_case(2), 0)
        labels = built._labels(prompts.ids)
        assert torch.equal(labels[:, -4:], prompts.ids[:, -4:])
        assert (labels[:, :-4] == -100).all()

    def test_float64_is_float64(self, tmp_path):
        """A layer at a time gives the gradients that a whole model in float64 gives."""
        case = model_case()
        exact = MODEL_STEP.job(case, "cpu", 0, tmp_path).build()
        plain = replace(MODEL_STEP.job(case, "cpu", 0, tmp_path), implementation=SP_REFERENCE).build()
        plain.module.double()
        prompts = plain._prompts(case, 0)
        prompts = replace(prompts, pixels=prompts.pixels.double())
        for built in (exact, plain):
            built._exact_loss(prompts)[0].backward()
        for name, adapter in plain._adapters.items():
            difference = (exact._adapters[name].grad - adapter.grad).norm() / adapter.grad.norm()
            assert difference < 1e-6, name  # of transformers' RMSNorm in float32
        key = "mm_projector.0.weight"
        one, other = (built._implementation.gradient(key) for built in (exact, plain))
        assert (one - other).norm() / other.norm() < 1e-6

    def test_flop_agree_with_torchs_counter(self, tmp_path):
        case = model_case(2)
        built = replace(MODEL_STEP.job(case, "cpu", 0, tmp_path), implementation=SP_REFERENCE).build()
        forward, counter = built.forward(case), FlopCounterMode(display=False)
        with counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            forward()[0].backward()
        decoder, length = Decoder.of(built.module.config.text_config), 590
        squares = 3 * 2 * decoder.layers * 4 * decoder.queries * (length**2 - length * (length + 1) // 2)
        assert sum(step.flop for step in model_step(case, SP_REFERENCE)) == counter.get_total_flops() - squares

    def test_the_gate_takes_few_prompts(self):
        case = model_case(16, mode="recompute")
        assert (case.gate.batch, case.gate.mode) == (JUDGED_BATCH, "recompute")
        assert (case.exact.batch, case.exact.mode) == (JUDGED_BATCH, "eager")
        assert model_case(1).gate.batch == 1


def _scaled(parameter):
    """Its gradient comes out a thousandth too large."""
    parameter.register_hook(lambda grad: grad * 1.001)


def test_factored_is_what_its_name_says(tmp_path):
    job = replace(PROJECTOR_STEP.job(projector_case(), "cpu", 0, Path(tmp_path)), implementation=FACTORED)
    assert isinstance(job.build().optimizer, FactoredAdamW)
