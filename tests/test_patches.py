"""Patch features in numbers: against scikit-learn, loops from the formulas, and all permutations."""

import copy
import itertools

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from minidino.images.crops import normalise
from minidino.images.pixels import Pixels
from minidino.model.vit import build_vit
from minidino.probes import patches
from minidino.probes.dense import feature_maps
from minidino.probes.features import extract
from minidino.probes.grid import augmented_features
from minidino.probes.patches import Matches, attention_to, foreground_pca, match_patches, thinned_matches, token_norms


def rng(seed=0):
    return np.random.default_rng(seed)


def things(n=3, grid=(5, 6), width=7, seed=0):
    """Features with a thing in the middle of each picture, and where it is."""
    mask = np.zeros(grid, bool)
    mask[1:-1, 2:-1] = True
    features = 0.3 * rng(seed).standard_normal((n, mask.size, width)) + 2
    features[:, mask.ravel()] += 3 * rng(9).standard_normal(width)
    return features, np.tile(mask.ravel(), (n, 1))


# ---------------------------------------------------------------- principal directions


def test_pca_basis_finds_the_directions_and_fixes_their_sign():
    x = rng().standard_normal((200, 6)) * [1, 5, 2, 0.1, 3, 0.5] + 4
    basis = patches.pca_basis(x, 3)
    oracle = PCA(3).fit(x)
    cosines = np.abs((basis.components * oracle.components_).sum(1))
    np.testing.assert_allclose(cosines, 1, atol=1e-9)
    np.testing.assert_allclose(basis.explained, oracle.explained_variance_ratio_, atol=1e-9)
    np.testing.assert_allclose(basis.mean, x.mean(0))
    assert (basis.components[np.arange(3), np.abs(basis.components).argmax(1)] > 0).all()
    mirrored = patches.pca_basis(torch.from_numpy(2 * x.mean(0) - x), 3)  # the same cloud, seen from the other side
    np.testing.assert_allclose(mirrored.components, basis.components, atol=1e-9)
    with pytest.raises(ValueError, match="1 <= n <= D"):
        patches.pca_basis(x, 7)


def test_patch_colors_are_scores_on_a_scale():
    features = rng(1).standard_normal((2, 12, 4))
    colors, basis = patches.patch_colors(torch.from_numpy(features), (3, 4))
    scores = (features.reshape(-1, 4) - features.reshape(-1, 4).mean(0)) @ basis.components.T
    low, high = np.percentile(scores, 1, axis=0), np.percentile(scores, 99, axis=0)
    expected = np.clip((scores - low) / (high - low), 0, 1)
    np.testing.assert_allclose(colors.reshape(-1, 3), expected, atol=1e-12)
    with pytest.raises(ValueError, match="2 x 2 = 4 patches, got 12"):
        patches.patch_colors(features, (2, 2))


def test_foreground_is_what_two_singular_value_decompositions_say():
    features, truth = things()
    found = foreground_pca(torch.from_numpy(features), (5, 6))
    np.testing.assert_array_equal(found.mask, truth)
    rows = features.reshape(-1, 7)
    centred = rows - rows.mean(0)
    first = centred @ np.linalg.svd(centred)[2][0]
    first = first if first[truth.ravel()].mean() > 0 else -first
    np.testing.assert_allclose(found.first.ravel(), first, atol=1e-10)
    inside = rows[first > 0] - rows[first > 0].mean(0)
    _, singular, directions = np.linalg.svd(inside)
    np.testing.assert_allclose(np.abs((found.basis.components * directions[:3]).sum(1)), 1, atol=1e-9)
    np.testing.assert_allclose(found.basis.explained, (singular**2 / (singular**2).sum())[:3], atol=1e-9)
    scores = inside @ found.basis.components.T
    low, high = np.percentile(scores, 1, axis=0), np.percentile(scores, 99, axis=0)
    np.testing.assert_allclose(found.rgb[truth], np.clip((scores - low) / (high - low), 0, 1), atol=1e-9)
    assert (found.rgb[~truth] == 0).all()


