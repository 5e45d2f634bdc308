"""How curation grows with the pool: neighbour graph, components and clusters, against faiss as it comes.

    python benchmarks/growth.py run                    every size, each in a process of its own
    python benchmarks/growth.py run --rows 30000       the sizes up to this one, printed and not stored
    python benchmarks/growth.py draw                   the table of docs/measured.md and docs/growth.png from the stored result

The result goes to data/results/curation-growth.json with machine, versions and commit.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from recipe import DOCS, RESULTS, put, store
from tqdm import tqdm

from minidino.curation.clusters import kmeans
from minidino.curation.duplicates import COPY, Pairs, connect
from minidino.curation.search import CHUNK, SAMPLE, Index, exact_neighbours, unit_rows
from minidino.pictures import COLORS
from minidino.runs import peak_memory_mb

WIDTH, NEIGHBOURS, CLUSTERS = 256, 16, 1000
COPIED = 0.1  # share of the rows that are another row with some noise
SIZES = (10_000, 30_000, 100_000, 300_000, 1_000_000)
STEPS = ("index", "graph", "components", "clusters")
OURS, PEER = "minidino", "faiss, defaults"


def draw_descriptors(n: int, path: Path, seed: int = 0) -> None:
    """Rows that lie as descriptors do: about a curved sheet of 24 dimensions in 256, crowded in places, some copied.

        x = unit(W2 tanh(W1 (crowd + 0.7 noise))) + unit(noise),   a tenth of the rows: another row + 0.1 unit(noise)

    Strangers stay below a cosine of 0.6, copies lie above 0.9.
    """
    rng = np.random.default_rng(seed)
    crowds = rng.normal(size=(1000, 24)).astype(np.float32)
    weight = (rng.pareto(1.5, 1000) + 0.1).astype(np.float64)
    first, second = (rng.normal(size=shape).astype(np.float32) for shape in ((24, 128), (128, WIDTH)))
    rows = np.lib.format.open_memmap(path, "w+", "float16", (n, WIDTH))
    for start in range(0, n, CHUNK):
        m = min(CHUNK, n - start)
        latent = crowds[rng.choice(1000, m, p=weight / weight.sum())] + 0.7 * rng.normal(size=(m, 24))
        x = unit_rows(np.tanh(latent @ first / 24**0.5) @ second) + unit_rows(rng.normal(size=(m, WIDTH)))
        copied = np.flatnonzero(rng.random(m) < COPIED)
        x[copied] = x[rng.integers(m, size=len(copied))] + 0.1 * unit_rows(rng.normal(size=(len(copied), WIDTH)))
        rows[start : start + m] = unit_rows(x)
    rows.flush()


def ours(path: Path) -> dict[str, Any]:
    """The stages of minidino.curation over a memory map."""
    rows, timer = np.load(path, mmap_mode="r"), Timer()
    index = timer("index", lambda: Index(rows, NEIGHBOURS + 1))
    similarity, found = timer("graph", index.graph)
    left, column = np.nonzero(similarity > COPY)
    labels = timer("components", lambda: connect(len(rows), Pairs(left, found[left, column])))
    timer("clusters", lambda: kmeans(rows, min(CLUSTERS, len(rows) // 10), unit=True))
    return timer.seconds | {"kind": index.plan.kind, "n_components": int(labels.max()) + 1, **recall(rows, found)}


def peer(path: Path) -> dict[str, Any]:
    """faiss with its default settings: an inverted file as its guidelines size it, one list looked into; Kmeans."""
    import faiss

    timer = Timer()
    rows = np.load(path).astype(np.float32)
    faiss.normalize_L2(rows)

    def build() -> Any:
        index = faiss.index_factory(WIDTH, f"IVF{int(4 * len(rows) ** 0.5)},Flat", faiss.METRIC_INNER_PRODUCT)
        index.train(rows)
        index.add(rows)
        return index

    index = timer("index", build)
    _, found = timer("graph", lambda: index.search(rows, NEIGHBOURS + 1))
    own = found == np.arange(len(rows))[:, None]
    found = np.where(own, -1, found)
    timer("clusters", lambda: faiss.Kmeans(WIDTH, min(CLUSTERS, len(rows) // 10)).train(rows))
    return timer.seconds | {"kind": "IVF, nprobe 1", **recall(rows, found)}


def recall(rows: np.ndarray, found: np.ndarray) -> dict[str, float]:
    """Share of the true neighbours of a sample that were found, for both by the same exact answer."""
    sample = np.sort(np.random.default_rng(1).choice(len(rows), SAMPLE, replace=False))
    truth = exact_neighbours(rows, rows[sample], NEIGHBOURS + 1).rows
    hits = [len(np.intersect1d(t[t != own], f)) for own, t, f in zip(sample, truth, found[sample])]
    return {"recall": float(np.mean(hits)) / NEIGHBOURS}


class Timer:
    """Seconds of each named piece of work."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def __call__(self, name: str, work: Callable[[], Any]) -> Any:
        begun = time.perf_counter()
        result = work()
        self.seconds[name] = time.perf_counter() - begun
        return result


