"""Floating-point operations and bytes that a training step cannot do without: the floor for its time.

As in counts.py. Gradients of weights need not reach memory: an update can take them as they are computed, and reads and
writes the parameter and its two states. Frozen weights are read in the forward and once more for what passes back
through them; recomputation is nobody's need.
"""

from __future__ import annotations

from dataclasses import replace

from sp_fast.bench.cases import DTYPES, Case
from sp_fast.bench.counts import Count, count
from sp_fast.bench.model_counts import Decoder, image_tokens
from sp_fast.bench.model_counts import steps as model_stages
from sp_fast.bench.train_cases import LORA_RANK, ModelStep

UPDATED = 6  # elements that an update moves for each of a parameter: itself and its two states, read and written


def projector_step(case: Case) -> list[Count]:
    """Forward; backward with the update."""
    forward, backward = (count(replace(case, direction=direction)) for direction in ("forward", "backward"))
    trained = _elements(case)
    return [forward, backward + Count(0, (UPDATED - 1) * trained * DTYPES[case.dtype].itemsize)]


def model_step(case: ModelStep, name: str) -> list[Count]:
    """The tower's forward; the projector's step, and the language model's."""
    config = case.shape.config()
    projector = Case(case.shape.variant, config.projector, "whole", "both", case.batch, case.dtype)
    decoder, tokens = Decoder.of(config.text_config), image_tokens(case, name) + case.prompt_tokens
    size, adapters = DTYPES[case.dtype].itemsize, adapter_elements(decoder)
    matrices = decoder.layers * decoder.matrices + decoder.vocabulary * decoder.width
    scores = decoder.layers * 4 * decoder.queries * tokens * (tokens + 1) // 2
    flop = 2 * tokens * (2 * matrices + 3 * adapters) + 3 * scores
    elements = 2 * decoder.weights + (2 + UPDATED) * adapters + case.batch * tokens * decoder.width
    tower = model_stages(replace(case, stage="tower"), name)
    return [*tower, *projector_step(projector), Count(case.batch * flop, elements * size)]


def adapter_elements(decoder: Decoder) -> int:
    """Of LoRA's two factors on every linear layer of the language model."""
    attention = 2 * (decoder.width + decoder.queries) + 2 * (decoder.width + decoder.keys)
    return decoder.layers * LORA_RANK * (attention + 3 * (decoder.width + decoder.inner))


def _elements(case: Case) -> int:
    """Of the parameters that a step moves, as counts.py counts what a backward writes."""
    batchless = [count(replace(case, direction="forward", batch=batch)).bytes for batch in (1, 2)]
    return (2 * batchless[0] - batchless[1]) // DTYPES[case.dtype].itemsize
