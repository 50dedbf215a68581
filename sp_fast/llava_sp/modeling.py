"""LLaVA-SP as transformers' users know models: LLaVA with the spatial projector."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    LlavaForConditionalGeneration,
    LlavaModel,
    LlavaPreTrainedModel,
    LogitsProcessor,
    LogitsProcessorList,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import can_return_tuple

from sp_fast.errors import CheckpointError
from sp_fast.llava_sp.configuration import LlavaSpConfig
from sp_fast.llava_sp.official_names import refuse_unmerged
from sp_fast.llava_sp.tower import patch_features
from sp_fast.projector import SPProjector
from sp_fast.recognise import listed

PROJECTOR = "multi_modal_projector"


class LlavaSpPreTrainedModel(LlavaPreTrainedModel):
    """What the models with and without a head share."""

    config_class = LlavaSpConfig
    _no_split_modules = ("SPProjector",)
    _core = ""  # where LlavaSpModel's parts are

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As in transformers, but what is not a whole projector in floating point is an error.

        Raises:
            CheckpointError: projector weights are missing, which transformers would replace by random ones, or were
                quantised; or the model was saved with adapters around its layers.
        """
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        where = args[0] if args else "the state dict"
        if info["missing_keys"]:
            refuse_unmerged(where, info["unexpected_keys"])
        for name, parameter in model.get_submodule(f"{cls._core}{PROJECTOR}").named_parameters():
            if not parameter.is_floating_point() or parameter.itemsize < 2:
                raise CheckpointError(
                    f"{PROJECTOR}.{name} was quantised to {parameter.dtype}, which the projector does not compute "
                    f"with: leave it out (llm_int8_skip_modules=['{PROJECTOR}', 'lm_head'] in BitsAndBytesConfig, "
                    "modules_to_not_convert in others)"
                )
        unfilled = {*info["missing_keys"], *(key for key, *_ in info.get("mismatched_keys", ()))}
        if lost := [key for key in unfilled if PROJECTOR in key]:
            raise CheckpointError(
                f"{where} lacks {listed(lost)}: give a whole LLaVA-SP checkpoint of "
                "this configuration (sp-fast convert makes one from official files)"
            )
        return (model, info) if output_loading_info else model

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As in transformers, with the configuration of the projector that is in place: a quantised or compact one may
        have taken the place of the one that the model was built with.

        Raises:
            ConfigError: it does not fit the other parts, or gives other numbers of tokens.
        """
        projector = self.get_submodule(f"{self._core}{PROJECTOR}")
        self.config.take_projector(getattr(projector, "config", self.config.projector))
        super().save_pretrained(*args, **kwargs)


class LlavaSpModel(LlavaSpPreTrainedModel, LlavaModel):
    """Vision tower, ``SPProjector`` and language model, without the head."""

    def __init__(self, config: LlavaSpConfig) -> None:
        LlavaPreTrainedModel.__init__(self, config)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.multi_modal_projector = SPProjector(config.projector)
        self.language_model = AutoModel.from_config(config.text_config)
        for module in self.multi_modal_projector.modules():
            module._is_hf_initialized = True  # by itself, as the official code's layers are
        self.post_init()

    def get_patch_features(self, pixel_values: Tensor) -> Tensor:
        """``[images, 3, height, width]`` to ``[images, N, C]``: the tower's selected layer, CLS removed."""
        return patch_features(self.vision_tower, pixel_values, self.config.vision_feature_layer)

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """``[images, 3, height, width]`` to ``[images, T + N, H]``: spatial tokens first."""
        return self.multi_modal_projector(self.get_patch_features(pixel_values))

    def get_image_features(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """As LLaVA's: ``pooler_output`` holds each image's tokens ``[T + N, H]``."""
        self._check_settings(kwargs)
        return BaseModelOutputWithPooling(pooler_output=list(self.encode_images(pixel_values)))

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs: Any,
    ) -> Any:
        """As LLaVA's, with one difference: the image token needs no row in the vocabulary.

        Args:
            input_ids: ``[B, L]``, with ``config.image_seq_length`` image tokens for each image.
            pixel_values: ``[images, 3, height, width]``, all images of the batch in reading order.
            inputs_embeds: ``[B, L, H]``, instead of ``input_ids`` and images.
            mm_encoder_outputs: ``{"image": get_image_features(...)}``, instead of ``pixel_values``.

        Raises:
            ValueError: there are not as many image tokens as the images give, or images without ``input_ids``.
        """
        self._check_settings(kwargs)
        tokens = None
        if (encoded := (mm_encoder_outputs or {}).get("image")) is not None:
            tokens = torch.cat(list(encoded.pooler_output))
        elif pixel_values is not None:
            tokens = self.encode_images(pixel_values).flatten(0, 1)
        if (input_ids is None) == (inputs_embeds is None) or (input_ids is None and tokens is not None):
            raise ValueError("give input_ids, with or without images, or inputs_embeds alone")
        if input_ids is not None:
            inputs_embeds = self._embed(input_ids, tokens)
        outputs = super().forward(inputs_embeds=inputs_embeds, **kwargs)
        outputs.image_hidden_states = tokens
        return outputs

    def _check_settings(self, kwargs: dict[str, Any]) -> None:
        """Raises ValueError for what LLaVA takes in a call, and LLaVA-SP is built with."""
        for name in ("vision_feature_layer", "vision_feature_select_strategy"):
            if kwargs.get(name) not in (None, getattr(self.config, name)):
                raise ValueError(f"{name}={kwargs[name]!r} is not the configuration's {getattr(self.config, name)!r}")
        if kwargs.get("image_sizes") is not None:
            raise ValueError("image_sizes is for towers that take images of any size: leave it out")

    def _embed(self, input_ids: Tensor, image_tokens: Tensor | None) -> Tensor:
        """``[B, L, H]``: the vocabulary's rows, with ``image_tokens`` ``[images * (T + N), H]`` in their places."""
        is_image = input_ids == self.config.image_token_id
        embeds = self.get_input_embeddings()(input_ids.masked_fill(is_image, 0))
        self._check_places(is_image, 0 if image_tokens is None else len(image_tokens))
        if image_tokens is None:
            return embeds
        return embeds.masked_scatter(is_image.unsqueeze(-1).to(embeds.device), image_tokens.to(embeds))

    def _check_places(self, is_image: Tensor, tokens: int) -> None:
        """Not while a graph is compiled, and not for a decoded token: it would make the CPU wait for the GPU."""
        if torch.compiler.is_compiling() or (is_image.shape[1] == 1 and not tokens):
            return
        if (places := int(is_image.sum())) != tokens:
            each = self.config.image_seq_length
            raise ValueError(
                f"the prompts have {places} image tokens and the images {tokens} ({tokens // each} images of {each}): "
                "every image of pixel_values needs its <image> in the text, which LlavaSpProcessor expands"
            )


