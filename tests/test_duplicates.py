"""Neighbours at every size and the copies found through them, against plain loops."""

import faiss
import numpy as np
import pytest

from minidino.curation.duplicates import (
    component_sizes,
    connect,
    find_duplicates,
    hash_duplicates,
    pca_hash,
    relative_duplicates,
    representatives,
    similar_pairs,
)
from minidino.curation.search import Index, Plan, exact_neighbours, plan_index, unit_rows


def cloud(n, width=32, n_clusters=40, spread=0.6, seed=0):
    """Rows around a few directions, as descriptors of pictures lie."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(n_clusters, width))
    return (centres[rng.integers(n_clusters, size=n)] + spread * rng.normal(size=(n, width))).astype(np.float32)


def cosines(x, y):
    x, y = x.astype(np.float64), y.astype(np.float64)
    return (x / np.linalg.norm(x, axis=1)[:, None]) @ (y / np.linalg.norm(y, axis=1)[:, None]).T


def closure(alike):
    """Components of a symmetric relation by repeated spreading of the smallest number."""
    labels = np.arange(len(alike))
    for _ in range(len(alike)):
        labels = np.where(alike | np.eye(len(alike), dtype=bool), labels[None], len(alike)).min(1)
    return np.unique(labels, return_inverse=True)[1]


# ------------------------------------------------------------------------------------------------ search


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_exact_neighbours_equal_the_sorted_cosines(dtype, monkeypatch):
    monkeypatch.setattr("minidino.curation.search.CHUNK", 37)  # several chunks on both sides, the last ones ragged
    bank, queries = cloud(300).astype(dtype), cloud(50, seed=1).astype(dtype)
    similarity, rows = exact_neighbours(bank, queries, 9)
    truth = cosines(queries, bank)
    np.testing.assert_allclose(similarity, -np.sort(-truth, axis=1)[:, :9], atol=1e-5)
    np.testing.assert_allclose(np.take_along_axis(truth, rows, 1), similarity, atol=1e-5)


def test_a_bank_smaller_than_k_leaves_places_empty():
    similarity, rows = Index(cloud(3), 5).search(cloud(2, seed=1))
    assert (np.sort(rows[:, :3], axis=1) == [0, 1, 2]).all() and (rows[:, 3:] == -1).all()
    assert np.isneginf(similarity[:, 3:]).all()


@pytest.mark.parametrize("plan", [Plan("ivf-flat", 60), Plan("ivf-pq", 60, 8)])
def test_approximate_indexes_reach_the_recall_they_are_asked_for_and_say_it(plan):
    bank, said = cloud(6000), []
    index = Index(bank, 10, recall=0.95, plan=plan, say=said.append)
    found, truth = index.search(bank[::7]).rows, exact_neighbours(bank, bank[::7], 10).rows
    hits = np.mean([len(np.intersect1d(f[1:], t[1:])) / 9 for f, t in zip(found, truth)])
    assert index.recall >= 0.95 and hits >= 0.93  # measured on other rows
    assert index.n_probe < 60  # it did look away
    assert f"{index.recall:.3f}" in said[0] and plan.kind in said[0]


def test_similarities_of_codes_are_those_of_the_true_rows():
    bank = cloud(2000)
    similarity, rows = Index(bank, 5, plan=Plan("ivf-pq", 20, 4), say=lambda words: None).search(bank[:50])
    np.testing.assert_allclose(similarity, np.take_along_axis(cosines(bank[:50], bank), rows, 1), atol=1e-5)
    assert (rows[:, 0] == np.arange(50)).all()


@pytest.mark.parametrize(
    ("n", "width", "plan"),
    [
        (100_000, 256, Plan("flat")),
        (1_000_000, 256, Plan("ivf-flat", 4000)),
        (4_000_000, 256, Plan("ivf-pq", 8000, 64)),
        (4_000_000, 250, Plan("ivf-pq", 8000, 50)),  # codes must divide the width
    ],
)
def test_the_size_chooses_the_index(n, width, plan):
    assert plan_index(n, width) == plan


def test_a_graph_never_holds_the_row_itself():
    x = cloud(200)
    x[:30] = x[0]  # more equal rows than neighbours
    similarity, rows = Index(x, 9).graph()
    assert rows.shape == (200, 8) and not (rows == np.arange(200)[:, None]).any()
    np.testing.assert_allclose(similarity[:30], 1, atol=1e-6)
    truth = cosines(x, x)
    np.fill_diagonal(truth, -2)
    np.testing.assert_allclose(similarity, -np.sort(-truth, axis=1)[:, :8], atol=1e-5)


def test_bad_banks_and_queries_are_refused():
    x = cloud(20)
    with pytest.raises(ValueError, match="n > 0"):
        Index(x[:0], 3)
    with pytest.raises(ValueError, match="like the bank"):
        Index(x, 3).search(x[:, :5])
    x[7, 3] = np.nan
    with pytest.raises(ValueError, match="descriptor 7 of 20"):
        unit_rows(x)


# ------------------------------------------------------------------------------------------------ copies


def test_components_are_the_closure_of_near_pairs():
    x = cloud(250, width=12, spread=0.5)
    labels, kept = find_duplicates(x, threshold=0.9, k=249)
    expected = closure(cosines(x, x) > 0.9)
    assert (labels == expected).all() and len(kept) == expected.max() + 1
    assert 40 < len(kept) < 250  # neither all alone nor all one
    assert (kept == [np.flatnonzero(labels == c)[0] for c in range(len(kept))]).all()
    sizes = component_sizes(labels)
    assert sum(size * n for size, n in sizes.items()) == 250 and sum(sizes.values()) == len(kept)


def test_the_best_picture_represents_and_the_first_of_equals():
    labels = np.array([0, 0, 0, 1, 1, 2])
    quality = np.array([[2, 9], [3, 1], [3, 4], [5, 5], [5, 5], [0, 0]])
    for dtype in (int, float, np.uint8, np.float16):
        assert representatives(labels, quality.astype(dtype)).tolist() == [2, 3, 5]
    assert representatives(np.zeros(3, int), np.array([[0], [2], [1]], np.uint16)).tolist() == [1]
    assert representatives(np.zeros(3, int), np.array([[False], [True], [False]])).tolist() == [1]
    assert representatives(labels).tolist() == [0, 3, 5]


def turned(degrees):
    angles = np.deg2rad(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def test_a_drifting_chain_breaks_at_the_floor():
    chain = turned([0, 30, 60, 90, 120, 300])  # each like the next (cosine 0.87), the ends opposite
    assert find_duplicates(chain, 0.6).labels.tolist() == [0, 0, 0, 0, 0, 1]
    labels, kept = find_duplicates(chain, 0.6, floor=0.45)
    assert labels.tolist() == [0, 0, 0, 1, 1, 2] and kept.tolist() == [0, 3, 5]
    labels, kept = find_duplicates(chain, 0.6, floor=0.45, quality=np.array([[0], [0], [1], [0], [0], [0]]))
    assert labels.tolist() == [0, 0, 0, 0, 0, 1] and kept.tolist() == [2, 5]


def test_the_threshold_is_a_strict_cosine_and_checked():
    pair = np.array([[1, 0], [0.6, 0.8]], np.float32)
    assert find_duplicates(pair, 0.59).labels.tolist() == [0, 0]
    assert find_duplicates(pair, 0.61).labels.tolist() == [0, 1]
    with pytest.raises(ValueError, match="cosine from -1 to 1"):
        find_duplicates(pair, 60)


def test_one_row_and_no_row_have_no_duplicates():
    assert find_duplicates(cloud(1)).labels.tolist() == [0]
    assert find_duplicates(np.zeros((3, 4), np.float32), 0.6, floor=0.45).labels.tolist() == [0, 1, 2]
    assert len(find_duplicates(cloud(0)).representatives) == 0


def test_relative_duplicates_take_the_whole_component_with_them():
    pool = turned([0, 50, 100, 200, 290])
    reference = turned([-40])  # cosine to row 0 is 0.77; row 1 is linked to row 0, row 2 to row 1
    assert relative_duplicates(pool, reference, 0.45).tolist() == [True, True, True, False, True]  # 290 = -70
    assert relative_duplicates(pool, reference, 0.7).tolist() == [True, False, False, False, True]
    assert not relative_duplicates(pool, reference[:0]).any()


def test_a_lower_threshold_removes_more():
    pool, reference = cloud(300, width=16), cloud(20, width=16, seed=5)
    strict, loose = (relative_duplicates(pool, reference, threshold, k=16) for threshold in (0.45, 0.6))
    assert (loose <= strict).all()


@pytest.mark.parametrize("threads", [1, 2])
def test_the_number_of_threads_changes_nothing(threads):
    before = faiss.omp_get_max_threads()
    try:
        faiss.omp_set_num_threads(threads)
        pairs = similar_pairs(cloud(3000), 0.8, 16)
    finally:
        faiss.omp_set_num_threads(before)
    again = similar_pairs(cloud(3000), 0.8, 16)
    assert (connect(3000, pairs) == connect(3000, again)).all()


# ------------------------------------------------------------------------------------------------ the same picture


def pictures(n, seed=0):
    """Smooth thumbnails, 8 x 8 x 3."""
    coarse = np.random.default_rng(seed).integers(0, 256, size=(n, 3, 4, 4)).astype(np.uint8)
    return coarse.repeat(2, 2).repeat(2, 3).reshape(n, -1)


def test_hash_names_equal_pictures_alike_and_others_not():
    x = pictures(500)
    x[400:] = x[:100]
    names = pca_hash(x)
    assert (names[400:] == names[:100]).all()
    assert len(np.unique(names[:400])) > 390


def test_hash_duplicates_forgive_a_grey_level_and_not_a_change():
    x = pictures(60)
    x[50] = x[3]
    x[51] = x[4] ^ 1  # one grey level, as another decoder gives
    x[52] = x[5][::-1]
    labels, kept = hash_duplicates(x, n_bits=8)  # so few bits that chance puts different pictures together
    assert labels[50] == labels[3] and labels[51] == labels[4] and labels[52] != labels[5]
    assert len(kept) == 58


def test_equal_pictures_find_each_other_behind_another_in_their_bucket():
    x = np.concatenate([pictures(30), pictures(30)])
    labels, kept = hash_duplicates(x, n_bits=1)
    assert labels.tolist() == 2 * list(range(30)) and kept.tolist() == list(range(30))


def test_the_number_of_bits_is_checked():
    with pytest.raises(ValueError, match="1 to 64 bits"):
        pca_hash(pictures(10), 65)
