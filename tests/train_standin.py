"""A run of training in milliseconds, with everything that a resumed one could lose: dropout, running statistics, a tied
and a frozen layer, Adam, a schedule, accumulated gradients, several epochs."""

from __future__ import annotations

import contextlib
import random
import shutil
from types import MappingProxyType

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from sp_fast.training.checkpoints import AtomicCheckpoints

WIDTH = 6


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.norm, self.drop = nn.BatchNorm1d(WIDTH), nn.Dropout(0.3)
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.last.weight = self.first.weight  # tied
        self.register_buffer("scratch", torch.zeros(3), persistent=False)

    def forward(self, x, labels):
        # Draws of python and numpy too: a resumed run has to make the same ones.
        scale = 1 + 0.1 * random.random() + 0.1 * float(np.random.rand())
        return {"loss": ((self.last(self.drop(self.norm(self.first(self.frozen(x))))) * scale - labels) ** 2).mean()}


class Samples(Dataset):
    def __init__(self, size=22):
        generator = torch.Generator().manual_seed(1)
        self.x, self.y = torch.randn(2, size, WIDTH, generator=generator)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return {"x": self.x[i], "labels": self.y[i]}


class Losses(TrainerCallback):
    """What is logged, by step; and a step in which the run stops, as if it had been killed before its save."""

    def __init__(self, stop_in=None):
        self.by_step, self.stop_in = {}, stop_in

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.by_step[state.global_step] = (logs["loss"], logs["grad_norm"], logs["learning_rate"])

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.stop_in:
            raise Stopped


class Stopped(BaseException):
    """Passes through whatever catches errors, as a kill would."""


class TinyTrainer(AtomicCheckpoints, Trainer):
    fingerprint = MappingProxyType({"data": "a", "batch": 4})


def trainer_of(folder, *, stop_in=None, model=Net, cls=TinyTrainer, data=None, **changes):
    settings = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 2,  # of 11 batches: 6 steps, the last of one batch
        "learning_rate": 0.05,
        "lr_scheduler_type": "cosine",
        "save_steps": 1,
        "save_strategy": "steps",
        "logging_steps": 1,
        "seed": 3,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    args = TrainingArguments(output_dir=str(folder), **settings | changes)
    torch.manual_seed(0)
    losses = Losses(stop_in)
    trainer = cls(model=model(), args=args, train_dataset=Samples() if data is None else data, callbacks=[losses])
    trainer.losses = losses
    return trainer


def run(folder, resume=None, **kwargs):
    """The trainer, after its run ended or was stopped."""
    trainer = trainer_of(folder, **kwargs)
    with contextlib.suppress(Stopped):
        trainer.train(resume_from_checkpoint=resume)
    return trainer


def same_end(one, other):
    """Bit for bit: parameters, buffers, optimizer, and the losses of the steps that both took."""
    ends = [t.model.state_dict() for t in (one, other)]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    moments = [t.optimizer.state_dict()["state"] for t in (one, other)]
    assert moments[0].keys() == moments[1].keys()
    for i, state in moments[0].items():
        assert all(torch.equal(state[name], moments[1][i][name]) for name in state)
    steps = one.losses.by_step.keys() & other.losses.by_step.keys()
    assert all(one.losses.by_step[step] == other.losses.by_step[step] for step in steps)
    return steps


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def part_of(whole, folder, *steps):
    """A run's folder with copies of some checkpoints."""
    for step in steps:
        shutil.copytree(f"{whole.args.output_dir}/checkpoint-{step}", folder / f"checkpoint-{step}")
    return folder
