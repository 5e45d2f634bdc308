"""Figures of what features know return what they drew, leave a readable PNG, and say so in a sentence."""

import math

import numpy as np
import pytest
import torch
from test_pictures import assert_shows_something, images, pixels_of, rng

from minidino import looking, pictures
from minidino.model.vit import build_vit
from minidino.probes.patches import Matches, attention_to, foreground_pca, outliers, token_norms


def title_of(path):
    from PIL import Image

    return Image.open(path).info["Description"]


def test_pca_rgb_shares_one_basis_over_the_images(tmp_path):
    features = rng(1).standard_normal((3, 8, 5))
    features[2] = features[0]  # the same features in another image get the same colours
    found = looking.pca_rgb(torch.from_numpy(features), (2, 4), images(3), tmp_path / "pca.png")
    assert found["rgb"].shape == (3, 2, 4, 3) and found["rgb"].min() == 0 and found["rgb"].max() == 1
    np.testing.assert_array_equal(found["rgb"][0], found["rgb"][2])
    centred = features.reshape(-1, 5) - features.reshape(-1, 5).mean(0)
    first = (centred @ found["components"][0]).reshape(3, 2, 4)
    inside = (found["rgb"][..., 0] > 0) & (found["rgb"][..., 0] < 1)
    assert np.corrcoef(first[inside], found["rgb"][..., 0][inside])[0, 1] > 0.999999  # a straight line between the cuts
    assert_shows_something(tmp_path / "pca.png")
    with pytest.raises(ValueError, match="2 x 2 = 4 patches, got 8"):
        looking.pca_rgb(features, (2, 2), images(3))


def test_pca_before_after_gives_each_network_its_own_directions(tmp_path):
    before, after = rng(1).standard_normal((2, 4, 6)), rng(2).standard_normal((2, 4, 9))
    found = looking.pca_before_after(images(2), before, after, (2, 2), tmp_path / "both.png")
    np.testing.assert_array_equal(found["before"], looking.pca_rgb(before, (2, 2), images(2))["rgb"])
    np.testing.assert_array_equal(found["after"], looking.pca_rgb(after, (2, 2), images(2))["rgb"])
    assert_shows_something(tmp_path / "both.png")


def test_attention_maps_tell_a_point_from_everywhere(tmp_path):
    attn = np.zeros((2, 3, 4, 4))
    attn[:, 0] = 0.7  # everywhere alike
    attn[:, 1, 2, 2] = 0.5  # one patch
    attn[:, 2, :2] = 1.0  # half
    found = looking.attention_maps(images(2), torch.from_numpy(attn), tmp_path / "attention.png")
    np.testing.assert_allclose(found["entropy"], [[math.log(16), 0, math.log(8)]] * 2, atol=1e-12)
    assert found["uniform"] == pytest.approx(math.log(16))
    assert_shows_something(tmp_path / "attention.png")


def test_neighbours_wall_frames_what_agrees(tmp_path):
    index = torch.tensor([[0, 1, 2], [3, 2, 1]])
    found = looking.neighbours_wall(images(2), images(4), index, [5, 6], [5, 5, 6, 7], tmp_path / "wall.png")
    assert found["right"].tolist() == [[True, True, False], [False, True, False]] and found["share"] == 0.5
    green, red = (pixels_of(tmp_path / "wall.png", color) for color in (pictures.RIGHT, pictures.WRONG))
    assert green > 500 and 0.8 < green / red < 1.25


def test_foreground_shows_what_was_cut_out(tmp_path):
    grid, features = (4, 8), 0.1 * rng(0).standard_normal((2, 32, 5))
    thing = np.zeros(grid, bool)
    thing[1:3, 2:6] = True
    features[:, thing.ravel(), 2] -= 4
    black = np.zeros((2, 16, 32, 3))  # black pixels: what is no foreground turns pale
    found = looking.foreground_rgb(black, foreground_pca(features, grid), grid, tmp_path / "fg.png")
    assert (found["mask"] == thing).all() and found["share"] == 0.25 and found["rgb"].shape == (2, 4, 8, 3)
    assert (found["rgb"][:, ~thing] == 0).all() and found["explained"].shape == (3,)
    assert title_of(tmp_path / "fg.png").startswith("25% of the patches are foreground")
    assert_shows_something(tmp_path / "fg.png")
    pale = pixels_of(tmp_path / "fg.png", (0.8, 0.8, 0.8))
    tile = pixels_of(tmp_path / "fg.png", (0.0, 0.0, 0.0)) / (2 + 2 * 0.25 + 2 * 0.75)
    # black: two images, a quarter of them kept, and the rest of what the colours show
    assert pale / tile == pytest.approx(2 * 0.75, rel=0.05)


def test_matches_join_the_centres_of_patches(tmp_path):
    found = Matches(np.array([0, 5, 3]), np.array([1, 0, 2]), np.array([0.9, 0.8, 0.5]))
    drawn = looking.matches(
        images(1, 24)[0, :, :16], images(1, 32)[0], found, (2, 3), tmp_path / "m.png", most=2, grid_b=(2, 2)
    )
    assert drawn["n"] == 2 and drawn["similarity"].tolist() == [0.9, 0.8]
    assert drawn["a"].tolist() == [[3.5, 3.5], [19.5, 11.5]]  # x, y of patches 0 and 5 in 24 x 16 pixels
    assert drawn["b"].tolist() == [[23.5, 7.5], [7.5, 7.5]]
    assert title_of(tmp_path / "m.png") == "The best 2 of 3 matches: cosines from 0.90 down to 0.80"
    assert_shows_something(tmp_path / "m.png")
    drawn = [pixels_of(tmp_path / "m.png", color) for color in looking.LINES[:3]]
    assert min(drawn[:2]) > 100 and drawn[2] == 0  # each line its own colour
    with pytest.raises(ValueError, match="at least one match"):
        looking.matches(images(1)[0], images(1)[0], Matches(*np.zeros((3, 0), int)), (2, 2))


