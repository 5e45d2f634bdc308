"""The code released for curation and for copy detection, run beside ours on the same inputs.

    python benchmarks/official_curation.py run CURATION COPIES [--data PATH]     data/results/official-curation.json
    python benchmarks/official_curation.py draw                                  the tables of docs/measured.md

CURATION is a clone of facebookresearch/ssl-data-curation at f540537, COPIES one of facebookresearch/sscd-copy-detection at
9590266. PATH holds the sets `pool` and `copies`; without it all pictures are drawn scenes. From the same clusters, first
centres or descriptors both must come to the same: rows exactly, numbers up to the rounding that each bound allows. Where
both draw at random, laws are compared as in official_data.py. At the end one thing here is changed at a time, and has to
be seen. What is compared stands in official_clusters.py and official_copies.py.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import official_clusters as tree
import official_copies as sscd
import torch
from official import _parts, _stored, _table
from official_data import ALPHA, Row, failures
from recipe import put, store
from released import checked, stand_in

from minidino.curation import clusters
from minidino.learning import copies

CURATION = ("facebookresearch/ssl-data-curation", "src", "f540537")
COPIES = ("facebookresearch/sscd-copy-detection", "sscd", "9590266")
Rows = Iterator[Row]


def released(curation: Path, detection: Path) -> SimpleNamespace:
    """Both packages, on a CPU."""
    commits = [checked(curation, *CURATION), checked(detection, *COPIES)]
    stand_in(sscd.STAND_INS)
    sys.path += map(str, (curation, detection, detection / "sscd"))
    np.Inf = np.inf  # which numpy had until 2.0
    modules = {key: import_module(name) for key, name in (tree.MODULES | sscd.MODULES).items()}
    there = SimpleNamespace(commits=commits, **modules)
    for module in (there.sampling, there.kmeans, there.levels):
        module.tqdm = lambda some, **_: some
    return there


# ---------------------------------------------------------------- would a difference be seen?


def by_size(sizes: np.ndarray, budget: int, generator: torch.Generator) -> np.ndarray:
    """Shares in proportion to sizes: what balance is there to prevent."""
    exact = budget * sizes / max(sizes.sum(), 1)
    shares = np.floor(exact).astype(np.int64)
    shares[np.argsort(shares - exact, kind="stable")[: budget - shares.sum()]] += 1
    return shares


def plants(there: SimpleNamespace) -> dict[str, tuple[Callable[[], Rows], AbstractContextManager]]:
    """What is changed here alone, and where it has to be seen."""
    x, nearest = tree.inputs(None)["drawn scenes"], clusters.nearest_members
    rows, some = partial(tree.kmeans_rows, there, "", x), partial(tree.laws, there, 2000)
    first_ones = patch.object(torch, "randperm", lambda n, generator: torch.arange(n))
    rising = patch.object(torch, "rand", lambda n, generator, dtype: torch.arange(n, dtype=dtype))
    uniform = patch.object(clusters, "first_centers", lambda x, n, seed: np.random.default_rng(seed).permutation(len(x))[:n])
    cold = patch.object(copies, "info_nce", lambda one, other, t, work=copies.info_nce: work(one, other, 1.01 * t))
    return {
        "shares in proportion to sizes": (partial(tree.leaves, there), patch.object(clusters, "split_budget", by_size)),
        "the first of the larger clusters get one more, not random ones": (some, first_ones),
        "a leaf gives its first rows, not random ones": (some, rising),
        "four of the members nearest to a centre are kept, not five": (
            rows, patch.object(clusters, "nearest_members", lambda level, n: nearest(level, n - 1))),
        "centres are learned from 15 rows for each, not from all 20": (rows, patch.object(clusters, "POINTS_PER_CLUSTER", 15)),
        "first centres drawn evenly, not by distance": (partial(tree.starts, there, 2000), uniform),
        "pooled with the power 3.01": (partial(sscd.pooling, there, 3.01), nullcontext()),
        "InfoNCE at a temperature 1 % higher": (partial(sscd.losses, there), cold),
        "whitening with a hundredth of its shrinkage": (partial(sscd.whitening, there, copies.SHRINKAGE / 100), nullcontext()),
        "recall where 98 of 100 links are right": (
            partial(sscd.measures, there, None), patch.object(sscd.measure, "PRECISION", 0.98)),
    }  # fmt: skip


def run(curation: Path, detection: Path, data: Path | None) -> None:
    there, rows, seen = released(curation, detection), [], {}
    found = tree.inputs(data)
    parts = [part(there) for part in (tree.leaves, tree.laws, tree.edges, tree.starts, tree.evenness)]
    parts += [part(there, name, x) for name, x in found.items() for part in (tree.kmeans_rows, tree.trees)]
    parts += [part(there) for part in (sscd.pooling, sscd.losses, sscd.whitening, partial(sscd.measures, data=data))]
    for row in (row for part in parts for row in part):
        rows.append(row)
        print(*row.values(), sep=" | ", flush=True)
    for words, (part, change) in plants(there).items():
        with change:
            tried = list(part())
        seen[words] = [len(failures(tried)), len(tried)]
        print(words, seen[words], flush=True)
    told = {"inputs": {name: x.shape for name, x in found.items()}, "objective": tree.objective(there)}
    store("official-curation", {"released": there.commits, "alpha": ALPHA, **told, "rows": rows, "seen": seen})
    if bad := failures(rows) + [("not seen", words) for words, (n, _) in seen.items() if not n]:
        sys.exit(f"{len(bad)} differ: {bad}")


def tables() -> dict[str, str]:
    """How far apart both are, what happens at the edges, and what of our changes is seen."""
    stored = _stored("curation")
    rows, edge = [], []
    for part, some in _parts(stored).items():
        if part == "edges":
            edge = [[row["what"], *(row[side].removesuffix(" rows") for side in ("ours", "theirs"))] for row in some]
            continue
        n, random = sum(np.sum(row["n"]) for row in some), [row["p"] for row in some if "p" in row]
        largest = max((row["largest"] for row in some if "p" not in row), default=0)
        rows.append([part, len(some), f"{n:,}", f"p = {min(random):.3f}" if random else f"{largest:.1e}" if largest else 0])
    words = "Released code at " + " and ".join(stored["released"])
    heads = ["", "comparisons", "numbers", "largest difference or smallest p-value"]
    seen = [[change, f"{n} of {of}"] for change, (n, of) in stored["seen"].items()]
    return {
        "official-curation": _table(heads, rows, stored, words),
        "official-curation-edges": _table(["rows that come out", "here", "released"], edge, stored, words),
        "official-curation-seen": _table(["changed here", "comparisons that fail"], seen, stored, words),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "draw"))
    parser.add_argument("checkouts", type=Path, nargs="*", help="CURATION and COPIES, for run")
    parser.add_argument("--data", type=Path, help="a folder with the sets pool and copies; without it scenes are drawn")
    options = parser.parse_args()
    if options.what == "draw":
        return put(tables())
    if len(options.checkouts) != 2:
        parser.error(f"run: expected two checkouts, of {CURATION[0]} and of {COPIES[0]}")
    torch.set_num_threads(1)
    run(*(path.resolve() for path in options.checkouts), options.data)


if __name__ == "__main__":
    main()
