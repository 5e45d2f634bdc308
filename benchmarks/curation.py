"""Curation measured: how it grows with the pool, how even its choice is, and whether that helps.

    python benchmarks/curation.py growth [--rows 1000000]   graph, components and clusters, against faiss as it comes
    python benchmarks/curation.py balance [--seeds 5]       a long-tailed pool: the classes of what is chosen
    python benchmarks/curation.py helps [--data PATH]       the same net on chosen and on random pictures of a raw pool

PATH holds the set `imagenette`. What the copy network knows is measured by benchmarks/copies.py.

Results go to data/results/curation-*.json with machine, versions and commit; no run is left out.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from recipe import spread, store
from tqdm import tqdm

from minidino.config import override, preset
from minidino.curate import COPY_STEPS, trained_describer
from minidino.curation.clusters import balanced_sample, hierarchical_kmeans, kmeans
from minidino.curation.duplicates import COPY, Pairs, connect
from minidino.curation.embeddings import network
from minidino.curation.pipeline import Curation, Describer
from minidino.curation.search import CHUNK, SAMPLE, Index, exact_neighbours, unit_rows
from minidino.images.datasets import open_images
from minidino.images.pixels import Pixels, load_pixels
from minidino.images.pools import Pool, draw_pool, long_tail, make_pool, write_pool
from minidino.images.scenes import KINDS, draw_scenes
from minidino.judge import class_tokens, judge_knn, judge_linear
from minidino.learning.train import start, train
from minidino.model.vit import VisionTransformer
from minidino.runs import keep_freed_memory, peak_memory_mb, pick_device
from minidino.stages import World

POOL_WORLD, JUDGING_WORLD, TAIL = 21, 1021, 1.5
WIDTH, NEIGHBOURS, CLUSTERS = 256, 16, 1000
COPIED = 0.1  # share of the rows that are another row with some noise
SIZES = (10_000, 30_000, 100_000, 300_000, 1_000_000)


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


# -- growth ------------------------------------------------------------------------------------------------------------


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


def growth(largest: int) -> None:
    """Each size and each contestant in a process of its own, so that each has its own peak of memory."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for n in tqdm([size for size in SIZES if size <= largest], unit="size"):
            path = Path(folder) / "rows.npy"
            draw_descriptors(n, path)
            for name, work in (("minidino", ours), ("faiss, defaults", peer)):
                with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                    rows.append({"rows": n, "who": name} | pool.submit(measured, work, path).result())
                tqdm.write(str(rows[-1]))
                store("curation-growth", {"width": WIDTH, "neighbours": NEIGHBOURS, "clusters": CLUSTERS, "runs": rows})


# -- is the choice better ----------------------------------------------------------------------------------------------


class Raw(NamedTuple):
    """A raw pool, what is known of it, and labelled pictures to judge on."""

    archive: Path
    pool: Pool
    bank: Pixels
    test: Pixels
    preset: str


def drawn_pool(folder: Path, n: int = 3000) -> Raw:
    """Scenes of very uneven kinds, half as many copies and a quarter as much junk; judged on even ones."""
    pool = draw_pool(n, copies=0.5, junk=0.25, tail=TAIL, seed=POOL_WORLD)
    archive = write_pool(pool, folder / "drawn.zip")
    even = draw_scenes(3000, seed=JUDGING_WORLD)
    pixels = Pixels.from_array(even.images, even.labels, list(KINDS))
    return Raw(archive, pool, pixels.select(range(2000)), pixels.select(range(2000, 3000)), "scenes-cpu")


def photograph_pool(folder: Path, data: Path, n: int = 2400) -> Raw:
    """Photographs of Imagenette, as uneven; judged on all of its validation part, the rest of training as the bank."""
    images = open_images(data / "imagenette")
    parts = {name: load_pixels(images.select(np.flatnonzero(images.splits == name)), 64, folder / name)
             for name in ("train", "val")}  # fmt: skip
    labels, rng = parts["train"].labels, np.random.default_rng(POOL_WORLD)
    groups = [rng.permutation(np.flatnonzero(labels == kind)) for kind in range(10)]
    rows = np.sort(np.concatenate([g[:m] for g, m in zip(groups, long_tail(n, 10, TAIL).clip(max=800))]))
    rest = np.setdiff1d(np.arange(len(labels)), rows)
    shown = [parts["train"].image(i).transpose(1, 2, 0) for i in rows]
    pool = make_pool(shown, labels[rows], copies=0.5, junk=0.25, seed=POOL_WORLD)
    archive = write_pool(pool, folder / "photographs.zip")
    return Raw(archive, pool, parts["train"].select(rest), parts["val"], "imagenette-cpu")


def pixels_of(raw: Raw, rows: Sequence[int]) -> Pixels:
    """These files of the pool, decoded."""
    images = open_images(raw.archive)
    place = {name: i for i, name in enumerate(images.files)}
    return load_pixels(images.select([place[raw.pool.names[row]] for row in rows]), 64, progress=False)


