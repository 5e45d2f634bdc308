"""One picture laid upon another."""

import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageEnhance, ImageOps

from minidino.curation.registration import (
    PROOF,
    agreement,
    correlation,
    proven_leaks,
    proven_pairs,
    registered,
    starts,
    texture,
)
from minidino.images.pixels import Pixels
from minidino.images.scenes import draw_scenes


def jpeg(picture):
    picture.save(file := io.BytesIO(), "JPEG", quality=30)
    return Image.open(file).convert("RGB")


def written(picture):
    ImageDraw.Draw(picture).rectangle((10, 62, 86, 74), fill=(255, 230, 0))
    return picture


def noisy(picture):
    pixels = np.asarray(picture) + np.random.default_rng(0).normal(0, 12, (96, 96, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


CHANGES = {
    "none": lambda p: p,
    "corner": lambda p: p.crop((0, 0, 75, 77)),
    "middle": lambda p: p.crop((9, 11, 88, 84)),
    "narrow": lambda p: p.crop((13, 2, 82, 94)),
    "mirror": ImageOps.mirror,
    "mirrored corner": lambda p: ImageOps.mirror(p.crop((20, 20, 96, 96))),
    "turn": lambda p: p.rotate(5).crop((5, 5, 91, 91)),
    "grey": lambda p: ImageOps.grayscale(p).convert("RGB"),
    "dark": lambda p: ImageEnhance.Brightness(p).enhance(0.5),
    "dull": lambda p: ImageEnhance.Contrast(p).enhance(0.5),
    "jpeg": jpeg,
    "small": lambda p: p.resize((40, 40), Image.Resampling.BICUBIC),
    "noise": noisy,
    "words": written,
}


def squares(pictures, side=48):
    """(n, 3, side, side) uint8 of PIL pictures."""
    rows = [np.asarray(p.resize((side, side), Image.Resampling.BICUBIC)) for p in pictures]
    return torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2).contiguous()


@pytest.fixture(scope="module")
def scenes():
    return [Image.fromarray(image) for image in draw_scenes(12, 96, 8).images]


@pytest.mark.parametrize("change", CHANGES)
def test_what_was_made_from_a_picture_agrees_with_it(change, scenes):
    made = squares([CHANGES[change](scene.copy()) for scene in scenes])
    assert registered(made, squares(scenes)).min() > PROOF


def test_strangers_agree_nowhere(scenes):
    assert registered(squares(scenes[1:]), squares(scenes[:-1])).max() < PROOF


def test_a_plain_picture_proves_nothing(scenes):
    plain = torch.full((1, 3, 48, 48), 90, dtype=torch.uint8)
    for pair in ((plain, squares(scenes[:1])), (squares(scenes[:1]), plain), (plain, plain)):
        assert registered(*pair).item() < 0.01


def pixels_of(pictures):
    return Pixels.from_array(np.stack([np.asarray(p) for p in pictures]), [0] * len(pictures), ["a"])


def angles(*degrees):
    """Descriptors on a circle, so that the cosine says who is proposed."""
    angle = np.deg2rad(np.array(degrees, dtype=float))
    return np.stack([np.cos(angle), np.sin(angle)], axis=1)


def test_of_what_is_proposed_only_true_pairs_stay(scenes):
    pictures = [scenes[0], scenes[1], ImageOps.mirror(scenes[0]), scenes[2], scenes[1].crop((5, 5, 85, 85)).resize((96, 96))]
    pool = pixels_of(pictures)
    pairs = proven_pairs(pool, angles(0, 10, 20, 30, 40), progress=False)
    assert {(min(p), max(p)) for p in zip(*map(np.ndarray.tolist, pairs))} == {(0, 2), (1, 4)}
    far = proven_pairs(pool, angles(0, 90, 180, 181, 270), progress=False)  # nobody proposes 0 and 2
    assert len(far.left) == 0


def test_each_picture_finds_its_original_among_those_that_are_near(scenes):
    pool = pixels_of([ImageOps.mirror(scenes[3]), scenes[5], scenes[0], scenes[7]])
    exam = pixels_of([scenes[3], scenes[4], scenes[5], scenes[7]])
    parts = np.concatenate([angles(5, 8, 100, 300), angles(200, 10, 20, 310)])  # two parts of each
    best, nearest = proven_leaks(pool, angles(0, 15, 8, 120), exam, parts, progress=False)
    assert nearest[:2].tolist() == [0, 2] and (best[:2] > PROOF).all()
    assert best[2] < PROOF and (best[3] < PROOF or nearest[3] != 3)


def test_chunks_do_not_matter(scenes):
    pool, pairs = pixels_of(scenes), np.array([[0, 0], [0, 1], [3, 3], [5, 4]])
    one, all_ = (agreement(pool, pool, pairs, progress=False, chunk=chunk) for chunk in (1, 64))
    np.testing.assert_allclose(one, all_, atol=1e-4)
    assert (all_[[0, 2]] > 0.99).all() and (all_[[1, 3]] < PROOF).all()
    assert agreement(pool, pool, pairs[:0], progress=False).shape == (0,)


def test_starts_stay_within_the_original_and_hold_the_identity():
    maps = starts()
    corners = torch.tensor([[x, y, 1.0] for x in (-1.0, 1.0) for y in (-1.0, 1.0)])
    assert len(maps) == 2 * (1 + 3 + 5) ** 2
    assert (maps @ corners.T).abs().max() <= 1 + 1e-6
    assert any(torch.equal(m, torch.tensor([[1.0, 0, 0], [0, 1, 0]])) for m in maps)


def test_correlation_is_that_of_the_part_that_both_show(scenes):
    x = texture(squares(scenes[:1]), 32)
    shift = torch.tensor([[[1.0, 0, 0.5], [0, 1, 0]]])  # the right three quarters of the original, and nothing beyond
    moved = torch.full_like(x, 7.0)
    moved[..., :24] = x[..., 8:]
    assert correlation(moved, x, shift).item() == pytest.approx(1, abs=1e-5)
    far = torch.tensor([[[1.0, 0, 1.0], [0, 1, 0]]])  # only half of it
    assert correlation(x, x, far).item() == 0
