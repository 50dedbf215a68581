"""The same bits again: forward and every gradient, repeated in one process and in fresh ones."""

import hashlib
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sp_fast import SPProjector
from tests.convergence import TINIEST, WIDTHS
from tests.helpers import features_for, randomised, shrunk, small

ROOT = Path(__file__).parents[1]
# Widths at which a BLAS blocks its sums, both pyramids, and a type that is rounded often.
CASES = {
    "torch": [(small("crop-dfi"), torch.float32), (small("pool-dfi"), torch.bfloat16)],
    "triton": [(shrunk("pool-dfi", **TINIEST, **WIDTHS), torch.float32)],
}


def results(projector, features, upstream):
    """The bits of the tokens and of every gradient, in a number."""
    projector.zero_grad()
    features = features.clone().requires_grad_()
    tokens = projector(features)
    tokens.backward(upstream)
    gradients = [parameter.grad for parameter in projector.parameters()]
    digest = hashlib.sha256()
    for tensor in (tokens, features.grad, *gradients):
        digest.update(tensor.detach().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def disturbed(seed):
    """Memory as another history would have left it: blocks of garbage freed, others held, so that addresses move."""
    rng = random.Random(seed)
    blocks = [torch.full((rng.randint(1, 2 ** rng.randint(4, 18)),), rng.uniform(-1e30, 1e30)) for _ in range(20)]
    return rng.sample(blocks, 5)


def fingerprints(backend, repeats, seed=0):
    """What every repeat of every case gave, without repetition."""
    torch.set_num_threads(1)
    found = []
    for config, dtype in CASES[backend]:
        projector = randomised(SPProjector(config, backend, dtype=dtype))
        features = features_for(config, 3, dtype)
        upstream = torch.randn(projector(features).shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        different = set()
        for repeat in range(repeats):
            held = disturbed(seed + repeat)
            different.add(results(projector, features, upstream))
            del held
        found.append(sorted(different))
    return found


def fresh_processes(backend, count, at_a_time=2):
    """The fingerprints of fresh processes, each with its own hash seed and history of memory."""
    code = f"from tests.test_determinism import fingerprints; print(fingerprints({backend!r}, 1, int(input())))"
    found = []
    for first in range(0, count, at_a_time):
        seeds = range(first, min(first + at_a_time, count))
        started = [process(code, seed) for seed in seeds]
        for child, seed in zip(started, seeds, strict=True):
            out, _ = child.communicate(str(seed))
            assert child.returncode == 0
            found.append(out.strip())
    return found


def process(code, seed):
    environment = os.environ | {"PYTHONHASHSEED": str(seed), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )


def check(backend, repeats, processes):
    found = fingerprints(backend, repeats)
    assert all(len(different) == 1 for different in found), found
    elsewhere = fresh_processes(backend, processes)
    assert set(elsewhere) == {str(found)}
    print(f"{backend}: {repeats} repeats and {len(elsewhere)} processes, one fingerprint a case: {found}")


@pytest.mark.parametrize(("repeats", "processes"), [(10, 1), pytest.param(2000, 20, marks=pytest.mark.campaign)])
def test_not_a_bit_differs(repeats, processes):
    check("torch", repeats, processes)


def test_a_difference_would_be_seen():
    """One unit in the last place of one upstream gradient changes a fingerprint."""
    (config, dtype), *_ = CASES["torch"]
    projector = randomised(SPProjector(config, "torch", dtype=dtype))
    features = features_for(config, 3, dtype)
    upstream = torch.ones_like(projector(features))
    before = results(projector, features, upstream)
    upstream[0, 0, 0] = 1 + torch.finfo(dtype).eps
    assert results(projector, features, upstream) != before
