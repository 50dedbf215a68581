"""What a study of minute size needs: a task, parts on a 12x12 grid, and recipes of two steps."""

import gc
from contextlib import contextmanager

import pytest
import torch
import yaml
from transformers import AutoModel, AutoModelForCausalLM, CLIPVisionConfig

from sp_fast.training.study.study import Study
from sp_fast.training.task.make import Task, make_task
from tests import tiny

_COMMON = {
    "global_batch_size": 2, "batch_size": 2, "max_steps": 2, "max_length": 1200, "workers": 0, "dtype": "float32",
    "gradient_checkpointing": False, "save_steps": 2,
}  # fmt: skip
RECIPES = {
    "pretrain": {"template": "plain", "learning_rate": 1e-3, **_COMMON},
    "finetune": {"template": "vicuna_v1", "learning_rate": 1e-3, "lora_rank": 2, "lora_dropout": 0, **_COMMON},
}


def make(folder, grid=12):
    """``task``, ``parts``, and ``minute-pretrain.yaml`` and ``minute-finetune.yaml``."""
    make_task(Task(train=8, held_out=2, captions=8, size=64), folder / "task")
    tower = CLIPVisionConfig(**{**tiny.TOWERS["clip"].to_dict(), "image_size": 4 * grid})
    text = tiny.config_of(max_position_embeddings=2048).text_config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(text).save_pretrained(folder / "parts" / "language-model")
        AutoModel.from_config(tower).save_pretrained(folder / "parts" / "vision-tower")
    tiny.tokenizer().save_pretrained(folder / "parts" / "language-model")
    for stage, recipe in RECIPES.items():
        (folder / f"minute-{stage}.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def study(folder, out="out"):
    return Study(folder / "task", folder / "parts", folder / out, str(folder / "minute"))


@contextmanager
def quick():
    """Without what takes three quarters of a run's time here, and has tests of its own."""
    with pytest.MonkeyPatch.context() as patch:
        for place in ("run._say_memory", "log_file.plot"):
            patch.setattr(f"sp_fast.training.{place}", lambda *args: None)
        patch.setattr("sp_fast.training.meter.measured_peak", lambda *args: 1e12)
        patch.setattr(gc, "collect", lambda *_: 0)  # a quarter of a second in a process as full as pytest's
        yield
