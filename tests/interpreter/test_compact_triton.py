"""Compact extractors on the Triton kernels, in the interpreter: outputs and every gradient beside the torch path's."""

import pytest
import torch

from sp_fast import SPProjector, SPProjectorConfig
from sp_fast.bench.accuracy import compare
from tests.compact_forms import KINDS
from tests.helpers import features_for, randomised, reference_of
from tests.test_random_configurations import results

PYRAMIDS = {
    "crop": {"kernel_sizes": (1, 2, 4), "detail_kernel": 2},
    "pool": {"kernel_sizes": (2, 3, 4), "detail_kernel": 3},
    "sliding": {"map_size": 4, "sliding_windows": (2, 2), "detail_kernel": 2},
}
DAILY = {
    ("depthwise", "crop", torch.float32), ("nested", "crop", torch.bfloat16), ("resampled", "crop", torch.float32),
}  # fmt: skip
SMALLER = {"grouped": {"groups": 2}, "resampled": {"base_kernel": 2}}
CASES = [
    pytest.param(*case, marks=() if case in DAILY else pytest.mark.campaign)
    for case in (
        (kind, pyramid, dtype) for kind in KINDS for pyramid in PYRAMIDS for dtype in (torch.float32, torch.bfloat16)
    )
]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("kind", "pyramid", "dtype"), CASES, ids=str)
def test_accuracy_rule(kind, pyramid, dtype):
    """Outputs together and gradients together: one tensor has too few elements for the rule."""
    widths = {"vision_width": 16, "spatial_width": 16, "text_width": 8}
    changes = {"grid": 4, **widths, **KINDS[kind], **PYRAMIDS[pyramid], **SMALLER.get(kind, {})}
    config = SPProjectorConfig(extractor=kind, pyramid=pyramid, **changes)
    pools = [([], [], []), ([], [], [])]
    for seed in range(2):
        projector = randomised(SPProjector(config, "triton", dtype=dtype), seed).eval()
        x = features_for(config, 2, dtype, seed)
        exact = randomised(SPProjector(config, dtype=torch.float64), seed)
        exact.load_state_dict({name: tensor.double() for name, tensor in projector.state_dict().items()})
        modules = projector, reference_of(projector), reference_of(exact)
        for pool, *found in zip(pools, *(results(module, x, "contiguous", seed) for module in modules), strict=True):
            for name in sorted(found[2]):
                for part, tensors in zip(pool, found, strict=True):
                    part.append(tensors[name].flatten())
    for what, parts in zip(("outputs", "gradients"), pools, strict=True):
        result = compare(what, *map(torch.cat, parts), dtype)
        assert result.passed, result
