"""Copy detection measured: which copies are known again, at which threshold.

    python benchmarks/copies.py run --data PATH      against imagededup's hashes and nets that learned nothing
    python benchmarks/copies.py draw                 the table of docs/measured.md and docs/copies-*.png from the stored result

PATH holds the sets `pool` and `copies` with their ground truth; `run` needs imagededup (pip install imagededup).

The result goes to data/results/curation-copies.json with machine, versions and commit.
"""

import argparse
import csv
import io
import json
import tempfile
import time
import zipfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from recipe import DOCS, RESULTS, count, put, spread, store
from tqdm import tqdm

from minidino.config import preset
from minidino.curate import COPY_STEPS, trained_describer
from minidino.curation.duplicates import COPY, LEAK, hash_duplicates, relative_duplicates
from minidino.curation.embeddings import PARTS, WHOLE, Part, embed, network
from minidino.curation.pipeline import Describer
from minidino.curation.registration import PROOF, agreement, proposed_between, proposed_within, proven_leaks
from minidino.curation.search import unit_rows
from minidino.images.datasets import open_images
from minidino.images.pixels import Pixels, load_pixels
from minidino.judge import random_backbone
from minidino.pictures import COLORS
from minidino.runs import keep_freed_memory, pick_device

Describe = Callable[[Pixels], np.ndarray]
SIDE = 112  # px, of the shorter side of a decoded picture
OURS, PROVEN = "CopyNet", "CopyNet and proof"
PRECISION = 0.99  # of the links that are found, for the recall that is compared


class Task(NamedTuple):
    """Pairs of pictures of which some are copies."""

    left: Pixels
    right: Pixels
    truth: np.ndarray  # (L, R) bool
    made: np.ndarray  # (L,) how the left picture was made; "" = it is no copy
    counted: np.ndarray  # (L, R) bool, the pairs that are judged


def copies_task(data: Path, folder: Path) -> Task:
    """Altered pictures against references, 30 of them altered from pictures that are not there."""
    pixels = load_pixels(open_images(data / "copies"), SIDE, folder / "copies")
    row = {Path(name).name: i for i, name in enumerate(pixels.files)}
    truth = list(csv.DictReader(io.StringIO(_read(data / "copies" / "copies.zip", "copies/ground_truth.csv"))))
    references = [Path(r["file"]).name for r in truth if r["role"] == "reference"]
    queries = [r for r in truth if r["role"] == "query"]
    asked = np.array([Path(r["reference"]).name for r in queries])
    same = asked[:, None] == np.array(references)[None]
    made = np.array([r["attack"].split(":")[0] if r["reference"] else "" for r in queries])
    rows = [row[Path(r["file"]).name] for r in queries]
    return Task(pixels.select(rows), pixels.select([row[name] for name in references]), same, made, np.ones_like(same))


def pool_task(data: Path, folder: Path) -> Task:
    """Every picture of the pool against every other; two kinds of junk are not judged against each other."""
    pixels = load_pixels(open_images(data / "pool"), SIDE, folder / "pool")
    row = {Path(name).name: i for i, name in enumerate(pixels.files)}
    group, made, junk = np.arange(len(row)), np.full(len(row), "", dtype=object), np.zeros(len(row), dtype=bool)
    outside: dict[str, int] = {}
    for r in csv.DictReader(io.StringIO((data / "pool" / "ground_truth.csv").read_text())):
        i, origin = row[Path(r["file"]).name], r["duplicate_of"]
        junk[i] = not r["class"].startswith(("n0", "n1", "cifar10:"))
        if origin:
            group[i] = outside.setdefault(origin, i) if origin.startswith("@") else row[Path(origin).name]
            made[i] = "" if origin.startswith("@") else r["transform"] or r["kind"]
    while (group[group] != group).any():
        group = group[group]
    counted = np.triu(np.ones((len(row), len(row)), dtype=bool), 1) & ~(junk[:, None] & junk)
    return Task(pixels, pixels, group[:, None] == group, made, counted)


