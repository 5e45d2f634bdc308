"""Clusters, balanced choices and retrieval: budgets to the piece, and what resampling is for."""

import numpy as np
import pytest
import torch

from minidino.curation.clusters import (
    Level,
    assign,
    balanced_sample,
    first_centers,
    hierarchical_kmeans,
    kmeans,
    members,
    nearest_members,
    split_budget,
)
from minidino.curation.retrieval import retrieve_by_cluster, retrieve_by_sample


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def long_tail(seed=0, n_classes=20, largest=2000, width=8, spread=0.15):
    """Classes whose sizes fall as 1 / rank; returns rows and classes."""
    rng = np.random.default_rng(seed)
    sizes = [max(largest // (rank + 1) ** 2, 5) for rank in range(n_classes)]
    classes = np.repeat(np.arange(n_classes), sizes)
    centres = rng.normal(size=(n_classes, width))
    return (centres[classes] + spread * rng.normal(size=(len(classes), width))).astype(np.float32), classes


def entropy(classes):
    share = np.bincount(classes) / len(classes)
    share = share[share > 0]
    return -(share * np.log(share)).sum()


# ------------------------------------------------------------------------------------------------ clusters


def test_assign_finds_the_nearest_centre(monkeypatch):
    monkeypatch.setattr("minidino.curation.search.CHUNK", 100)
    x, _ = long_tail()
    centres = x[::200].copy()
    level = assign(x, centres)
    far = ((x[:, None].astype(np.float64) - centres[None]) ** 2).sum(2)
    assert (level.labels == far.argmin(1)).all()
    np.testing.assert_allclose(level.distance, far.min(1), atol=1e-4)


@pytest.mark.parametrize("n_centers", [1, 2, 30, 200, 300])
def test_first_centres_are_different_rows(n_centers):
    x, _ = long_tail()
    assert len(np.unique(first_centers(x[:300], n_centers))) == n_centers


def test_first_centres_visit_every_class_before_the_crowd():
    rng = np.random.default_rng(0)
    truth = np.repeat(np.arange(6), [500, 5, 5, 5, 5, 5])
    x = (10 * np.eye(6)[truth] + 0.1 * rng.normal(size=(525, 6))).astype(np.float32)
    assert all(len(np.unique(truth[first_centers(x, 6, seed)])) == 6 for seed in range(10))


def test_kmeans_finds_classes_that_lie_apart():
    rng = np.random.default_rng(0)
    truth = np.repeat(np.arange(5), 60)
    x = (10 * np.eye(5)[truth] + rng.normal(size=(300, 5))).astype(np.float32)
    assert all(len(np.unique(truth[group])) == 1 for group in members(kmeans(x, 5)))


def test_kmeans_by_angle_ignores_length():
    x, _ = long_tail()
    stretched = x * np.random.default_rng(1).uniform(0.5, 2, size=(len(x), 1)).astype(np.float32)
    assert (kmeans(x, 9, unit=True).labels == kmeans(stretched, 9, unit=True).labels).mean() > 0.99


def test_the_same_seed_gives_the_same_clusters():
    x, _ = long_tail()
    first, again, other = kmeans(x, 30, 0), kmeans(x, 30, 0), kmeans(x, 30, 1)
    assert (first.centroids == again.centroids).all() and (first.centroids != other.centroids).any()


@pytest.mark.parametrize("count", [0, 7])
def test_impossible_numbers_of_clusters_are_refused(count):
    with pytest.raises(ValueError, match="1 to 6 clusters for 6 rows"):
        kmeans(np.eye(6, dtype=np.float32), count)


def test_nearest_members_are_the_nearest_of_each_cluster():
    level = Level(np.zeros((3, 1), np.float32), np.array([0, 1, 0, 0, 1]), np.array([3, 1, 1, 2, 5], np.float32))
    assert nearest_members(level, 2).tolist() == [1, 2, 3, 4]
    assert [group.tolist() for group in members(level)] == [[0, 2, 3], [1, 4], []]


def test_resampling_moves_the_centres_from_the_crowd_to_the_support():
    """On a line with three quarters of the rows in a tenth of it, plain centres crowd there."""
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.uniform(0, 0.1, 3000), rng.uniform(0.1, 1, 1000)])[:, None].astype(np.float32)
    crowded = [
        np.mean([(hierarchical_kmeans(x, [40], turns, seed=seed)[0].centroids < 0.1).mean() for seed in range(5)])
        for turns in (0, 10)
    ]
    assert crowded[0] > 0.25 and 0.05 < crowded[1] < 0.6 * crowded[0]


