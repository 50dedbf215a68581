"""A study's runs in processes of their own; each takes seconds to begin."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from sp_fast.errors import TrainingError
from sp_fast.training.study.queue import run_jobs
from sp_fast.training.study.results import read_lines
from sp_fast.training.study.study import Job
from tests import study_folder

pytestmark = [pytest.mark.campaign, pytest.mark.timeout(0)]
DYING, FAILING, FINE = (Job(arm, 0) for arm in ("dying", "failing", "fine"))


def work(job, tell):
    print("said by", job, flush=True)
    tell("finetune", 1, 2)
    if job == DYING:
        os.kill(os.getpid(), signal.SIGKILL)
    if job == FAILING:
        raise TrainingError("the loss is not finite")
    return {"pid": os.getpid()}


class Watcher:
    def __init__(self):
        self.seen = []

    def __getattr__(self, name):
        return lambda job, *said: self.seen.append((name, job, *said))


def test_one_that_dies_or_fails_leaves_the_others_alone(tmp_path):
    watcher = Watcher()
    run_jobs([DYING, FAILING, FINE], work, 2, lambda job: tmp_path / f"{job}.txt", watcher)
    of = {job: [(name, *said) for name, one, *said in watcher.seen if one == job] for job in (DYING, FAILING, FINE)}
    assert all(some[:2] == [("started",), ("told", "finetune", 1, 2)] for some in of.values())
    assert of[DYING][2:] == [
        ("failed", f"its process ended with exit code -9; what it said is in {tmp_path}/dying-0.txt")
    ]
    assert of[FAILING][2:] == [("failed", "the loss is not finite")]
    ((name, said),) = of[FINE][2:]
    assert name == "finished"
    assert said["pid"] != os.getpid()
    assert (tmp_path / "fine-0.txt").read_text() == "said by fine-0\n"


def command(folder, out, workers):
    given = {"task": "task", "parts": "parts", "recipe": "minute"}
    options = [f"--{name}={folder / value}" for name, value in given.items()]
    words = ["train", "study", *options, f"--out={out}", f"--workers={workers}", "--images=1", "--seeds=2"]
    return [sys.executable, "-m", "sp_fast", *words, "--arm=crop", "--arm=mlp", "--json"]


def test_workers_that_are_interrupted_end_where_one_process_does(tmp_path):
    folder = study_folder.make(tmp_path)
    assert subprocess.run(command(folder, tmp_path / "alone", 0), capture_output=True).returncode == 0
    process = subprocess.Popen(
        command(folder, tmp_path / "together", 2), stderr=subprocess.PIPE, start_new_session=True
    )
    while not (tmp_path / "together" / "runs" / "mlp-0" / "pretrain").exists():
        assert process.poll() is None, process.communicate()[1].decode()
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    said = process.communicate()[1].decode()
    assert process.returncode == 130
    assert "Traceback" not in said
    again = subprocess.run(command(folder, tmp_path / "together", 2), capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert "is done" in again.stderr
    assert len(json.loads(again.stdout)["arms"]) == 2
    found = [
        sorted(read_lines(tmp_path / out / "results.jsonl"), key=lambda x: (x["arm"], x["seed"]))
        for out in ("alone", "together")
    ]
    for alone, together in zip(*found, strict=True):
        assert alone["types"] == together["types"]
        for stage, curve in alone["losses"].items():  # on as many threads bit for bit
            assert together["losses"][stage]["loss"] == pytest.approx(curve["loss"], rel=1e-4)
