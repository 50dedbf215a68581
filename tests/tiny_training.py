"""What a tiny training run needs: a language model's folder, a tower's, conversations, images."""

from __future__ import annotations

import gc
import json

import torch
from transformers import AutoModel, AutoModelForCausalLM, TrainerCallback

from sp_fast import SPProjector
from sp_fast.training import log_file, run
from sp_fast.training.estimate import Estimate
from sp_fast.training.settings import read_recipe
from tests import tiny
from tests.helpers import randomised

PROJECTOR = tiny.PROJECTOR
COLOURS = ("red", "green", "blue", "grey")


def parts(folder, text="llama", tower="clip"):
    """Folders of a language model with its tokenizer, and of a vision tower."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(tiny.config_of(text).text_config).save_pretrained(folder / "lm")
        AutoModel.from_config(tiny.TOWERS[tower]).save_pretrained(folder / "tower")
    tiny.tokenizer().save_pretrained(folder / "lm")
    return folder / "lm", folder / "tower"


def rows(count, text_only=()):
    """LLaVA's form, a few turns each."""
    found = []
    for i in range(count):
        turns = [f"What colour is thing {i}?", COLOURS[i % 4]] * (1 + i % 2)
        said = [{"from": ("human", "gpt")[j % 2], "value": turn} for j, turn in enumerate(turns)]
        row = {"id": f"sample-{i}", "conversations": said}
        if i not in text_only:
            row["image"] = f"{i % 5}.png"
            said[0]["value"] = "<image>\n" + said[0]["value"]
        found.append(row)
    return found


def data(folder, count=12, text_only=()):
    """A data file with its images beside it."""
    folder.mkdir(exist_ok=True)
    for i in range(5):
        tiny.image(i).save(folder / f"{i}.png")
    (folder / "data.json").write_text(json.dumps(rows(count, text_only)))
    return folder / "data.json"


def captions(folder, count=12):
    """Of the first stage: an image and its caption."""
    path = data(folder, 1)
    said = [
        {
            "id": f"caption-{i}",
            "image": f"{i % 5}.png",
            "conversations": [
                {"from": "human", "value": "Describe it.\n<image>"},
                {"from": "gpt", "value": f"thing {i}"},
            ],
        }
        for i in range(count)
    ]
    path.write_text(json.dumps(said))
    return path


def everything(folder):
    """Parts, a projector, and 16 samples, five of them without an image."""
    parts(folder)
    data(folder / "data", 16, text_only=(1, 2, 3, 4, 5))
    start(folder)
    return folder


def quicken(patch):
    """Runs without what costs them a second each and what tests of its own hold: the memory's estimate, the figure at
    the end, and the Trainer's collections of garbage, slow in a process as full as pytest's."""
    patch.setattr(run, "estimate", lambda *_: Estimate({"gradients": 2000}, 0, 1, 1, 1))
    patch.setattr(log_file, "plot", lambda _: None)
    patch.setattr(gc, "collect", lambda *_: 0)


def quiet(text):
    """For whoever wants to be told."""


def recipe(stage, folder, **changes):
    """A stage's published recipe, with what makes it small."""
    small = {
        "output": folder / stage, "language_model": folder / "lm", "vision_tower": folder / "tower",
        "data": [folder / "data" / "data.json"], "batch_size": 2, "global_batch_size": 4, "workers": 0,
        "max_length": 400, "dtype": "float32", "learning_rate": 1e-2, "save_steps": 100, "gradient_checkpointing": False,
    }  # fmt: skip
    if stage == "finetune":
        small |= {"lora_rank": 4, "lora_alpha": 8}
    return read_recipe(stage, None, small | changes)


def start(folder, seed=0, path=None):
    """A projector of a few widths, which no variant has; no bias is zero."""
    randomised(SPProjector(tiny.config_of().projector), seed).save_pretrained(path or folder / "start")


def widths():
    config = tiny.config_of().projector
    return {name: getattr(config, name) for name in ("vision_width", "spatial_width", "text_width")}


class Watch(TrainerCallback):
    """Losses by step; interrupts after a step, if one is named."""

    def __init__(self, stop_after=None):
        self.losses, self._stop = {}, stop_after

    def on_log(self, args, state, control, logs, **kwargs):
        if "loss" in logs:
            self.losses[state.global_step] = logs["loss"]

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self._stop:
            control.should_save = True

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == self._stop:
            raise KeyboardInterrupt
