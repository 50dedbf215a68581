"""What the kernels decide on the host: launch tables, chips, backends. No kernel runs."""

import dataclasses
import json

import pytest
import torch

from sp_fast.backend import choose_backend
from sp_fast.bench.tune import VALUES, descend, neighbours, write_row
from sp_fast.kernels import device
from sp_fast.kernels.device import CHIPS, Chip, chip_of, pretend, why_not_triton
from sp_fast.kernels.tiles import (
    BUCKETS,
    LARGE,
    TABLE,
    attend_tiles,
    bucket_of,
    is_swapped,
    launch_table,
    power_of_two,
    product_tiles,
    quantized_tiles,
    windowed_tiles,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CUDA = torch.device("cuda")


def test_every_chip_has_every_row_and_they_fit():
    table = launch_table()
    for chip in (*CHIPS.values(), Chip(0, 48 * 1024)):
        for itemsize in (2, 4):
            for bucket in (*BUCKETS, LARGE):
                tiles = table[chip.capability, itemsize, bucket]
                assert tiles.shared_bytes(itemsize) <= chip.shared_memory, (chip, itemsize, bucket)
                assert all(power_of_two(n, 1) == n for n in dataclasses.astuple(tiles)[:4])
    assert len(table) == (len(CHIPS) + 1) * 2 * (len(BUCKETS) + 1)


def test_an_unknown_chip_takes_the_default_rows():
    assert windowed_tiles(Chip(130, 10**6), torch.bfloat16, 3, 1024, 512) == launch_table()[0, 2, 4]


def test_stages_shrink_to_what_a_chip_has():
    whole = launch_table()[90, 2, 1]
    less = windowed_tiles(Chip(90, whole.shared_bytes(2) - 1), torch.bfloat16, 1, 1024, 512)
    assert less.stages_single == whole.stages_single - 1
    with pytest.raises(
        ValueError, match=r"needs \d+ bytes of shared memory .*capability 9\.0\) has 20000: use backend='torch'"
    ):
        windowed_tiles(Chip(90, 20_000), torch.bfloat16, 1, 1024, 512)


def test_quantised_tiles_fit_every_chip_and_end_with_a_group():
    for chip in CHIPS.values():
        for dtype in DTYPES:
            for batch in (1, 2, 9, 64, 200):
                for group, channels in ((1024, 1), (300, 1), (64, 2), (5, 2)):
                    tiles = quantized_tiles(chip, dtype, batch, 512, group, channels)
                    assert tiles.shared_bytes(dtype.itemsize) <= chip.shared_memory
                    assert group % tiles.block_k == 0 or tiles.block_k <= power_of_two(group)
    with pytest.raises(ValueError, match=r"needs \d+ bytes of shared memory .* has 20000: use backend='torch'"):
        quantized_tiles(Chip(90, 20_000), torch.bfloat16, 1, 512, 1024, 1)


@pytest.mark.parametrize(
    ("batch", "bucket"), [(1, 1), (2, 2), (3, 4), (8, 8), (9, 16), (64, 64), (65, LARGE), (10**6, LARGE)]
)
def test_buckets(batch, bucket):
    assert bucket_of(batch) == bucket


def test_operand_order():
    assert [c for c in CHIPS if is_swapped(CHIPS[c], torch.bfloat16)] == [90, 100]
    assert not any(is_swapped(chip, torch.float32) for chip in CHIPS.values())


def test_products_keep_their_tiles_up_to_64_images():
    few, last, many = (product_tiles(CHIPS[90], torch.bfloat16, batch, 512) for batch in (1, 64, 65))
    assert few == last
    assert few.block_m < many.block_m


def test_attention_fits_or_says_why_not():
    for chip in CHIPS.values():
        for dtype in (torch.bfloat16, torch.float32):
            for outputs in (25, 121) if dtype == torch.float32 else (25, 121, 441):
                assert attend_tiles(chip, dtype, 6, outputs, 512).shared_bytes(dtype.itemsize) <= chip.shared_memory
    with pytest.raises(ValueError, match=r"attention over 1024 outputs .* this GPU .* has 20000: use backend='torch'"):
        attend_tiles(Chip(86, 20_000), torch.float32, 6, 1024, 512)


class Properties:
    major, minor, shared_memory_per_block_optin = 8, 6, 101_376


def test_a_device_is_asked_once_and_only_when_needed(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: asked.append(index) or Properties)
    device._query.cache_clear()
    try:
        assert chip_of(torch.device("cuda", 3)) == chip_of(torch.device("cuda", 3)) == Chip(86, 101_376)
        assert asked == [3]
        with pretend(CHIPS[100]):
            assert chip_of(torch.device("cuda", 3)) == CHIPS[100]
    finally:
        device._query.cache_clear()


def test_backends_on_invented_devices(monkeypatch):
    monkeypatch.setattr(device, "has_triton", lambda: True)
    with pretend(CHIPS[90]):
        assert choose_backend("auto", CUDA, torch.bfloat16) == ("triton", "auto: torch.bfloat16 on an NVIDIA GPU")
        assert choose_backend("torch", CUDA, torch.bfloat16) == ("torch", "requested")
        assert choose_backend("triton", CUDA, torch.float16).name == "triton"
        assert "torch.float64 is none of" in choose_backend("auto", CUDA, torch.float64).reason
    with pretend(Chip(75, 64 * 1024)):
        assert choose_backend("auto", CUDA, torch.float16) == (
            "torch", "auto: the GPU has compute capability 7.5, below 8.0",
        )  # fmt: skip
    monkeypatch.setattr(device, "has_triton", lambda: False)
    assert why_not_triton(CUDA, torch.bfloat16) == "triton is not installed (pip install triton)"


def test_neighbours_fit_the_chip():
    start = launch_table()[86, 2, 1]
    found = [tiles for field in VALUES for tiles in neighbours(start, field, CHIPS[86], 2, 512)]
    assert found
    assert all(t.shared_bytes(2) <= CHIPS[86].shared_memory for t in found)
    assert all(sum(a != b for a, b in zip(*map(dataclasses.astuple, (t, start)), strict=True)) == 1 for t in found)


def test_tuning_finds_the_fastest_and_keeps_wrong_tiles_out():
    start = launch_table()[90, 2, 1]

    def measure(tiles):
        if tiles.warps == 8:
            return "other bits than the present choice"
        return 1 + abs(tiles.block_d - 256) / 256 + abs(tiles.stages_single - 3) - (tiles.warps == 8)

    best, trials = descend(start, CHIPS[90], 2, 512, measure)
    assert (best.block_d, best.stages_single, best.warps) == (256, 3, start.warps)
    assert any(trial.ms is None and "other bits" in trial.reason for trial in trials)
    assert len({trial.tiles for trial in trials}) == len(trials)
    assert descend(start, CHIPS[90], 2, 512, lambda _: "broken")[0] == start


def test_a_row_is_rewritten_and_the_others_stay(tmp_path):
    path = tmp_path / "table.json"
    path.write_text(TABLE.read_text())
    tiles = dataclasses.replace(launch_table()[90, 2, 1], block_d=256)
    write_row(CHIPS[90], 2, 1, tiles, path)
    before, after = json.loads(TABLE.read_text()), json.loads(path.read_text())
    changed = [b for a, b in zip(before, after, strict=True) if a != b]
    assert changed == [{"chip": 90, "bytes": 2, "bucket": 1, **dataclasses.asdict(tiles)}]
    write_row(Chip(103, 227 * 1024), 4, 8, tiles, path)
    assert launch_table(path)[103, 4, 8] == tiles
    assert launch_table(path)[103, 2, 1] == launch_table()[0, 2, 1]
    launch_table.cache_clear()
