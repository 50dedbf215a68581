"""Configurations drawn at random, as in tests/test_random_configurations.py, on the Triton kernels in float32."""

import copy
import random

import pytest
import torch

from sp_fast import SPProjector
from sp_fast.bench.accuracy import compare
from tests.helpers import randomised, reference_of
from tests.test_random_configurations import random_config, random_features, results


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("count", [6, pytest.param(100, marks=pytest.mark.campaign)])
def test_float32_keeps_to_the_accuracy_rule(count):
    """One draw has too few elements for the rule, so outputs and gradients are judged over all draws. A window in the
    wrong place is off by the size of the values, and leaves the rule's band however many draws there are."""
    pools = {"outputs": ([], [], []), "gradients": ([], [], [])}
    for seed in range(count):
        rng = random.Random(seed)
        config = random_config(rng, grid=5, width=20)
        features, layout, _ = random_features(rng, config)
        features = features.nan_to_num()
        projector = randomised(SPProjector(config, "triton"), seed).eval()
        modules = projector, reference_of(projector), reference_of(copy.deepcopy(projector).double())
        for pool, *found in zip(pools.values(), *(results(m, features, layout, seed) for m in modules), strict=True):
            assert found[0].keys() == found[2].keys()
            for name, exact in found[2].items():
                assert [tensors[name] is None for tensors in found] == [exact is None] * 3, (name, config)
                for part, tensors in zip(pool, found, strict=True):
                    if exact is not None:
                        assert tensors[name].shape == exact.shape
                        assert tensors[name].isfinite().all(), (name, seed, config)
                        part.append(tensors[name].flatten())
    for name, parts in pools.items():
        comparison = compare(name, *map(torch.cat, parts), torch.float32)
        print(count, "configurations,", sum(map(len, parts[0])), comparison)
        assert comparison.passed, comparison