def measured(work: Callable[[Path], dict[str, Any]], path: Path) -> dict[str, Any]:
    found = work(path)
    return found | {"peak_memory_mb": peak_memory_mb()}


def run(largest: int) -> None:
    """Each size and each contestant in a process of its own, so that each has its own peak of memory."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for n in tqdm([size for size in SIZES if size <= largest], unit="size"):
            path = Path(folder) / "rows.npy"
            draw_descriptors(n, path)
            for name, work in ((OURS, ours), (PEER, peer)):
                with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                    rows.append({"rows": n, "who": name} | pool.submit(measured, work, path).result())
                tqdm.write(str(rows[-1]))
                found = {"width": WIDTH, "neighbours": NEIGHBOURS, "clusters": CLUSTERS, "runs": rows}
                if largest >= SIZES[-1]:
                    store("curation-growth", found)


# -- the tables --------------------------------------------------------------------------------------------------------


def stored() -> dict[str, Any]:
    return json.loads((RESULTS / "curation-growth.json").read_text())


def seconds_of(run: dict[str, Any]) -> float:
    return sum(run.get(step, 0.0) for step in STEPS)


def tables() -> dict[str, str]:
    """The table of docs/measured.md, written from the stored result."""
    found = stored()
    lines = ["| descriptors | | time (s) | of it the graph | of it the clusters | recall@16 | peak memory (MiB) |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    for run in found["runs"]:
        graph = sum(run.get(step, 0.0) for step in STEPS[:3])
        lines.append(f"| {run['rows']:,} | {run['who']} ({run['kind']}) | {seconds_of(run):,.0f} | {graph:,.0f} | "
                     f"{run['clusters']:,.0f} | {run['recall']:.3f} | {run['peak_memory_mb']:,.0f} |")  # fmt: skip
    e = found["environment"]
    lines += ["", f"{found['width']} dimensions, {found['neighbours']} neighbours, up to {found['clusters']:,} clusters; "
              f"one run each on {e['machine']}; torch {e['versions']['torch']}, {e['date'][:10]}, commit {e['commit']}."]  # fmt: skip
    return {"growth": "\n".join(lines)}


def draw() -> None:
    """Time against size, beside lines of linear and quadratic growth; and what of the neighbours is found."""
    figure = Figure(figsize=(9, 3.6), dpi=100, layout="constrained")
    left, right = figure.subplots(1, 2)
    for who, color in ((OURS, "trained"), (PEER, "pixels")):
        runs = [run for run in stored()["runs"] if run["who"] == who]
        sizes = [run["rows"] for run in runs]
        left.plot(sizes, [seconds_of(run) for run in runs], "o-", color=COLORS[color], label=who)
        right.plot(sizes, [100 * run["recall"] for run in runs], "o-", color=COLORS[color], label=who)
        if who == OURS:
            first = seconds_of(runs[0])
            for power, style, word in ((1, ":", "linear"), (2, "--", "quadratic")):
                grown = [first * (size / sizes[0]) ** power for size in sizes]
                left.plot(sizes, grown, style, color=COLORS["limit"], linewidth=1, label=word)
    left.set(xscale="log", yscale="log", ylabel="time (s)", xlabel="descriptors", title="graph, components, clusters")
    right.set(xscale="log", ylim=(0, 103), ylabel="true neighbours found (%)", xlabel="descriptors", title="recall@16")
    left.legend()
    right.legend(loc="center right")
    figure.savefig(DOCS / "growth.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "draw"))
    parser.add_argument("--rows", type=int, default=SIZES[-1], help="of the largest bank")
    options = parser.parse_args()
    if options.rows < SIZES[0]:
        parser.error(f"--rows: expected at least {SIZES[0]:,}, the smallest size; got {options.rows:,}")
    if options.what == "run":
        run(options.rows)
    if options.rows < SIZES[-1]:
        return
    put(tables())
    draw()


if __name__ == "__main__":
    main()
