"""The stream of batches: a function of (seed, step) alone, whoever computes it and from wherever it starts."""

from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch

from minidino.config import CropConfig, MaskConfig, override, preset
from minidino.images.batches import (
    Batch,
    batch_indices,
    batches,
    collate,
    crop_laws,
    largest_block,
    make_batch,
    repeats,
)
from minidino.images.pixels import Pixels

CPU = torch.device("cpu")
N_IMAGES = 10
SMALL = [
    "crops.global_size=32", "crops.local_size=16", "optim.batch_size=6", "run.steps=7", "run.seed=3",
]  # fmt: skip


def small(*changes):
    return override(preset("scenes-cpu"), [*SMALL, *changes])


@pytest.fixture(scope="module")
def pixels():
    images = np.random.default_rng(0).integers(0, 256, (N_IMAGES, 40, 48, 3), dtype=np.uint8)
    return Pixels.from_array(images, np.arange(N_IMAGES), [str(i) for i in range(N_IMAGES)])


def assert_same(left, right):
    for name, a, b in zip(Batch._fields, left, right, strict=True):
        assert torch.equal(a, b), name


# ---------------------------------------------------------------- which images


@pytest.mark.parametrize("n_images, batch_size", [(10, 4), (10, 5), (7, 3), (3, 8), (1, 4), (5, 5)])
def test_passes_are_permutations_without_a_gap(n_images, batch_size):
    n_passes, n_steps = 6, -(-6 * n_images // batch_size)
    stream = torch.cat([batch_indices(n_images, batch_size, step, 0) for step in range(n_steps)])
    passes = stream[: n_passes * n_images].view(n_passes, n_images)
    assert torch.equal(passes.sort(dim=1).values, torch.arange(n_images).expand(n_passes, -1))
    if n_images >= 7:
        assert len({tuple(row.tolist()) for row in passes}) == n_passes  # a fresh order each time


def test_order_depends_on_seed_and_step_alone():
    def stream(seed):
        return [batch_indices(50, 8, step, seed).tolist() for step in range(5)]

    first = stream(4)
    torch.manual_seed(123)
    assert stream(4) == first
    assert batch_indices(50, 8, 3, 4).tolist() == first[3]  # asked alone, out of order
    assert stream(5) != first


def test_no_images_says_so():
    with pytest.raises(ValueError, match="at least one image"):
        batch_indices(0, 4, 0, 0)


# ---------------------------------------------------------------- the stream


def test_a_batch_has_the_promised_shapes(pixels):
    batch = next(batches(small("crops.n_local=3"), pixels, CPU))
    assert batch.crops_global.shape == (2, 6, 3, 32, 32) and batch.crops_global.dtype == torch.float32
    assert batch.crops_local.shape == (3, 6, 3, 16, 16)
    assert batch.masks.shape == (2, 6, 16) and batch.masks.dtype == torch.bool
    assert batch.masks.any(-1).sum() == 6  # half of 12 crops
    assert batch.mask_weights.shape == (int(batch.masks.sum()),)
    assert not torch.equal(batch.crops_global[0], batch.crops_global[1])
    assert len(next(batches(small("crops.n_local=0"), pixels, CPU)).crops_local) == 0


def test_a_stream_taken_up_in_the_middle_is_the_same_to_the_bit(pixels):
    config = small()
    whole = list(batches(config, pixels, CPU))
    assert len(whole) == 7
    torch.manual_seed(99)  # the global generator must not matter
    rest = list(batches(config, pixels, CPU, start_step=4))
    assert len(rest) == 3
    for a, b in zip(whole[4:], rest, strict=True):
        assert_same(a, b)
    assert list(batches(config, pixels, CPU, start_step=7)) == []
    assert not torch.equal(whole[0].crops_global, whole[1].crops_global)


def test_worker_processes_change_nothing(pixels):
    inline = list(batches(small(), pixels, CPU, start_step=2))
    spread = list(batches(small("run.workers=2"), pixels, CPU, start_step=2))
    for a, b in zip(inline, spread, strict=True):
        assert_same(a, b)


def test_the_seed_changes_pictures_and_masks(pixels):
    a, b = (next(batches(small(f"run.seed={seed}"), pixels, CPU)) for seed in (3, 4))
    assert not torch.equal(a.masks, b.masks) and not torch.equal(a.crops_global, b.crops_global)


def test_each_step_cuts_and_hides_anew(pixels):
    rows = torch.arange(4)
    first, again, second = (make_batch(small(), step, *pixels.batch(rows), rows) for step in (5, 5, 6))
    assert_same(first, again)
    for name in ("crops_global", "crops_local", "masks"):
        assert not torch.equal(getattr(first, name), getattr(second, name)), name


def test_a_row_does_not_know_its_neighbours(pixels):
    """Views of an image at a step are the same in any batch that has it: processes may share a batch."""
    config, rows = small(), torch.tensor([4, 1, 7])
    together = make_batch(config, 5, *pixels.batch(rows), rows)
    alone = make_batch(config, 5, *pixels.batch(rows[2:]), rows[2:])
    torch.testing.assert_close(together.crops_global[:, 2], alone.crops_global[:, 0], rtol=0, atol=1e-5)


# ---------------------------------------------------------------- putting together and taking apart


def test_each_masked_crop_weighs_one():
    masks = torch.zeros(2, 3, 4, dtype=torch.bool)
    masks[0, 0, :3], masks[1, 2, 1] = True, True
    batch = collate(torch.zeros(2, 3, 3, 8, 8), torch.zeros(0, 3, 3, 4, 4), masks, torch.arange(3))
    torch.testing.assert_close(batch.mask_weights, torch.tensor([1 / 3, 1 / 3, 1 / 3, 1.0]))
    empty = collate(torch.zeros(2, 3, 3, 8, 8), torch.zeros(0, 3, 3, 4, 4), masks & False, torch.arange(3))
    assert empty.mask_weights.shape == (0,)


def test_weights_run_along_the_masked_patches(pixels):
    batch = next(batches(small(), pixels, CPU))
    crop_of = batch.masks.flatten(0, 1).nonzero()[:, 0]
    sums = torch.zeros(12).index_add(0, crop_of, batch.mask_weights)
    torch.testing.assert_close(sums, batch.masks.flatten(0, 1).any(-1).float())


def test_rows_are_the_batch_of_some_images(pixels):
    batch = next(batches(small(), pixels, CPU))
    parts = [batch.rows(slice(0, 2)), batch.rows(slice(2, 6))]
    for name in ("crops_global", "crops_local", "masks"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts], dim=1), getattr(batch, name)), name
    assert torch.equal(torch.cat([part.index for part in parts]), batch.index)
    for part in parts:
        assert len(part.mask_weights) == part.masks.sum()
        assert part.mask_weights.sum().item() == pytest.approx(int(part.masks.any(-1).sum()), rel=1e-5)


