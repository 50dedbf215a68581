"""DDP and FSDP2 on two processes, which test_wrapping.py starts: each works out the gradients of both alone, and then
holds the wrapped module's to their mean. A module of its own, because each process has to import it."""

import functools
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from sp_fast import SPProjector
from tests.convergence import TINIEST, WIDTHS, batch_of
from tests.helpers import randomised, reference_of, shrunk

CONFIG = shrunk("crop-dfi", **TINIEST, **WIDTHS)
# Three details and a value projection that nothing uses, which DDP would wait for if it asked for a gradient.
UNUSED = shrunk("conv336_crop_multifuse_q", **TINIEST | WIDTHS | {"detail_kernel": (1, 2, 1)})


def build(backend, config=CONFIG):
    """The projector, or where the backend is "reference" the reference, always of the same weights."""
    projector = randomised(SPProjector(config, "torch" if backend == "reference" else backend))
    return reference_of(projector) if backend == "reference" else projector


def features(seed=0):
    return batch_of(CONFIG, seed, 0).float()


def backward(module, rank, step=0):
    tokens = module(features(10 * rank + step))
    generator = torch.Generator().manual_seed(rank)
    tokens.backward(torch.randn(tokens.shape, generator=generator))


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gradients(module):
    return {name: whole(p.grad) for name, p in module.named_parameters() if p.grad is not None}


@functools.cache
def mean_gradients(backend, config, steps):
    """Halved before they are added, as DDP does it; exact either way."""
    found = []
    for rank in range(2):
        module = build(backend, config)
        for step in range(steps):
            backward(module, rank, step)
        found.append(gradients(module))
    return {name: found[0][name] / 2 + found[1][name] / 2 for name in found[0]}


def same(module, backend, config=CONFIG, steps=1):
    torch.testing.assert_close(gradients(module), mean_gradients(backend, config, steps), rtol=0, atol=0)


def ddp(backend, rank, config=CONFIG, steps=1, **options):
    module = DistributedDataParallel(build(backend, config), **options)
    for _ in range(steps):
        module.zero_grad()
        backward(module, rank)
        same(module.module, backend, config)


def accumulation(backend, rank):
    module = DistributedDataParallel(build(backend))
    with module.no_sync():
        backward(module, rank, 0)
    backward(module, rank, 1)
    same(module.module, backend, steps=2)


def fsdp(backend, rank, parts=(), exact=True):
    module = build(backend)
    for part in parts:
        fully_shard(module.get_submodule(part))
    fully_shard(module)
    backward(module, rank)
    if exact:
        return same(module, backend)
    # A layer that is sharded by itself is called, not read, so a fused kernel stands aside: the same within rounding.
    return torch.testing.assert_close(gradients(module), mean_gradients(backend, CONFIG, 1), rtol=1e-4, atol=1e-5)


def fsdp_in_float16(backend, rank, parts=()):
    module, policy = build(backend), MixedPrecisionPolicy(torch.float16)
    for part in parts:
        fully_shard(module.get_submodule(part), mp_policy=policy)
    fully_shard(module, mp_policy=policy)
    tokens = module(features(10 * rank))
    assert tokens.dtype == torch.float16
    torch.testing.assert_close(tokens.float(), build(backend)(features(10 * rank)), rtol=0.1, atol=0.1)


PARTS = ("extractor", "integrator", "output", "patch_mlp.0")
JOBS = {
    "ddp": ddp,
    "ddp of the reference": lambda _, rank: ddp("reference", rank),
    "ddp, static graph": functools.partial(ddp, steps=2, static_graph=True),  # which the first step learns
    "ddp, gradients as views": functools.partial(ddp, gradient_as_bucket_view=True),
    "ddp, unused projection": lambda _, rank: ddp("torch", rank, UNUSED, steps=2),  # else the second step raises
    "ddp, accumulation": accumulation,
    "ddp, accumulation of the reference": lambda _, rank: accumulation("reference", rank),
    "fsdp": fsdp,
    "fsdp of parts": functools.partial(fsdp, parts=PARTS, exact=False),
    "fsdp in float16": fsdp_in_float16,
    "fsdp of parts in float16": functools.partial(fsdp_in_float16, parts=PARTS),
}


def work(rank, backend, jobs, folder):
    torch.set_num_threads(1)
    store, wait = f"file://{folder}/store", timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=wait)
    failures = {}
    for name in jobs:
        try:
            JOBS[name](backend, rank)
        except Exception:  # noqa: BLE001 - handed to the test of this job
            failures[name] = traceback.format_exc()
    torch.save(failures, folder / f"{rank}.pt")
    dist.destroy_process_group()
