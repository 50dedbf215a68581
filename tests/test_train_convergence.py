"""Training a model with the fast projector beside the same training with the reference: the whole path, LoRA too."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sp_fast.training.run import set_up
from sp_fast.training.stage import part_of
from tests import tiny_training
from tests.convergence import EPS, EXACT, Run, drift, official_parameters, permuted, reorderings, within_rounding
from tests.helpers import reference_of
from tests.tiny_training import Watch, recipe

FAST = "fast"


class Reordered(nn.Module):
    """A reference whose sums run in another order."""

    def __init__(self, reference, order):
        super().__init__()
        self.inner, self._order = permuted(reference, order), order

    def forward(self, features):
        return self.inner(features[..., self._order["C"]])[..., self._order["H"].argsort()]


def raced(folder, seed, steps, projector, dtype=torch.float32):
    """Losses, and everything that was trained: the projector by official names. ``projector`` is FAST, None for the
    reference, or an order for it."""
    settings = recipe(
        "finetune", folder, output=folder / f"run-{len(list(folder.iterdir()))}", projector=str(folder / f"start-{seed}"),
        max_steps=steps, seed=seed, lora_dropout=0, projector_learning_rate=1e-2, save_steps=steps + 1,
    )  # fmt: skip
    trainer, _ = set_up("finetune", settings, lambda text: None)
    trainer.args.adam_epsilon = EPS
    trainer.args.save_strategy = "no"
    core = trainer.model.base_model.model.model
    trainer.model.to(dtype)
    if projector is not FAST:
        reference = reference_of(core.multi_modal_projector)
        core.multi_modal_projector = reference if projector is None else Reordered(reference, projector)
    watch = Watch()
    trainer.add_callback(watch)
    trainer.train()
    found = core.multi_modal_projector
    parameters = official_parameters(getattr(found, "inner", found), None if projector in (FAST, None) else projector)
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad and part_of(name) != "projector":
            parameters[name] = parameter.detach().double()
    return Run(torch.tensor(list(watch.losses.values()), dtype=torch.float64), parameters)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("race")
    tiny_training.parts(folder)
    tiny_training.data(folder / "data", 16, text_only=(1, 2, 3, 4, 5))
    for seed in range(3):
        tiny_training.start(folder, seed, folder / f"start-{seed}")
    return folder


def test_float64_training_is_the_references(folder):
    fast, reference = (raced(folder, 0, 12, projector, torch.float64) for projector in (FAST, None))
    assert reference.losses[-1] < reference.losses[0]
    assert (drift(fast, reference) <= EXACT).all()


@pytest.mark.campaign
@pytest.mark.timeout(0)
@pytest.mark.parametrize("seed", range(3))
def test_float32_training_is_the_references_to_rounding(folder, seed):
    """The rule: at most twice what the reference itself drifts when its sums run in another order."""
    reference = raced(folder, seed, 200, None)
    fast = drift(raced(folder, seed, 200, FAST), reference)
    config = SimpleNamespace(**tiny_training.widths())
    again = [drift(raced(folder, seed, 200, order), reference) for order in reorderings(config)]
    limit = torch.stack(again).amax(0)
    print(f"\nseed {seed}: loss {reference.losses[0]:.3f} to {reference.losses[-1]:.3f}; losses and parameters drift by "
          f"{fast.tolist()}, the reordered reference by {limit.tolist()}")  # fmt: skip
    assert reference.losses[-1] < reference.losses[0] / 2
    assert within_rounding(fast, limit)
