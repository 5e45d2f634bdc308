"""Is the choice better? How even what curation chooses is, and what a network learns from it.

    python benchmarks/curation.py balance [--seeds 5] [--data PATH]   a long-tailed pool: the classes of what is chosen
    python benchmarks/curation.py helps [--seeds 3] [--data PATH]     the same net on chosen and on random pictures
    python benchmarks/curation.py draw                                README tables and docs/curation-*.png

PATH holds the set `imagenette`; --features RUN is a network that chooses among its photographs. Pools, networks and
stages are kept in runs/curation, so that a study goes on where it was; delete that folder to begin anew.

Results go to data/results/curation-*.json with machine, versions and commit; no run is left out. What the copy network
knows is measured by benchmarks/copies.py, and how the stages grow by benchmarks/growth.py.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from recipe import DOCS, RESULTS, ROOT, put, spread, store
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from minidino.config import override, preset
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
from minidino.pictures import COLORS
from minidino.runs import keep_freed_memory, pick_device
from minidino.stages import World

WORK = ROOT / "runs" / "curation"
POOL_WORLD, JUDGING_WORLD, TAIL = 21, 1021, 1.5


class Raw(NamedTuple):
    """A raw pool, what is known of it, labelled pictures to judge on, and the network that chooses."""

    archive: Path
    pool: Pool
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
    return Raw(archive, pool, pixels.select(range(2000)), pixels.select(range(2000, 3000)), "scenes-cpu", None)


def photograph_pool(data: Path, features: Path | None, n: int = 2400) -> Raw:
    """Photographs of Imagenette, as uneven; judged on all of its validation part, the rest of training as the bank."""
    images = open_images(data / "imagenette")
    parts = {name: load_pixels(images.select(np.flatnonzero(images.splits == name)), 64, WORK / name)
             for name in ("train", "val")}  # fmt: skip
    labels, rng = parts["train"].labels, np.random.default_rng(POOL_WORLD)
    groups = [rng.permutation(np.flatnonzero(labels == kind)) for kind in range(10)]
    rows = np.sort(np.concatenate([g[:m] for g, m in zip(groups, long_tail(n, 10, TAIL).clip(max=800))]))
    rest = np.setdiff1d(np.arange(len(labels)), rows)
    shown = [parts["train"].image(i).transpose(1, 2, 0) for i in rows]
    pool = make_pool(shown, labels[rows], copies=0.5, junk=0.25, seed=POOL_WORLD)
    archive = write_pool(pool, WORK / "photographs.zip")
    return Raw(archive, pool, parts["train"].select(rest), parts["val"], "imagenette-cpu", features)


def raw_pools(data: Path | None, features: Path | None) -> Iterator[Raw]:
    WORK.mkdir(parents=True, exist_ok=True)
    yield drawn_pool()
    if data is not None:
        yield photograph_pool(data, features)


def pixels_of(raw: Raw, rows: Sequence[int]) -> Pixels:
    """These files of the pool, decoded."""
    images = open_images(raw.archive)
    place = {name: i for i, name in enumerate(images.files)}
    return load_pixels(images.select([place[raw.pool.names[row]] for row in rows]), 64, progress=False)


def learned(raw: Raw, arm: str, rows: Sequence[int], steps: int, seed: int) -> VisionTransformer:
    """The frozen backbone of the preset, trained on these files of the pool."""
    path = WORK / f"{raw.name}-{arm}-{steps}-{seed}.safetensors"
    config = override(preset(raw.preset), [f"run.steps={steps}", f"run.seed={seed}"])
    state = start(config, pick_device())
    backbone = state.teacher.backbone
    if path.exists():
        backbone.load_state_dict(load_file(path))
    else:
        for _ in tqdm(train(config, pixels_of(raw, rows), state), total=steps, desc=path.stem, leave=False):
            pass
        save_file(backbone.state_dict(), path)
    return backbone


def chooser(raw: Raw, steps: int) -> Describer:
    """The semantic network: a given run, or the preset trained on the raw pool itself, junk and copies included."""
    if raw.features:
        return semantic_describer(raw.features)
    net = learned(raw, "everything", range(len(raw.pool.names)), steps, 0)
    return Describer("semantic", network(net), raw.size, f"{raw.preset}, {steps} steps on the raw pool")


# -- how even ----------------------------------------------------------------------------------------------------------


def balance(pools: Iterator[Raw], seeds: int, steps: int) -> None:
    """Entropy over the true classes of a tenth of a long tail: at random, by plain and by resampled clusters."""
    found: dict[str, Any] = {}
    for raw in pools:
        own = np.flatnonzero(np.array(raw.pool.made) == "own")
        describer = chooser(raw, steps)
        rows = describer.describe(pixels_of(raw, own).whole(describer.size)).numpy()
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


def helps(pools: Iterator[Raw], seeds: int, steps: int, chooser_steps: int, copy_steps: int) -> None:
    """Same net, same steps: on what curation chose and on as many pictures of the raw pool at random."""
    found: dict[str, Any] = {}
    for raw in pools:
        n, describer = len(raw.pool.names), chooser(raw, chooser_steps)
        curation = Curation(raw.archive, WORK / raw.name, short_side=64)
        curation.drop_same()
        distinct = curation.pixels.select(np.flatnonzero(curation.kept))
        curation.drop_copies(trained_describer(distinct, curation.folder, copy_steps), threshold=None)
        budget = int(curation.kept.sum()) // 2
        curation.balance(budget, describer)
        kept = {file for file, k in zip(curation.pixels.files, curation.kept) if k}
        curated = np.flatnonzero([file in kept for file in raw.pool.names])
        world = World(raw.name, raw.bank, raw.test)
        arms: dict[str, list[dict[str, float]]] = {"random": [], "curated": []}
        for seed in range(seeds):
            chance = np.random.default_rng(seed)
            for arm, rows in (("random", np.sort(chance.permutation(n)[:budget])), ("curated", curated)):
                net = learned(raw, arm, rows, steps, seed)
                tokens = class_tokens(world, preset(raw.preset), {arm: net})
                arms[arm].append({
                    "knn": judge_knn(world, tokens.items())[arm]["k=20"],
                    "linear": judge_linear(world, tokens)[arm]["mean"],
                    "entropy": entropy(raw.pool.labels[rows]),
                    "junk": float((raw.pool.labels[rows] < 0).mean()),
                    "repeated": 1 - len(np.unique(raw.pool.original[rows])) / len(rows),
                })  # fmt: skip
                print(raw.name, arm, seed, arms[arm][-1], flush=True)
        summary = {arm: {key: spread([run[key] for run in runs]) for key in runs[0]} for arm, runs in arms.items()}
        found[raw.name] = {"files": n, "budget": budget, "steps": steps, "features": describer.made_by,
                           "copy_steps": copy_steps, "funnel": curation.funnel, "summary": summary, "runs": arms}  # fmt: skip
        store("curation-helps", {"pools": found})


# -- the README --------------------------------------------------------------------------------------------------------


def stored(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"curation-{name}.json").read_text())


def tables() -> dict[str, str]:
    """The README's tables, written from the stored results."""
    even, helped = stored("balance"), stored("helps")
    names = list(even["pools"])
    lines = ["| what is chosen | " + " | ".join(f"{name} (nats)" for name in names) + " |", "|---" * (1 + len(names)) + "|"]
    for who in even["pools"][names[0]]["entropy"]:
        cells = [_spread(even["pools"][name]["entropy"][who]) for name in names]
        lines.append(f"| {who} | " + " | ".join(cells) + " |")
    written = {"balance": "\n".join([*lines, "", _source(even)])}
    lines = ["| pool | learned from | k-NN | linear | junk | copies | entropy (nats) |", "|---" * 7 + "|"]
    for name, pool in helped["pools"].items():
        for arm, row in pool["summary"].items():
            cells = [_spread(row[key]) for key in ("knn", "linear", "junk", "repeated", "entropy")]
            lines.append(f"| {name} | {pool['budget']:,} {arm} | " + " | ".join(cells) + " |")
    return written | {"helps": "\n".join([*lines, "", _source(helped)])}


