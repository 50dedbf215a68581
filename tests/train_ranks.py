"""Checkpoints of two ranks, forked by a process of their own: ``python -m tests.train_ranks FOLDER`` prints what went
wrong, and leaves the checkpoints of a run of two ranks in FOLDER/TinyTrainer."""

from __future__ import annotations

import os
import socket
import sys
import traceback
from pathlib import Path

import pytest
import torch
from torch.utils.data import Sampler

from sp_fast.errors import TrainingError
from tests.train_standin import TinyTrainer, run, same_end, trainer_of


class OwnOrder(Sampler):
    """Another one in each epoch."""

    def __init__(self, size):
        self.size, self.epoch = size, 0

    def __len__(self):
        return self.size

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        return iter(torch.randperm(self.size, generator=torch.Generator().manual_seed(self.epoch)).tolist())


class OwnSampler(TinyTrainer):
    def _get_train_sampler(self, train_dataset=None):
        return OwnOrder(len(self.train_dataset))


class FailsOnTheSecond(TinyTrainer):
    """Its second rank cannot write its random state."""

    def _save_rng_state(self, output_dir):
        if self.args.process_index == 1 and self.state.global_step == 2:
            raise OSError(28, "no space on this node")
        super()._save_rng_state(output_dir)


def work(rank, folder):
    settings = {"ddp_backend": "gloo", "ddp_find_unused_parameters": False, "save_total_limit": 3}
    for cls in (TinyTrainer, OwnSampler):
        whole = run(folder / cls.__name__, cls=cls, **settings)  # two epochs of 3 steps, in another order each
        assert whole.args.world_size == 2
        assert whole.state.global_step == 6
        for step in (2, 4) if cls is TinyTrainer else (4,):  # in both epochs
            part = folder / f"{cls.__name__}-{step}"
            run(part, stop_in=step + 1, cls=cls, **settings)
            resumed = run(part, resume=True, cls=cls, **settings)
            assert same_end(whole, resumed) == set(range(step + 1, 7)), (cls, step)
    failing = trainer_of(folder / "fails", cls=FailsOnTheSecond, **settings)
    with pytest.raises(TrainingError, match=r"no space on this node \(rank 1\).*checkpoint-1, the last whole one"):
        failing.train()
    assert sorted(path.name for path in (folder / "fails").iterdir()) == ["checkpoint-1"]


def main(folder):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(2):
        if (child := os.fork()) == 0:
            shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
            os.environ.update(shared, RANK=str(rank), LOCAL_RANK=str(rank))
            try:
                work(rank, folder)
                os._exit(0)
            except BaseException:  # noqa: BLE001 - a child must not come back
                traceback.print_exc()
                os._exit(1)
        children.append(child)
    return max(os.waitpid(child, 0)[1] for child in children)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(bool(main(Path(sys.argv[1]))))
