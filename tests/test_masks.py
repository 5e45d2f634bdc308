"""Block masks against the published statistics and a plain-Python version of the law."""

import math
import random

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp

from minidino.images.masks import batch_masks, block_mask


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def naive_block_mask(height, width, n_masked, rng, max_patches):
    """The law, patch by patch, with Python's own random numbers."""
    mask = np.zeros((height, width), bool)
    while mask.sum() < n_masked:
        before = mask.sum()
        room = min(n_masked - before, max_patches)
        for _ in range(10):
            area = rng.uniform(4, room)
            aspect = math.exp(rng.uniform(math.log(0.3), -math.log(0.3)))
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if h < height and w < width:
                top, left = rng.randint(0, height - h), rng.randint(0, width - w)
                cells = [(i, j) for i in range(top, top + h) for j in range(left, left + w) if not mask[i, j]]
                if 0 < len(cells) <= room:
                    mask[tuple(zip(*cells))] = True
                    break
        if mask.sum() == before:
            break
    return mask


@pytest.mark.parametrize("grid", [(6, 6), (14, 14), (16, 16), (7, 9)])
@pytest.mark.parametrize("share", [0.1, 0.3, 0.5])
def test_target_is_never_passed_and_nearly_always_met(grid, share):
    g, target = generator(), int(grid[0] * grid[1] * share)
    counts = np.array([block_mask(grid, target, g).sum().item() for _ in range(500)])
    assert counts.max() <= target
    assert (counts == target).mean() >= 0.84
    assert (target - counts).mean() <= 0.2


@pytest.mark.parametrize("grid, n_masked, max_patches", [((8, 8), 20, 32), ((6, 10), 30, 12)])
def test_masks_have_the_distribution_of_the_naive_version(grid, n_masked, max_patches):
    g, rng = generator(1), random.Random(1)
    ours = np.stack([block_mask(grid, n_masked, g, max_patches=max_patches).numpy() for _ in range(1500)])
    naive = np.stack([naive_block_mask(*grid, n_masked, rng, max_patches) for _ in range(1500)])
    assert np.abs(ours.mean(axis=0) - naive.mean(axis=0)).max() < 0.08  # 4 standard errors of a difference
    for statistic in (
        lambda m: m.any(axis=2).sum(axis=1),  # rows touched
        lambda m: (m[:, 1:] != m[:, :-1]).sum(axis=(1, 2)) + (m[:, :, 1:] != m[:, :, :-1]).sum(axis=(1, 2)),  # edges
    ):
        assert ks_2samp(statistic(ours), statistic(naive)).pvalue > 1e-3


def test_one_block_is_a_rectangle_smaller_than_the_grid():
    g = generator()
    for _ in range(300):
        mask = block_mask((4, 6), 24, g, min_patches=20, max_patches=24).numpy()
        assert not mask.all()
    single = [block_mask((12, 12), 9, g, min_patches=9).numpy() for _ in range(300)]
    rectangles = [np.array_equal(m, np.outer(m.any(axis=1), m.any(axis=0))) for m in single]
    assert np.mean(rectangles) > 0.5  # most have room for one block only
    sides = {(int(m.any(axis=1).sum()), int(m.any(axis=0).sum())) for m, r in zip(single, rectangles) if r}
    assert {(3, 3), (2, 4), (4, 2)} <= sides and max(max(pair) for pair in sides) <= 6


def test_nothing_to_hide_and_nothing_that_fits():
    assert block_mask((6, 6), 0, generator()).sum() == 0
    assert block_mask((1, 1), 1, generator()).sum() == 0  # no block is smaller than this grid


@pytest.mark.parametrize(
    "n_crops, probability, n_masked", [(2, 0.5, 1), (16, 0.5, 8), (7, 0.5, 3), (5, 0.0, 0), (6, 1.0, 6)]
)
def test_exactly_the_asked_share_of_crops_is_masked(n_crops, probability, n_masked):
    masks = batch_masks(n_crops, (8, 8), generator(3), mask_probability=probability)
    assert masks.shape == (n_crops, 64) and masks.dtype == torch.bool
    assert masks.any(dim=1).sum() == n_masked


def test_shares_are_stratified_and_average_to_the_middle():
    g = generator()
    for _ in range(20):
        counts = batch_masks(32, (16, 16), g).sum(dim=1)
        shares = (counts[counts > 0] / 256).sort().values
        edges = torch.linspace(0.1, 0.5, 17)
        assert (shares <= edges[1:] + 1e-6).all()
        assert (shares >= edges[:-1] - 6 / 256).all()  # a mask may miss its target by a few patches
        assert shares.mean().item() == pytest.approx(0.30, abs=0.015)


def test_one_image_draws_from_the_whole_interval_and_masks_either_crop():
    g = generator()
    batches = torch.stack([batch_masks(2, (16, 16), g) for _ in range(300)]).float()
    shares = batches.sum(dim=1).mean(dim=1)
    assert shares.min() < 0.13 and shares.max() > 0.47
    first = batches[:, 0].any(dim=1).float().mean()
    assert 0.4 < first < 0.6  # shuffled over the batch


def test_the_generator_decides_everything():
    assert torch.equal(batch_masks(8, (6, 6), generator(5)), batch_masks(8, (6, 6), generator(5)))
    assert not torch.equal(batch_masks(8, (6, 6), generator(5)), batch_masks(8, (6, 6), generator(6)))