@pytest.mark.parametrize("seed", range(4))
def test_the_sign_does_not_depend_on_that_of_the_features(seed):
    features, truth = things(seed=seed)
    one, other = foreground_pca(features, (5, 6)), foreground_pca(-features, (5, 6))
    np.testing.assert_array_equal(one.mask, truth)
    np.testing.assert_array_equal(other.mask, truth)
    np.testing.assert_allclose(one.first, other.first, atol=1e-10)
    np.testing.assert_allclose(other.first_basis.components, -one.first_basis.components, atol=1e-10)
    assert one.first.reshape(3, 5, 6)[:, 0].mean() < one.first.reshape(3, 5, 6)[:, 2, 3].mean()


def test_without_an_inside_the_largest_entry_is_positive():
    features = rng(0).standard_normal((1, 20, 5)) * [1, 9, 1, 1, 1]
    found = foreground_pca(features, (2, 10))  # all patches lie on the rim
    assert found.first_basis.components[0, 1] > 0.9
    np.testing.assert_array_equal(found.mask[0], features[0, :, 1] > features[0, :, 1].mean())


def test_one_basis_for_all_pictures():
    features, _ = things()
    features[2] = features[0]
    found = foreground_pca(features, (5, 6))
    np.testing.assert_array_equal(found.rgb[0], found.rgb[2])
    assert not np.allclose(found.rgb[0], found.rgb[1])
    alone = foreground_pca(features[1:2], (5, 6))
    assert not np.allclose(alone.rgb[0], found.rgb[1])
    threshold = float(np.median(found.first[found.mask]))
    stricter = foreground_pca(features, (5, 6), threshold)
    assert 4 < stricter.mask.sum() < 0.6 * found.mask.sum()
    np.testing.assert_array_equal(stricter.mask, found.first > threshold)


def test_a_threshold_that_leaves_nothing_or_everything_is_refused():
    features, _ = things()
    with pytest.raises(ValueError, match="got 0 of 90 patches above the threshold 1e"):
        foreground_pca(features, (5, 6), threshold=1e6)
    with pytest.raises(ValueError, match="got 90 of 90 .* scores run from"):
        foreground_pca(features, (5, 6), threshold=-1e6)
    with pytest.raises(ValueError, match="got 0 of 90"):
        foreground_pca(np.ones((3, 30, 7)), (5, 6))  # nothing differs
    with pytest.raises(ValueError, match="D >= 3"):
        foreground_pca(features[..., :2], (5, 6))
    features[0, 0, 0] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        foreground_pca(features, (5, 6))


# ---------------------------------------------------------------- which patch is which


def cosine(x, y):
    return float(np.dot(x, y) / (np.sqrt(np.dot(x, x)) * np.sqrt(np.dot(y, y))))


@pytest.mark.parametrize("masked", [False, True])
def test_mutual_matches_are_those_of_two_loops(masked):
    a, b = rng(1).standard_normal((12, 5)), rng(2).standard_normal((9, 5))
    rows = [i for i in range(12) if not masked or i % 3]
    columns = [j for j in range(9) if not masked or j != 4]
    expected = []
    for i in rows:
        j = max(columns, key=lambda j: cosine(a[i], b[j]))
        if max(rows, key=lambda k: cosine(a[k], b[j])) == i:
            expected.append((-cosine(a[i], b[j]), i, j))
    given = dict(foreground_a=np.isin(np.arange(12), rows), foreground_b=torch.tensor(np.isin(np.arange(9), columns)))
    found = match_patches(a, torch.from_numpy(b), **(given if masked else {}))
    assert len(found.i) >= 3 and [*zip(found.i, found.j)] == [(i, j) for _, i, j in sorted(expected)]
    np.testing.assert_allclose(found.similarity, [-c for c, _, _ in sorted(expected)], atol=1e-12)


