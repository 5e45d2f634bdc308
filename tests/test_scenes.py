"""The drawn world: the same for ever, answered for every pixel, and no gift to a descriptor."""

import numpy as np
import pytest
import torch

from minidino.images.pixels import Pixels
from minidino.images.scenes import FAR, FIRST_KIND, GROUND, KINDS, MASK_CLASSES, draw_scenes
from minidino.probes.features import color_histogram, pixels
from minidino.probes.knn import knn_accuracy


@pytest.fixture(scope="module")
def scenes():
    return draw_scenes(900, seed=5)


def test_a_scene_depends_on_seed_and_index_alone(scenes):
    part = draw_scenes(7, seed=5, start=60, chunk=3)
    for name in ("images", "labels", "masks", "depth"):
        assert np.array_equal(getattr(part, name), getattr(scenes, name)[60:67])
    assert not np.array_equal(draw_scenes(7, seed=6, start=60).images, part.images)


def test_every_pixel_has_an_answer(scenes):
    assert scenes.images.shape == (900, 64, 64, 3) and scenes.images.dtype == np.uint8
    assert scenes.depth.dtype == np.float32 and 0.1 < scenes.depth.min() and scenes.depth.max() == FAR
    assert (scenes.depth[scenes.masks == 0] == FAR).all()
    assert set(np.unique(scenes.masks)) == set(range(len(MASK_CLASSES)))
    for masks, label in zip(scenes.masks, scenes.labels):
        things = np.unique(masks[masks >= FIRST_KIND])
        assert things.tolist() == [FIRST_KIND + label]  # one kind in a scene, and something of it is to be seen


def test_kinds_are_equally_frequent_and_legible(scenes):
    counts = np.bincount(scenes.labels, minlength=len(KINDS))
    assert abs(counts - 90).max() < 4 * (900 * 0.1 * 0.9) ** 0.5
    shown = (scenes.masks >= FIRST_KIND).mean((1, 2))
    assert np.median(shown) > 0.15 and shown.max() < 0.95


def test_the_image_row_does_not_tell_the_depth(scenes):
    """The same row of the ground is near in one scene and far in another."""
    row, ground = scenes.depth[:, 56], scenes.masks[:, 56] == GROUND
    nearest, farthest = np.percentile(row[ground], (10, 90))
    assert farthest > 2.5 * nearest


def test_pixels_and_colors_do_not_solve_it(scenes):
    images = torch.from_numpy(scenes.images).permute(0, 3, 1, 2).contiguous()
    for describe in (pixels, color_histogram):
        rows = describe(images)
        accuracy = knn_accuracy(rows[:700], scenes.labels[:700], rows[700:], scenes.labels[700:], (20,))[20]
        assert accuracy < 0.3


def test_grain_is_grey_and_as_strong_as_asked():
    clean, noisy = (draw_scenes(8, seed=1, grain=g).images.astype(float) for g in (0.0, 0.1))
    inside = (clean > 90) & (clean < 165)  # nowhere near the clipping
    noise = np.where(inside.all(-1, keepdims=True), noisy - clean, np.nan)
    assert abs(np.nanstd(noise) / 255 - 0.1) < 0.01
    assert np.nanmax(abs(noise[..., 0] - noise[..., 2])) <= 1  # rounding


@pytest.mark.parametrize("bad", [{"n": 0}, {"n": 1, "size": 0}, {"n": 1, "seed": -1}, {"n": 1, "start": -1}])
def test_impossible_requests_are_refused_in_words(bad):
    with pytest.raises(ValueError, match="expected n, size >= 1"):
        draw_scenes(**bad)


def test_any_size_can_be_drawn():
    assert draw_scenes(3, size=40).images.shape == (3, 40, 40, 3)
    assert len(Pixels.from_array(draw_scenes(3, size=33).images, [0, 1, 2], list(KINDS))) == 3