def test_norm_histogram_counts_every_token(tmp_path):
    lengths = rng(0).lognormal(3, 0.1, (20, 16))
    lengths[:, 6] = 500.0
    norms = {"cls": np.full(20, 9.0), "registers": np.full((20, 2), 30.0), "patch": lengths}
    found = looking.norm_histogram(norms, tmp_path / "norms.png")
    assert {name: count.sum() for name, count in found["counts"].items()} == {"patch": 320, "registers": 40, "cls": 20}
    assert found["share"] == 1 / 16 and found["threshold"] == outliers(lengths).threshold
    np.testing.assert_allclose(found["mean_map"], lengths.mean(0).reshape(4, 4))
    assert found["median"] == np.median(lengths) and title_of(tmp_path / "norms.png").startswith("6.25% of the patch")
    assert_shows_something(tmp_path / "norms.png")
    assert min(pixels_of(tmp_path / "norms.png", color) for color in looking.TOKENS.values()) > 50
    wide = looking.norm_histogram({**norms, "registers": np.zeros((20, 0))}, grid=(2, 8))
    assert wide["mean_map"].shape == (2, 8) and "registers" not in wide["counts"]
    with pytest.raises(ValueError, match="give grid"):
        looking.norm_histogram({"patch": lengths[:, :15]})


def test_segmentation_sheet_judges_what_is_known(tmp_path):
    truth = np.zeros((2, 8, 8), int)
    truth[0, :, 4:], truth[1] = 2, -1
    predicted = np.zeros((2, 8, 8), int)
    predicted[0, :2, 4:], predicted[1], predicted[1, 7] = 2, 1, -1
    names = ["wall", "floor", "chair", "lamp", "door"]
    found = looking.segmentation_sheet(images(2), truth, torch.from_numpy(predicted), names, tmp_path / "s.png")
    assert found["accuracy"] == 40 / 64 and found["per_image"] == [40 / 64, pytest.approx(math.nan, nan_ok=True)]
    assert found["classes_seen"] == [0, 1, 2]
    assert title_of(tmp_path / "s.png") == "62.5% of the pixels of these 2 pictures are named rightly"
    assert_shows_something(tmp_path / "s.png")
    shown = [pixels_of(tmp_path / "s.png", color) for color in pictures.SEGMENTS[:5]]
    assert shown[1] > shown[2] > 1000 > 10 > shown[4]  # a whole picture; half of one and an eighth; not there
    with pytest.raises(ValueError, match="one size"):
        looking.segmentation_sheet(images(2), truth, predicted[:, :4], names)
    with pytest.raises(ValueError, match="classes from 0 to 1, got 0 to 2"):
        looking.segmentation_sheet(images(2), truth, predicted, names[:2])
    with pytest.raises(ValueError, match="nothing to judge"):
        looking.segmentation_sheet(images(2), np.full_like(truth, 9), predicted, names, ignore=9)


def test_a_legend_of_many_classes_stays_on_the_sheet(tmp_path):
    truth = np.arange(60).reshape(1, 6, 10)
    found = looking.segmentation_sheet(images(1), truth, truth, [f"class {k}" for k in range(60)], tmp_path / "s.png")
    assert found["accuracy"] == 1 and len(found["classes_seen"]) == 60
    assert len(np.unique(looking._class_colors(60), axis=0)) == 60
    assert_shows_something(tmp_path / "s.png")


@pytest.mark.parametrize("name", [r"$\frac$", "US$", "_", "50$ to 60$"])
def test_a_class_may_be_called_anything(name, tmp_path):
    truth = np.zeros((1, 8, 8), int)
    assert looking.segmentation_sheet(images(1), truth, truth, [name], tmp_path / "s.png")["accuracy"] == 1


def test_depth_sheet_is_in_metres(tmp_path):
    truth = np.full((2, 8, 8), 2.0)
    truth[0, :4], truth[1, 0], truth[1, 1] = 8.0, 0.0, np.nan
    predicted = truth + 0.5
    predicted[1, :2] = 100.0  # nobody knows
    found = looking.depth_sheet(images(2), torch.from_numpy(truth), predicted, tmp_path / "d.png")
    assert found == {"rmse_m": 0.5, "known": 112 / 128, "depth_m": (2.0, 8.0)}
    assert title_of(tmp_path / "d.png").startswith("The predicted distances are 0.5 m off")
    assert_shows_something(tmp_path / "d.png")
    with pytest.raises(ValueError, match="some truth above 0 m"):
        looking.depth_sheet(images(2), np.zeros((2, 8, 8)), predicted)
    with pytest.raises(ValueError, match="for 3 images"):
        looking.depth_sheet(images(3), truth, predicted)


def test_from_a_network_to_its_pictures(tmp_path):
    vit = build_vit("vit_tiny", depth=1, width=12, heads=3, patch_size=4, img_size=16, num_register_tokens=2)
    found = looking.norm_histogram(token_norms(vit, images(3)), tmp_path / "norms.png")
    assert {name: count.sum() for name, count in found["counts"].items()} == {"patch": 48, "registers": 6, "cls": 3}
    drawn = looking.attention_maps(images(3), attention_to(vit, images(3)), tmp_path / "attention.png")
    assert drawn["entropy"].shape == (3, 3) and (drawn["entropy"] <= drawn["uniform"] + 1e-9).all()
    assert_shows_something(tmp_path / "attention.png")