def learn(raw: Raw, rows: Sequence[int], steps: int, seed: int) -> VisionTransformer:
    """Train the preset on these files of the pool; the frozen backbone."""
    pixels = pixels_of(raw, rows)
    config = override(preset(raw.preset), [f"run.steps={steps}", f"run.seed={seed}"])
    state = start(config, pick_device())
    for _ in tqdm(train(config, pixels, state), total=steps, leave=False):
        pass
    return state.teacher.backbone


def balance(data: Path | None, seeds: int, steps: int) -> None:
    """Entropy over the true classes of what is chosen from a long tail: at random, by plain and by resampled clusters.

    The semantic features are those of the preset, trained on the raw pool itself without labels.
    """
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        for raw in raw_pools(Path(name), data):
            own = np.flatnonzero(np.array(raw.pool.made) == "own")
            net = learn(raw, np.arange(len(raw.pool.names)), steps, 0)
            seen = pixels_of(raw, own).whole(preset(raw.preset).crops.global_size)
            rows, labels = network(net)(seen).numpy(), raw.pool.labels[own]
            budget = fine = len(own) // 10
            runs: dict[str, list[float]] = {"the pool": [], "random": [], "k-means": [], "hierarchical k-means": []}
            for seed in range(seeds):
                chance = torch.Generator().manual_seed(seed)
                flat = [kmeans(rows, fine, seed, unit=True)]
                tree = hierarchical_kmeans(rows, [fine, fine // 10], seed=seed, unit=True)
                chosen = {
                    "the pool": np.arange(len(own)),
                    "random": torch.randperm(len(own), generator=chance)[:budget].numpy(),
                    "k-means": balanced_sample(flat, budget, chance),
                    "hierarchical k-means": balanced_sample(tree, budget, chance),
                }
                for who, picked in chosen.items():
                    runs[who].append(entropy(labels[picked]))
            summary = {who: spread(values) for who, values in runs.items()}
            found[raw.archive.stem] = {"budget": budget, "pictures": len(own), "ln_classes": float(np.log(10)),
                                       "steps": steps, "entropy": summary, "runs": runs}  # fmt: skip
            print(raw.archive.stem, summary)
            store("curation-balance", {"pools": found})


def entropy(labels: np.ndarray) -> float:
    share = np.bincount(labels) / len(labels)
    return float(-(share[share > 0] * np.log(share[share > 0])).sum())


def helps(data: Path | None, seeds: int, steps: int, copy_steps: int) -> None:
    """Same net, same steps: on what curation chose and on as many pictures of the raw pool at random."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        for raw in raw_pools(Path(name), data):
            folder, n = Path(name) / raw.archive.stem, len(raw.pool.names)
            curation = Curation(raw.archive, folder, short_side=64)
            curation.drop_same()
            distinct = curation.pixels.select(np.flatnonzero(curation.kept))
            curation.drop_copies(trained_describer(distinct, folder, copy_steps))
            budget = int(curation.kept.sum()) // 2
            net = learn(raw, np.arange(n), steps, 0)
            size = preset(raw.preset).crops.global_size
            curation.balance(budget, Describer("semantic", network(net), size, "trained on the raw pool"))
            kept = {file for file, k in zip(curation.pixels.files, curation.kept) if k}
            curated = np.flatnonzero([file in kept for file in raw.pool.names])
            world = World(raw.archive.stem, raw.bank, raw.test)
            arms: dict[str, list[dict[str, float]]] = {"random": [], "curated": []}
            for seed in range(seeds):
                chance = np.random.default_rng(seed)
                for arm, rows in (("random", np.sort(chance.permutation(n)[:budget])), ("curated", curated)):
                    tokens = class_tokens(world, preset(raw.preset), {arm: learn(raw, rows, steps, seed)})
                    arms[arm].append({
                        "knn": judge_knn(world, tokens.items())[arm]["k=20"],
                        "linear": judge_linear(world, tokens)[arm]["mean"],
                        "entropy": entropy(raw.pool.labels[rows][raw.pool.labels[rows] >= 0]),
                        "junk": float((raw.pool.labels[rows] < 0).mean()),
                    })  # fmt: skip
                    print(raw.archive.stem, arm, seed, arms[arm][-1], flush=True)
            summary = {arm: {key: spread([run[key] for run in runs]) for key in runs[0]} for arm, runs in arms.items()}
            found[raw.archive.stem] = {"files": n, "budget": budget, "steps": steps, "funnel": curation.funnel,
                                       "summary": summary, "runs": arms}  # fmt: skip
            store("curation-helps", {"pools": found})


def raw_pools(folder: Path, data: Path | None) -> Iterator[Raw]:
    yield drawn_pool(folder)
    if data is not None:
        yield photograph_pool(folder, data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("growth", "balance", "helps"))
    parser.add_argument("--data", type=Path, help="folder of the sets of photographs")
    parser.add_argument("--rows", type=int, default=SIZES[-1], help="of the largest bank")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1000, help="of pretraining")
    parser.add_argument("--copy-steps", type=int, default=COPY_STEPS, help="of the copy network")
    options = parser.parse_args()
    keep_freed_memory()
    if options.what == "growth":
        growth(options.rows)
    elif options.what == "balance":
        balance(options.data, options.seeds, options.steps)
    else:
        helps(options.data, options.seeds, options.steps, options.copy_steps)


if __name__ == "__main__":
    main()