def hashes() -> dict[str, Describe]:
    """imagededup's perceptual hashes as rows of +-1: their cosine is 1 - 2 d / 64 for d different bits."""
    from imagededup.methods import AHash, DHash, PHash, WHash

    def describer(method: Any) -> Describe:
        def describe(pixels: Pixels) -> np.ndarray:
            codes = [method.encode_image(image_array=pixels.image(i).transpose(1, 2, 0)) for i in range(len(pixels))]
            bits = np.unpackbits(np.array([list(bytes.fromhex(code)) for code in codes], dtype=np.uint8), axis=1)
            return 2.0 * bits - 1

        return describe

    return {f"imagededup {m.__name__}": describer(m(verbose=False)) for m in (PHash, DHash, WHash, AHash)}


def cosines(describe: Describe, task: Task) -> np.ndarray:
    """How alike the descriptors of each pair are, (L, R)."""
    left = unit_rows(describe(task.left))
    right = left if task.right is task.left else unit_rows(describe(task.right))
    return left @ right.T


def proofs(describe: Describe, task: Task) -> np.ndarray:
    """How well the pairs that a describer proposes agree when one is laid upon the other, (L, R); -1 = not proposed."""
    within, left = task.right is task.left, describe(task.left)
    pairs = proposed_within(left) if within else proposed_between(left, describe(task.right))
    score = np.full(task.truth.shape, -1, dtype=np.float32)
    score[tuple(pairs.T)] = agreement(task.left, task.right, pairs, progress=False)
    return np.maximum(score, score.T) if within else score


def judged(score: np.ndarray, task: Task) -> dict[str, Any]:
    """The curve of precision and recall over pairs, and the recall of each kind of change where 99 of 100 are right."""
    flat, true = score[task.counted], task.truth[task.counted]
    order = np.argsort(-flat, kind="stable")
    hits = np.cumsum(true[order])
    last = np.append(np.diff(flat[order]) < 0, True)  # pairs of equal score are taken together
    good = np.flatnonzero((hits >= PRECISION * np.arange(1, len(hits) + 1)) & last)
    threshold = float(flat[order[good[-1]]]) if len(good) else np.inf
    linked = task.truth & ~np.eye(*score.shape, dtype=bool) if task.right is task.left else task.truth
    own = np.where(linked, score, -np.inf).max(1)  # a copy counts by its best link to any of its group
    found = {"threshold": threshold, "recall": float(hits[good[-1]] / true.sum()) if len(good) else 0.0}
    found["recall_of"] = {name: float((own[task.made == name] >= threshold).mean())
                          for name in dict.fromkeys(task.made) if name}  # fmt: skip
    found["curve"] = []
    for cut in np.linspace(0.2, 0.95, 16).tolist():
        n = int((flat > cut).sum())
        right_ones = int((true & (flat > cut)).sum())
        found["curve"].append({"threshold": cut, "recall": right_ones / int(true.sum()),
                               "precision": right_ones / n if n else 1.0})  # fmt: skip
    return found


def leaks(describer: Describer, pool: Pixels, data: Path, folder: Path) -> dict[str, Any]:
    """Relative deduplication of the pool against three evaluation sets, of which 180 pictures or copies are planted.

    By a threshold on the cosine to whole pictures, or to these and their parts, as published; and by proof, as the
    pipeline does it.
    """
    planted, told = np.zeros(len(pool), dtype=bool), {}
    row = {Path(name).name: i for i, name in enumerate(pool.files)}
    for r in csv.DictReader(io.StringIO((data / "pool" / "ground_truth.csv").read_text())):
        planted[row[Path(r["file"]).name]] = r["duplicate_of"].startswith("@")
    rows, proof = rows_of(describer, pool, folder), np.zeros(len(pool))
    references: dict[str, list[np.ndarray]] = {"whole": [], "parts": []}
    for name in ("imagenette", "tiny-imagenet-40", "cifar10"):
        images = open_images(data / name)
        pixels = load_pixels(images.split("val"), SIDE, folder / name)
        views = [rows_of(describer, pixels, folder, part) for part in PARTS]
        references["whole"].append(views[0])
        references["parts"] += views
        proof = np.maximum(proof, proven_leaks(pool, rows, pixels, np.concatenate(views), progress=False)[0])
    for threshold in (0.35, 0.4, LEAK, 0.5, 0.55, COPY):
        told[f"{threshold:g}"] = {by: counted(relative_duplicates(rows, np.concatenate(reference), threshold), planted)
                                  for by, reference in references.items()}  # fmt: skip
    return told | {"proof": {f"{threshold:g}": counted(proof > threshold, planted)
                             for threshold in (0.6, 0.65, PROOF, 0.75, 0.8)}}  # fmt: skip


