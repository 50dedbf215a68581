"""What a training run is: one flat list of settings, from a YAML file and the command line.

Importing this takes neither torch nor transformers, so that --help answers at once.
"""

from __future__ import annotations

import typing
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from sp_fast.errors import TrainingError
from sp_fast.training.official_flags import TEMPLATES
from sp_fast.variants import VARIANTS

STAGES = ("pretrain", "finetune")


@dataclass(frozen=True)
class Recipe:
    """Settings of a run. ``pretrain`` trains the projector alone, ``finetune`` the language model too.

    Raises:
        TrainingError: a value that cannot be, or settings that contradict each other.
    """

    output: Annotated[Path, "Folder of the run: checkpoints, log and result. A run that was interrupted goes on in it."]
    data: Annotated[tuple[Path, ...], "LLaVA JSON or JSONL, or messages with images; several files are joined."]
    model: Annotated[Path | None, "Folder of a whole LLaVA-SP model to go on from, instead of the next three."] = None
    language_model: Annotated[Path | None, "Folder of the language model."] = None
    vision_tower: Annotated[Path | None, "Folder of the CLIP or SigLIP vision tower."] = None
    projector: Annotated[
        str | dict[str, Any] | None,
        "A variant's name, to begin at random (mlp: no spatial tokens), or in a file fields of SPProjectorConfig; or a "
        "trained projector's folder or file. Default: crop-dfi.",
    ] = None
    tokenizer: Annotated[Path | None, "Folder of the tokenizer, where it is not the language model's."] = None
    image_folder: Annotated[Path | None, "Where the data's images are, and stay. Default: beside the data."] = None
    template: Annotated[str | None, "Chat template: plain, vicuna_v1, or a file; with null, the model's own."] = None
    max_length: Annotated[int, "Tokens of a sample, image tokens included; longer ones are cut at the end."] = 2048
    bad_samples: Annotated[
        Literal["stop", "skip"], "Where a sample cannot be used, stop or skip: it is named in any case."
    ] = "stop"
    group_by_length: Annotated[bool, "Batches of samples of like length, with images or all without."] = True
    workers: Annotated[int, "Processes that read data."] = 4
    lora_rank: Annotated[int | None, "Rank of LoRA on the language model; with null, finetune trains all of it."] = None
    lora_alpha: Annotated[float | None, "LoRA's alpha. Default: twice the rank."] = None
    lora_dropout: Annotated[float, "LoRA's dropout."] = 0.05
    learning_rate: Annotated[float, "Highest learning rate (of the projector in pretrain)."] = 1e-3
    projector_learning_rate: Annotated[float | None, "The projector's own in finetune. Default: the same."] = None
    weight_decay: Annotated[float, "AdamW's weight decay, of matrices."] = 0.0
    warmup_ratio: Annotated[float, "Share of the steps in which the learning rate rises."] = 0.03
    schedule: Annotated[
        Literal["cosine", "linear", "constant_with_warmup"],
        "Learning rate after that: cosine, linear or constant_with_warmup.",
    ] = "cosine"
    epochs: Annotated[float, "Passes over the data."] = 1.0
    max_steps: Annotated[int | None, "Steps, instead of epochs."] = None
    max_grad_norm: Annotated[float, "Gradients are clipped to this norm; 0 leaves them."] = 1.0
    batch_size: Annotated[int, "Samples of one process at a time."] = 1
    global_batch_size: Annotated[int | None, "Samples of a step, over all processes and accumulated."] = None
    gradient_accumulation_steps: Annotated[int | None, "Instead of the global batch size."] = None
    dtype: Annotated[
        Literal["bfloat16", "float32"],
        "Of frozen weights and of what is computed, bfloat16 or float32; trained ones are float32.",
    ] = "bfloat16"
    gradient_checkpointing: Annotated[
        bool, "Compute the language model's layers again in the backward: less memory."
    ] = True
    attention: Annotated[str, "Of the language model: auto, or a name of sp-fast generate --attn."] = "auto"
    deepspeed: Annotated[Path | None, "DeepSpeed's JSON configuration."] = None
    seed: Annotated[int, "Of the data's order, the projector's first weights and dropout."] = 0
    logging_steps: Annotated[int, "Steps between lines of the log."] = 1
    save_steps: Annotated[int, "Steps between checkpoints."] = 500
    save_total_limit: Annotated[int, "Checkpoints that are kept."] = 1
    tensorboard: Annotated[bool, "Also log for tensorboard (pip install tensorboard)."] = False

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise TrainingError(f"{name}={value} must be {least} or more")
        for name in ("learning_rate", "projector_learning_rate", "lora_alpha", "epochs"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise TrainingError(f"{name}={value} must be a number above 0")
        for name in ("warmup_ratio", "lora_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise TrainingError(f"{name}={getattr(self, name)} must be a share, from 0 to below 1")
        if self.save_steps % self.logging_steps:
            raise TrainingError(
                f"save_steps={self.save_steps} must be a multiple of logging_steps={self.logging_steps}: a run that "
                "goes on would log another mean"
            )
        if not self.data:
            raise TrainingError("data is empty: name a file of conversations, or several")
        if (self.global_batch_size is None) == (self.gradient_accumulation_steps is None):
            raise TrainingError("give global_batch_size or gradient_accumulation_steps, one of them")
        parts = (self.language_model, self.vision_tower)
        if (self.model is None) == (None in parts) or (self.model is not None and any(parts)):
            raise TrainingError("give model, or language_model and vision_tower")
        if self.model is not None and (self.projector or self.tokenizer):
            raise TrainingError("model has a projector and a tokenizer: give its parts instead, to use others")
        if self.seed >= 2**32:
            raise TrainingError(f"seed={self.seed} must be below 2**32")

    @property
    def alpha(self) -> float | None:
        """LoRA's, with its default."""
        return 2.0 * self.lora_rank if self.lora_alpha is None and self.lora_rank else self.lora_alpha

    def accumulation(self, processes: int) -> int:
        """Batches of each process in a step. Raises TrainingError where the global batch cannot be divided so."""
        if self.global_batch_size is None:
            return self.gradient_accumulation_steps
        together = self.batch_size * processes
        if self.global_batch_size % together:
            raise TrainingError(
                f"global_batch_size={self.global_batch_size} is not a multiple of batch_size={self.batch_size} times "
                f"{processes} processes: choose another batch_size"
            )
        return self.global_batch_size // together

    def absolute(self) -> Recipe:
        """The same from wherever it is read: paths from the root, and the projector's and template's where they are
        files."""
        paths = {name: value.absolute() for name, value in vars(self).items() if isinstance(value, Path)}
        known = {*VARIANTS, *TEMPLATES.values()}
        named = {
            name: str(Path(value).absolute())
            for name in ("projector", "template")
            if isinstance(value := getattr(self, name), str) and value not in known and Path(value).exists()
        }
        return replace(self, **paths, **named, data=tuple(path.absolute() for path in self.data))

    def to_dict(self) -> dict[str, Any]:
        """For YAML and JSON, without what is not set."""
        values = {name: _plain(value) for name, value in vars(self).items()}
        return {name: value for name, value in values.items() if value is not None}


_LEAST = {
    "max_length": 1, "workers": 0, "lora_rank": 1, "weight_decay": 0, "max_steps": 1, "max_grad_norm": 0,
    "batch_size": 1, "global_batch_size": 1, "gradient_accumulation_steps": 1, "seed": 0, "logging_steps": 1,
    "save_steps": 1, "save_total_limit": 1,
}  # fmt: skip


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [str(one) for one in value]
    return str(value) if isinstance(value, Path) else value


#: what each setting says to the user
HELP = {name: hint.__metadata__[0] for name, hint in typing.get_type_hints(Recipe, include_extras=True).items()}
#: what settings are where nobody says it; those that are nothing then are left out
DEFAULTS = {one.name: one.default for one in fields(Recipe) if one.default not in (MISSING, None)}