@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (5, 5)])
def test_assignment_is_the_cheapest_of_all(shape):
    a, b = rng(13).standard_normal((shape[0], 3)), 2 * rng(14).standard_normal((shape[1], 3))  # squares differ
    distance = np.array([[np.sqrt(((x - y) ** 2).sum()) for y in b] for x in a])
    distance = distance if shape[0] <= shape[1] else distance.T
    cheapest = min(
        sum(distance[i, j] for i, j in enumerate(choice))
        for choice in itertools.permutations(range(distance.shape[1]), len(distance))
    )
    found = match_patches(a, b, "assignment")
    assert len(found.i) == min(shape) == len(set(found.i)) == len(set(found.j))
    cost = sum(np.sqrt(((a[i] - b[j]) ** 2).sum()) for i, j in zip(found.i, found.j))
    assert cost == pytest.approx(cheapest, abs=1e-9)
    np.testing.assert_allclose(found.similarity, [cosine(a[i], b[j]) for i, j in zip(found.i, found.j)], atol=1e-12)
    assert (np.diff(found.similarity) <= 0).all()


@pytest.mark.parametrize("method", ["mutual", "assignment"])
def test_a_shuffled_picture_is_put_together_again(method):
    a, order = rng(5).standard_normal((40, 8)), rng(6).permutation(40)
    found = match_patches(a, a[order], method)
    assert len(found.i) == 40 and (order[found.j] == found.i).all()
    np.testing.assert_allclose(found.similarity, 1)


def test_what_cannot_be_matched_is_refused():
    a = rng().standard_normal((4, 3))
    with pytest.raises(ValueError, match="'mutual' or 'assignment'"):
        match_patches(a, a, "greedy")
    with pytest.raises(ValueError, match="one width"):
        match_patches(a, a[:, :2])
    with pytest.raises(ValueError, match="at least one patch in foreground_b"):
        match_patches(a, a, foreground_b=np.zeros(4, bool))
    with pytest.raises(ValueError, match=r"foreground_a of shape \(4,\) and type bool"):
        match_patches(a, a, foreground_a=np.ones(4))


