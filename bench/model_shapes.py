"""Which models are measured: published shapes with random weights, or a folder that `sp-fast convert` wrote."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sp_fast.bench.plan import check_names, fitting
from sp_fast.errors import ConfigError

if TYPE_CHECKING:
    from transformers import LlavaConfig, PretrainedConfig

    from sp_fast.llava_sp import LlavaSpConfig


def _llama(
    width: int, inner: int, layers: int, heads: int, kv_heads: int, context: int, vocabulary: int = 32000
) -> dict[str, Any]:
    return {
        "model_type": "llama", "hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "max_position_embeddings": context,
        "vocab_size": vocabulary, "rms_norm_eps": 1e-5,
    }  # fmt: skip


#: Of published language models: Qwen2-0.5B, TinyLlama-1.1B, Vicuna-7B and -13B v1.5
LLMS: dict[str, dict[str, Any]] = {
    "tiny": _llama(64, 128, 2, 4, 2, 2048, vocabulary=512),
    "0.5b": {
        "model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
        "num_attention_heads": 14, "num_key_value_heads": 2, "max_position_embeddings": 131072, "vocab_size": 151936,
        "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
    },
    "1b": _llama(2048, 5632, 22, 32, 4, 2048),
    "7b": _llama(4096, 11008, 32, 32, 32, 4096),
    "13b": _llama(5120, 13824, 40, 40, 40, 4096),
}  # fmt: skip

_LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
#: Each gives 24 x 24 patches, which the published projectors read.
TOWERS: dict[str, dict[str, Any]] = {
    "tiny": {
        "model_type": "clip_vision_model", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
        "num_attention_heads": 2, "image_size": 48, "patch_size": 2,
    },
    "clip-l-336": {
        "model_type": "clip_vision_model", **_LARGE, "image_size": 336, "patch_size": 14, "projection_dim": 768,
    },
    "siglip-l-384": {"model_type": "siglip_vision_model", **_LARGE, "image_size": 384, "patch_size": 16},
}  # fmt: skip
_TINY_PROJECTOR = {"spatial_width": 32}


@dataclass(frozen=True)
class ModelShape:
    """Language model, tower and projector variant; or a LlavaSp folder, which says all of it."""

    llm: str = "7b"
    tower: str = "clip-l-336"
    variant: str = "crop-dfi"
    folder: str | None = None

    @property
    def name(self) -> str:
        """Part of a case's key."""
        return f"{self.llm}.{self.tower}.{self.variant}"

    def config(self) -> LlavaSpConfig:
        """Of LLaVA-SP. Raises ConfigError for a variant that the tower does not fit."""
        return _config(self)

    def llava_config(self) -> LlavaConfig:
        """Of LLaVA-1.5 with the same tower and language model; its image token has a row in the vocabulary."""
        from transformers import LlavaConfig

        ours = self.config()
        return LlavaConfig(
            vision_config=ours.vision_config, text_config=ours.text_config,
            image_token_index=min(ours.image_token_id, ours.text_config.vocab_size - 1),
            image_seq_length=ours.projector.patch_tokens, vision_feature_layer=ours.vision_feature_layer,
            vision_feature_select_strategy=ours.vision_feature_select_strategy,
        )  # fmt: skip


@functools.lru_cache(maxsize=32)
def _config(shape: ModelShape) -> LlavaSpConfig:
    from sp_fast.config import SPProjectorConfig
    from sp_fast.llava_sp import LlavaSpConfig

    if shape.folder is not None:
        return LlavaSpConfig.from_pretrained(shape.folder)
    text, vision = _part(LLMS[shape.llm]), _part(TOWERS[shape.tower])
    widths = {"vision_width": vision.hidden_size, "text_width": text.hidden_size}
    overrides = fitting(shape.variant, {**widths, **(_TINY_PROJECTOR if shape.tower == "tiny" else {})})
    projector = SPProjectorConfig.variant(shape.variant, grid=vision.image_size // vision.patch_size, **overrides)
    return LlavaSpConfig(
        vision_config=vision, text_config=text, projector_config=projector.to_dict(),
        image_token_index=text.vocab_size - 1,
    )  # fmt: skip


def _part(values: dict[str, Any]) -> PretrainedConfig:
    from transformers import AutoConfig

    return AutoConfig.for_model(**values)


def random_shape(llm: str, tower: str, variant: str) -> ModelShape:
    """Raises ConfigError for names that are unknown, or a variant that does not fit the tower."""
    check_names("llm", [llm], tuple(LLMS))
    check_names("tower", [tower], tuple(TOWERS))
    shape = ModelShape(llm, tower, variant)
    shape.config()
    return shape


def chosen_shape(llm: str | None, tower: str | None, variant: str | None, device: str, tiny: bool) -> ModelShape:
    """What a command was asked for, and for the rest what suits the device, or a rehearsal. Raises as
    ``random_shape``."""
    usual = ("tiny", "tiny") if tiny else ("0.5b" if device == "cpu" else "7b", "clip-l-336")
    return random_shape(llm or usual[0], tower or usual[1], variant or "crop-dfi")


def folder_shape(folder: Path) -> ModelShape:
    """Of a model's folder; raises ConfigError where there is none."""
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{folder} holds no config.json: give a LlavaSp folder, as `sp-fast convert` writes")
    shape = ModelShape(folder.name, "its own", "its own", str(folder.resolve()))
    config = shape.config()
    return ModelShape(folder.name, config.vision_config.model_type, config.projector.pyramid, shape.folder)
