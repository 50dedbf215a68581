"""Norms of gradients against float64, where torch's own lose the small squares of a large tensor."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.linalg import vector_norm

from sp_fast.training.gradient_norm import gradient_norm
from sp_fast.training.trainer import SpTrainer


def gradients(dtype, *shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype) * 1e-3 for shape in shapes]


def error(found, given):
    exact = math.sqrt(math.fsum(x * x for one in given for x in one.double().flatten().tolist()))
    return abs(found.item() / exact - 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_it_is_exact_at_any_size(dtype):
    given = gradients(dtype, (2**2, 2**9, 2**9), (300, 7), (11,), ())
    found = gradient_norm(iter(given))
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    assert error(found, given) < 4 * torch.finfo(found.dtype).eps
    if dtype == torch.float32:
        assert error(vector_norm(given[0]), given[:1]) > 1e-5  # what torch's would be, on a CPU


def test_it_does_not_depend_on_the_layout():
    """One tensor, or the same in pieces: the same to rounding."""
    (whole,) = gradients(torch.float32, (2**6, 2**8, 2**8))
    pieces = gradient_norm(whole.split(5)), gradient_norm(whole.flatten(1).split(1000, 1))
    for found in pieces:
        assert abs(found / gradient_norm([whole]) - 1) < 2 * torch.finfo(torch.float32).eps


def test_the_trainer_clips_by_it():
    model = nn.Linear(2**10, 2**10, bias=False)
    (model.weight.grad,) = gradients(torch.float32, (2**10, 2**10))
    trainer = SimpleNamespace(is_deepspeed_enabled=False)
    found = SpTrainer._gradient_norm(trainer, model)
    assert error(found, [model.weight.grad]) < 4 * torch.finfo(torch.float32).eps
    assert list(trainer.gradient_norms.values()) == [found]


def test_of_nothing_it_is_zero():
    assert gradient_norm([]) == 0
