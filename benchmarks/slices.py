"""Whom a choice of pictures leaves out: networks that learned from what was asked for, judged on what nobody asked for.

    python benchmarks/slices.py run [--seeds 3]     data/results/slices.json
    python benchmarks/slices.py draw                the table of docs/measured.md

A pool of even drawn scenes; a tenth of it is chosen at random, by queries of all ten kinds, or by queries of five kinds. Each
choice teaches one network for each seed, as many steps each. All are judged by logistic regression on the same even scenes
of another world, so that only features can know less of a kind. Networks are kept in runs/slices.
"""

import argparse
import json
from typing import Any

import numpy as np
import torch
from curation import taught
from probes import _said
from recipe import RESULTS, ROOT, made_on, put, spread, store

from minidino.config import override, preset
from minidino.curation.retrieval import retrieve_by_sample
from minidino.images.pixels import Pixels
from minidino.images.scenes import KINDS, Scenes, draw_scenes
from minidino.judge import trained_backbone
from minidino.model.vit import VisionTransformer
from minidino.probes.features import extract
from minidino.probes.logistic import logistic_regression
from minidino.runs import Run, keep_freed_memory, pick_device

WORK = ROOT / "runs" / "slices"
PRESET, STEPS, SIZE = "scenes-cpu", 600, 48
POOL_WORLD, QUERY_WORLD, JUDGING_WORLD = 41, 42, 1041
N_POOL, BUDGET, QUERIES = 10_000, 1000, 300
N_BANK, N_TEST = 3000, 3000
ASKED = range(5)  # kinds that the narrow queries show
COLUMNS = ("unasked_share", "all", "asked", "unasked", "worst", "gap")


def pixels_of(scenes: Scenes) -> Pixels:
    return Pixels.from_array(scenes.images, scenes.labels, list(KINDS))


def described(vit: VisionTransformer, pixels: Pixels) -> torch.Tensor:
    return extract(vit, pixels.squares(SIZE), progress=False)["cls"]


def choices(seeds: int) -> tuple[Pixels, dict[str, list[np.ndarray]]]:
    """The pool, and the rows of each choice, one for each seed; the choices by queries are the same for all seeds."""
    pool, drawn = pixels_of(draw_scenes(N_POOL, seed=POOL_WORLD)), draw_scenes(4 * QUERIES, seed=QUERY_WORLD)
    chooser = trained_backbone(Run(ROOT / "data" / "runs" / "scenes-cpu"), pick_device())
    rows, queries = described(chooser, pool).numpy(), described(chooser, pixels_of(drawn)).numpy()
    narrow = np.flatnonzero(np.isin(drawn.labels, ASKED))[:QUERIES]
    found = {"at random": [np.random.default_rng(seed).permutation(N_POOL)[:BUDGET] for seed in range(seeds)]}
    for words, asking in (("asked for ten kinds", queries[:QUERIES]), ("asked for five kinds", queries[narrow])):
        found[words] = [_nearest(asking, rows)] * seeds
    return pool, found


def _nearest(queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """As many rows as the budget allows: the fewest neighbours of each query that fill it, the most similar first."""
    for n in range(1, N_POOL):
        brought = retrieve_by_sample(queries, rows, n)
        if len(brought.rows) >= BUDGET:
            return np.sort(brought.rows[np.argsort(-brought.similarity, kind="stable")[:BUDGET]])
    raise ValueError(f"the pool has fewer than {BUDGET} pictures")


def learned(name: str, pixels: Pixels, seed: int) -> VisionTransformer:
    """A frozen backbone that learned from these pictures."""
    WORK.mkdir(parents=True, exist_ok=True)
    config = override(preset(PRESET), [f"run.steps={STEPS}", f"run.seed={seed}"])
    return taught(WORK / f"{name.replace(' ', '-')}-{seed}.safetensors", config, lambda: pixels)


def judged(vit: VisionTransformer, judging: Pixels) -> dict[str, float]:
    """Top-1 over kinds: of all, of those asked for, of the others; the worst kind, and how far from the best it is."""
    tokens, labels = described(vit, judging), judging.labels
    model = logistic_regression(tokens[:N_BANK], labels[:N_BANK], tokens[N_BANK:], labels[N_BANK:])["model"]
    truth = labels[N_BANK:]
    right = model.predict(tokens[N_BANK:]).numpy() == truth
    of_kind = np.array([right[truth == kind].mean() for kind in range(len(KINDS))])
    return {"all": of_kind.mean(), "asked": of_kind[ASKED].mean(), "unasked": of_kind[len(ASKED):].mean(),
            "worst": of_kind.min(), "gap": np.ptp(of_kind), "of_kind": of_kind.tolist()}  # fmt: skip


def run(seeds: int) -> None:
    pool, chosen = choices(seeds)
    judging = pixels_of(draw_scenes(N_BANK + N_TEST, seed=JUDGING_WORLD))
    arms: dict[str, list[dict[str, Any]]] = {}
    for arm, draws in chosen.items():
        for seed, rows in enumerate(draws):
            told = {"unasked_share": float((pool.labels[rows] >= len(ASKED)).mean())}
            told |= judged(learned(arm, pool.select(rows), seed), judging)
            arms.setdefault(arm, []).append(told)
            print(arm, seed, told, flush=True)
    summary = {arm: {key: spread([run[key] for run in runs]) for key in COLUMNS} for arm, runs in arms.items()}
    store("slices", {"pool": N_POOL, "budget": BUDGET, "queries": QUERIES, "steps": STEPS, "n_test": N_TEST,
                     "summary": summary, "runs": arms})  # fmt: skip


def tables() -> dict[str, str]:
    """The table of docs/measured.md, written from the stored result."""
    found = json.loads((RESULTS / "slices.json").read_text())
    lines = ["| chosen | of the five kinds nobody asked for | top-1, all kinds | the five asked for | the other five | "
             "the worst kind | from worst to best |", "|---" * 7 + "|"]  # fmt: skip
    for arm, row in found["summary"].items():
        share, *rest = (row[key] for key in COLUMNS)
        cells = [f"{100 * share['mean']:.0f} %", *map(_said, rest)]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    seeds = len(next(iter(found["runs"].values())))
    note = (f"{found['budget']:,} of {found['pool']:,} drawn scenes, {found['queries']} queries, {found['steps']} steps, {seeds} "
            f"seeds of training; logistic regression, {found['n_test']:,} scenes of another world. {made_on(found)}")  # fmt: skip
    return {"slices": "\n".join([*lines, "", note])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "draw"))
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    keep_freed_memory()
    if options.what == "run":
        run(options.seeds)
    put(tables())


if __name__ == "__main__":
    main()
