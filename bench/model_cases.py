"""What is measured of a whole model: one stage at one batch, with one attention, eager or compiled."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from sp_fast.bench.cases import DTYPES
from sp_fast.bench.model_shapes import ModelShape
from sp_fast.bench.plan import check_names
from sp_fast.errors import ConfigError

#: tower: pixels to patch features; projector: to image tokens; prefill: the language model on image tokens and text,
#: logits of the last position; ttft: pixels and text to the first token; decode: each further one; end_to_end: all
STAGES = ("tower", "projector", "prefill", "ttft", "decode", "end_to_end")

#: compiled: sp_fast.compile_model, whose graphs hold tower and projector, the prefill, and the decode step, and begin
#: in `generate`: the parts have no clock of their own.
MODES = {"eager": STAGES, "compiled": ("ttft", "decode", "end_to_end")}

SP_FAST, SP_REFERENCE, LLAVA, EXACT = "sp_fast", "sp_reference", "llava", "exact"
IMPLEMENTATIONS = (SP_FAST, SP_REFERENCE, LLAVA)


@dataclass(frozen=True)
class ModelCase:
    """One row of a table, for every implementation that takes part."""

    shape: ModelShape
    stage: str
    batch: int  # images, a prompt each
    dtype: str
    prompt_tokens: int  # of text, beside the image's
    new_tokens: int
    attention: str  # the language model's, by transformers' names
    mode: str
    direction: str = "forward"

    @property
    def key(self) -> str:
        """Unique in a plan, and a file name."""
        lengths = f"b{self.batch}.p{self.prompt_tokens}.n{self.new_tokens}"
        return f"{self.shape.name}.{self.stage}.{lengths}.{self.attention}.{self.mode}.{self.dtype}"

    @property
    def gate(self) -> ModelCase:
        """The case whose results judge this one: every stage's are parts of them."""
        return replace(self, stage="end_to_end")

    @property
    def exact(self) -> ModelCase:
        """The case whose float64 results judge this one, whatever attention and mode."""
        return replace(self.gate, attention="sdpa", mode="eager")


class Lengths(NamedTuple):
    """Tokens of a prompt beside its image's, and of an answer."""

    prompt_tokens: int = 64
    new_tokens: int = 32


def model_cases(
    shapes: Sequence[ModelShape],
    stages: Sequence[str],
    batches: Sequence[int],
    dtypes: Sequence[str],
    attentions: Mapping[str, Sequence[str]],
    modes: Sequence[str],
    lengths: Lengths,
) -> tuple[ModelCase, ...]:
    """Every combination that exists, those on the same weights beside each other; ``attentions`` are those of a dtype.

    Raises:
        ConfigError: a name that is unknown, a length that does not fit, or stages that none of the modes has.
    """
    for kind, given, known in (
        ("stage", stages, STAGES), ("dtype", dtypes, tuple(DTYPES)), ("mode", modes, tuple(MODES)),
    ):  # fmt: skip
        check_names(kind, given, known)
    if min(batches) < 1:
        raise ConfigError(f"batch {min(batches)} is no number of images: give 1 or more")
    if lengths.prompt_tokens < 1 or lengths.new_tokens < 2:
        raise ConfigError(
            f"prompt-tokens={lengths.prompt_tokens} and new-tokens={lengths.new_tokens} must be at least 1 and 2: the "
            "time of a decoded token is that between two of them"
        )
    for shape in shapes:
        _check_context(shape, lengths)
    cases = tuple(
        ModelCase(shape, stage, batch, dtype, *lengths, attention, mode)
        for shape, dtype, mode in itertools.product(shapes, dtypes, modes)
        for attention, batch, stage in itertools.product(attentions[dtype], batches, stages)
        if stage in MODES[mode]
    )
    if not cases:
        raise ConfigError(
            f"mode {', '.join(modes)} has no stage {', '.join(stages)}: choose from {', '.join(MODES['compiled'])}, or "
            "--mode eager"
        )
    return cases


def _check_context(shape: ModelShape, lengths: Lengths) -> None:
    config = shape.config()
    image, context = config.image_seq_length, config.text_config.max_position_embeddings
    if (needed := image + sum(lengths)) > context:
        raise ConfigError(
            f"{image} image tokens, {lengths.prompt_tokens} of text and {lengths.new_tokens} new ones are {needed}, "
            f"but the language model's context is {context}: choose smaller --prompt-tokens or --new-tokens"
        )


def attentions_on(device: str, dtype: str, requested: Sequence[str]) -> dict[str, str]:
    """The attentions that are asked for and run there, each once, with the reason.

    Raises:
        BackendError: an unknown one, or a forced one that cannot run there.
    """
    from sp_fast.attention import attention_on

    check_names("dtype", [dtype], tuple(DTYPES))
    found: dict[str, str] = {}
    for name in requested:
        attention = attention_on(name, torch.device(device), DTYPES[dtype])
        found.setdefault(attention.name, attention.reason)
    return found


def model_implementations(names: Sequence[str]) -> tuple[str, ...]:
    """Those that are named, or all. Raises ConfigError for names that are none."""
    check_names("implementation", names, IMPLEMENTATIONS)
    return tuple(dict.fromkeys(names)) or IMPLEMENTATIONS
