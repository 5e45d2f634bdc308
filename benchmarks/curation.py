"""Is the choice better? How even what curation chooses is, and what a network learns from it.

    python benchmarks/curation.py balance [--seeds 5] [--data PATH]   a long-tailed pool: the classes of what is chosen
    python benchmarks/curation.py choose [--seeds 3] [--data PATH]    what curation chooses of the same pools
    python benchmarks/curation.py learn [--jobs 8]                    nets on chosen and random pictures; on a GPU, say
    python benchmarks/curation.py helps [--seeds 3] [--data PATH]     both, as far as not done before, and judge
    python benchmarks/curation.py draw                                tables of docs/measured.md and docs/curation-*.png

PATH holds the set `imagenette`; --features RUN is a network that chooses among its photographs. Pools, networks and
stages are kept in runs/curation, so that a study goes on where it was; delete that folder to begin anew.

Results go to data/results/curation-*.json with machine, versions and commit; no run is left out. What the copy network
knows is measured by benchmarks/copies.py, and how the stages grow by benchmarks/growth.py.
"""

import argparse
import json
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from recipe import DOCS, RESULTS, ROOT, put, spread, store
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from minidino.config import RunConfig, override, preset
from minidino.curate import COPY_STEPS, semantic_describer, trained_describer
from minidino.curation.clusters import balanced_sample, hierarchical_kmeans, kmeans
from minidino.curation.embeddings import network
from minidino.curation.pipeline import Curation, Describer
from minidino.images.datasets import open_images
from minidino.images.pixels import Pixels, load_pixels
from minidino.images.pools import Pool, draw_pool, long_tail, make_pool, write_pool
from minidino.images.scenes import KINDS, draw_scenes
from minidino.judge import class_tokens, judge_knn, judge_linear
from minidino.learning.train import start, train
from minidino.model.vit import VisionTransformer
from minidino.pictures import COLORS, DPI, WIDTH
from minidino.runs import environment, keep_freed_memory, pick_device, write_atomically
from minidino.stages import World

WORK = ROOT / "runs" / "curation"
POOL_WORLD, JUDGING_WORLD, TAIL = 21, 1021, 1.5
CHOOSER_WORLD, CHOOSER_SCENES = 31, 4000
POOLS = ("drawn", "photographs")
QUERIES = 300  # pictures of the curated set that is asked with


class Raw(NamedTuple):
    """A raw pool, what is known of it, labelled pictures to judge on, and the network that chooses."""

    archive: Path
    pool: Pool
    queries: Path  # an archive of clean, even pictures: what is to be learned about
    bank: Pixels
    test: Pixels
    preset: str
    features: Path | None  # of a run; None trains the preset on the raw pool

    @property
    def name(self) -> str:
        return self.archive.stem

    @property
    def size(self) -> int:
        return preset(self.preset).crops.global_size


def drawn_pool(n: int = 3000) -> Raw:
    """Scenes of very uneven kinds, half as many copies and a quarter as much junk; judged on even ones."""
    pool = draw_pool(n, copies=0.5, junk=0.25, tail=TAIL, seed=POOL_WORLD)
    archive = write_pool(pool, WORK / "drawn.zip")
    even = draw_scenes(3000, seed=JUDGING_WORLD)
    pixels = Pixels.from_array(even.images, even.labels, list(KINDS))
    asked = draw_scenes(QUERIES, seed=CHOOSER_WORLD + 1)
    queries = write_queries(Pixels.from_array(asked.images, asked.labels, list(KINDS)), WORK / "drawn-queries.zip")
    return Raw(archive, pool, queries, pixels.select(range(2000)), pixels.select(range(2000, 3000)), "scenes-cpu", None)


