"""A pool with the truth about each file."""

import io

import numpy as np
import pytest
from PIL import Image, ImageOps

from minidino.images.datasets import open_images
from minidino.images.pixels import load_pixels
from minidino.images.pools import CHANGES, draw_pool, write_pool
from minidino.images.scenes import KINDS, draw_scenes, draw_some, scene_kinds


@pytest.fixture(scope="module")
def pool():
    return draw_pool(110, copies=0.5, junk=0.2, size=48, seed=5)


def pixels_of(file):
    return np.asarray(Image.open(io.BytesIO(file)))


def test_kinds_are_known_before_drawing_and_any_scene_can_be_drawn_alone():
    scenes = draw_scenes(40, 32, seed=3)
    assert (scene_kinds(np.arange(40), 3) == scenes.labels).all()
    some = draw_some(np.array([7, 31]), 32, 3)
    assert (some.images == scenes.images[[7, 31]]).all() and (some.depth == scenes.depth[[7, 31]]).all()


def test_the_common_is_frequent_and_the_rare_is_there(pool):
    own = np.array(pool.made) == "own"
    counts = np.bincount(pool.labels[own], minlength=len(KINDS))
    share = 1 / (1 + np.arange(len(KINDS)))
    assert counts.sum() == 110 and (np.abs(counts - 110 * share / share.sum()) <= 1).all()
    even = draw_pool(50, copies=0, junk=0, tail=0, size=16)
    assert (np.bincount(even.labels) == 5).all() and set(even.made) == {"own"}


def test_every_row_says_what_it_was_made_from(pool):
    made = np.array(pool.made)
    assert {name: int((made == name).sum()) for name in CHANGES} == dict.fromkeys(CHANGES, 6) | {
        name: 5 for name in list(CHANGES)[5:]}  # fmt: skip
    assert (made == "junk").sum() == 22 and (pool.labels[made == "junk"] == -1).all()
    own = pool.original == np.arange(len(made))
    assert (own == np.isin(made, ["own", "junk"])).all() and (made[pool.original[~own]] == "own").all()
    assert (pool.labels == pool.labels[pool.original]).all()
    for row, name in enumerate(pool.made):
        file, original = pool.files[row], pool.files[pool.original[row]]
        if name == "exact":
            assert file == original
        elif name == "other bytes":
            assert file != original and (pixels_of(file) == pixels_of(original)).all()
        elif name == "mirrored":
            mirrored = ImageOps.mirror(Image.open(io.BytesIO(original)))
            assert (pixels_of(file) == np.asarray(mirrored)).all()
        elif name in CHANGES:
            assert pixels_of(file).shape != pixels_of(original).shape or (pixels_of(file) != pixels_of(original)).any()


def test_a_pool_on_disk_is_the_same_each_time_and_opens(pool, tmp_path):
    one = write_pool(pool, tmp_path / "one.zip")
    again = write_pool(draw_pool(110, copies=0.5, junk=0.2, size=48, seed=5), tmp_path / "two.zip")
    assert one.read_bytes() == again.read_bytes()
    images = open_images(one)
    assert sorted(images.files) == sorted(pool.names) and len(set(pool.names)) == len(pool.names)
    assert len(load_pixels(images, 48, progress=False)) == len(pool.names)
