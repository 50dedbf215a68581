"""What each stage trains, and how fast: stage 1 the projector, stage 2 LoRA on the language model as well (paper,
Tab. 11). The vision tower is frozen in both."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sp_fast.llava_sp.modeling import PROJECTOR, LlavaSpForConditionalGeneration
from sp_fast.training.recipe import Recipe

if TYPE_CHECKING:
    from peft import PeftModel

LANGUAGE = "language_model"
ADAPTER = "default"


def prepare(
    model: LlavaSpForConditionalGeneration, stage: str, recipe: Recipe
) -> LlavaSpForConditionalGeneration | PeftModel:
    """Freezes what the stage does not train; what it does is float32.

    LoRA goes on every linear layer of the language model but its head. The projector stays outside of PEFT, whose
    ``modules_to_save`` would keep a second copy of its 924 million parameters.
    """
    projector = model.model.multi_modal_projector
    used = [parameter for parameter in projector.parameters() if parameter.requires_grad]  # a variant may have others
    model.requires_grad_(False)
    for config in (model.config, model.config.text_config):
        config.use_cache = False
    found = model
    if stage == "finetune" and recipe.lora_rank:
        found = with_lora(model, recipe.lora_rank, recipe.alpha, recipe.lora_dropout)
    elif stage == "finetune":
        for part in (model.model.language_model, model.lm_head):
            part.float().requires_grad_(True)
    for parameter in used:
        parameter.requires_grad_(True)
    if recipe.gradient_checkpointing:
        language = model.model.language_model
        # The newer of two names, where there is one.
        enable = getattr(language, "activation_checkpointing_enable", None) or language.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    return found


def with_lora(model: LlavaSpForConditionalGeneration, rank: int, alpha: float, dropout: float) -> PeftModel:
    """The model with adapters on the language model's linear layers, in float32."""
    from peft import LoraConfig, get_peft_model

    kinds = {name.rpartition(".")[2] for name, m in model.model.language_model.named_modules() if type(m) is nn.Linear}
    target = rf"model\.{LANGUAGE}\..*\.({'|'.join(sorted(kinds))})"
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=target, task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)  # a name that PEFT asks for
        return get_peft_model(model, config, adapter_name=ADAPTER)


def part_of(name: str) -> str:
    """The part of the model that a parameter belongs to, by its name: "projector" or "language model"."""
    return "projector" if f"{PROJECTOR}." in name else "language model"


def trained(model: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    """Trained parameters by part and name."""
    found: dict[str, dict[str, nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found.setdefault(part_of(name), {})[name] = parameter
    return found


def learning_rates(stage: str, recipe: Recipe) -> dict[str, float]:
    """By part."""
    own = recipe.projector_learning_rate if stage == "finetune" else None
    return {"projector": own or recipe.learning_rate, "language model": recipe.learning_rate}


def parameter_groups(model: nn.Module, rates: Mapping[str, float], weight_decay: float) -> list[dict[str, Any]]:
    """For AdamW: a part's matrices decay, its vectors (norms and biases) do not."""
    return [
        {"name": part, "params": list(some.values()), "lr": rates[part], "weight_decay": decay}
        for part, parameters in trained(model).items()
        for decay, some in (
            (weight_decay, {n: p for n, p in parameters.items() if p.dim() > 1}),
            (0.0, {n: p for n, p in parameters.items() if p.dim() <= 1}),
        )
        if some
    ]


def dtype_of(recipe: Recipe) -> torch.dtype:
    """Of frozen weights and of what is computed."""
    return getattr(torch, recipe.dtype)