# ---------------------------------------------------------------- laws and blocks of a config


@pytest.mark.parametrize("blur, chances", [("released", (0, 0.9, 0.5)), ("paper", (1, 0.1, 0.5)), ("none", (0, 0, 0))])
def test_the_blur_switch(blur, chances):
    assert tuple(law.blur_p for law in crop_laws(CropConfig(blur=blur))) == chances


def test_laws_say_what_the_config_says():
    config = CropConfig(
        global_size=48, local_size=24, global_scale=(0.4, 0.9), local_scale=(0.1, 0.2), jitter_probability=0.7,
        brightness=0.11, contrast=0.12, saturation=0.13, hue=0.14, grayscale_probability=0.15,
        solarize_probability=0.16,
    )  # fmt: skip
    first, second, local = crop_laws(config)
    assert (first.size, second.size, local.size) == (48, 48, 24)
    assert (first.scale, second.scale, local.scale) == ((0.4, 0.9), (0.4, 0.9), (0.1, 0.2))
    assert (first.solarize_p, second.solarize_p, local.solarize_p) == (0, 0.16, 0)
    for law in (first, second, local):
        assert (law.brightness, law.contrast, law.saturation, law.hue) == (0.11, 0.12, 0.13, 0.14)
        assert (law.jitter_p, law.gray_p, law.flip_p) == (0.7, 0.15, 0.5)


def test_the_default_laws_are_the_published_ones():
    first, second, local = crop_laws(CropConfig())
    assert replace(first, blur_p=0.9, solarize_p=0.2) == second
    assert (second.jitter_p, second.hue, second.saturation, second.gray_p) == (0.8, 0.1, 0.2, 0.2)
    assert (local.size, local.scale) == (96, (0.05, 0.32))


@pytest.mark.parametrize(
    "side, patch, released, fixed", [(224, 14, 128, 128), (224, 16, 98, 98), (518, 14, 666, 684.5), (48, 8, 18, 18)]
)
def test_largest_block_of_the_released_expression(side, patch, released, fixed):
    assert largest_block(MaskConfig(max_patches="released"), side, patch) == released
    assert largest_block(MaskConfig(max_patches="fixed"), side, patch) == fixed


def test_masks_follow_their_config(pixels):
    none = next(islice(batches(small("masks.probability=0"), pixels, CPU), 1))
    assert not none.masks.any() and none.mask_weights.shape == (0,)
    every = next(batches(small("masks.probability=1", "masks.ratio=(0.3, 0.5)"), pixels, CPU))
    shares = every.masks.float().mean(-1)
    assert shares.min() >= 2 / 16 and shares.max() <= 0.5  # a target of 4 to 8 patches, at times missed


def test_an_image_that_comes_twice_in_a_batch_is_cut_anew(pixels):
    assert repeats(torch.tensor([4, 0, 4, 4, 0])).tolist() == [0, 0, 1, 2, 1]
    few = pixels.select(range(5))
    batch = next(batches(small("optim.batch_size=8"), few, CPU))
    twice = [(i, j) for i in range(8) for j in range(i) if batch.index[i] == batch.index[j]]
    assert len(twice) >= 3
    for i, j in twice:
        assert not torch.equal(batch.crops_global[:, i], batch.crops_global[:, j])
    once = make_batch(small("optim.batch_size=8"), 0, *few.batch(batch.index[:1]), batch.index[:1])
    assert torch.equal(once.crops_global[:, 0], batch.crops_global[:, 0])  # the first is cut as ever
