"""What curation shares with the code released for clusters and balanced samples; official_curation.py runs it.

From the same clusters, or from the same first centres, rows and trees; where both draw at random, their laws.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from official_data import Row, drawn, same
from recipe import ROOT, spread

from minidino.curation import clusters
from minidino.curation.clusters import Level, Tree, balanced_sample, hierarchical_kmeans
from minidino.curation.search import unit_rows
from minidino.images.crops import normalise
from minidino.images.datasets import open_images
from minidino.images.pixels import load_pixels
from minidino.images.scenes import KINDS, draw_scenes
from minidino.judge import trained_backbone
from minidino.runs import Run

MODULES = {"tree": "src.clusters", "sampling": "src.hierarchical_sampling", "kmeans": "src.kmeans_gpu",
           "levels": "src.hierarchical_kmeans_gpu"}  # fmt: skip
DRAWS, TREES = 20_000, 300
SMALL = [[0, 0, 0, 1, 1, 2, 3, 3, 3], [0, 0, 0, 1], [0, 0]]  # labels of nine rows, of four clusters, of two of these
COUNTS, SIZES = [100, 20], [5, 3]  # of trees: clusters of each level, members that are clustered anew
EPS = float(np.finfo(np.float32).eps)
Rows = Iterator[Row]


def outcome(work: Callable[[], Any]) -> str:
    """How many rows come out, or what is raised."""
    try:
        return f"{len(work())} rows"
    except (ValueError, RuntimeError):
        return "an error"


def edge(what: str, ours: Callable, theirs: Callable, expected: tuple[str, str]) -> Row:
    """What happens where there is too much or too little: known, and not always the same."""
    found = outcome(ours), outcome(theirs)
    return same("edges", what, 1, float(found != expected), 0, ours=found[0], theirs=found[1])


# ---------------------------------------------------------------- a balanced choice from the same clusters


def lists(groups: list[np.ndarray]) -> np.ndarray:
    """The released form of clusters."""
    found = np.empty(len(groups), dtype=object)
    for i, group in enumerate(groups):
        found[i] = group
    return found


def as_released(there: SimpleNamespace, tree: Tree) -> Any:
    return there.tree.HierarchicalCluster.from_dict([{"clusters": lists(clusters.members(level))} for level in tree])


def random_tree(rng: np.random.Generator) -> Tree:
    """Up to 400 rows under up to four levels, very uneven; on the first some clusters may be empty."""
    n, n_levels = int(rng.integers(1, 400)), int(rng.integers(1, 5))
    tree: Tree = []
    for depth in range(n_levels):
        count = int(rng.integers(1, n + 1) ** 0.8) if depth else int(rng.integers(1, n + 3))
        labels = (count * rng.random(n) ** 3).astype(np.int64)
        if depth:
            labels[rng.permutation(n)[:count]] = np.arange(count)  # the released code refuses empty ones there
        tree.append(Level(np.zeros((count, 1)), labels, np.zeros(n)))
        n = count
    return tree


def small_tree() -> Tree:
    return [Level(np.zeros((max(some) + 1, 1)), np.array(some), np.zeros(len(some))) for some in SMALL]


def first_come() -> ExitStack:
    """Whoever is drawn at random is now the first, here and there."""
    stack = ExitStack()
    stack.enter_context(patch.object(np.random, "choice", lambda some, n, replace: some[:n]))
    stack.enter_context(patch.object(torch, "randperm", lambda n, generator: torch.arange(n)))
    stack.enter_context(patch.object(torch, "rand", lambda n, generator, dtype: torch.arange(n, dtype=dtype)))
    return stack


def sampled(there: SimpleNamespace, tree: Tree) -> tuple[Callable, Callable]:
    """Ours and theirs: a budget -> rows, rising."""
    draws, work = torch.Generator().manual_seed(0), there.sampling.hierarchical_sampling
    theirs = lambda budget: np.sort(work(as_released(there, tree), budget)).astype(np.int64)  # noqa: E731
    return lambda budget: balanced_sample(tree, budget, draws), theirs


def leaves(there: SimpleNamespace) -> Rows:
    """Rows of random trees: what each leaf gives, and which."""
    rng, found = np.random.default_rng(0), []
    with first_come():
        for _ in range(TREES):
            tree = random_tree(rng)
            n = len(tree[0].labels)
            ours, theirs = sampled(there, tree)
            for budget in {0, 1, n, *rng.integers(0, n + 1, 3).tolist()}:
                found.append((tree, ours(budget), theirs(budget)))
    shares = [np.abs(np.subtract(*(np.bincount(tree[0].labels[rows], minlength=len(tree[0].centroids)) for rows in pair))).sum()
              for tree, *pair in found]  # fmt: skip
    yield same("leaves", "rows that a leaf gives more or fewer", len(found), np.sum(shares), 0)
    others = [len(np.setxor1d(*pair)) for _, *pair in found]
    yield same("leaves", "rows that one alone chooses", len(found), np.sum(others), 0)


def laws(there: SimpleNamespace, n_draws: int = DRAWS) -> Rows:
    """The same small tree, so often that every set of rows that can come out does: how often each?"""
    for budget in (2, 4, 5, 6):
        np.random.seed(0)
        found = [[work(budget) for _ in range(n_draws)] for work in sampled(there, small_tree())]
        named = [(1 << np.stack(some)).sum(1).astype(np.int16) for some in found]  # a set as a number
        yield drawn("sets", f"{budget} of 9 rows", *named)


def edges(there: SimpleNamespace) -> Rows:
    """Of samples and of clusters."""

    def asked(tree: Tree, budget: int) -> list[Callable]:
        return [partial(work, budget) for work in sampled(there, tree)]

    tree = small_tree()
    top = Level(np.zeros((1, 1)), np.zeros(3, int), np.zeros(3))
    gap = [tree[0], Level(np.zeros((3, 1)), 2 * np.array(SMALL[1]), np.zeros(4)), top]
    yield edge("nothing is asked for", *asked(tree, 0), ("0 rows", "0 rows"))
    yield edge("more is asked for than there is, 9 rows", *asked(tree, 10), ("an error", "9 rows"))
    yield edge("4 rows, a cluster of clusters is empty", *asked(gap, 4), ("4 rows", "an error"))
    x = np.array([[0.0], [1.0], [2.0]], np.float32)
    kmeans = there.kmeans.kmeans
    yield edge("5 clusters of 3 rows", lambda: clusters.kmeans(x, 5).centroids,
               lambda: kmeans(torch.tensor(x), 5, 1, num_init=1)[0], ("an error", "3 rows"))  # fmt: skip
    x = np.array([[2.0], [2.0], [1.0], [1.5], [2.5], [3.0], [9.0]], np.float32)
    start = np.array([0, 1, 6])  # two centres on one place, in the middle of the rest: nothing comes to the second

    def filled(labels: np.ndarray) -> np.ndarray:
        return np.unique(labels)

    with fixed_starts(there, lambda rows, n: start):
        yield edge("clusters that are not empty, of 3, where two begin on one place",
                   lambda: filled(clusters.kmeans(x, 3).labels),
                   lambda: filled(kmeans(torch.tensor(x), 3, 25, num_init=1)[2]), ("3 rows", "2 rows"))  # fmt: skip


# ---------------------------------------------------------------- clusters


@cache
def scenes() -> tuple[np.ndarray, np.ndarray]:
    """What the small trained network says of 1,000 drawn scenes, (1000, 64), and what these show."""
    some, vit = draw_scenes(1000, 48, seed=5), trained_backbone(Run(ROOT / "data/runs/scenes-cpu"), torch.device("cpu"))
    with torch.no_grad():
        rows = [vit(x) for x in normalise(torch.as_tensor(some.images).permute(0, 3, 1, 2)).split(250)]
    return torch.cat(rows).numpy(), some.labels


def inputs(data: Path | None) -> dict[str, np.ndarray]:
    """Descriptors, of length 1 as the pipeline has them."""
    found = {"drawn scenes": unit_rows(scenes()[0])}
    if data:
        images = open_images(data / "pool")
        pixels = load_pixels(images.select(range(0, len(images), 2)), 32, progress=False)
        found["thumbnails of photographs"] = unit_rows(pixels.whole(16).flatten(1).numpy() - 127.5)
    return found


def spread_rows(x: Any, n: int) -> np.ndarray:
    """The longest row, then always the one furthest from all before: they hang on no order of rows."""
    x = np.asarray(x, dtype=np.float64)
    chosen, nearest = [int(np.square(x).sum(1).argmax())], np.inf
    while len(chosen) < n:
        nearest = np.minimum(nearest, np.square(x - x[chosen[-1]]).sum(1))
        chosen.append(int(nearest.argmax()))
    return np.array(chosen)


def fixed_starts(there: SimpleNamespace, choose: Callable[[Any, int], np.ndarray]) -> ExitStack:
    """Here and there these rows are the first centres."""
    stack = ExitStack()
    stack.enter_context(patch.object(clusters, "first_centers", lambda x, n, seed: choose(x, n)))
    theirs = lambda x, n, *_, **__: (x[choose(x, n)], None)  # noqa: E731
    stack.enter_context(patch.object(there.kmeans, "kmeans_plusplus", theirs))
    return stack


def kmeans_rows(there: SimpleNamespace, name: str, x: np.ndarray, n: int = 50) -> Rows:
    """Assignment, and what 1 and 25 moves make of the same first centres; theirs in float64."""
    wide, start, part = torch.tensor(x).double(), spread_rows(x, n), f"k-means, {name}"
    theirs = there.kmeans.assign_clusters(wide[start], wide, "l2").numpy()
    ours = clusters.assign(x, x[start])
    distance = (wide - wide[start][theirs]).square().sum(1).numpy()
    bound = 4 * x.shape[1] ** 0.5 * EPS  # of x^2 - 2xy + y^2 for rows of length 1
    yield same(part, "rows assigned to others", len(x), (ours.labels != theirs).sum(), 0)
    yield same(part, "squared distances", len(x), np.abs(ours.distance - distance).max(), bound)
    level = Level(x[start], theirs, distance.astype(np.float32))
    core = there.sampling.closest_to_centroid_selection(there.kmeans.sort_cluster_by_distance(
        wide.numpy(), wide[start], lists(clusters.members(level)), "cpu", torch.float64), range(n), 5)  # fmt: skip
    others = np.setxor1d(clusters.nearest_members(level, 5), core)
    yield same(part, "rows that one alone keeps of the five nearest to each centre", len(core), len(others), 0)
    with fixed_starts(there, spread_rows):
        for moves in (1, 25):
            centres, _, labels, _ = there.kmeans.kmeans(wide, n, moves, num_init=1, high_precision=torch.float64)
            level = clusters.kmeans(x, n, n_iterations=moves)
            apart = np.abs(level.centroids - centres.numpy()).max()
            yield same(part, f"centres after {moves} move{'s' * (moves > 1)}", centres.numel(), apart, bound)
            yield same(part, f"rows elsewhere after {moves}", len(x), (level.labels != labels).sum(), 0)


def starts(there: SimpleNamespace, n_draws: int = DRAWS) -> Rows:
    """Three centres of six rows, in their order: the law of k-means++, to which the released code adds trials."""
    x = np.array([[0, 0], [1, 0], [0, 2], [3, 1], [3, 3], [5, 0]], np.float32)
    wide, state = torch.tensor(x), np.random.RandomState(0)
    norms = wide.square().sum(1)
    theirs = [there.kmeans.kmeans_plusplus(wide, 3, norms, "l2", state, 1)[1] for _ in range(n_draws)]
    ours = [clusters.first_centers(x, 3, seed) for seed in range(n_draws)]
    named = ((np.stack(some) @ [1, 6, 36]).astype(np.int16) for some in (ours, theirs))
    yield drawn("first centres", "three of six rows, in their order", *named)


def their_tree(there: SimpleNamespace, x: np.ndarray, counts: list[int]) -> Tree:
    wide = torch.tensor(x).double()
    levels = there.levels.hierarchical_kmeans_with_resampling(wide, counts, 2, SIZES, verbose=False)
    tree: Tree = []
    for below, level in zip([wide, levels[0]["centroids"]], levels):
        distance = (below - level["centroids"][level["assignment"]]).square().sum(1)
        tree.append(Level(level["centroids"].numpy(), level["assignment"], distance.numpy()))
    return tree


def trees(there: SimpleNamespace, name: str, x: np.ndarray) -> Rows:
    """Two levels, each found anew among the nearest members, from the same first centres on; and 300 rows of them."""
    part = f"trees, {name}"
    with fixed_starts(there, spread_rows), first_come():
        theirs = their_tree(there, x, COUNTS)
        ours = hierarchical_kmeans(x, COUNTS, 10, SIZES, n_iterations=50)
        for i, (a, b) in enumerate(zip(ours, theirs), 1):
            yield same(part, f"elsewhere on level {i}", len(a.labels), (a.labels != b.labels).sum(), 0)
            yield same(part, f"centres of level {i}", a.centroids.size, np.abs(a.centroids - b.centroids).max(), 1e-5)
        rows = sampled(there, ours)[0](300), sampled(there, theirs)[1](300)
        yield same(part, "rows that one alone chooses, of 300", 300, len(np.setxor1d(*rows)), 0)


def evenness(there: SimpleNamespace, seeds: int = 20) -> Rows:
    """A long tail of kinds of scenes; each draws its own first centres. How even are the kinds of 60 chosen rows?"""
    x, kinds = scenes()
    order = np.random.default_rng(0).permutation(len(x))
    tail = np.sort(np.concatenate([order[kinds[order] == kind][: 100 // (1 + kind)] for kind in range(len(KINDS))]))
    x, kinds, found = unit_rows(x[tail]), kinds[tail], ([], [])
    for seed in range(seeds):
        np.random.seed(seed)
        both = hierarchical_kmeans(x, [40, 8], 10, SIZES, seed, 50), their_tree(there, x, [40, 8])
        for i, (tree, entropies) in enumerate(zip(both, found)):
            share = np.bincount(kinds[sampled(there, tree)[i](60)]) / 60
            entropies.append(-(share[share > 0] * np.log2(share[share > 0])).sum())
    yield drawn("evenness", f"bits of the kinds of 60 rows of {len(x)}", *found)


def objective(there: SimpleNamespace, seeds: int = 20) -> dict[str, Any]:
    """Mean squared distance to 50 centres, each from its own first ones: the released code tries several for each."""
    x, state = unit_rows(scenes()[0]), np.random.RandomState(0)
    wide = torch.tensor(x).double()
    ours = [float(clusters.kmeans(x, 50, seed, 50).distance.mean()) for seed in range(seeds)]
    theirs = [there.kmeans.kmeans(wide, 50, 50, num_init=1, random_state=state)[3] / len(x) for _ in range(seeds)]
    return {"seeds": seeds, "ours": spread(ours), "theirs": spread(theirs)}
