"""The order of samples: every sample once, one modality a batch, of similar length, from seed and epoch alone."""

import random
import time

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from sp_fast.training.sampling import OrderSampler


def data(samples, with_images, seed=0):
    rng = np.random.default_rng(seed)
    has_images = rng.permutation(np.arange(samples) < with_images)
    return (rng.lognormal(5, 1, samples).astype(np.int32) + 600 * has_images).astype(np.int32), has_images


def order(sizes, has_images, batch, seed=0, epoch=0, group=True):
    sampler = OrderSampler(sizes, has_images, batch, seed, group)
    sampler.set_epoch(epoch)
    assert len(sampler) == len(sizes)
    return np.array(list(sampler), dtype=int)


@pytest.mark.parametrize(
    ("samples", "with_images", "batch"),
    [(1000, 700, 16), (1000, 700, 7), (64, 32, 16), (1000, 1000, 16), (1000, 0, 16), (10, 6, 16), (40, 23, 16), (1, 1, 4), (5, 2, 1)],
)  # fmt: skip
def test_batches_are_of_one_modality_and_every_sample_comes_once(samples, with_images, batch):
    sizes, has_images = data(samples, with_images)
    found = order(sizes, has_images, batch)
    assert sorted(found) == list(range(samples))
    batches = [has_images[found[i : i + batch]] for i in range(0, samples, batch)]
    mixed = [i for i, one in enumerate(batches) if one.any() != one.all()]
    assert len(mixed) <= 1
    whole = with_images // batch + (samples - with_images) // batch
    assert all(i >= whole for i in mixed)  # at the end of the epoch


def test_batches_are_of_similar_length_and_in_random_order():
    sizes, has_images = data(20000, 12000)
    found = order(sizes, has_images, 16)
    batches = sizes[found].reshape(-1, 16)
    padding = 1 - batches.sum() / (16 * batches.max(1)).sum()
    plain = sizes[order(sizes, has_images, 16, group=False)].reshape(-1, 16)
    assert padding < 0.1 < 0.3 < 1 - plain.sum() / (16 * plain.max(1)).sum()
    assert (np.diff(batches, axis=1) <= 0).all()
    means, images = batches.mean(1), has_images[found].reshape(-1, 16).all(1)
    for some in (means[images], means[~images], images.astype(float)):
        assert abs(np.corrcoef(some[1:], some[:-1])[0, 1]) < 0.15  # neighbours say nothing about each other
    # Which samples share a batch is random too: not the 16 that sorting all of them would put together.
    everywhere = np.ptp(
        np.argsort(np.argsort(sizes[has_images]))[
            np.searchsorted(np.flatnonzero(has_images), found.reshape(-1, 16)[images])
        ],
        axis=1,
    )
    assert np.median(everywhere) > 100


@pytest.mark.parametrize("group", [True, False])
def test_the_order_follows_from_seed_and_epoch_alone(group):
    sizes, has_images = data(500, 300)
    first = order(sizes, has_images, 16, 3, 2, group)
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    before = torch.get_rng_state()
    assert (order(sizes, has_images, 16, 3, 2, group) == first).all()
    assert torch.equal(torch.get_rng_state(), before)
    for seed, epoch in ((3, 1), (4, 2), (2, 3), (3, 0)):
        other = order(sizes, has_images, 16, seed, epoch, group)
        assert (other != first).mean() > 0.9
        assert sorted(other) == sorted(first)


def test_the_loader_takes_batches_as_they_are():
    sizes, has_images = data(100, 64)
    sampler = OrderSampler(sizes, has_images, 8, 0)
    loader = DataLoader(range(100), batch_size=8, sampler=sampler, collate_fn=list)
    whole = [batch for batch in loader if len(batch) == 8]
    assert sum(len({bool(has_images[i]) for i in batch}) > 1 for batch in whole) <= 1


@pytest.mark.campaign
def test_a_million_samples_take_less_than_two_seconds():
    sizes, has_images = data(1_000_000, 624_000)
    start = time.process_time()  # which other work on the machine does not lengthen
    found = order(sizes, has_images, 128)
    seconds = time.process_time() - start
    batches = sizes[found][: 1_000_000 // 128 * 128].reshape(-1, 128)
    padding = 1 - batches.sum() / (128 * batches.max(1)).sum()
    print(f"\n1,000,000 samples ordered in {seconds:.2f} s; {100 * padding:.1f}% of batches of 128 is padding")
    assert seconds < 2
