"""Floating-point operations and bytes that a stage of a model cannot do without: the floor for its time.

As in counts.py: every weight that the stage uses is read once, inputs once, and results written once; a multiplication
and an addition each. Of embeddings only the rows that are looked up count. Attention to later tokens is not needed, so
a prefill's scores are those of a triangle; torch's counter, which has the whole square, is corrected for that in the
test. A decode step reads the keys and values of every token before it.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PretrainedConfig

from sp_fast.bench.cases import DTYPES, Case
from sp_fast.bench.counts import Count, count
from sp_fast.bench.model_cases import LLAVA, ModelCase
from sp_fast.errors import ConfigError
from sp_fast.llava_sp.tower import tower_kind

#: Whether query, key and value have biases.
_LANGUAGE_MODELS = {"llama": False, "mistral": False, "qwen2": True}


@dataclass(frozen=True)
class Decoder:
    """A language model of Llama's kind, in elements and multiply-adds."""

    layers: int
    width: int
    queries: int  # heads times their width
    keys: int  # the same of keys, and of values
    inner: int
    vocabulary: int
    biased: bool

    @classmethod
    def of(cls, text: PretrainedConfig) -> Decoder:
        """Raises ConfigError for a language model whose layers are not known here."""
        if text.model_type not in _LANGUAGE_MODELS:
            raise ConfigError(
                f"the language model is of model_type {text.model_type!r}, whose operations are not counted: "
                f"known are {', '.join(_LANGUAGE_MODELS)}"
            )
        head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        return cls(
            text.num_hidden_layers, text.hidden_size, text.num_attention_heads * head, text.num_key_value_heads * head,
            text.intermediate_size, text.vocab_size, _LANGUAGE_MODELS[text.model_type],
        )  # fmt: skip

    @property
    def matrices(self) -> int:
        """Of one layer: query, key, value, output, and the three of the MLP."""
        return self.width * (2 * self.queries + 2 * self.keys + 3 * self.inner)

    @property
    def weights(self) -> int:
        """All but the embeddings' rows; the head counts, be it tied to them or not."""
        biases = self.biased * (self.queries + 2 * self.keys)
        layer = self.matrices + biases + 2 * self.width
        return self.layers * layer + self.width + self.vocabulary * self.width

    def prefill(self, tokens: int) -> tuple[int, int]:
        """FLOP and elements beside the weights, of one prompt: embeddings in, cache and last logits out."""
        scores = 4 * self.queries * tokens * (tokens + 1) // 2
        flop = self.layers * (2 * tokens * self.matrices + scores) + 2 * self.width * self.vocabulary
        return flop, tokens * self.width + 2 * self.layers * tokens * self.keys + self.vocabulary

    def step(self, before: int) -> tuple[int, int]:
        """The same of one token with ``before`` others in the cache: its own keys and values join them."""
        flop = self.layers * (2 * self.matrices + 4 * self.queries * (before + 1)) + 2 * self.width * self.vocabulary
        return flop, self.width + 2 * self.layers * self.keys * (before + 1) + self.vocabulary


def steps(case: ModelCase, name: str) -> list[Count]:
    """What an implementation has to do one after another in the case's stage."""
    return _STEPS[case.stage](case, name)


def image_tokens(case: ModelCase, name: str) -> int:
    """Of one image: the other model has no spatial tokens."""
    config = case.shape.config()
    return config.projector.patch_tokens if name == LLAVA else config.image_seq_length


def prompt_length(case: ModelCase, name: str) -> int:
    """Image tokens and text of one prompt."""
    return image_tokens(case, name) + case.prompt_tokens


def _tower(case: ModelCase, name: str) -> Count:
    """The layers up to the one that is read."""
    config = case.shape.config()
    vision, kind = config.vision_config, tower_kind(config.vision_config)
    width, inner, patch = vision.hidden_size, vision.intermediate_size, vision.patch_size
    patches = (vision.image_size // patch) ** 2
    tokens = patches + kind.has_cls
    layers = config.vision_feature_layer % (vision.num_hidden_layers + 1)
    pixels = 3 * patch * patch * width
    matrices = 4 * width * width + 2 * width * inner
    biases = 4 * width + inner + width
    norms = 2 * width * (kind.norm is not None)
    embeddings = pixels + tokens * width + width  # and CLIP's class token, or SigLIP's bias of the convolution
    weights = embeddings + norms + layers * (matrices + biases + 4 * width)
    flop = 2 * patches * pixels + layers * (2 * tokens * matrices + 4 * width * tokens * tokens)
    images = case.batch * (3 * vision.image_size**2 + patches * width)
    return _count(case, case.batch * flop, weights + images)


def _projector(case: ModelCase, name: str) -> Count:
    config = case.shape.config().projector
    stage = "mlp" if name == LLAVA else "whole"  # LLaVA's projector is the patch tokens' MLP
    return count(Case(case.shape.variant, config, stage, "forward", case.batch, case.dtype))


def _prefill(case: ModelCase, name: str) -> Count:
    decoder = Decoder.of(case.shape.config().text_config)
    flop, elements = decoder.prefill(prompt_length(case, name))
    return _count(case, case.batch * flop, decoder.weights + case.batch * elements)


def _decode(case: ModelCase, name: str) -> list[Count]:
    """Every token after the first."""
    decoder, length = Decoder.of(case.shape.config().text_config), prompt_length(case, name)
    found = []
    for before in range(length, length + case.new_tokens - 1):
        flop, elements = decoder.step(before)
        found.append(_count(case, case.batch * flop, decoder.weights + case.batch * elements))
    return found


def _mean(counts: list[Count]) -> Count:
    total = sum(counts, start=Count(0, 0))
    return Count(total.flop // len(counts), total.bytes // len(counts))


def _first(case: ModelCase, name: str) -> list[Count]:
    return [_tower(case, name), _projector(case, name), _prefill(case, name)]


def _count(case: ModelCase, flop: int, elements: int) -> Count:
    return Count(flop, elements * DTYPES[case.dtype].itemsize)


_STEPS = {
    "tower": lambda case, name: [_tower(case, name)],
    "projector": lambda case, name: [_projector(case, name)],
    "prefill": lambda case, name: [_prefill(case, name)],
    "ttft": _first,
    "decode": lambda case, name: [_mean(_decode(case, name))],
    "end_to_end": lambda case, name: [*_first(case, name), *_decode(case, name)],
}
