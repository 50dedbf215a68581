"""The model, for the core: which memory it needs, what judges it, and what its records say."""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import torch

from sp_fast.bench.budget import PROCESS_MIB
from sp_fast.bench.cases import DTYPES
from sp_fast.bench.counts import Count
from sp_fast.bench.memory import MIB
from sp_fast.bench.model_cases import EXACT, SP_FAST, SP_REFERENCE, ModelCase
from sp_fast.bench.model_counts import image_tokens, prompt_length, steps
from sp_fast.bench.model_gate import ModelGate
from sp_fast.bench.model_shapes import ModelShape
from sp_fast.bench.model_subject import ModelJob
from sp_fast.bench.suite import Needs

METERED = ("ttft", "end_to_end")  # a decode's run holds a prefill too, whose energy would be counted with it
NEW_TOKENS_STAGES = {"decode": 1, "end_to_end": None}  # tokens of a prompt that the stage's time gives; None: all


class ModelSuite:
    """Stages of LLaVA-SP, in the official form and ours, and of LLaVA-1.5."""

    ours, yardstick, exact = SP_FAST, SP_REFERENCE, EXACT

    def weights(self, case: ModelCase) -> Hashable:
        return case.shape, case.dtype

    def job(self, case: ModelCase, device: str, seed: int, folder: Path) -> ModelJob:
        return ModelJob(EXACT, case.shape, DTYPES[case.dtype], device, seed, folder)

    def gate(self, case: ModelCase) -> ModelGate:
        return ModelGate(case.dtype)

    def needs(self, cases: Sequence[ModelCase], implementations: Sequence[str]) -> Needs:
        """Estimates. A process holds its weights; one that runs, cache and activations beside them and a convolution's
        weights laid out anew; float64, one layer's weights widened."""
        first = max(cases, key=lambda case: case.batch * (case.prompt_tokens + case.new_tokens))
        sizes, size = _sizes(first.shape), DTYPES[first.dtype].itemsize
        idle = sum(sizes) * size / MIB + PROCESS_MIB
        cache, activations = _elements(first)
        running = (2 * cache * size + 4 * activations + 3 * 4 * max(sizes)) / MIB
        exact = idle + (2 * 8 * max(sizes) + 3 * 8 * activations) / MIB
        return Needs(
            f"{first.shape.name} in {first.dtype} at batch {first.batch}", idle, running, exact,
            "choose a smaller --llm or --batch, fewer --implementation, or bfloat16",
        )  # fmt: skip

    def fields(self, case: ModelCase, name: str) -> dict[str, Any]:
        projector = case.shape.config().projector
        return {
            "benchmark": "model", "case": case.key, "variant": case.shape.variant, "stage": case.stage,
            "direction": case.direction, "batch": case.batch, "dtype": case.dtype, "grid": projector.grid,
            "vision_width": projector.vision_width, "spatial_width": projector.spatial_width,
            "text_width": projector.text_width, "llm": case.shape.llm, "tower": case.shape.tower,
            "attention": case.attention, "mode": case.mode, "image_tokens": image_tokens(case, name),
            "prompt_tokens": case.prompt_tokens, "new_tokens": case.new_tokens,
        }  # fmt: skip

    def figures(self, case: ModelCase, p50_ms: float) -> dict[str, Any]:
        if case.stage not in NEW_TOKENS_STAGES:
            return {}
        tokens = NEW_TOKENS_STAGES[case.stage] or case.new_tokens
        return {"tokens_per_second": case.batch * tokens / p50_ms * 1e3}

    def steps(self, case: ModelCase, name: str) -> list[Count]:
        return steps(case, name)

    def parts(self, case: ModelCase, name: str) -> list[Count]:
        return steps(case, name)

    def captured(self, case: ModelCase) -> bool:
        """`generate` waits for the device at every token; a part's graph would be faster than the part as it runs."""
        return False

    def metered(self, case: ModelCase) -> bool:
        return case.stage in METERED


@functools.lru_cache(maxsize=32)
def _sizes(shape: ModelShape) -> list[int]:
    """Elements of every parameter of LLaVA-SP, the official form's, tied ones once."""
    from sp_fast.checkpoint import official_shapes
    from sp_fast.llava_sp import LlavaSpForConditionalGeneration

    with torch.device("meta"):
        model = LlavaSpForConditionalGeneration(shape.config())
    named = {name: p.numel() for name, p in model.named_parameters() if "multi_modal_projector" not in name}
    return [*named.values(), *map(math.prod, official_shapes(shape.config().projector).values())]


def _elements(case: ModelCase) -> tuple[int, int]:
    """Of the cache, and of what a forward holds at once: a few rows of each width, and the tower's and the logits'."""
    config = case.shape.config()
    text, vision = config.text_config, config.vision_config
    length = prompt_length(case, SP_FAST) + case.new_tokens
    heads = text.num_key_value_heads / text.num_attention_heads
    cache = int(2 * text.num_hidden_layers * length * text.hidden_size * heads)
    rows = length * (6 * text.hidden_size + 3 * text.intermediate_size)
    tower = config.projector.patch_tokens * (6 * vision.hidden_size + 3 * vision.intermediate_size)
    return case.batch * cache, case.batch * (rows + tower + 8 * text.vocab_size)


MODEL = ModelSuite()