def photograph_pool(data: Path, features: Path | None, n: int = 2400) -> Raw:
    """Photographs of Imagenette, as uneven; judged on all of its validation part, the rest of training as the bank."""
    images = open_images(data / "imagenette")
    parts = {name: load_pixels(images.split(name), 64, WORK / name) for name in ("train", "val")}
    labels, rng = parts["train"].labels, np.random.default_rng(POOL_WORLD)
    groups = [rng.permutation(np.flatnonzero(labels == kind)) for kind in range(10)]
    rows = np.sort(np.concatenate([g[:m] for g, m in zip(groups, long_tail(n, 10, TAIL).clip(max=800))]))
    rest = np.setdiff1d(np.arange(len(labels)), rows)
    shown = [parts["train"].image(i).transpose(1, 2, 0) for i in rows]
    pool = make_pool(shown, labels[rows], copies=0.5, junk=0.25, seed=POOL_WORLD)
    archive = write_pool(pool, WORK / "photographs.zip")
    asked = np.concatenate([rest[labels[rest] == kind][: QUERIES // 10] for kind in range(10)])
    queries = write_queries(parts["train"].select(asked), WORK / "photographs-queries.zip")
    return Raw(archive, pool, queries, parts["train"].select(rest), parts["val"], "imagenette-cpu", features)


def write_queries(pixels: Pixels, path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for row in range(len(pixels)):
            with archive.open(f"{row:04d}.png", "w") as file:
                Image.fromarray(np.ascontiguousarray(pixels.image(row).transpose(1, 2, 0))).save(file, "PNG")
    return path


class Net(NamedTuple):
    """A network to be trained: on these files of an archive, or on clean scenes of the chooser's world."""

    name: str
    preset: str
    steps: int
    seed: int
    archive: Path | None
    files: tuple[str, ...] = ()

    def pixels(self) -> Pixels:
        if self.archive is None:
            drawn = draw_scenes(CHOOSER_SCENES, seed=CHOOSER_WORLD)
            return Pixels.from_array(drawn.images, drawn.labels, list(KINDS))
        return files_of(self.archive, self.files)


def raw_pools(names: Sequence[str], data: Path | None, features: Path | None) -> Iterator[Raw]:
    WORK.mkdir(parents=True, exist_ok=True)
    for name in names:
        yield drawn_pool() if name == "drawn" else photograph_pool(data, features)


def files_of(archive: Path, files: Sequence[str]) -> Pixels:
    """These files of a pool, decoded."""
    images = open_images(archive)
    place = {name: i for i, name in enumerate(images.files)}
    return load_pixels(images.select([place[file] for file in files]), 64, progress=False)


def learned(net: Net) -> VisionTransformer:
    """The frozen backbone of a preset, trained on some files; from its file, if it was trained before."""
    config = override(preset(net.preset), [f"run.steps={net.steps}", f"run.seed={net.seed}"])
    return taught(WORK / f"{net.name}.safetensors", config, net.pixels)


def taught(path: Path, config: RunConfig, pixels: Callable[[], Pixels]) -> VisionTransformer:
    """The frozen backbone of a config that learned from these pictures; from its file, if it did so before."""
    state = start(config, pick_device())
    backbone = state.teacher.backbone
    if path.exists():
        backbone.load_state_dict(load_file(path))
    else:
        for _ in tqdm(train(config, pixels(), state), total=config.run.steps, desc=path.stem, leave=False):
            pass
        save_file(backbone.state_dict(), path)
    return backbone.cpu()


def chooser(raw: Raw, steps: int) -> Describer:
    """The semantic network: a given run, or the preset trained on other scenes, evenly drawn and clean."""
    if raw.features:
        return semantic_describer(raw.features)
    net, made_by = Net(f"chooser-{steps}", raw.preset, steps, 0, None), f"{raw.preset}, {steps} steps on other scenes"
    return Describer("semantic", network(learned(net)), raw.size, made_by)


# -- how even ----------------------------------------------------------------------------------------------------------


def balance(pools: Iterator[Raw], seeds: int, steps: int) -> None:
    """Entropy over the true classes of a tenth of a long tail: at random, by plain and by resampled clusters."""
    found: dict[str, Any] = {}
    for raw in pools:
        own = np.flatnonzero(np.array(raw.pool.made) == "own")
        describer = chooser(raw, steps)
        pixels = files_of(raw.archive, [raw.pool.names[row] for row in own])
        rows = describer.describe(pixels.whole(describer.size)).numpy()
        labels = raw.pool.labels[own]
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
        found[raw.name] = {"budget": budget, "pictures": len(own), "ln_classes": float(np.log(10)),
                           "features": describer.made_by, "entropy": summary, "runs": runs}  # fmt: skip
        print(raw.name, summary)
        store("curation-balance", {"pools": found})


def entropy(labels: np.ndarray) -> float:
    """In nats, over the classes; junk has none and does not count."""
    share = np.bincount(labels[labels >= 0]) / (labels >= 0).sum()
    return float(-(share[share > 0] * np.log(share[share > 0])).sum())


# -- does it help ------------------------------------------------------------------------------------------------------


def choose(raw: Raw, seeds: int, chooser_steps: int, copy_steps: int) -> dict[str, Any]:
    """What curation chooses of a pool in two ways, and as many files at random for each seed; kept in a file."""
    path = WORK / f"{raw.name}-chosen.json"
    if path.exists():
        found = json.loads(path.read_text())
        kept = {"seeds": len(found["arms"]["random"]), "copy_steps": found["copy_steps"]}
        if kept != (asked := {"seeds": seeds, "copy_steps": copy_steps}):
            raise SystemExit(f"{path} holds a choice for {kept}, and {asked} is asked for: move {WORK} away to begin anew")
        return found
    describer, names = chooser(raw, chooser_steps), np.array(raw.pool.names)

    def distinct() -> Curation:
        curation = Curation(raw.archive, WORK / raw.name, short_side=64)
        curation.drop_same()
        left = curation.pixels.select(np.flatnonzero(curation.kept))
        curation.drop_copies(trained_describer(left, curation.folder, copy_steps), threshold=None)
        return curation

    def kept(curation: Curation) -> list[str]:
        chosen = {file for file, k in zip(curation.pixels.files, curation.kept) if k}
        return [str(name) for name in names if name in chosen]

    retrieved, balanced = distinct(), distinct()
    retrieved.retrieve(raw.queries, describer)
    budget = int(retrieved.kept.sum())
    balanced.balance(budget, describer)
    draws = [np.sort(np.random.default_rng(seed).permutation(len(names))[:budget]) for seed in range(seeds)]
    found = {
        "pool": raw.name, "preset": raw.preset, "files": len(names), "budget": budget, "features": describer.made_by,
        "copy_steps": copy_steps, "queries": QUERIES, "distinct": retrieved.funnel["without copies"],
        "arms": {"random": [names[rows].tolist() for rows in draws], "balanced": [kept(balanced)] * seeds,
                 "retrieved": [kept(retrieved)] * seeds},
    }  # fmt: skip
    write_atomically(path, json.dumps(found).encode())
    return found


def nets_of(chosen: dict[str, Any], steps: int) -> dict[str, list[Net]]:
    """The networks of each arm, one for each seed."""
    archive = WORK / f"{chosen['pool']}.zip"
    return {
        arm: [Net(f"{chosen['pool']}-{arm}-{steps}-{seed}", chosen["preset"], steps, seed, archive, tuple(files))
              for seed, files in enumerate(draws)]
        for arm, draws in chosen["arms"].items()
    }  # fmt: skip


def learn(pools: Sequence[str], steps: int, jobs: int) -> None:
    """Train the networks of every pool that was chosen from, several at a time; on a machine with a GPU, say."""
    if not (WORK / "drawn.zip").exists():
        drawn_pool()
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as workers:
        for pool in pools:
            chosen = json.loads((WORK / f"{pool}-chosen.json").read_text())
            for name in workers.map(_train, [net for arm in nets_of(chosen, steps).values() for net in arm]):
                print(name, flush=True)
            write_atomically(WORK / f"{pool}-learned.json", json.dumps(environment(0, pick_device())).encode())


def _train(net: Net) -> str:
    learned(net)
    return net.name


def helps(pools: Iterator[Raw], seeds: int, steps: int, chooser_steps: int, copy_steps: int) -> None:
    """Same net, same steps: on what curation chose and on as many pictures of the raw pool at random."""
    found = stored("helps")["pools"] if (RESULTS / "curation-helps.json").exists() else {}
    for raw in pools:
        chosen = choose(raw, seeds, chooser_steps, copy_steps)
        place, world = {name: row for row, name in enumerate(raw.pool.names)}, World(raw.name, raw.bank, raw.test)
        arms: dict[str, list[dict[str, float]]] = {}
        for arm, nets in nets_of(chosen, steps).items():
            arms[arm] = []
            for net in nets:
                rows = np.array([place[file] for file in net.files])
                tokens = class_tokens(world, preset(raw.preset), {arm: learned(net)})
                arms[arm].append({
                    "knn": judge_knn(world, tokens.items())[arm]["k=20"],
                    "linear": judge_linear(world, tokens)[arm]["mean"],
                    "entropy": entropy(raw.pool.labels[rows]),
                    "junk": float((raw.pool.labels[rows] < 0).mean()),
                    "repeated": 1 - len(np.unique(raw.pool.original[rows])) / len(rows),
                })  # fmt: skip
                print(net.name, arms[arm][-1], flush=True)
        summary = {arm: {key: spread([run[key] for run in runs]) for key in runs[0]} for arm, runs in arms.items()}
        kept = "files", "budget", "features", "copy_steps", "queries", "distinct"
        found[raw.name] = {key: chosen[key] for key in kept}
        trained = WORK / f"{raw.name}-learned.json"  # of `learn`; the networks may come from another machine
        found[raw.name] |= {"steps": steps, "trained_on": json.loads(trained.read_text()) if trained.exists() else None,
                            "summary": summary, "runs": arms}  # fmt: skip
        store("curation-helps", {"pools": found})


# -- the tables --------------------------------------------------------------------------------------------------------


def stored(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"curation-{name}.json").read_text())


def tables() -> dict[str, str]:
    """The tables of docs/measured.md, written from the stored results."""
    even, helped = stored("balance"), stored("helps")
    names = list(even["pools"])
    lines = [f"| what is chosen | {' | '.join(f'{name} (nats)' for name in names)} |", "|---" * (1 + len(names)) + "|"]
    for who in even["pools"][names[0]]["entropy"]:
        cells = [_spread(even["pools"][name]["entropy"][who]) for name in names]
        lines.append(f"| {who} | " + " | ".join(cells) + " |")
    sizes = ", ".join(f"{pool['budget']:,} of {pool['pictures']:,} {name}" for name, pool in even["pools"].items())
    note = f"Entropy over the classes of {sizes}; ln 10 = 2.303. {_source(even)}"
    written = {"balance": "\n".join([*lines, "", note])}
    lines = ["| pool | learned from | k-NN | linear | entropy (nats) | junk | copies |", "|---" * 7 + "|"]
    notes = []
    for name, pool in helped["pools"].items():
        for arm, row in pool["summary"].items():
            cells = [_spread(row[key]) for key in ("knn", "linear", "entropy", "junk", "repeated")]
            lines.append(f"| {name} | {pool['budget']:,} {arm} | " + " | ".join(cells) + " |")
        seeds, machine = row["knn"]["n"], (pool["trained_on"] or helped["environment"])["machine"]
        notes.append(f"{name}: {pool['files']:,} files, {pool['steps']:,} steps, {seeds} seeds, trained on {machine}")
    return written | {"helps": "\n".join([*lines, "", f"{'; '.join(notes)}. Judged on {_source(helped)}"])}


def _spread(values: dict[str, float]) -> str:
    return f"{values['mean']:.3f}" + (f" ± {values['sd']:.3f}" if values["sd"] > 1e-9 else "")


def _source(found: dict[str, Any]) -> str:
    e = found["environment"]
    return f"{e['machine']}; torch {e['versions']['torch']}, {e['date'][:10]}, commit {e['commit']}."


def draw() -> None:
    """Left of each pair: how even the choice is; right: what is learned from it. One dot for each seed."""
    even, helped = stored("balance")["pools"], stored("helps")["pools"]
    figure = Figure(figsize=(WIDTH, 2.6 * len(even)), dpi=DPI, layout="constrained")
    figure.suptitle("What curation chooses is more even; on drawn scenes more is learned from it", fontsize=11)
    for (left, right), name in zip(figure.subplots(len(even), 2, squeeze=False), even):
        for row, (who, runs) in enumerate(even[name]["runs"].items()):
            color = COLORS["trained" if who.startswith("hierarchical") else "pixels"]
            left.plot(runs, [row] * len(runs), "o", color=color)
        left.axvline(even[name]["ln_classes"], color=COLORS["limit"], linestyle=":")
        left.set_yticks(range(len(even[name]["runs"])), list(even[name]["runs"]))
        title = f"{name}: {even[name]['budget']} of {even[name]['pictures']:,}"
        left.set(xlabel="entropy over the classes (nats)", title=title)
        for row, runs in enumerate(helped[name]["runs"].values()):
            for (key, label), marker in zip({"knn": "k-NN", "linear": "linear probe"}.items(), "os"):
                values = [100 * run[key] for run in runs]
                color = COLORS["student" if key == "knn" else "teacher"]
                right.plot(values, [row] * len(runs), marker, color=color, label=label if row == 0 else None)
        right.set_yticks(range(len(helped[name]["runs"])), list(helped[name]["runs"]))
        right.set(xlabel="accuracy (%)", title=f"{name}: learned from {helped[name]['budget']:,}")
        right.margins(y=0.2)
        if name == next(iter(even)):
            right.legend(fontsize=8)
    figure.savefig(DOCS / "curation-choice.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("balance", "choose", "learn", "helps", "draw"))
    parser.add_argument("--pools", nargs="+", choices=POOLS, default=POOLS)
    parser.add_argument("--data", type=Path, help="folder of the sets of photographs")
    parser.add_argument("--features", type=Path, help="run of the network that chooses photographs")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=600, help="of pretraining")
    parser.add_argument("--jobs", type=int, default=1, help="networks trained at a time")
    parser.add_argument("--chooser-steps", type=int, default=1000, help="of the network that chooses")
    parser.add_argument("--copy-steps", type=int, default=COPY_STEPS, help="of the copy network")
    options = parser.parse_args()
    keep_freed_memory()
    if "photographs" in options.pools and options.data is None and options.what not in ("learn", "draw"):
        parser.error("expected --data PATH, where the photographs are, or --pools drawn")
    pools = raw_pools(options.pools, options.data, options.features)
    if options.what == "balance":
        balance(pools, options.seeds, options.chooser_steps)
    elif options.what == "choose":
        for raw in pools:
            choose(raw, options.seeds, options.chooser_steps, options.copy_steps)
    elif options.what == "learn":
        learn(options.pools, options.steps, options.jobs)
    elif options.what == "helps":
        helps(pools, options.seeds, options.steps, options.chooser_steps, options.copy_steps)
    else:
        put(tables())
        draw()


if __name__ == "__main__":
    main()