def counted(found: np.ndarray, planted: np.ndarray) -> dict[str, int]:
    return {"planted": int(planted.sum()), "found": int(found[planted].sum()),
            "pool": len(found), "others": int(found[~planted].sum())}  # fmt: skip


def rows_of(describer: Describer, pixels: Pixels, folder: Path, part: Part = WHOLE) -> np.ndarray:
    name, describe, made_by = folder / "rows.npy", describer.describe, describer.made_by
    rows = embed(pixels, describe, describer.size, name, describer.kind, made_by, "float32", progress=False, part=part).rows
    return np.array(rows)  # the file is written again for the next


def run(data: Path, steps: int, seeds: int) -> None:
    """All describers on both tasks; ours is taught on the pool alone, so the pictures of `copies` are new to it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tasks = {"copies": copies_task(data, folder), "pool": pool_task(data, folder)}
        pool = tasks["pool"].left
        everyone: dict[str, Describe] = hashes()
        everyone["colours of 16 x 16 places"] = lambda pixels: pixels.whole(16).flatten(1).numpy() - 127.5
        random_vit = network(random_backbone(preset("imagenette-cpu"), pick_device()))
        nets, seconds, guarded = {"random ViT": Describer("copy", random_vit, 64, "random ViT")}, [], []
        distinct = pool.select(np.sort(hash_duplicates(pool.whole(16).flatten(1).numpy()).representatives))
        for seed in range(seeds):
            begun = time.perf_counter()
            ours = nets[f"{OURS}, seed {seed}"] = trained_describer(distinct, folder, steps, seed)
            seconds.append(time.perf_counter() - begun)
            guarded.append(leaks(ours, pool, data, folder))
            print(seed, guarded[-1])
        for who, net in nets.items():
            everyone[who] = lambda pixels, net=net: rows_of(net, pixels, folder)
        runs = {}
        for who, describe in tqdm(everyone.items(), unit="describer"):
            runs[who] = {name: judged(cosines(describe, task), task) for name, task in tasks.items()}
            if who.startswith(OURS):
                runs[who.replace(OURS, PROVEN)] = {name: judged(proofs(describe, task), task) for name, task in tasks.items()}
                tqdm.write(f"{PROVEN}: " + str([run["recall"] for run in runs[who.replace(OURS, PROVEN)].values()]))
            tqdm.write(who + "".join(f", {task} {found['recall']:.3f}" for task, found in runs[who].items()))
        store("curation-copies", {"steps": steps, "seconds": seconds, "precision": PRECISION, "leaks": guarded,
                                  "runs": runs})  # fmt: skip


def tables() -> dict[str, str]:
    """The tables of docs/measured.md, written from the stored result."""
    found = stored()
    lines = ["| describer | altered pictures (%) | a pool (%) |", "|---|---|---|"]
    for who, runs in by_name(found["runs"]).items():
        cells = [spread([100 * float(np.mean(list(run[task]["recall_of"].values()))) for run in runs])
                 for task in ("copies", "pool")]  # fmt: skip
        lines.append(f"| {who} | " + " | ".join(_spread(cell) for cell in cells) + " |")
    first = found["leaks"][0]["proof"][f"{PROOF:g}"]
    lines += ["", f"| what is too close | leaks found, of {first['planted']} | others dropped, of "
              f"{first['pool'] - first['planted']:,} |", "|---|---|---|"]  # fmt: skip
    rows = [(f"cosine above {t} to a whole picture", [run[t]["whole"] for run in found["leaks"]]) for t in ("0.45", "0.6")]
    rows += [(f"cosine above {t} to a picture or a part", [run[t]["parts"] for run in found["leaks"]]) for t in ("0.45", "0.6")]
    rows += [(f"proof above {PROOF:g}", [run["proof"][f"{PROOF:g}"] for run in found["leaks"]])]
    for words, runs in rows:
        lines.append(f"| {words} | " + " | ".join(", ".join(f"{run[key]:,}" for run in runs) for key in ("found", "others")) + " |")
    e, seconds = found["environment"], spread(found["seconds"])
    lines += ["", f"Copies that are linked to their original or to another copy of it, mean over the kinds of change, where "
              f"{found['precision']:.0%} of the links are right; ours: mean ± standard deviation over "
              f"{seconds['n']} seeds, {found['steps']} steps, {seconds['mean']:.0f} ± {seconds['sd']:.0f} s of training "
              f"on {e['machine']}; torch {e['versions']['torch']}, {e['date'][:10]}, commit {e['commit']}."]  # fmt: skip
    return {"copies": "\n".join(lines)}


def by_name(runs: dict[str, Any]) -> dict[str, list[Any]]:
    """The runs of each describer, seeds together."""
    names: dict[str, list[Any]] = {}
    for who, found in runs.items():
        names.setdefault(who.split(", seed")[0], []).append(found)
    return names


def _spread(values: dict[str, float]) -> str:
    return f"{values['mean']:.1f}" + (f" ± {values['sd']:.1f}" if values["n"] > 1 else "")


def stored() -> dict[str, Any]:
    return json.loads((RESULTS / "curation-copies.json").read_text())


def draw() -> None:
    """Precision and recall around the default thresholds, and the recall of each kind of change."""
    runs = by_name(stored()["runs"])
    titles = {"copies": "altered pictures against references", "pool": "a pool against itself"}
    figure = Figure(figsize=(9, 3.6), dpi=100, layout="constrained")
    for ax, (task, title) in zip(figure.subplots(1, 2, sharey=True), titles.items(), strict=True):
        for seed, found in enumerate(runs[OURS]):
            curve = found[task]["curve"]
            for key, color, style in (("precision", "teacher", "-"), ("recall", "student", "--")):
                points = [point["threshold"] for point in curve], [100 * point[key] for point in curve]
                ax.plot(*points, style, color=COLORS[color], label=None if seed else key)
        for threshold in (LEAK, COPY):
            ax.axvline(threshold, color=COLORS["limit"], linestyle=":", linewidth=1)
        ax.set(xlabel="threshold of the cosine", title=title)
        ax.legend(loc="lower right")
    figure.axes[0].set_ylabel("share of links (%)")
    figure.suptitle("Links around the thresholds for leaks (0.45) and copies (0.6)")
    figure.savefig(DOCS / "copies-thresholds.png")

    figure = Figure(figsize=(9, 5.5), dpi=100, layout="constrained")
    for ax, (task, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        ours = runs[PROVEN][0][task]["recall_of"]
        kinds = sorted(ours, key=ours.get)
        for who, found in runs.items():
            if not who.startswith(("imagededup", OURS)):
                continue
            shares = np.array([[100 * run[task]["recall_of"][kind] for kind in kinds] for run in found])
            color, marker = {OURS: ("student", "s"), PROVEN: ("trained", "o")}.get(who, ("pixels", "x"))
            ax.plot(shares.mean(0), np.arange(len(kinds)), marker, color=COLORS[color], label=who)
            ax.hlines(np.arange(len(kinds)), shares.min(0), shares.max(0), color=COLORS[color])
        ax.set_yticks(np.arange(len(kinds)), kinds, fontsize=8)
        ax.set(xlabel="found (%)", title=title, xlim=(-3, 103))
    handles, labels = figure.axes[0].get_legend_handles_labels()
    words = ["four perceptual hashes", *labels[-2:]]
    figure.legend(handles[-3:], words, loc="outside lower center", ncols=3)
    figure.suptitle("Which changes are known again, where 99 of 100 links are right")
    figure.savefig(DOCS / "copies-kinds.png")


def _read(archive: Path, name: str) -> str:
    with zipfile.ZipFile(archive) as file:
        return file.read(name).decode()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "draw"))
    parser.add_argument("--data", type=Path, help="folder of the sets of photographs")
    parser.add_argument("--seeds", type=count, default=3)
    parser.add_argument("--steps", type=count, default=COPY_STEPS, help="of the copy network")
    options = parser.parse_args()
    if options.what == "run" and options.data is None:
        parser.error("run: expected --data PATH, the folder of the sets pool and copies")
    if options.what == "run" and find_spec("imagededup") is None:
        parser.error("run: needs imagededup, whose hashes it is compared with: pip install imagededup")
    keep_freed_memory()
    if options.what == "run":
        run(options.data, options.steps, options.seeds)
    put(tables())
    draw()


if __name__ == "__main__":
    main()