def test_thinned_matches_are_those_of_a_loop():
    found = match_patches(rng(7).standard_normal((30, 6)), rng(8).standard_normal((42, 6)), "assignment")
    grid, grid_b = (5, 6), (6, 7)
    for radius in (0, 1, 2):
        kept = []
        for m in range(len(found.i)):
            steps = [9]
            for k in kept:
                (i, j), (other_i, other_j) = (found.i[m], found.j[m]), (found.i[k], found.j[k])
                steps.append(max(abs(i // 6 - other_i // 6), abs(i % 6 - other_i % 6)))
                steps.append(max(abs(j // 7 - other_j // 7), abs(j % 7 - other_j % 7)))
            if min(steps) > radius:
                kept.append(m)
        thinned = thinned_matches(found, grid, radius, grid_b)
        assert thinned.i.tolist() == found.i[kept].tolist() and thinned.j.tolist() == found.j[kept].tolist()
        assert len(kept) == 30 if radius == 0 else 1 < len(kept) < 15


def test_thinning_nothing_gives_nothing_and_another_grid_is_noticed():
    none = Matches(np.zeros(0, int), np.zeros(0, int), np.zeros(0))
    assert len(thinned_matches(none, (2, 2)).i) == 0
    with pytest.raises(ValueError, match="from 0 to 3 on the grid"):
        thinned_matches(Matches(np.array([4]), np.array([0]), np.ones(1)), (2, 2))
    with pytest.raises(ValueError, match="radius"):
        thinned_matches(none, (2, 2), radius=-1)


# ---------------------------------------------------------------- what tokens do


def small_vit(n_registers=2):
    return build_vit("vit_tiny", depth=2, width=24, heads=3, patch_size=4, img_size=16, num_register_tokens=n_registers)


def images(n, height=16, width=16):
    return torch.from_numpy(rng(n).integers(0, 256, (n, 3, height, width), dtype=np.uint8))


@pytest.mark.parametrize("n_registers", [0, 2])
def test_token_norms_are_those_of_a_loop(n_registers):
    vit, pixels = small_vit(n_registers), images(5, 16, 24)
    vit.train()
    found = token_norms(vit, pixels, batch_size=2)
    assert vit.training and found["registers"].shape == (5, n_registers)
    vit.eval()
    for n in range(5):
        with torch.no_grad():
            stream = vit.forward_features(normalise(pixels[n : n + 1])).x_prenorm[0].double()
        lengths = [float((token**2).sum() ** 0.5) for token in stream]
        np.testing.assert_allclose(found["cls"][n], lengths[0], rtol=1e-5)
        np.testing.assert_allclose(found["registers"][n], lengths[1 : 1 + n_registers], rtol=1e-5)
        np.testing.assert_allclose(found["patch"][n], lengths[1 + n_registers :], rtol=1e-5)
    with pytest.raises(ValueError, match="uint8"):
        token_norms(vit, pixels.float())


def test_planted_outliers_are_found_where_they_are():
    norms = rng(0).lognormal(3, 0.15, (50, 16))
    planted = rng(1).random(norms.shape) < 0.02
    planted[:, 3] = True
    norms[planted] *= 8
    found = patches.outliers(norms)
    np.testing.assert_array_equal(found.mask, planted)
    assert found.share == planted.mean() and found.where[3] == 1 and found.where.shape == (16,)
    log = np.log(norms)
    spread = np.median(abs(log - np.median(log)))
    assert np.log(found.threshold) == pytest.approx(np.median(log) + 6 * spread)
    fixed = patches.outliers(torch.from_numpy(norms), patches.PUBLISHED_OUTLIER)
    np.testing.assert_array_equal(fixed.mask, norms > 150)


def test_tokens_of_one_length_have_no_outliers():
    assert patches.outliers(np.full((3, 4), 7.0)).share == 0
    norms = np.full((3, 4), 7.0)
    norms[0, 0], norms[1, 1] = 7.35, 7.5  # 5 % and 7 % longer
    assert np.argwhere(patches.outliers(norms).mask).tolist() == [[1, 1]]
    with pytest.raises(ValueError, match="lengths above 0"):
        patches.outliers(np.zeros((3, 4)))
    with pytest.raises(ValueError, match=r"shape \(n, N\)"):
        patches.outliers(np.ones(4))


def test_attention_is_a_row_of_the_whole_map():
    vit, pixels = small_vit().eval(), images(3, 16, 24)
    with torch.no_grad():
        whole = vit.attention_maps(normalise(pixels))  # (3, h, T, T), T = 1 + 2 + 24
    found = attention_to(vit, pixels)
    assert found.shape == (3, 3, 4, 6) and torch.equal(found.flatten(2), whole[:, :, 0, 3:])
    assert torch.equal(attention_to(vit, pixels, token=2).flatten(2), whole[:, :, 2, 3:])
    with torch.no_grad():
        first = vit.attention_maps(normalise(pixels), 0)
    assert torch.equal(attention_to(vit, pixels, block=0).flatten(2), first[:, :, 0, 3:])
    for wrong in ({"block": 2}, {"block": -3}, {"token": 27}):
        with pytest.raises(ValueError, match="a block below 2 and a token below 27"):
            attention_to(vit, pixels, **wrong)


def slow_marks(look, share):
    """The published way: from the least looked-at patch on, those that come after the first 1 - share."""
    rising, marks, so_far = np.argsort(look.ravel(), kind="stable"), np.zeros(look.size, bool), 0.0
    for patch in rising:
        so_far += look.ravel()[patch] / look.sum()
        marks[patch] = so_far > 1 - share
    return marks.reshape(look.shape)


@pytest.mark.parametrize("share", [0.1, 0.6, 0.95])
def test_marks_hold_the_share_that_is_asked_for_and_no_patch_more(share):
    maps = rng(3).gamma(0.5, size=(4, 2, 3, 5))
    marks = patches.attended(torch.from_numpy(maps), share)
    for look, marked in zip(maps.reshape(-1, 3, 5), marks.reshape(-1, 3, 5), strict=True):
        np.testing.assert_array_equal(marked, slow_marks(look, share))
        held = look[marked] / look.sum()
        assert held.sum() >= share > held.sum() - held.min()


def test_a_look_is_held_against_things_pixel_by_pixel():
    maps, truth = rng(4).gamma(0.5, size=(6, 3, 2, 4)), rng(5).random((6, 6, 8)) < 0.3
    truth[5] = False
    found, marks = patches.on_things(maps, torch.from_numpy(truth)), patches.attended(maps)
    for n, head in itertools.product(range(6), range(3)):
        look, marked = (np.kron(part[n, head], np.ones((3, 2))) for part in (maps, marks))
        assert found.mass[n, head] == pytest.approx((look * truth[n]).sum() / look.sum())
        either = (marked.astype(bool) | truth[n]).sum()
        assert found.jaccard[n, head] == pytest.approx((marked.astype(bool) & truth[n]).sum() / either)
    even = patches.on_things(np.ones((6, 1, 2, 4)), truth)
    np.testing.assert_allclose(even.mass[:, 0], truth.mean((1, 2)))
    corners = np.kron(np.eye(2) > 0, np.ones((1, 2), bool))  # (2, 4)
    only = patches.on_things(corners[None, None].astype(float), np.kron(corners, np.ones((3, 2), bool))[None], 0.9)
    assert only.mass.item() == only.jaccard.item() == 1


def test_looks_and_things_that_do_not_fit_are_refused():
    maps, truth = np.ones((2, 1, 2, 4)), np.ones((2, 6, 8), bool)
    for wrong in (np.zeros_like(maps), -maps, maps[0], maps[:0]):
        with pytest.raises(ValueError, match="numbers from 0 on"):
            patches.attended(wrong)
    for share in (0.0, 1.0):
        with pytest.raises(ValueError, match=f"a share between 0 and 1, got {share}"):
            patches.attended(maps, share)
    for wrong in (truth[:1], truth[:, :5], truth[:, :, :7], truth[0], truth.astype(int)):
        with pytest.raises(ValueError, match="expected 2 masks .* a multiple of 2 x 4 px"):
            patches.on_things(maps, wrong)


def test_features_of_half_precision_are_understood():
    features, truth = things()
    found = foreground_pca(torch.from_numpy(features).bfloat16(), (5, 6))
    np.testing.assert_array_equal(found.mask, truth)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_networks_of_half_precision_are_shown_pixels_of_theirs(dtype):
    sizes = {"width": 16, "depth": 4, "heads": 2, "patch_size": 4, "img_size": 8}
    vit = build_vit("vit_tiny", **sizes, num_register_tokens=1).eval()
    half = copy.deepcopy(vit).to(dtype)
    images = torch.randint(0, 256, (2, 3, 8, 16), dtype=torch.uint8)
    stored = Pixels.from_array(images.permute(0, 2, 3, 1).numpy(), [0, 1], ["a", "b"])
    for look in (
        lambda net: extract(net, images, progress=False, blocks=4)["cls_blocks"],
        lambda net: feature_maps(net, images, 2, progress=False),
        lambda net: torch.from_numpy(token_norms(net, images)["patch"]),
        lambda net: attention_to(net, images),
        lambda net: next(augmented_features(net, stored, 8, 2, 2))[0]["mean_patch"],
    ):
        torch.testing.assert_close(look(half).double(), look(vit).double(), atol=0.05, rtol=0.05)
