"""config.json of official checkpoints, language models and towers: read into our configuration's parts, and made."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

from sp_fast.errors import CheckpointError, first_line
from sp_fast.llava_sp.configuration import LlavaSpConfig
from sp_fast.llava_sp.tower import KINDS
from sp_fast.tensor_files import file_problem, read_json
from sp_fast.vision import CLIP_L_336

# The language model's type, and the type and class that the official code gives to a model on it.
OFFICIAL_TYPES = {
    "llama": ("llava_llama", "LlavaLlamaForCausalLM"),
    "mistral": ("llava_mistral", "LlavaMistralForCausalLM"),
    "qwen2": ("llava_qwen", "LlavaQwenForCausalLM"),
}
_TEXT_TYPES = {"llava": "llama", "LlamaForCausalLM": "llama"} | {
    name: text for text, names in OFFICIAL_TYPES.items() for name in names
}
_TOWER_TYPES = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"} | {name: name for name in KINDS}
KNOWN_TOWERS = {"openai/clip-vit-large-patch14-336": {"model_type": "clip_vision_model", **CLIP_L_336}}
# A wrong guess at these gives shapes that do not fit, or numbers that are not the model's.
_NEEDED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_NEEDED_TEXT = (*_NEEDED, "vocab_size", "max_position_embeddings", "rms_norm_eps")
_NEEDED_TOWER = (*_NEEDED, "image_size", "patch_size")
_LEGACY = ("rope_theta", "rope_scaling", "partial_rotary_factor")  # rope_parameters of transformers 5
_NOT_THE_MODELS = {"model_type", "architectures", "_name_or_path", "transformers_version", "dtype", "torch_dtype"}
# What LlavaSpModel does; the official code knows other ways, by these fields.
_FIXED = {"mm_vision_select_feature": "patch", "mm_projector_type": "mlp2x_gelu"}
PUBLISHED_LAYER = -2


def read_config(path: Path, way_out: str) -> dict[str, Any]:
    """A config.json. Raises CheckpointError where it cannot be read."""
    if problem := file_problem(path):
        raise CheckpointError(f"{path} {problem}: {way_out}")
    try:
        values = read_json(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({first_line(error)}): fetch it again") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds a {type(values).__name__}, not a configuration: fetch it again")
    return values


def text_config(path: Path, values: Mapping[str, Any]) -> PretrainedConfig:
    """The language model's, without what the official code adds to it.

    Raises:
        CheckpointError: a type that transformers lacks, or a field that is missing or wrong.
    """
    if "quantization_config" in values:
        raise CheckpointError(f"{path} has quantization_config: quantised weights have lost bits, give the original")
    named = [values.get("model_type"), *(values.get("architectures") or [])]
    kind = next((_TEXT_TYPES[name] for name in named if name in _TEXT_TYPES), named[0])
    if kind not in CONFIG_MAPPING:
        raise CheckpointError(
            f"{path} has model_type={named[0]!r}, which is no language model's that transformers knows: give a causal "
            f"language model, e.g. of type {', '.join(OFFICIAL_TYPES)}"
        )
    return _build(path, kind, values, _NEEDED_TEXT)


def vision_config(folder: Path | None, named: str | None, has_head: bool) -> PretrainedConfig:
    """The tower's: of a folder (a tower's or a whole CLIP's or SigLIP's), else of a tower known by name.

    Raises:
        CheckpointError: neither is at hand, or it is no CLIP or SigLIP.
    """
    if folder is None:
        if named not in KNOWN_TOWERS:
            raise CheckpointError(
                f"the tower's configuration is nowhere (config.json names mm_vision_tower={named!r}): give its folder "
                "with --vision-tower"
            )
        return AutoConfig.for_model(**KNOWN_TOWERS[named])
    path = folder / "config.json"
    values = read_config(path, "give a folder with a CLIP or SigLIP vision tower")
    values = {"model_type": values.get("model_type"), **values.get("vision_config", values)}
    kind = _TOWER_TYPES.get(values["model_type"])
    if kind is None:
        raise CheckpointError(
            f"{path} is of model_type {values['model_type']!r}, not of {', '.join(_TOWER_TYPES)}: give such a tower"
        )
    config = _build(path, kind, values, _NEEDED_TOWER)
    if not has_head and kind == "siglip_vision_model":
        config.vision_use_head = False  # the official tower drops SigLIP's pooling head, of which nothing is read
    return config


def selected_layer(path: Path, facts: Mapping[str, Any], tower_width: int) -> int:
    """``mm_vision_select_layer`` of an official config.json, after its other fields have been checked.

    Raises:
        CheckpointError: it is missing, or a field asks for what LLaVA-SP is not.
    """
    for name, value in {**_FIXED, "mm_hidden_size": tower_width}.items():
        if facts.get(name, value) != value:
            raise CheckpointError(
                f"{path} has {name}={facts[name]!r} where {value!r} is expected: give the tower and the files of one "
                "LLaVA-SP model"
            )
    layer = facts.get("mm_vision_select_layer")
    if not isinstance(layer, int):
        raise CheckpointError(
            f"{path} has mm_vision_select_layer={layer!r} where the hidden state of the tower is expected that the "
            f"model was trained on: add it (the published scripts have {PUBLISHED_LAYER})"
        )
    return layer


def tower_name(config: PretrainedConfig) -> str | None:
    """The name under which a tower of this architecture is known, if there is one."""
    values = config.to_dict()
    return next((n for n, known in KNOWN_TOWERS.items() if all(values.get(k) == v for k, v in known.items())), None)


def projector_fields(config: LlavaSpConfig, tower: str) -> dict[str, Any]:
    """What an official config.json says of vision tower and projector."""
    return {
        **_FIXED,
        "mm_hidden_size": config.vision_config.hidden_size,
        "mm_vision_select_layer": config.vision_feature_layer,
        "mm_vision_tower": tower,
        "use_mm_proj": True,
    }


def official_config(config: LlavaSpConfig, kept: Mapping[str, Any], tower: str, dtype: str) -> dict[str, Any]:
    """What the config.json of a whole official model holds; fields of ``kept`` that are not the model's stay.

    Raises:
        CheckpointError: the official code has no class for this language model.
    """
    text = config.text_config
    if text.model_type not in OFFICIAL_TYPES:
        raise CheckpointError(
            f"the official code has no model on {text.model_type!r}, only on {', '.join(OFFICIAL_TYPES)}: export "
            "--layout projector"
        )
    model_type, architecture = OFFICIAL_TYPES[text.model_type]
    values = {k: v for k, v in text.to_dict().items() if k not in _NOT_THE_MODELS}
    rope = dict(values.pop("rope_parameters", None) or {})
    kind = rope.pop("rope_type", "default")
    if "rope_theta" in rope:
        values["rope_theta"] = rope.pop("rope_theta")
    values["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
    return {
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        **{k: v for k, v in kept.items() if k not in _NOT_THE_MODELS and k != "auto_map"},
        **values,
        **projector_fields(config, tower),
        "model_type": model_type,
        "architectures": [architecture],
        "torch_dtype": dtype,
    }


def _build(path: Path, kind: str, values: Mapping[str, Any], needed: tuple[str, ...]) -> PretrainedConfig:
    fields = AutoConfig.for_model(kind).to_dict().keys() - _NOT_THE_MODELS
    if missing := [name for name in needed if name in fields and values.get(name) is None]:
        raise CheckpointError(f"{path} lacks {', '.join(missing)}: give the config.json that the model was saved with")
    known = {k: v for k, v in values.items() if k in fields or (k in _LEGACY and v is not None)}
    try:
        return AutoConfig.for_model(kind, **known)
    except Exception as error:  # configurations check themselves in any way
        raise CheckpointError(f"{path} is no {kind} configuration ({first_line(error)}): fetch it again") from error
