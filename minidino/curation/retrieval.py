"""Pool pictures like those of a curated set: the nearest of each, or whole clusters that the set has a part in.

    retrieve_by_sample    large sets: N nearest neighbours of each query
    retrieve_by_cluster   small sets: up to 10,000 pictures of every cluster with more than 3 queries
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from minidino.curation.clusters import assign, kmeans, members
from minidino.curation.search import Index, Rows, unit_rows
from minidino.engine import LOCAL, Engine


class Retrieved(NamedTuple):
    """What was found, each pool row once."""

    rows: Int[np.ndarray, "m"]  # rising
    source: Int[np.ndarray, "m"]  # the query that is nearest among those that asked for it, or the cluster it is from
    similarity: Float[np.ndarray, "m"]  # cosine to that query, or to the nearest of the cluster's queries
    requested: int  # before collisions, small clusters and the cap: what the paper's Table 15 counts


def retrieve_by_sample(query: Rows, pool: Rows, n: int = 4, engine: Engine = LOCAL) -> Retrieved:
    """Take the n most similar pool rows of each query, by cosine.

    Args:
        query: (Q, D) of the curated set, by a semantic network.
        pool: (N, D), by the same network.
        n: 4 for ImageNet-22k and Google Landmarks, 32 for ImageNet-1k in the paper; larger makes more collisions.
        engine: where neighbours are searched.
    Source: DINOv2 paper, appendix A.4.
    """
    similarity, rows = Index(pool, min(n, len(pool)), engine=engine).search(query)
    found = rows >= 0
    asking = np.broadcast_to(np.arange(len(query))[:, None], rows.shape)[found]
    rows, similarity = rows[found], similarity[found]
    order = np.lexsort([asking, -similarity, rows])  # of each row the nearest query comes first
    unique, first = np.unique(rows[order], return_index=True)
    best = order[first]
    return Retrieved(unique, asking[best], similarity[best], n * len(query))


def retrieve_by_cluster(
    query: Rows,
    pool: Rows,
    n_clusters: int,
    min_queries: int = 4,
    per_cluster: int = 10_000,
    cap: int = 1_000_000,
    seed: int = 0,
) -> Retrieved:
    """Take pool rows at random from the clusters where the queries are at home.

    Args:
        query: (Q, D) of the curated set, by a semantic network.
        pool: (N, D), by the same network.
        n_clusters: of the pool; 100,000 in the paper, for 744 M pictures.
        min_queries: a cluster counts from so many queries on ("more than 3" in the paper).
        per_cluster: rows of one cluster at most.
        cap: rows in all at most, chosen at random.
        seed: of clusters and chance.
    Raises:
        ValueError: more clusters than rows of the pool, queries of another width, or min_queries below 1.
    Source: DINOv2 paper, appendix A.4.
    """
    if min_queries < 1:
        raise ValueError(f"expected min_queries of at least 1, got {min_queries}")
    clusters = kmeans(pool, n_clusters, seed, unit=True)
    home = assign(query, clusters.centroids, unit=True).labels
    chosen = np.flatnonzero(np.bincount(home, minlength=n_clusters) >= min_queries)
    rng, groups = np.random.default_rng(seed), members(clusters)
    picked = [rng.permutation(groups[c])[:per_cluster] for c in chosen]
    found = np.sort(rng.permutation(np.concatenate([*picked, np.zeros(0, dtype=np.int64)]))[:cap])
    source, similarity = clusters.labels[found], np.empty(len(found), dtype=np.float32)
    for c in chosen:
        here = source == c
        similarity[here] = (unit_rows(pool[found[here]]) @ unit_rows(query[home == c]).T).max(1)
    return Retrieved(found, source, similarity, per_cluster * len(chosen))
