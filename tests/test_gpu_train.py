"""What only a GPU can show of training: `make test-gpu`."""

import json
import math

import pytest
import torch

from sp_fast.training.run import train
from tests.test_gpu import _a_gpu  # noqa: F401, the fixture sets this module up too
from tests.tiny_training import Watch, everything, quiet, recipe

pytestmark = pytest.mark.gpu


@pytest.fixture
def folder(tmp_path):
    return everything(tmp_path)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_both_stages_learn(folder, dtype, checkpointing):
    """Frozen weights in the dtype, trained ones in float32 under autocast, batches of text alone among them."""
    common = {"dtype": dtype, "gradient_checkpointing": checkpointing, "workers": 2, "epochs": 8}
    first = recipe("pretrain", folder, projector=str(folder / "start"), template="vicuna_v1", **common)
    train("pretrain", first, quiet)
    watch = Watch()
    second = recipe("finetune", folder, projector=str(first.output / "projector"), **common)
    train("finetune", second, quiet, [watch])
    losses = list(watch.losses.values())
    assert all(map(math.isfinite, losses))
    assert sum(losses[-4:]) < sum(losses[:4])
    line = json.loads((second.output / "log.jsonl").read_text().splitlines()[-1])
    assert line["mfu"] > 0
    assert 0 < line["peak_memory_mib"] * 2**20 <= torch.cuda.max_memory_allocated() + 2**20


def test_an_interrupted_run_goes_on(folder):
    """The steps after it are those of a run that went through, to what two runs of a GPU differ by."""
    changes = {"projector": str(folder / "start"), "dtype": "float32", "epochs": 2}
    runs = [Watch(), Watch(), Watch(3), Watch()]
    for name, watch in zip(("one", "two"), runs, strict=False):
        train("finetune", recipe("finetune", folder, output=folder / name, **changes), quiet, [watch])
    again = recipe("finetune", folder, output=folder / "again", **changes)
    with pytest.raises(KeyboardInterrupt):
        train("finetune", again, quiet, [runs[2]])
    train("finetune", again, quiet, [runs[3]])
    one, two, went_on = (torch.tensor(list(run.losses.values())) for run in (runs[0], runs[1], runs[3]))
    spread = (one - two).abs().max() + torch.finfo(torch.float32).eps * one.max()
    assert len(went_on) == len(one) - 3
    assert ((went_on - one[3:]).abs() <= 2 * spread).all()