def _spread(values: dict[str, float]) -> str:
    return f"{values['mean']:.3f}" + (f" ± {values['sd']:.3f}" if values["sd"] else "")


def _source(found: dict[str, Any]) -> str:
    e = found["environment"]
    return f"{e['machine']}; torch {e['versions']['torch']}, {e['date'][:10]}, commit {e['commit']}."


def draw() -> None:
    """Left of each pair: how even the choice is; right: what is learned from it. One dot for each seed."""
    even, helped = stored("balance")["pools"], stored("helps")["pools"]
    figure = Figure(figsize=(9, 3 * len(even)), dpi=100, layout="constrained")
    axes = figure.subplots(len(even), 2, squeeze=False)
    for (left, right), name in zip(axes, even):
        for row, runs in enumerate(even[name]["runs"].values()):
            left.plot(runs, [row] * len(runs), "o", color=COLORS["trained" if row == 3 else "pixels"])
        left.axvline(even[name]["ln_classes"], color=COLORS["limit"], linestyle=":")
        left.set_yticks(range(len(even[name]["runs"])), list(even[name]["runs"]))
        left.set(xlabel="entropy over the classes (nats)", title=f"{name}: {even[name]['budget']} of {even[name]['pictures']}")
        for row, (arm, runs) in enumerate(helped[name]["runs"].items()):
            for key, marker in (("knn", "o"), ("linear", "s")):
                label = {"knn": "k-NN", "linear": "linear probe"}[key] if row == 0 else None
                values = [100 * run[key] for run in runs]
                right.plot(values, [row] * len(runs), marker, color=COLORS["student" if key == "knn" else "teacher"], label=label)
        right.set_yticks(range(2), list(helped[name]["runs"]))
        right.set(xlabel="accuracy (%)", title=f"{name}: learned from {helped[name]['budget']:,}", ylim=(-0.5, 1.5))
        right.legend()
    figure.savefig(DOCS / "curation-choice.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("balance", "helps", "draw"))
    parser.add_argument("--data", type=Path, help="folder of the sets of photographs")
    parser.add_argument("--features", type=Path, help="run of the network that chooses photographs")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=600, help="of pretraining")
    parser.add_argument("--chooser-steps", type=int, default=1000, help="of the network that chooses")
    parser.add_argument("--copy-steps", type=int, default=COPY_STEPS, help="of the copy network")
    options = parser.parse_args()
    keep_freed_memory()
    pools = raw_pools(options.data, options.features)
    if options.what == "balance":
        balance(pools, options.seeds, options.chooser_steps)
    elif options.what == "helps":
        helps(pools, options.seeds, options.steps, options.chooser_steps, options.copy_steps)
    else:
        put(tables())
        draw()


if __name__ == "__main__":
    main()
