"""The spatial task's language model: small, and taught to answer about scenes before it sees any image.

As in LLaVA it has its skill before the projector comes. A real one has it from much text; a small one that is shown
sentences alone takes hours to find out which words belong together. So a scene is given as vectors, as an image will
be: a thing is one or several positions with the sum of its words' embeddings, "red circle" and "top left", and
background has a place alone. No pixel and no feature of the vision tower takes part, and no spatial token.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache, partial
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM

from sp_fast.training.task.fit import Lessons, Progress, fit
from sp_fast.training.task.reading import Scene, make_scene, questions
from sp_fast.training.task.words import PLACES

_IGNORED = -100
_QUESTIONS = 3  # of a scene: what was asked before distracts, and delays the first insight by thousands of steps
_POSITIONS = 4  # most that a thing takes
_BACKGROUND = 16  # most positions that show none
_JUDGED = 200  # scenes


def make_language_model(
    tokenizer: PreTrainedTokenizerBase, width: int, layers: int, heads: int, context: int, seed: int
) -> Qwen2ForCausalLM:
    """At random, a Qwen2. Two things help small models to find out early what to look at: keys begin equal to queries,
    so that like attends to like (mimetic initialization), and embeddings are not drowned by what the layers add."""
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=context,
        initializer_range=0.6 * width**-0.5,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(config)
        model.set_attn_implementation("eager")  # the fastest for such widths on a CPU
        model.model.embed_tokens.weight.normal_(0, 0.3)
        for layer in model.model.layers:
            layer.self_attn.k_proj.weight.copy_(layer.self_attn.q_proj.weight)
            for last in (layer.self_attn.o_proj, layer.mlp.down_proj):
                last.weight /= (2 * layers) ** 0.5
    return model


def teach_reading(
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    lessons: Lessons,
    seed: int,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Trains on scenes that are never the same twice, a batch of them each step; returns the share of answers to new
    ones that it says right, word for word."""
    batch, device = lessons.batch, model.device
    documents = partial(Documents.make, tokenizer, seed, device=device)

    def loss_of(step: int) -> Tensor:
        return reading_loss(model, documents(range(step * batch, (step + 1) * batch)))

    fit(model, loss_of, lessons, progress)
    beyond = lessons.steps * batch
    with torch.no_grad():
        return {"reading": _accuracy(model, documents(range(beyond, beyond + _JUDGED)))}


@dataclass(frozen=True)
class Documents:
    """A batch of scenes with questions.

    ``things`` ``[B, S, 2]`` int64: of each position the tokens of its kind and place; the padding token stands for
    none.
    ``input_ids``, ``labels`` ``[B, L]`` int64: the questions and answers after them, padded on the right.
    ``mask`` ``[B, 1 + S + L]`` int64, of everything with the beginning of text in front.
    """

    things: Tensor
    input_ids: Tensor
    labels: Tensor
    mask: Tensor

    @classmethod
    def make(
        cls, tokenizer: PreTrainedTokenizerBase, seed: int, numbers: Iterable[int], device: torch.device
    ) -> Documents:
        """By their numbers."""
        rows = [_document(tokenizer, Random(f"{seed}/reading/{number}")) for number in numbers]
        pad = tokenizer.pad_token_id
        things, ids, labels = (
            pad_sequence([torch.tensor(row[i]) for row in rows], True, fill, side)
            for i, (fill, side) in enumerate(((pad, "left"), (pad, "right"), (_IGNORED, "right")))
        )
        is_there = [torch.ones(len(rows), 1, dtype=torch.bool), (things != pad).any(-1), ids != pad]
        return cls(*(tensor.to(device) for tensor in (things, ids, labels, torch.cat(is_there, 1).long())))


def reading_loss(model: Qwen2ForCausalLM, documents: Documents) -> Tensor:
    """Cross-entropy of the answers."""
    logits = read(model, documents)
    return F.cross_entropy(logits.float().flatten(0, 1), documents.labels.flatten(), ignore_index=_IGNORED)


def read(model: Qwen2ForCausalLM, documents: Documents) -> Tensor:
    """``[B, L, vocabulary]`` logits: what is said at each of ``input_ids``, from what stands before it."""
    embed, things, ids = model.get_input_embeddings(), documents.things, documents.input_ids
    vectors = (embed(things) * (things != model.config.pad_token_id).unsqueeze(-1)).sum(2)
    begin = embed(ids.new_full((len(ids), 1), model.config.bos_token_id))
    embeds = torch.cat([begin, vectors, embed(ids)], 1)
    positions = torch.arange(embeds.shape[1], device=ids.device)[None]
    hidden = model.model(
        inputs_embeds=embeds, attention_mask=documents.mask, position_ids=positions, use_cache=False
    ).last_hidden_state
    return model.lm_head(hidden[:, things.shape[1] : -1])


def _accuracy(model: Qwen2ForCausalLM, documents: Documents) -> float:
    """Of answers, each up to its end of text."""
    labels = documents.labels
    supervised = labels != _IGNORED
    wrong = (read(model, documents).argmax(-1) != labels) & supervised
    ends = labels == model.config.eos_token_id
    answer = ends.cumsum(1) - ends.long()  # of each token, the number of its answer
    failed = torch.zeros_like(labels).scatter_add_(1, answer, wrong.long()).bool()
    return 1 - (failed.sum() / ends.sum()).item()


def _document(tokenizer: PreTrainedTokenizerBase, rng: Random) -> tuple[list[list[int]], list[int], list[int]]:
    """Things, ids and labels, as ``Documents`` has them."""
    scene = make_scene(rng)
    things = _things(tokenizer, rng, scene)
    ids = list(_tokens(tokenizer, "\n"))
    labels = [_IGNORED] * len(ids)
    for question, answer in questions(rng, scene, _QUESTIONS):
        asked, said = _tokens(tokenizer, f"{question}\n"), _tokens(tokenizer, answer + tokenizer.eos_token)
        ids += asked + said
        labels += [_IGNORED] * len(asked) + list(said)
    return things, ids, labels


def _things(tokenizer: PreTrainedTokenizerBase, rng: Random, scene: Scene) -> list[list[int]]:
    """Tokens of kind and place of every position, in any order."""
    shown = [(str(kind), place) for place, kind in scene for _ in range(rng.randint(1, _POSITIONS))]
    shown += [(tokenizer.pad_token, rng.choice(PLACES)) for _ in range(rng.randint(0, _BACKGROUND))]
    rng.shuffle(shown)
    return [[token for word in words for token in _tokens(tokenizer, word)] for words in shown]


@lru_cache(maxsize=1 << 16)
def _tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    """Most texts come again and again."""
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
