"""Clusters that cover the data, and a choice that is balanced over them.

    kmeans -> hierarchical_kmeans -> Tree -> balanced_sample -> rows

Plain clusters are many where pictures are many. Clusters of clusters, each found anew among the few points nearest to
its centre, spread evenly over what there is; a sample split evenly over such a tree has as much of the rare as of the
common.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int

from minidino.curation.search import Rows, chunks, float_rows, unit_rows

POINTS_PER_CLUSTER = 256  # rows for each cluster that its centre is learned from
SEED_ROUNDS = 64


class Level(NamedTuple):
    """Clusters of what lies below: of rows on the first level, of the centres below on the others."""

    centroids: Float[np.ndarray, "C D"]
    labels: Int[np.ndarray, "n"]  # the cluster of each row or centre below
    distance: Float[np.ndarray, "n"]  # squared Euclidean, to its centre


Tree = list[Level]  # from the many to the few


def kmeans(x: Rows, n_clusters: int, seed: int = 0, n_iterations: int = 25, unit: bool = False) -> Level:
    """Find clusters by Lloyd's algorithm from spread first centres, on at most 256 rows for each; all are assigned.

    Args:
        x: (n, D), in memory or memory-mapped; read in chunks.
        n_clusters: at most n. Some may stay empty where rows are equal.
        seed: of the first centres and of the rows looked at.
        n_iterations: of moving the centres.
        unit: bring each row to length 1 as it is read, where the angle counts.
    Raises:
        ValueError: more clusters than rows, or a row that is not finite.
    Differs: the code released with Vo et al. 2024 (ssl-data-curation, f540537) learns from all rows, moves 50 times,
        tries 2 + ln C rows for each first centre, leaves an empty cluster empty (here it takes a part of a large one),
        and makes fewer clusters of too few rows.
    """
    import faiss

    if not 1 <= n_clusters <= len(x):
        raise ValueError(f"expected 1 to {len(x)} clusters for {len(x)} rows, got {n_clusters}")
    n_points = min(len(x), POINTS_PER_CLUSTER * n_clusters)
    points = np.sort(np.random.default_rng(seed).choice(len(x), n_points, replace=False))
    search = faiss.Kmeans(x.shape[1], n_clusters, niter=n_iterations, seed=seed + 1, min_points_per_centroid=1,
                          max_points_per_centroid=POINTS_PER_CLUSTER)  # fmt: skip
    rows = (unit_rows if unit else float_rows)(x[points])
    search.train(rows, init_centroids=rows[first_centers(rows, n_clusters, seed)])
    return assign(x, search.centroids, unit)


def first_centers(x: Float[np.ndarray, "n D"], n_centers: int, seed: int = 0) -> Int[np.ndarray, "n_centers"]:
    """Choose rows far from each other to begin with, each with a chance that grows with the distance to those before.

        P(row) ~ min over centres so far of ||x_row - centre||^2

    Args:
        x: the rows.
        n_centers: up to 65 are drawn one by one; more in 64 rounds, so that it costs no more than moving them once.
        seed: of the draws.
    Source: Arthur and Vassilvitskii 2007, k-means++; the rounds follow Bahmani et al. 2012, k-means||.
    """
    import faiss

    rng = np.random.default_rng(seed)
    new = chosen = np.array([rng.integers(len(x))])
    nearest = np.full(len(x), np.inf)
    for some in np.array_split(np.arange(n_centers - 1), min(n_centers - 1, SEED_ROUNDS) or 1):
        distance, _ = faiss.knn(x, x[new], 1)
        nearest = np.minimum(nearest, distance[:, 0].clip(1e-30))  # equal rows have a chance when nothing else is left
        nearest[new] = 0
        with np.errstate(divide="ignore"):
            key = rng.exponential(size=len(x)) / nearest  # the smallest keys are a draw without replacement
        new = np.argsort(key, kind="stable")[: len(some)]
        chosen = np.append(chosen, new)
    return chosen


def assign(x: Rows, centroids: Float[np.ndarray, "C D"], unit: bool = False) -> Level:
    """Give each row to its nearest centre; `unit` as for `kmeans`."""
    import faiss

    if x.ndim != 2 or x.shape[1] != centroids.shape[1]:
        raise ValueError(f"expected rows (n, {centroids.shape[1]}) like the centres, got {x.shape}")
    prepare = unit_rows if unit else float_rows
    labels, distance = np.empty(len(x), np.int64), np.empty(len(x), np.float32)
    for part in chunks(len(x)):
        far, nearest = faiss.knn(prepare(x[part]), centroids, 1)
        labels[part], distance[part] = nearest[:, 0], far[:, 0]
    return Level(centroids, labels, distance)


def hierarchical_kmeans(
    x: Rows,
    n_clusters: Sequence[int],
    n_resamples: int = 10,
    sample_sizes: Sequence[int] | None = None,
    seed: int = 0,
    n_iterations: int = 25,
    unit: bool = False,
) -> Tree:
    """Cluster the rows, then the centres, and so on; on each level until the centres no longer follow the crowd.

        repeat n_resamples times:  keep the s members nearest to each centre;  k-means of these;  assign all anew

    The density of k-means' centres goes as p^(D / (D + 2)) with the density p of what is clustered; each turn
    flattens it once more.

    Args:
        x: (n, D).
        n_clusters: of each level, falling, such as [1000, 100].
        n_resamples: turns on each level; 0 is plain k-means of k-means.
        sample_sizes: s of each level; None takes 10 on the first and 3 on the others.
        seed, n_iterations, unit: as for `kmeans`; only rows are brought to length 1, not centres.
    Returns:
        The levels, from the many clusters to the few.
    Raises:
        ValueError: no level, counts that do not fall, or not one sample size for each.
    Source: Vo et al. 2024 (arXiv 2405.15613), sections 3.2 and 3.3.
    Differs: turns end early when fewer members than clusters are left; the released code makes fewer clusters. There a
        sample size of 1 means no turns.
    """
    counts, sizes = list(n_clusters), list(sample_sizes or [10, *[3] * (len(n_clusters) - 1)])
    if not counts or any(below <= above for below, above in zip(counts, counts[1:])):
        raise ValueError(f"expected falling numbers of clusters, such as [1000, 100], got {counts}")
    if len(sizes) != len(counts) or min(sizes) < 1:
        raise ValueError(f"expected {len(counts)} sample sizes of at least 1, got {sizes}")
    tree: Tree = []
    for count, size in zip(counts, sizes):
        below, unit = (tree[-1].centroids, False) if tree else (x, unit)
        level = kmeans(below, count, seed, n_iterations, unit)
        for turn in range(n_resamples):
            core = nearest_members(level, size)
            if len(core) < count:
                break
            level = assign(below, kmeans(below[core], count, seed + turn + 1, n_iterations, unit).centroids, unit)
        tree.append(level)
    return tree


def nearest_members(level: Level, at_most: int) -> Int[np.ndarray, "m"]:
    """The members of each cluster that lie nearest to its centre, rising."""
    chosen = [group[np.argsort(level.distance[group], kind="stable")[:at_most]] for group in members(level)]
    return np.sort(np.concatenate(chosen))


def members(level: Level) -> list[Int[np.ndarray, "m"]]:
    """The rows or centres in each cluster, rising."""
    sizes = np.bincount(level.labels, minlength=len(level.centroids))
    return np.split(np.argsort(level.labels, kind="stable"), np.cumsum(sizes)[:-1])


# ---------------------------------------------------------------- a balanced choice


def balanced_sample(tree: Tree, budget: int, generator: torch.Generator) -> Int[np.ndarray, "budget"]:
    """Choose rows so that every branch gives as evenly as it can, from the top down.

    Args:
        tree: from `hierarchical_kmeans`.
        budget: rows wanted, met exactly.
        generator: who gets what cannot be shared evenly, and which rows of a cluster are taken.
    Returns:
        Rows, rising.
    Raises:
        ValueError: a budget above the number of rows.
    Source: Vo et al. 2024, section 3.4, and its hierarchical_sampling.py.
    Differs: the released code gives all rows where more are asked for, fails at an empty cluster above the first level,
        and can give a row several times (`multiplier`).
    """
    sizes = [np.ones(len(tree[0].labels), dtype=np.int64)]  # rows under each node, level by level
    for level in tree:
        sizes.append(np.bincount(level.labels, sizes[-1], len(level.centroids)).astype(np.int64))
    quota = split_budget(sizes[-1], budget, generator)
    for level, below in zip(reversed(tree[1:]), reversed(sizes[1:-1])):
        shares = np.zeros_like(below)
        for group, share in zip(members(level), quota):
            shares[group] = split_budget(below[group], int(share), generator)
        quota = shares
    chosen = []
    for group, share in zip(members(tree[0]), quota):
        key = torch.rand(len(group), generator=generator, dtype=torch.float32).numpy()
        chosen.append(group[np.argsort(key, kind="stable")[:share]])
    return np.sort(np.concatenate(chosen))


def split_budget(sizes: Int[np.ndarray, "C"], budget: int, generator: torch.Generator) -> Int[np.ndarray, "C"]:
    """Share a budget as evenly as sizes allow.

        share_i = min(cut, size_i), the cut as high as the budget allows; what is left goes singly to random larger ones

    Args:
        sizes: what each can give at most.
        budget: at most their sum.
        generator: draws who gets one more.
    """
    if not 0 <= budget <= sizes.sum():
        raise ValueError(f"expected a budget from 0 to {sizes.sum()}, got {budget}")
    low, high = 0, int(sizes.max(initial=0))
    while low < high:  # the largest cut that does not exceed the budget
        cut = (low + high + 1) // 2
        low, high = (cut, high) if np.minimum(sizes, cut).sum() <= budget else (low, cut - 1)
    shares = np.minimum(sizes, low)
    larger = np.flatnonzero(sizes > low)
    lucky = torch.randperm(len(larger), generator=generator).numpy()[: budget - int(shares.sum())]
    shares[larger[lucky]] += 1
    return shares
