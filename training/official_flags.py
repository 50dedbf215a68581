"""The flags of the official training scripts, as settings of a recipe: what the published commands say, runs here."""

from __future__ import annotations

import logging
from typing import Any

from sp_fast.errors import TrainingError

logger = logging.getLogger("sp_fast")

# Official name: our setting.
SAME = {
    "model_name_or_path": "language_model",
    "pretrain_mm_mlp_adapter": "projector",
    "data_path": "data",
    "output_dir": "output",
    "model_max_length": "max_length",
    "group_by_modality_length": "group_by_length",
    "dataloader_num_workers": "workers",
    "lora_r": "lora_rank",
    "mm_projector_lr": "projector_learning_rate",
    "lr_scheduler_type": "schedule",
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "batch_size",
}
# What LLaVA-SP is, or this package always does: accepted with this value, as text, in lower case.
FIXED = {
    "mm_projector_type": ("mlp2x_gelu",),
    "mm_vision_select_layer": ("-2",),
    "mm_vision_select_feature": ("patch",),
    "mm_use_im_start_end": ("false",),
    "mm_use_im_patch_token": ("false",),
    "image_aspect_ratio": ("pad",),
    "mm_patch_merge_type": ("flat",),
    "is_multimodal": ("true",),
    "lazy_preprocess": ("true",),
    "freeze_backbone": ("false",),
    "evaluation_strategy": ("no",),
    "eval_strategy": ("no",),
    "save_strategy": ("steps",),
    "optim": ("adamw_torch", "adamw_torch_fused"),
    "bits": ("16",),
    "lora_bias": ("none",),
    "fp16": ("false",),
}
# Which change nothing here.
HARMLESS = {"per_device_eval_batch_size", "tf32", "cache_dir", "run_name", "local_rank"}
WORDS = {"true": True, "false": False, "yes": True, "no": False, "1": True, "0": False}
TEMPLATES = {"plain": "plain", "v1": "vicuna_v1", "vicuna_v1": "vicuna_v1"}


def translate(stage: str, name: str, value: Any) -> list[tuple[str, Any]]:
    """Our settings that an official flag stands for; an unknown one as it is.

    Raises:
        TrainingError: it asks for what LLaVA-SP is not, or belongs to the other stage.
    """
    text = str(value).lower()
    if name in SAME:
        return [(SAME[name], value)]
    if name in HARMLESS:
        return []
    if name in FIXED:
        if text not in FIXED[name]:
            raise TrainingError(f"{name}={value} is not supported, only {' or '.join(FIXED[name])}: leave it out")
        return []
    if name in MEANINGS:
        return MEANINGS[name](stage, name, text)
    return [(name, value)]


def _template(stage: str, name: str, text: str) -> list[tuple[str, Any]]:
    if text not in TEMPLATES:
        raise TrainingError(
            f"version={text} is none of {', '.join(TEMPLATES)}: give a chat template's file as template"
        )
    return [("template", TEMPLATES[text])]


def _stage_flag(stage: str, name: str, text: str) -> list[tuple[str, Any]]:
    own = {"tune_mm_mlp_adapter": "pretrain", "lora_enable": "finetune"}[name]
    if _is_true(name, text) != (stage == own):
        if name == "lora_enable" and stage == "finetune":
            return [("lora_rank", None)]  # all of the language model
        raise TrainingError(f"{name}={text} belongs to the other stage, and this is {stage}")
    return []


def _loggers(stage: str, name: str, text: str) -> list[tuple[str, Any]]:
    if text not in ("tensorboard", "none"):
        logger.warning("%s=%s is not served: log.jsonl and loss.svg are written instead", name, text)
    return [("tensorboard", text == "tensorboard")]


def _bf16(stage: str, name: str, text: str) -> list[tuple[str, Any]]:
    return [("dtype", "bfloat16" if _is_true(name, text) else "float32")]


def _is_true(name: str, text: str) -> bool:
    if text not in WORDS:
        raise TrainingError(f"{name}={text} must be one of {', '.join(WORDS)}")
    return WORDS[text]


MEANINGS = {
    "version": _template,
    "tune_mm_mlp_adapter": _stage_flag,
    "lora_enable": _stage_flag,
    "report_to": _loggers,
    "bf16": _bf16,
}
