"""Training a model with the fast projector beside the same training with the reference: the whole path, LoRA too."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch

from sp_fast.training.study.drift import drift, reference_of, reorderings, within_rounding
from sp_fast.training.study.paths import fast_form, path, reordered_form
from tests import tiny_training
from tests.convergence import EXACT, REORDERINGS
from tests.tiny_training import recipe


def raced(folder, seed, steps, form, dtype=torch.float32):
    settings = recipe(
        "finetune", folder, output=folder / f"run-{len(list(folder.iterdir()))}", projector=str(folder / f"start-{seed}"),
        max_steps=steps, seed=seed, lora_dropout=0, projector_learning_rate=1e-2,
    )  # fmt: skip
    return path(settings, form, dtype)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("race")
    tiny_training.parts(folder)
    tiny_training.data(folder / "data", 16, text_only=(1, 2, 3, 4, 5))
    for seed in range(3):
        tiny_training.start(folder, seed, folder / f"start-{seed}")
    return folder


@pytest.mark.usefixtures("quick_runs")
def test_float64_training_is_the_references(folder):
    fast, reference = (raced(folder, 0, 12, form, torch.float64) for form in (fast_form, reference_of))
    assert reference.losses[-1] < reference.losses[0]
    assert (drift(fast, reference) <= EXACT).all()


@pytest.mark.campaign
@pytest.mark.timeout(0)
@pytest.mark.parametrize("seed", range(3))
def test_float32_training_is_the_references_to_rounding(folder, seed):
    """The rule: at most twice what the reference itself drifts when its sums run in another order."""
    reference = raced(folder, seed, 200, reference_of)
    fast = drift(raced(folder, seed, 200, fast_form), reference)
    config = SimpleNamespace(**tiny_training.widths())
    forms = [partial(reordered_form, order) for order in reorderings(config, REORDERINGS)]
    again = [drift(raced(folder, seed, 200, form), reference) for form in forms]
    limit = torch.stack(again).amax(0)
    print(f"\nseed {seed}: loss {reference.losses[0]:.3f} to {reference.losses[-1]:.3f}; losses and parameters drift by "
          f"{fast.tolist()}, the reordered reference by {limit.tolist()}")  # fmt: skip
    assert reference.losses[-1] < reference.losses[0] / 2
    assert within_rounding(fast, limit)
