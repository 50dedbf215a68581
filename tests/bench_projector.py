"""pytest-benchmark: the ops and the projector at a few widths, forward and backward. Off by default: `make bench`.

For quick looks while one works on a kernel, with pytest-benchmark's own --benchmark-compare and --benchmark-autosave. No
gate and no processes of their own: figures that are quoted come from `sp-fast bench projector`.
"""

import pytest
import torch

from sp_fast import SPProjector, SPProjectorConfig, geometry
from sp_fast.kernels.pooled_rows import pooled_rows
from sp_fast.kernels.window import encode_windows
from sp_fast.kernels.windowed_matmul import windowed_matmul, windowed_matmul_dweight

WIDTHS = {"vision_width": 256, "spatial_width": 128, "text_width": 256}


@pytest.fixture(params=["crop-dfi", "pool-dfi"])
def config(request):
    return SPProjectorConfig.variant(request.param, **WIDTHS)


@pytest.fixture(params=[1, 8], ids=["b1", "b8"])
def features(request, config):
    return torch.randn(request.param, config.patch_tokens, config.vision_width)


@pytest.mark.benchmark(group="projector, forward")
def test_forward(benchmark, config, features):
    projector = SPProjector(config).eval()
    with torch.no_grad():
        tokens = benchmark(projector, features)
    assert tokens.shape == (len(features), config.spatial_tokens + config.patch_tokens, config.text_width)
    assert tokens.isfinite().all()


@pytest.mark.benchmark(group="projector, forward + backward")
def test_forward_backward(benchmark, config, features):
    projector = SPProjector(config)

    def step():
        projector.zero_grad(set_to_none=True)
        projector(features).sum().backward()

    benchmark(step)
    assert all(p.grad.isfinite().all() for p in projector.parameters())


@pytest.mark.benchmark(group="windowed matmul, forward")
def test_windowed_matmul_fwd(benchmark, features):
    config = SPProjectorConfig(**WIDTHS)
    windows = encode_windows(geometry.spatial_windows(config))
    weight = torch.randn(geometry.spatial_cells(config), config.vision_width, config.spatial_width)
    out = benchmark(windowed_matmul, features, [weight], windows)
    assert out.shape == (len(features), 6, config.spatial_width)


@pytest.mark.benchmark(group="windowed matmul, weight gradient")
def test_windowed_matmul_dweight(benchmark, features):
    config = SPProjectorConfig(**WIDTHS)
    windows, cells = encode_windows(geometry.spatial_windows(config)), geometry.spatial_cells(config)
    grad = torch.randn(len(features), 6, config.spatial_width)
    out = torch.full((cells, config.vision_width, config.spatial_width), torch.nan)
    benchmark(windowed_matmul_dweight, grad, features, [out], windows)
    assert out.isfinite().all()


@pytest.mark.benchmark(group="pooled rows")
def test_pooled_rows_fwd(benchmark, features):
    levels = geometry.pooled_levels(SPProjectorConfig.variant("pool-dfi", **WIDTHS))
    rows = benchmark(pooled_rows, features, 24, 0, 24, levels)
    assert rows.shape[1] == 576 + sum(k * k for k in levels)