@pytest.mark.parametrize(("counts", "sizes", "words"), [
    ([], None, "falling"), ([10, 10], None, "falling"), ([10, 5], [3], "2 sample sizes"), ([10], [0], "at least 1"),
])  # fmt: skip
def test_impossible_trees_are_refused(counts, sizes, words):
    with pytest.raises(ValueError, match=words):
        hierarchical_kmeans(long_tail()[0], counts, sample_sizes=sizes)


# ------------------------------------------------------------------------------------------------ the balanced choice


@pytest.mark.parametrize("budget", [0, 1, 7, 50, 99, 100])
def test_a_budget_is_split_exactly_and_evenly(budget):
    sizes = np.array([50, 3, 0, 20, 27])
    shares = split_budget(sizes, budget, generator())
    assert shares.sum() == budget and (shares <= sizes).all()
    unsated = shares[shares < sizes]
    assert not len(unsated) or unsated.max() - unsated.min() <= 1
    assert not len(unsated) or shares.max() <= unsated.min() + 1


@pytest.mark.parametrize("counts", [[100], [100, 10], [100, 20, 4]])
def test_balanced_samples_meet_any_budget_without_repeating(counts):
    x, _ = long_tail()
    tree = hierarchical_kmeans(x, counts, n_resamples=3)
    for budget in (0, 1, 333, len(x)):
        rows = balanced_sample(tree, budget, generator())
        assert len(rows) == budget == len(np.unique(rows))


def test_a_balanced_sample_holds_more_of_the_rare():
    x, classes = long_tail()
    tree = hierarchical_kmeans(x, [150, 30])
    balanced = entropy(classes[balanced_sample(tree, 300, generator())])
    chance = entropy(classes[np.random.default_rng(0).choice(len(x), 300, replace=False)])
    assert balanced > chance + 0.5


def test_the_generator_decides_the_sample():
    tree = hierarchical_kmeans(long_tail()[0], [50, 5])
    first, again, other = (balanced_sample(tree, 200, generator(seed)) for seed in (0, 0, 1))
    assert (first == again).all() and (first != other).any()


def test_impossible_budgets_are_refused():
    tree = hierarchical_kmeans(long_tail()[0], [50])
    with pytest.raises(ValueError, match="budget from 0 to"):
        balanced_sample(tree, 10**6, generator())


# ------------------------------------------------------------------------------------------------ retrieval


def ring(degrees):
    angles = np.deg2rad(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def test_sample_retrieval_counts_collisions():
    pool, query = ring([0, 10, 20, 180, 190]), ring([2, 8, 181])
    rows, source, similarity, requested = retrieve_by_sample(query, pool, n=2)
    assert rows.tolist() == [0, 1, 3, 4] and requested == 6  # two queries ask for rows 0 and 1
    assert source.tolist() == [0, 1, 2, 2]  # each by the nearer one
    np.testing.assert_allclose(similarity, np.cos(np.deg2rad([2, 2, 1, 9])), atol=1e-6)


def test_sample_retrieval_from_a_pool_smaller_than_n():
    found = retrieve_by_sample(ring([0, 90]), ring([5]), n=4)
    assert found.rows.tolist() == [0] and found.requested == 8


def blobs():
    rng = np.random.default_rng(0)
    return (np.eye(4)[np.repeat(np.arange(4), 50)] + 0.05 * rng.normal(size=(200, 4))).astype(np.float32)


def test_cluster_retrieval_takes_the_clusters_where_queries_are():
    pool = blobs()
    query = pool[[0, 1, 2, 3, 50, 51, 52]]  # four queries in the first blob, three in the second: "more than 3"
    found = retrieve_by_cluster(query, pool, n_clusters=4, per_cluster=30)
    assert len(found.rows) == 30 == found.requested and (found.rows < 50).all()
    assert len(np.unique(found.source)) == 1 and (found.similarity > 0.9).all()
    both = retrieve_by_cluster(query, pool, n_clusters=4, min_queries=3, per_cluster=30)
    assert (both.rows < 50).sum() == (both.rows >= 50).sum() == 30 and both.requested == 60
    assert len(retrieve_by_cluster(query, pool, 4, min_queries=3, per_cluster=1000, cap=70).rows) == 70


def test_queries_that_are_at_home_nowhere_bring_nothing():
    found = retrieve_by_cluster(blobs()[:3], blobs(), n_clusters=4)
    assert len(found.rows) == 0 and found.requested == 0
