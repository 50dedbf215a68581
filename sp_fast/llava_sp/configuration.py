"""LlavaSpConfig: a vision tower, a projector and a language model that fit each other."""

from __future__ import annotations

import sys
from typing import Any

from transformers import LlavaConfig

from sp_fast.config import SPProjectorConfig
from sp_fast.errors import ConfigError
from sp_fast.llava_sp.tower import tower_kind

_FROM_PARTS = {"grid": "vision_config", "vision_width": "vision_config", "text_width": "text_config"}


class LlavaSpConfig(LlavaConfig):
    """Of ``LlavaSpForConditionalGeneration``.

    ``vision_config`` is a CLIP or SigLIP vision tower's, ``text_config`` any causal language model's that transformers'
    LLaVA takes. ``projector_config`` says what stands between: a variant's name ("crop-dfi", the default, "pool-dfi",
    "conv336", ...), or fields of ``SPProjectorConfig``; its grid and outer widths are the parts' own. The number of
    image tokens and the treatment of the CLS token follow.

    Raises:
        ConfigError: parts that do not fit, or a feature of LlavaConfig that LLaVA-SP has not.
    """

    model_type = "llava_sp"

    projector_config: dict[str, Any] | str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        tower = tower_kind(self.vision_config)
        self.projector_config = self._fitting(self.projector_config).to_dict()
        projector = self.projector
        self.image_seq_length = projector.spatial_tokens + projector.patch_tokens
        if not tower.has_cls:
            self.vision_feature_select_strategy = "full"
        elif self.vision_feature_select_strategy != "default":
            raise ConfigError("vision_feature_select_strategy='full' would project the CLS token too: leave it out")
        layers = self.vision_config.num_hidden_layers
        if not isinstance(self.vision_feature_layer, int) or not -layers - 1 <= self.vision_feature_layer <= layers:
            raise ConfigError(
                f"vision_feature_layer={self.vision_feature_layer!r} must be one of the tower's {layers + 1} hidden "
                f"states, -{layers + 1} to {layers}; LLaVA-SP reads -2"
            )
        for name, value in (("projector_hidden_act", "gelu"), ("multimodal_projector_bias", True)):
            if getattr(self, name) != value:
                raise ConfigError(f"{name}={getattr(self, name)!r} must be LLaVA-SP's {value!r}: leave it out")

    @property
    def projector(self) -> SPProjectorConfig:
        """What the projector is built from."""
        return SPProjectorConfig.from_dict(self.projector_config)

    def take_projector(self, projector: SPProjectorConfig) -> None:
        """In the place of the present one.

        Raises:
            ConfigError: it does not fit the other parts, or gives other numbers of tokens.
        """
        fitting, present = self._fitting(projector.to_dict()), self.projector
        for name in ("spatial_tokens", "patch_tokens"):
            if getattr(fitting, name) != getattr(present, name):
                raise ConfigError(
                    f"the projector gives {getattr(fitting, name)} {name.replace('_', ' ')} an image, and the model's "
                    f"configuration has {getattr(present, name)}: build the model from LlavaSpConfig(projector_config="
                    "projector.config.to_dict(), ...)"
                )
        self.projector_config = fitting.to_dict()

    @property
    def context(self) -> int:
        """Tokens that the language model's positions reach, image tokens included."""
        return getattr(self.text_config, "max_position_embeddings", sys.maxsize)

    def check_prompt(self, tokens: int) -> None:
        """Raises ConfigError for a prompt of so many tokens, those of images included, that fills the context."""
        if tokens >= self.context:
            raise ConfigError(
                f"the prompt has {tokens} tokens, image tokens included ({self.image_seq_length} an image), but the "
                f"language model's context is {self.context}: shorten it, or leave images out"
            )

    def _fitting(self, given: dict[str, Any] | str | None) -> SPProjectorConfig:
        vision, text = self.vision_config, self.text_config
        parts = {
            "grid": vision.image_size // vision.patch_size,
            "vision_width": vision.hidden_size,
            "text_width": text.hidden_size,
        }
        values = {"variant": given or "crop-dfi"} if given is None or isinstance(given, str) else dict(given)
        for name, value in parts.items():
            if values.get(name, value) != value:
                raise ConfigError(
                    f"projector_config has {name}={values[name]!r}, but the {_FROM_PARTS[name]} has {value}: leave it "
                    "out, or give the parts that the projector was trained with"
                )
        values |= parts
        if values.get("extractor") == "transformer" or values.get("variant", "").startswith("tfm"):
            values.setdefault("spatial_width", vision.hidden_size)  # which transformer blocks keep
        variant = values.pop("variant", None)
        return SPProjectorConfig.from_dict(values) if variant is None else SPProjectorConfig.variant(variant, **values)
