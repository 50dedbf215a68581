"""LlavaSpProcessor: images and text to what the model takes, and the chat templates of the published recipe."""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING, Any

from transformers import LlavaProcessor
from transformers.image_utils import make_flat_list_of_images

from sp_fast.errors import ConfigError, ImageError
from sp_fast.llava_sp.tower import tower_kind

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sp_fast.llava_sp.configuration import LlavaSpConfig

IMAGE_TOKEN = "<image>"
_CONTENT = (
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>\n' }}{% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %}"
)
# In front of a language model's own template, which knows text alone: contents become text, images first.
_AS_TEXT = (
    "{% set all = namespace(messages=[]) %}{% for message in messages %}{% set content %}"
    + _CONTENT
    + "{% endset %}{% set all.messages = all.messages + [dict(message, content=content)] %}{% endfor %}"
    "{% set messages = all.messages %}"
)
_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)
#: Of LLaVA's conversation modes. "plain" is stage 1's: the image, then its caption.
CHAT_TEMPLATES = {
    "vicuna_v1": (
        "{% if messages[0]['role'] == 'system' %}{% set turns = messages[1:] %}"
        "{% set message = messages[0] %}" + _CONTENT + "{{ ' ' }}"
        "{% else %}{% set turns = messages %}{{ '" + _SYSTEM.replace("'", "\\'") + " ' }}{% endif %}"
        "{% for message in turns %}{% if message['role'] == 'user' %}"
        "{{ 'USER: ' }}" + _CONTENT + "{{ ' ' }}"
        "{% else %}{{ 'ASSISTANT: ' }}{% generation %}" + _CONTENT + "{{ eos_token }}{% endgeneration %}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    ),
    "plain": (
        "{% for message in messages %}{% if message['role'] == 'assistant' %}{% generation %}"
        + _CONTENT
        + "{{ '\n' }}{% endgeneration %}{% else %}{{ '<image>' }}{% endif %}{% endfor %}"
    ),
}


class LlavaSpProcessor(LlavaProcessor):
    """LLaVA's processor, where an image stands for T spatial and N patch tokens.

    The text after an image is tokenised as the official code does, on its own: a SentencePiece tokenizer then begins it
    with a space, which one that is not ``legacy`` leaves out after a special token.
    """

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> Any:
        """As LLaVA's. Raises ImageError where the text has another number of ``<image>`` than images are given."""
        if text is not None:
            text = self.separated(text) if isinstance(text, str) else [self.separated(prompt) for prompt in text]
        return super().__call__(images=images, text=text, **kwargs)

    def separated(self, prompt: str) -> str:
        """The prompt with a space after each image, where the tokenizer needs it to begin a text there."""
        if not self._wants_space:
            return prompt
        return re.sub(rf"({self.image_token})(?!{self.image_token}|\Z)", r"\1 ", prompt)

    @functools.cached_property
    def _wants_space(self) -> bool:
        alone, after, spaced = (
            self.tokenizer(text, add_special_tokens=False)["input_ids"]
            for text in ("\nx", f"{self.image_token}\nx", f"{self.image_token} \nx")
        )
        return after[1:] != alone == spaced[1:]

    def validate_inputs(self, images: Any = None, text: Any = None, **kwargs: Any) -> None:
        """Raises ImageError where the prompts ask for more images than are given, or for fewer."""
        if text is not None:
            wanted = sum(prompt.count(self.image_token) for prompt in ([text] if isinstance(text, str) else text))
            given = 0 if images is None else len(make_flat_list_of_images(images))
            if wanted != given:
                raise ImageError(
                    f"the text has {wanted} {self.image_token} and {given} images are given: each image needs its "
                    f"{self.image_token} in the text, in order"
                )
        super().validate_inputs(images=images, text=text, **kwargs)

    @classmethod
    def for_model(
        cls, config: LlavaSpConfig, tokenizer: PreTrainedTokenizerBase, chat_template: str | None = "vicuna_v1"
    ) -> LlavaSpProcessor:
        """The processor of a model: its image size, its number of image tokens, its image token.

        The tokenizer gets ``<image>`` as a special token if it has none. Images are padded to a square of the mean
        colour, as in the published recipe, then scaled bicubically and normalised as the tower was trained.

        Args:
            chat_template: a name of ``CHAT_TEMPLATES``, a template, or None to keep the tokenizer's own, which gets
                ``<image>`` and text as one text.

        Raises:
            ConfigError: the tokenizer's image token is not ``config.image_token_id``.
        """
        add_image_token(tokenizer)
        found = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        if found != config.image_token_id:
            raise ConfigError(
                f"{IMAGE_TOKEN} is token {found} of the tokenizer, but the model's image_token_index is "
                f"{config.image_token_id}: give the tokenizer that the model was made with"
            )
        kind, size = tower_kind(config.vision_config), config.vision_config.image_size
        template = CHAT_TEMPLATES.get(chat_template, chat_template)
        if template is None and tokenizer.chat_template is not None:
            template = _AS_TEXT + tokenizer.chat_template.removeprefix(_AS_TEXT)
        return cls(
            image_processor=image_processor(size, has_cls=kind.has_cls),
            tokenizer=tokenizer,
            patch_size=config.vision_config.patch_size,
            vision_feature_select_strategy=config.vision_feature_select_strategy,
            chat_template=template,
            image_token=IMAGE_TOKEN,
            num_additional_image_tokens=config.projector.spatial_tokens + kind.has_cls,
        )


def add_image_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of ``<image>``, which is added as a special token where it is missing; and a padding token, which a batch
    needs, where there is none: the unknown token, as in Vicuna's recipe, else the end of text."""
    from tokenizers import AddedToken

    if IMAGE_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_special_tokens(
            {"additional_special_tokens": [AddedToken(IMAGE_TOKEN, special=True, normalized=False)]}
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    # To generate, prompts end together; a trainer pads by itself. Without the second line it would not be saved.
    tokenizer.padding_side = "left"
    tokenizer.init_kwargs["padding_side"] = "left"
    return tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)


def image_processor(size: int, has_cls: bool) -> Any:
    """Of a tower's image size, in pixels; CLIP's normalisation, or SigLIP's for a tower without CLS."""
    try:
        from transformers import LlavaImageProcessorPil as Processor
    except ImportError:
        from transformers import LlavaImageProcessor as Processor
    settings: dict[str, Any] = {"do_pad": True, "size": {"shortest_edge": size}}
    if not has_cls:  # SigLIP's normalisation
        settings |= {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
    return Processor(**settings, crop_size={"height": size, "width": size})
