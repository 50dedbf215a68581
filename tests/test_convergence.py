"""Training on the torch path ends where the reference's does: AdamW, a random teacher, three seeds."""

import pytest
import torch

from sp_fast.training.study.drift import EPS, within_rounding
from tests.convergence import CONFIGS, EXACT, TORCH_EPS, race, student, with_fault


def campaign(*values):
    return pytest.param(*values, marks=pytest.mark.campaign)


# Seeds, steps, the factor by which the loss falls at least.
EFFORTS = pytest.mark.parametrize(("seeds", "steps", "factor"), [((0,), 12, 1.2), campaign((0, 1, 2), 200, 5)])


@EFFORTS
@pytest.mark.parametrize("eps", [EPS, TORCH_EPS])
@pytest.mark.parametrize("variant", CONFIGS)
def test_float32_ends_within_rounding(variant, eps, seeds, steps, factor):
    for seed in seeds:
        result = race(variant, seed, steps, ["torch"], eps=eps)
        print(result)
        assert result.fall >= factor
        assert within_rounding(result.found["torch"], result.reordered), result


@EFFORTS
@pytest.mark.parametrize("variant", CONFIGS)
def test_float64_ends_where_the_reference_does(variant, seeds, steps, factor):
    for seed in seeds:
        result = race(variant, seed, steps, ["torch"], torch.float64)
        print(result)
        assert result.fall >= factor
        assert result.reordered.max() <= EXACT
        assert result.found["torch"].max() <= EXACT, result


@pytest.mark.parametrize("variant", CONFIGS)
def test_a_gradient_off_by_a_thousandth_is_seen(variant):
    """In any parameter but the key's biases, which shift all logits of a softmax alike: their gradients vanish."""
    healthy = race(variant, 0, 6, [])
    for name, _ in student(variant, 0, torch.float32).named_parameters():
        found = with_fault(healthy, name, 6)
        vanishes = "key" in name and name.endswith("bias")
        assert within_rounding(found, healthy.reordered) == vanishes, (name, found, healthy.reordered)
