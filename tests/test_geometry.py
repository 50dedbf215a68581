"""Windows against the official slices, written out again as the official tower has them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sp_fast import SPProjectorConfig, geometry
from sp_fast.errors import ConfigError
from sp_fast.kernels.window import Window, decode_windows, encode_windows
from tests.helpers import ALL_VARIANTS, small

# Tower switch -> the crops it makes on an l x l map, as (first, behind last) of rows and columns alike.
OFFICIAL_CROPS = {
    "336_6_tokens": lambda l: [(l // 2 - 2 - i, l // 2 + 2 + i) for i in range(0, l // 2, 2)],  # noqa: E741
    "336_3_tokens": lambda l: [(l // 2 - 4 - i, l // 2 + 4 + i) for i in range(0, l // 2, 4)],  # noqa: E741
    "224": lambda l: [(l // 2 - 1 - i, l // 2 + 1 + i) for i in range(l // 2)],  # noqa: E741
}


def sources(window, output=0):
    return [window.source(output, q) for q in range(window.cells)]


def rows_of(grid, top, bottom, left, right):
    return torch.arange(grid * grid).view(grid, grid)[top:bottom, left:right].flatten().tolist()


@pytest.mark.parametrize("grid", [16, 24, 27, 32])
@pytest.mark.parametrize("tower", OFFICIAL_CROPS)
def test_crops_are_the_official_slices(tower, grid):
    crops = [(a, b) for a, b in OFFICIAL_CROPS[tower](grid) if a >= 0]  # l=27: the seventh begins at -1, unused
    config = SPProjectorConfig(kernel_sizes=[b - a for a, b in crops], detail_kernel=None, grid=grid)
    windows = geometry.spatial_windows(config)
    assert len(windows) == len(crops)
    for window, (a, b) in zip(windows, crops, strict=True):
        assert sources(window) == rows_of(grid, a, b, a, b)


def test_crop_24_of_the_siglip_grid_misses_three_edges():
    window = geometry.spatial_windows(SPProjectorConfig(grid=27))[-1]
    assert sources(window) == rows_of(27, 1, 25, 1, 25)


@pytest.mark.parametrize(("kernel", "outputs"), [(4, 121), (8, 81), (12, 49), (16, 25), (9, 64), (5, 100)])
@pytest.mark.parametrize("grid", [24, 27])
def test_detail_windows_are_the_strided_convolution(kernel, outputs, grid):
    (window,) = geometry.detail_windows(SPProjectorConfig(detail_kernel=kernel, grid=grid))
    assert window.outputs == outputs
    first = (grid - 24 + 1) // 2 if grid % 2 == 0 else 1  # the 24 x 24 crop: rows 1..24 of 27
    side = window.out_width
    for output in range(outputs):
        top, left = first + output // side * 2, first + output % side * 2
        assert sources(window, output) == rows_of(grid, top, top + kernel, left, left + kernel)


def test_sliding_windows_tile_the_map_in_reading_order():
    config = SPProjectorConfig(pyramid="sliding", detail_kernel=None)
    windows = geometry.spatial_windows(config)
    expected = [rows_of(24, r * 8, r * 8 + 8, c * 12, c * 12 + 12) for r in range(3) for c in range(2)]
    assert [sources(w) for w in windows] == expected
    assert sorted(row for window in expected for row in window) == list(range(576))


def test_sliding_windows_on_an_odd_grid_need_a_map_that_they_divide():
    with pytest.raises(ConfigError, match="map_size"):
        SPProjectorConfig(pyramid="sliding", grid=27)
    windows = geometry.spatial_windows(SPProjectorConfig(pyramid="sliding", grid=27, map_size=24))
    assert sources(windows[0]) == rows_of(27, 1, 9, 1, 13)


def test_pooled_windows_follow_the_patch_rows():
    config = SPProjectorConfig(pyramid="pool")
    windows = geometry.spatial_windows(config)
    behind = 576
    for window, k in zip(windows[:-1], (4, 8, 12, 16, 20), strict=True):
        assert sources(window) == list(range(behind, behind + k * k))
        behind += k * k
    assert sources(windows[-1]) == list(range(576))
    assert geometry.pooled_levels(config) == (4, 8, 12, 16, 20)


@pytest.mark.parametrize("size", [16, 24, 27, 32])
@pytest.mark.parametrize("bins", [1, 4, 7, 12, 16])
def test_pooling_bins_are_those_of_adaptive_pooling(size, bins):
    x = torch.randn(1, size, dtype=torch.double)
    means = torch.stack([x[0, a:b].mean() for a, b in geometry.pooling_bins(size, bins)])
    torch.testing.assert_close(torch.nn.functional.adaptive_avg_pool1d(x, bins)[0], means)


def test_overlapping_bins():
    assert geometry.pooling_bins(24, 16)[:3] == [(0, 2), (1, 3), (3, 5)]
    assert [a for a, _ in geometry.pooling_bins(24, 20)] == [int(1.2 * i + 1e-9) for i in range(20)]


@pytest.mark.parametrize("variant", ALL_VARIANTS)
def test_windows_meet_every_cell_once_and_stay_inside(variant):
    check_windows(small(variant))


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_windows_of_random_configurations(data):
    grid = data.draw(st.integers(1, 40))
    sizes = data.draw(st.sets(st.integers(1, grid), min_size=1, max_size=8))
    pyramid = data.draw(st.sampled_from(["crop", "pool"]))
    top = grid if pyramid == "pool" else max(sizes)
    kernel = data.draw(st.none() | st.integers(1, top))
    stride = data.draw(st.integers(1, 4))
    config = SPProjectorConfig(
        pyramid, kernel_sizes=sorted(sizes), detail_kernel=kernel, detail_stride=stride, grid=grid
    )
    check_windows(config)


def check_windows(config):
    windows = geometry.spatial_windows(config) + geometry.detail_windows(config)
    rows = config.patch_tokens + sum(k * k for k in geometry.pooled_levels(config))
    met = {}
    for w in windows:
        met.setdefault(w.weight, []).extend(range(w.cell, w.cell + w.cells))
        for output in {0, w.outputs - 1}:
            read = sources(w, output)
            assert len(set(read)) == w.cells
            assert min(read) >= 0
            assert max(read) < rows
        assert w.last_source == max(sources(w, w.outputs - 1))
    cells = [n for n in (geometry.spatial_cells(config), geometry.detail_cells(config)) if n]
    assert [sorted(met[i]) for i in sorted(met)] == [list(range(n)) for n in cells]
    assert decode_windows(encode_windows(windows)) == windows


def test_decoding_refuses_a_broken_list():
    with pytest.raises(ValueError, match="9 integers"):
        decode_windows([1, 2, 3])
    assert decode_windows([]) == []
    assert encode_windows([Window(0, 1, 2, 3, 4, 5, 6, 7, 8)]) == list(range(9))
