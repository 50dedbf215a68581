"""What is measured of training: one step of the projector alone, or of a whole model with LoRA."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from sp_fast.bench.cases import DTYPES, Case
from sp_fast.bench.implementations import BASELINES, OURS, baselines_on
from sp_fast.bench.model_cases import SP_FAST, SP_REFERENCE, ModelCase
from sp_fast.bench.model_shapes import ModelShape
from sp_fast.bench.plan import check_names, projector_cases
from sp_fast.errors import ConfigError

#: projector: its step on given features, as behind a frozen tower; step: pixels to updated adapters and projector
STAGES = ("projector", "step")
STEP = "step"  # the direction of both: gradients let go, forward, backward, update

#: Ours with an optimizer that makes no gradients of the convolutions: training/factored.py.
FACTORED = "factored"
PROJECTOR_OURS = (OURS, FACTORED)
PROJECTOR_IMPLEMENTATIONS = (*PROJECTOR_OURS, *BASELINES)
MODEL_IMPLEMENTATIONS = (SP_FAST, SP_REFERENCE)

#: Of every implementation; torch's fused kernel, or what computes the same.
ADAMW: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}

#: The published recipe's, on the language model's linear layers.
LORA_RANK, LORA_ALPHA = 128, 256
LORA_TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
MODES = ("eager", "recompute")  # recompute: gradient checkpointing, a layer at a time
JUDGED_BATCH = 2  # prompts that judge a model's step: float64 keeps eight bytes of every activation


@dataclass(frozen=True)
class ModelStep(ModelCase):
    """A LoRA step of a whole model; half of each prompt's text is supervised."""

    @property
    def gate(self) -> ModelStep:
        """The same with no more prompts than float64 has room for."""
        return replace(self, batch=min(self.batch, JUDGED_BATCH))

    @property
    def exact(self) -> ModelStep:
        """Float64, whatever attention and recomputation."""
        return replace(self.gate, attention="sdpa", mode=MODES[0])


def projector_steps(
    variants: Sequence[str], batches: Sequence[int], dtypes: Sequence[str], overrides: dict[str, Any]
) -> tuple[Case, ...]:
    """Raises ConfigError for names that are unknown."""
    cases = projector_cases(variants, ["whole"], ["both"], batches, dtypes, overrides)
    return tuple(replace(case, direction=STEP) for case in cases)


def model_steps(
    shape: ModelShape, batches: Sequence[int], dtypes: Sequence[str], attention: str, mode: str, prompt_tokens: int
) -> tuple[ModelStep, ...]:
    """Raises ConfigError for names that are unknown, or a length that does not fit."""
    check_names("dtype", dtypes, tuple(DTYPES))
    if min(batches) < 1:
        raise ConfigError(f"batch {min(batches)} is no number of images: give 1 or more")
    if prompt_tokens < 2:
        raise ConfigError(f"prompt-tokens={prompt_tokens} must be at least 2: half of them are supervised")
    config = shape.config()
    image, context = config.image_seq_length, config.text_config.max_position_embeddings
    if image + prompt_tokens > context:
        raise ConfigError(
            f"{image} image tokens and {prompt_tokens} of text are {image + prompt_tokens}, but the language model's "
            f"context is {context}: choose smaller --prompt-tokens"
        )
    return tuple(
        ModelStep(shape, STEP, batch, dtype, prompt_tokens, 0, attention, mode, STEP)
        for dtype, batch in itertools.product(dtypes, batches)
    )


def projector_implementations(device: str, names: Sequence[str]) -> tuple[str, ...]:
    """Those that are named; else ours and the baselines, but torch.compile, which would compile for every turn.

    Raises ConfigError for names that are none.
    """
    check_names("implementation", names, PROJECTOR_IMPLEMENTATIONS)
    present = (*PROJECTOR_OURS, *baselines_on(torch.device(device)))
    for name in names:
        if name not in present:
            raise ConfigError(f"{name} is no implementation of its own on {device}: choose from {', '.join(present)}")
    return tuple(dict.fromkeys(names)) or tuple(name for name in present if name != "compiled")


def model_step_implementations(names: Sequence[str]) -> tuple[str, ...]:
    """Those that are named, or both. Raises ConfigError for names that are none."""
    check_names("implementation", names, MODEL_IMPLEMENTATIONS)
    return tuple(dict.fromkeys(names)) or MODEL_IMPLEMENTATIONS