class LlavaSpForConditionalGeneration(LlavaSpPreTrainedModel, LlavaForConditionalGeneration):
    """LLaVA-SP with its language model's head: what is trained and generates."""

    _core = "model."

    def __init__(self, config: LlavaSpConfig) -> None:
        LlavaPreTrainedModel.__init__(self, config)
        self.model = LlavaSpModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    #: columns that compile_model has put in front of the prompts
    padded = 0

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """As in transformers.

        Raises:
            ConfigError: a prompt as long as the language model's context, or longer, image tokens included.
        """
        prompt = next(
            (x for x in (inputs, kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if x is not None), None
        )
        if prompt is not None:
            self.config.check_prompt(prompt.shape[1])
        return super().generate(inputs, *args, **kwargs)

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, dict[str, Any]]:
        """With beams or several answers, a prompt's images are repeated together (transformers 5.17: one by one)."""
        pixels = kwargs.pop("pixel_values", None)
        expanded, kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **kwargs
        )
        if pixels is not None:
            images = (input_ids == self.config.image_token_id).sum(1) // self.config.image_seq_length
            own = pixels.split(images.tolist())
            kwargs["pixel_values"] = torch.cat([images.repeat(expand_size, 1, 1, 1) for images in own])
        return expanded, kwargs

    def _get_logits_processor(
        self, generation_config: Any, input_ids_seq_length: int | None = None, *args: Any, **kwargs: Any
    ) -> LogitsProcessorList:
        """Repetition penalties and the like see text alone."""
        length = None if input_ids_seq_length is None else input_ids_seq_length - self.padded
        if self.padded and generation_config.min_new_tokens is not None:  # transformers counts from the padded prompt
            generation_config = copy.copy(generation_config)
            generation_config.min_length -= self.padded
        found = super()._get_logits_processor(generation_config, length, *args, **kwargs)
        return LogitsProcessorList(_OfText(one, self.config.image_token_id, self.padded) for one in found)


class _OfText(LogitsProcessor):
    """A processor that sees neither the padding of compile_model nor image tokens, which have no row in the vocabulary:
    in their places it sees a token that is there anyway."""

    def __init__(self, inner: LogitsProcessor, image_token_id: int, padded: int) -> None:
        self._inner, self._image, self._padded = inner, image_token_id, padded

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        text = input_ids[:, self._padded :]
        is_image = text == self._image
        other = text.masked_fill(is_image, -1).amax(1, keepdim=True).clamp(min=0)
        return self._inner(torch.where(is_image, other, text), scores)
