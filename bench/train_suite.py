"""Training steps for the core: which memory they need, what judges them, and what their records say."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sp_fast.bench import budget
from sp_fast.bench.cases import DTYPES, Case
from sp_fast.bench.counts import Count
from sp_fast.bench.implementations import EXACT, YARDSTICK
from sp_fast.bench.memory import MIB
from sp_fast.bench.model_cases import SP_FAST, SP_REFERENCE
from sp_fast.bench.model_counts import Decoder, image_tokens
from sp_fast.bench.model_suite import ModelSuite
from sp_fast.bench.suite import Needs, ProjectorSuite
from sp_fast.bench.train_cases import LORA_RANK, MODES, PROJECTOR_OURS, ModelStep
from sp_fast.bench.train_counts import adapter_elements, model_step, projector_step
from sp_fast.bench.train_gate import TrainGate
from sp_fast.bench.train_model import ModelStepJob
from sp_fast.bench.train_subject import StepJob
from sp_fast.checkpoint import official_shapes

LAYER_ROWS = (16, 4)  # what a layer keeps for its backward of each token, in the model's width and in the MLP's
HELD = 4  # a parameter, its gradient and two states, which a process keeps between its turns


class ProjectorStepSuite(ProjectorSuite):
    """A step of the projector alone, by every implementation."""

    def weights(self, case: Case) -> Hashable:
        return case

    def job(self, case: Case, device: str, seed: int, folder: Path) -> StepJob:
        return StepJob(EXACT, case.config, DTYPES[case.dtype], device, seed, folder, case=case.key)

    def gate(self, case: Case) -> TrainGate:
        return TrainGate(case.dtype, PROJECTOR_OURS, YARDSTICK)

    def needs(self, cases: Sequence[Case], implementations: Sequence[str]) -> Needs:
        [case] = cases
        waiting = budget.idle_mib(case.config, case.dtype)
        return Needs(
            f"a training step of {case.variant} in {case.dtype} at batch {case.batch}",
            HELD * (waiting - budget.PROCESS_MIB) + budget.PROCESS_MIB,
            # its gradients are held already; what torch.compile lays out anew is not
            budget.running_mib(case.config, case.dtype, case.batch, "compiled" in implementations),
            budget.exact_mib(case.config, case.dtype, case.batch, True),
            "choose a smaller --spatial-width or --batch, or bfloat16",
            rebuilt=True,
        )  # fmt: skip

    def fields(self, case: Case, name: str) -> dict[str, Any]:
        return super().fields(case, name) | {"benchmark": "train", "stage": "projector"}

    def steps(self, case: Case, name: str) -> list[Count]:
        return projector_step(case)

    def parts(self, case: Case, name: str) -> list[Count]:
        return projector_step(case)

    def captured(self, case: Case) -> bool:
        """A step is timed by its parts."""
        return False

    def metered(self, case: Case) -> bool:
        return True


class ModelStepSuite(ModelSuite):
    """A LoRA step of a whole model, around the official form's projector and around ours."""

    def weights(self, case: ModelStep) -> Hashable:
        return case

    def job(self, case: ModelStep, device: str, seed: int, folder: Path) -> ModelStepJob:
        return ModelStepJob(EXACT, case.shape, DTYPES[case.dtype], device, seed, folder, case=case.key)

    def gate(self, case: ModelStep) -> TrainGate:
        return TrainGate(case.dtype, (SP_FAST,), SP_REFERENCE)

    def needs(self, cases: Sequence[ModelStep], implementations: Sequence[str]) -> Needs:
        """Estimates, as a model's are; of trained parameters gradients and states are held, and of every layer what its
        backward reads, or its input where that is computed anew."""
        [case] = cases
        size, config = DTYPES[case.dtype].itemsize, case.shape.config()
        decoder = Decoder.of(config.text_config)
        projector = sum(map(math.prod, official_shapes(config.projector).values()))
        trained = (HELD * adapter_elements(decoder) + (HELD - 1) * projector) * size / MIB
        tokens = image_tokens(case, SP_FAST) + case.prompt_tokens
        layer = LAYER_ROWS[0] * decoder.width + LAYER_ROWS[1] * decoder.inner
        kept = layer * decoder.layers if case.mode == MODES[0] else layer + decoder.width * decoder.layers
        rows = kept * size + 8 * decoder.vocabulary  # logits, and their float32
        widened = (layer * decoder.layers + 2 * decoder.vocabulary) * 8
        base = super().needs(cases, implementations)
        return replace(
            base,
            what=f"a training step of {base.what}",
            idle_mib=base.idle_mib + trained,
            running_mib=base.running_mib + case.batch * tokens * rows / MIB,
            exact_mib=base.exact_mib + 3 * trained + case.gate.batch * tokens * widened / MIB,
            way_out="choose a smaller --llm or --batch, --recompute, or bfloat16",
            rebuilt=True,
        )

    def fields(self, case: ModelStep, name: str) -> dict[str, Any]:
        return super().fields(case, name) | {"benchmark": "train", "lora_rank": LORA_RANK}

    def figures(self, case: ModelStep, p50_ms: float) -> dict[str, Any]:
        """Tokens that pass through the language model, image tokens included."""
        tokens = case.batch * (image_tokens(case, SP_FAST) + case.prompt_tokens)
        return {"tokens_per_second": tokens / p50_ms * 1e3}

    def steps(self, case: ModelStep, name: str) -> list[Count]:
        return model_step(case, name)

    def parts(self, case: ModelStep, name: str) -> list[Count]:
        return model_step(case, name)

    def metered(self, case: ModelStep) -> bool:
        return True


PROJECTOR_STEP, MODEL_STEP = ProjectorStepSuite(), ModelStepSuite()
