"""From a conversation to token ids and labels: rendered once, tokenised once, supervised by character spans.

Pieces of the text are never tokenised by themselves, because what they become depends on what stands beside them. The
template says which characters are the assistant's (``{% generation %}``), the tokenizer says which characters a token
is made of, and a token is supervised where the two overlap.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

import numpy as np
from transformers.utils.chat_template_utils import render_jinja_template

from sp_fast.errors import DataError, TrainingError, first_line
from sp_fast.llava_sp.processing import CHAT_TEMPLATES, IMAGE_TOKEN, LlavaSpProcessor
from sp_fast.training.conversation import Conversation, Message

IGNORED = -100  # a label that has no part in the loss
_MARKER = re.compile(r"{%-?\s*generation\s*-?%}")
_PROBE = (Message("user", f"{IMAGE_TOKEN}\nquestion"), Message("assistant", "answer"))


@dataclass(frozen=True)
class Encoded:
    """Token ids, and labels of the same length: the id where it is supervised, else -100."""

    input_ids: list[int]
    labels: list[int]
    truncated: bool


class Encoder:
    """What a model is shown of a conversation, and what it has to say.

    A control token of the tokenizer inside the data (``</s>``, say) would end a turn or stand for nothing: a sample
    that says one is refused.

    Args:
        template: a name of ``CHAT_TEMPLATES``, or None for the processor's own.
        max_length: in tokens, image tokens included; longer samples lose their end.

    Raises:
        TrainingError: a template that does not say what is the assistant's, or a tokenizer that does not say where its
            tokens stand in the text.
    """

    def __init__(self, processor: LlavaSpProcessor, template: str | None, max_length: int) -> None:
        self.processor, self.max_length = processor, max_length
        self._template, self._name = _template_of(processor, template), template or "the processor's own"
        tokenizer = processor.tokenizer
        if not tokenizer.is_fast:
            raise TrainingError(
                f"{type(tokenizer).__name__} does not say where its tokens stand in the text: load one with "
                "tokenizer.json, which AutoTokenizer makes of most tokenizers"
            )
        controls = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        controls |= dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
        self._controls = re.compile("|".join(re.escape(token) for token in sorted(controls, key=len, reverse=True)))
        # What the vocabulary lacks becomes the unknown token, whatever the text says.
        self._control_ids = np.array([i for i in controls.values() if i != tokenizer.unk_token_id])
        self._lead = self._lead_of_answers()

    @functools.cached_property
    def image_tokens(self) -> int:
        """How many tokens an image becomes."""
        processor, size = self.processor, self.processor.image_processor.crop_size
        patches = (size["height"] // processor.patch_size) * (size["width"] // processor.patch_size)
        has_cls = processor.vision_feature_select_strategy == "default"
        return patches + processor.num_additional_image_tokens - has_cls

    def estimate(self, conversation: Conversation) -> int:
        """About how many tokens it becomes, without tokenising: four characters each."""
        text = sum(len(message.text) for message in conversation.messages)
        return text // 4 + len(conversation.images) * self.image_tokens

    def check(self, conversation: Conversation) -> None:
        """What can be said without tokenising. Raises DataError for control tokens in the text, and for roles or a
        number of images that the template does not take."""
        for message in conversation.messages:
            for found in self._controls.findall(message.text):
                if found != IMAGE_TOKEN:
                    raise DataError(f"its text says {found}, a control token of the tokenizer: write it another way")
        shape = tuple((message.role, message.text.count(IMAGE_TOKEN)) for message in conversation.messages)
        self._check_places(self._places(shape), conversation)

    def encode(self, conversation: Conversation) -> Encoded:
        """Tokens as the processor makes them of the rendered text and the images, and their labels.

        Supervised is all that follows a prompt: the assistant's words, the space in front and what ends them. Raises
        DataError as ``check``, for images that do not fit into ``max_length``, and where it leaves no supervised token.
        """
        self.check(conversation)
        rendered, spans = self._render(conversation.messages)
        self._check_places(rendered.count(IMAGE_TOKEN), conversation)
        text = self.processor.separated(rendered)
        ids, supervised = self._tokenise(text, [self._moved(rendered, *span) for span in spans])
        is_image = ids == self.processor.image_token_id
        labels = np.where(supervised & ~is_image, ids, IGNORED)
        repeats = np.where(is_image, self.image_tokens, 1)
        ids, labels = np.repeat(ids, repeats), np.repeat(labels, repeats)
        self._check_length(ids, labels)
        kept = slice(self.max_length)
        return Encoded(ids[kept].tolist(), labels[kept].tolist(), len(ids) > self.max_length)

    def _lead_of_answers(self) -> str:
        """The space between the prompt and an answer: Vicuna's prompts end with ``ASSISTANT:``.

        The model has to say it, so it is supervised, as in the official code. Most of the time it is part of the
        answer's first token; in front of digits, say, it is one of its own.
        """
        try:
            text, spans = self._render(_PROBE)
            prompt, _ = self._render(_PROBE[:1], add_generation_prompt=True)
        except DataError as error:
            raise TrainingError(f"chat template {self._name} cannot be used: {error}") from error
        if not any("answer" in text[start:end] for start, end in spans):
            raise TrainingError(f"chat template {self._name} leaves the answer out of its {{% generation %}} block")
        lead = text[len(prompt) : spans[0][0]] if text.startswith(prompt) else ""
        return lead if lead.isspace() else ""

    def _render(
        self, messages: tuple[Message, ...], add_generation_prompt: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text, and the spans of its characters that are the assistant's."""
        turns = [{"role": message.role, "content": message.text} for message in messages]
        try:
            texts, spans = render_jinja_template(
                conversations=[turns],
                chat_template=self._template,
                return_assistant_tokens_mask=True,
                add_generation_prompt=add_generation_prompt,
                **self.processor.tokenizer.special_tokens_map,
            )
        except Exception as error:  # templates refuse what they do not know in any way
            raise DataError(f"chat template {self._name} refuses it: {first_line(error)}") from error
        return texts[0], spans[0]

    @functools.lru_cache(maxsize=4096)  # noqa: B019, one encoder a run
    def _places(self, shape: tuple[tuple[str, int], ...]) -> int:
        """How many images the template has places for in messages of these roles and numbers of images."""
        return self._render(tuple(Message(role, IMAGE_TOKEN * images) for role, images in shape))[0].count(IMAGE_TOKEN)

    def _moved(self, rendered: str, start: int, end: int) -> tuple[int, int]:
        """A span with its lead, in the separated text, where the space after an image belongs to what follows it."""
        start -= len(self._lead) * rendered[:start].endswith(self._lead)
        return len(self.processor.separated(rendered[:start])), len(self.processor.separated(rendered[:end]))

    def _tokenise(self, text: str, spans: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
        """``[L]`` int64 ids and ``[L]`` bool, whether a token has a character of the spans."""
        tokenizer = self.processor.tokenizer
        has_bos = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
        encoding = tokenizer(
            text,
            add_special_tokens=not has_bos,
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
            verbose=False,  # about its own length; max_length decides
        )
        ids, added = np.array(encoding["input_ids"]), np.array(encoding["special_tokens_mask"], bool)
        if np.isin(ids[~added], self._control_ids).sum() > len(self._controls.findall(text)):
            raise DataError("the tokenizer finds a control token in text that is written another way: remove it")
        starts, ends = np.array(encoding["offset_mapping"]).T
        inside = np.zeros(len(text) + 1, np.int64)
        for start, end in spans:
            inside[start:end] = 1
        before = np.concatenate([[0], inside.cumsum()])  # characters inside spans before each
        # A token of no characters, such as a space that the tokenizer puts in front, goes with the one that follows.
        return ids, (before[np.maximum(ends, starts + 1)] > before[starts]) & ~added

    def _check_places(self, places: int, conversation: Conversation) -> None:
        if places != len(conversation.images):
            raise DataError(
                f"chat template {self._name} has {places} places for its {len(conversation.images)} images: choose "
                "another template for such samples"
            )

    def _check_length(self, ids: np.ndarray, labels: np.ndarray) -> None:
        places = np.flatnonzero(ids == self.processor.image_token_id)
        if len(places) and places[-1] >= self.max_length:
            raise DataError(
                f"its images end at token {places[-1] + 1}, beyond {self.max_length}: raise the maximal length"
            )
        said = np.flatnonzero(labels[1:] != IGNORED) + 1  # the first token is predicted by none
        if not len(said):
            raise DataError("no supervised token: its answers are empty")
        if said[0] >= self.max_length:
            raise DataError(
                f"no supervised token: its answer begins at token {said[0] + 1}, beyond {self.max_length}: raise the "
                "maximal length"
            )


def _template_of(processor: LlavaSpProcessor, name: str | None) -> str:
    template = processor.chat_template if name is None else CHAT_TEMPLATES.get(name)
    if not isinstance(template, str):
        raise TrainingError(f"chat template {name!r} is none of {', '.join(CHAT_TEMPLATES)}, nor the processor's own")
    if not _MARKER.search(template):
        raise TrainingError(
            f"the chat template {name or 'of the processor'} does not mark what is the assistant's: put its answers, "
            f"with what ends them, between {{% generation %}} and {{% endgeneration %}}, or choose "
            f"{' or '.join(CHAT_TEMPLATES)} with --template"
        )
    return template
