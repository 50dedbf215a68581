"""Runs of training that are killed, most of them inside a save, and resumed: ``python -m tests.kill_campaign 100``.

One process imports everything and never trains; each run is a child that it forks. A child marks in shared memory that a
save begins and ends, and how far it is, so that it is known of a dead one where it was killed.
"""

from __future__ import annotations

import collections
import hashlib
import json
import mmap
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch

from sp_fast.training import checkpoints
from sp_fast.training.run_folder import newest_complete
from tests.train_standin import TinyTrainer, run

STEPS = 12
PHASES = ("outside", "making room", "writing", "sealing", "removing the oldest")
mark = mmap.mmap(-1, 2)  # phase, number of the save; shared with the children


class Marked(TinyTrainer):
    """Says where in a save it is."""

    def _save_checkpoint(self, model, trial):
        mark[1] = self.state.global_step
        super()._save_checkpoint(model, trial)
        mark[0] = 0

    def _make_room(self):
        mark[0] = 1
        super()._make_room()
        mark[0] = 2

    def _seal(self, final):
        mark[0] = 3
        super()._seal(final)

    def _remove_oldest(self):
        mark[0] = 4
        super()._remove_oldest()


def forked(work):
    if (child := os.fork()) == 0:
        try:
            torch.set_num_threads(1)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the Trainer prints every step
            work()
            os._exit(0)
        except BaseException:  # noqa: BLE001 - a child must not come back
            traceback.print_exc()
            os._exit(1)
    return child


def train(folder, resume=None):
    """To the end, which is then described in a file beside the folder: its last bits, and the losses of each step."""
    trainer = run(folder, resume=resume, cls=Marked, save_total_limit=2)
    tensors = [*trainer.model.state_dict().values()]
    moments = torch.load(folder / f"checkpoint-{STEPS}" / "optimizer.pt", weights_only=True)["state"]
    tensors += [value for state in moments.values() for value in state.values()]  # a run at its end makes no optimizer
    bits = hashlib.sha256(b"".join(t.contiguous().numpy().tobytes() for t in tensors)).hexdigest()
    losses = {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
    folder.with_suffix(".json").write_text(
        json.dumps({"bits": bits, "losses": losses, "last": trainer.state.global_step})
    )


def ended(folder):
    return json.loads(folder.with_suffix(".json").read_text())


def kill_inside(child, step, wait):
    """Some time after the save of a step has begun; if it has ended by then, in the next one."""
    while mark[1] < step:
        time.sleep(0.0001)
    time.sleep(wait)
    while mark[0] == 0 and mark[1] < STEPS:
        time.sleep(0.0001)
    return kill(child)


def kill(child):
    """Returns the phase in which the child died."""
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return mark[0]


def main(kills, folder):
    chance = random.Random(0)
    whole = folder / "whole"
    started = time.perf_counter()
    assert os.waitpid(forked(lambda: train(whole)), 0)[1] == 0
    whole_seconds, expected = time.perf_counter() - started, ended(whole)
    assert len(expected["losses"]) == expected["last"] == STEPS
    phases, found, left, exact = collections.Counter(), collections.Counter(), collections.Counter(), 0
    for number in range(kills):
        part = folder / f"{number}"
        mark[:] = bytes(2)
        child = forked(lambda part=part: train(part))
        if number % 20 == 0:  # at any time
            time.sleep(chance.uniform(0.3, 0.9) * whole_seconds)
            phase = kill(child)
        else:
            phase = kill_inside(child, chance.randint(1, STEPS - 1), chance.uniform(0, 0.01))
        phases[PHASES[phase]] += 1
        left.update(path.name.split("-")[0] for path in (part.iterdir() if part.is_dir() else ()))
        newest = newest_complete(part)
        assert not newest.rejected, newest  # a kill damages nothing
        found[newest.step] += 1
        resume = True if newest.folder else None
        assert os.waitpid(forked(lambda part=part, resume=resume: train(part, resume)), 0)[1] == 0
        exact += ended(part) == expected
        assert sorted(path.name for path in part.iterdir()) == ["checkpoint-11", "checkpoint-12"]
        shutil.rmtree(part)
    inside = kills - phases["outside"]
    print(f"{kills} kills, {inside} inside a save ({dict(phases)})")
    print(f"left behind: {dict(left)}; resumed from steps {dict(sorted(found.items()))}")
    print(f"{exact} of {kills} ended as the run that went through, bit for bit, in every loss, weight and moment")
    return inside, exact


if __name__ == "__main__":
    checkpoints.logger.setLevel("ERROR")
    wanted = int(sys.argv[1])
    with tempfile.TemporaryDirectory() as place:
        inside, exact = main(wanted, Path(place))
    sys.exit(not (exact == wanted and inside >= 0.8 * wanted))
