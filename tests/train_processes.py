"""Training on two processes, which test_train_distributed.py starts. A module of its own, because each has to import it.

accelerate shards models on accelerators alone. Here it is told that these two processes are some; everything that it
does then runs on gloo.
"""

import multiprocessing
import os
import traceback
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from accelerate import PartialState
from accelerate.utils import DistributedType

from sp_fast.training.result import trained_tensors
from sp_fast.training.run import set_up, train
from tests.tiny_training import Watch, quicken, quiet, recipe

FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer,SPProjector",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
}


def settings(folder, output, **changes):
    """Samples of both kinds in any order, so that a process can have text alone while the other has images."""
    small = {"projector": str(folder / "start"), "group_by_length": False, "lora_dropout": 0, "warmup_ratio": 0}
    return recipe("finetune", folder, output=folder / output, **{**small, **changes})


def in_float64(folder, output, **changes):
    """Losses by step, gradient norms of the last one, and what was trained."""
    trainer, _ = set_up("finetune", settings(folder, output, **changes), quiet)
    assert trainer.is_fsdp_enabled == ("FSDP_VERSION" in os.environ)
    trainer.model.double()
    watch = Watch()
    trainer.add_callback(watch)
    trainer.train()
    return watch.losses, trainer.gradient_norms, trained_tensors(trainer.model)


def both(folder):
    """What ``in_float64`` gives; the losses of a run that goes through, of one that is interrupted, and after it; and of
    one in bfloat16 that trains the whole language model."""
    through, stopped, went_on = Watch(), Watch(2), Watch()
    train("finetune", settings(folder, "through", lora_dropout=0.5), quiet, [through])
    again = settings(folder, "stopped", lora_dropout=0.5)
    try:
        train("finetune", again, quiet, [stopped])
    except KeyboardInterrupt:
        train("finetune", again, quiet, [went_on])
    half = Watch()
    whole = {"lora_rank": None, "lora_alpha": None, "dtype": "bfloat16", "max_steps": 2}
    train("finetune", settings(folder, "whole", **whole), quiet, [half])
    return in_float64(folder, "two"), (through.losses, stopped.losses, went_on.losses), half.losses


def _work(rank, port, environment, function, arguments, folder):
    world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ.update({"MASTER_ADDR": "127.0.0.1", **{k: str(v) for k, v in world.items()}, **environment})
    torch.set_num_threads(1)
    quicken(pytest.MonkeyPatch())
    try:
        if environment:
            _as_accelerators()
        found = function(*arguments)
    except BaseException:  # handed to the test
        Path(folder, f"{rank}.failed").write_text(traceback.format_exc())
        raise
    torch.save(found, Path(folder, f"{rank}.pt"))


def _as_accelerators():
    begin = PartialState.__init__

    def as_accelerators(self, *args, **kwargs):
        begin(self, *args, **kwargs)
        self.distributed_type = DistributedType.MULTI_XPU

    PartialState.__init__ = as_accelerators


def two_processes(function, *arguments, folder, fsdp=False):
    """What a function returns on each of two processes, forked by one that has the imports behind it."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.set_forkserver_preload([__name__])
    given = (port, FSDP if fsdp else {}, function, arguments, folder)
    try:
        torch.multiprocessing.start_processes(_work, given, nprocs=2, start_method="forkserver")
    except Exception as error:
        said = [path.read_text() for path in sorted(Path(folder).glob("*.failed"))]
        raise AssertionError("\n".join(said)) from error
    return [torch.load(Path(folder, f"{rank}.pt"), weights_only=True) for rank in range(2)]
