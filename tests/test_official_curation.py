"""benchmarks/official_curation.py without the released code: a sampler that gives one by one stands in for it."""

import importlib
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "benchmarks"))
    return importlib.import_module


def one_by_one(levels, budget):
    """Each branch in turn gives one row, as long as it has any: the released law where all chance is first come."""
    def size(depth, i):
        return len(levels[0][i]) if depth == 0 else sum(size(depth - 1, child) for child in levels[depth][i])

    def shared(sizes, budget):
        shares = [0] * len(sizes)
        while budget:
            for i in range(len(sizes)):
                more = shares[i] < sizes[i] and budget > 0
                shares[i], budget = shares[i] + more, budget - more
        return shares

    def rows(depth, i, budget):
        if depth == 0:
            return list(levels[0][i][:budget])
        shares = shared([size(depth - 1, child) for child in levels[depth][i]], budget)
        return [row for child, share in zip(levels[depth][i], shares) for row in rows(depth - 1, child, share)]

    top = len(levels) - 1
    shares = shared([size(top, i) for i in range(len(levels[top]))], budget)
    return np.array([row for i, share in enumerate(shares) for row in rows(top, i, share)], dtype=np.int64)


def released(sampler):
    cluster = SimpleNamespace(from_dict=lambda levels: [level["clusters"] for level in levels])
    return SimpleNamespace(tree=SimpleNamespace(HierarchicalCluster=cluster),
                           sampling=SimpleNamespace(hierarchical_sampling=sampler))  # fmt: skip


def test_what_each_leaf_gives_is_compared_row_by_row(benchmark, monkeypatch):
    study = benchmark("official_clusters")
    monkeypatch.setattr(study, "TREES", 20)
    assert [row["largest"] for row in study.leaves(released(one_by_one))] == [0, 0]

    def other(levels, budget):
        found = one_by_one(levels, budget)
        gone = np.setdiff1d(np.concatenate([*levels[0]]), found)
        return np.append(found[1:], gone[:1]) if len(found) and len(gone) else found

    assert min(row["largest"] for row in study.leaves(released(other))) > 0
    assert torch.randperm(9, generator=torch.Generator().manual_seed(0)).tolist() != list(range(9))  # chance is back


def test_every_tree_is_one_that_the_released_code_takes(benchmark):
    study, rng = benchmark("official_clusters"), np.random.default_rng(1)
    trees = [study.random_tree(rng) for _ in range(200)]
    for tree in trees:
        for below, level in zip(tree, tree[1:]):
            assert len(level.labels) == len(below.centroids)
            assert set(level.labels) == set(range(len(level.centroids)))
    empty = [len(np.unique(tree[0].labels)) < len(tree[0].centroids) for tree in trees]
    assert any(empty) and {len(tree) for tree in trees} == {1, 2, 3, 4}


def test_shares_in_proportion_are_a_change_that_keeps_the_budget(benchmark):
    by_size, sizes = benchmark("official_curation").by_size, np.array([0, 1, 9, 90])
    shares = [by_size(sizes, budget, None) for budget in range(101)]
    assert [share.sum() for share in shares] == list(range(101)) and all((share <= sizes).all() for share in shares)
    assert shares[50].tolist() == [0, 1, 4, 45]


def test_a_checkout_that_is_none_or_at_another_commit_is_refused(benchmark, tmp_path):
    checked = benchmark("released").checked
    with pytest.raises(SystemExit, match="is no checkout of a/b: it has no src"):
        checked(tmp_path, "a/b", "src")
    (tmp_path / "src").mkdir()
    with pytest.raises(SystemExit, match="expected a/b at 1234567, found"):
        checked(tmp_path, "a/b", "src", "1234567")
    author = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    for words in (["init", "-q"], [*author, "commit", "-q", "--allow-empty", "-m", "one"]):
        subprocess.run(["git", "-C", tmp_path, *words], check=True)
    commit = checked(tmp_path, "a/b", "src")
    assert len(commit) == 7 and checked(tmp_path, "a/b", "src", commit) == commit


@pytest.mark.parametrize("seen", [True, False])
def test_a_change_that_is_not_seen_is_an_error(seen, benchmark, monkeypatch):
    study, stored = benchmark("official_curation"), {}
    row = study.tree.same("part", "what", 1, 0, 0)
    monkeypatch.setattr(study, "released", lambda *_: SimpleNamespace(commits=["1", "2"]))
    monkeypatch.setattr(study, "store", lambda name, found: stored.update(found))
    monkeypatch.setattr(study, "plants", lambda there: {"a change": (lambda: [row | {"largest": int(seen)}], study.nullcontext())})
    names = {study.tree: "leaves laws edges starts evenness kmeans_rows trees", study.sscd: "pooling losses whitening measures"}
    for module, parts in names.items():
        for name in parts.split():
            monkeypatch.setattr(module, name, lambda *_, **__: [row])
    monkeypatch.setattr(study.tree, "objective", lambda there: {})
    monkeypatch.setattr(study.tree, "inputs", lambda data: {"some": np.zeros((3, 2))})
    if seen:
        study.run(None, None, None)
    else:
        with pytest.raises(SystemExit, match="not seen"):
            study.run(None, None, None)
    assert len(stored["rows"]) == 11 and stored["seen"] == {"a change": [int(seen), 1]}
