"""What each part of DINOv2 is worth: one left out or changed at a time, judged by all that features are used for.

    python benchmarks/ablations.py learn [--seeds 3] [--only CHANGE]  networks of drawn scenes, kept in runs/ablations-*
    python benchmarks/ablations.py judge [--seeds 3]                  those that are there under the same probes
    python benchmarks/ablations.py draw                               the table of docs/measured.md and its picture

The preset scenes-cpu for 500 steps on world 11, judged on world 1011. Signs to look for (paper, table 3): KoLeo helps to
find a picture again, iBOT helps patches to name what they show. Results: data/results/ablations.json.
"""

import argparse
import json
import math
import sys
from functools import cache
from pathlib import Path

import numpy as np
import torch
from recipe import REPORTING, RESULTS, count, made_on, put, spread, store

from minidino.config import RunConfig, override, preset
from minidino.images.batches import crop_laws
from minidino.images.crops import crop_seed, multi_crop
from minidino.judge import class_tokens, judge_knn, judge_patches, trained_backbone
from minidino.pictures import figure_of, save
from minidino.probes.retrieval import Query, mean_average_precision, similarity
from minidino.runs import Run, pick_device, write_atomically
from minidino.stages import World, open_world, pretrain

RUNS, DOCS = Path("runs"), RESULTS.parents[1] / "docs"
STEPS, N_QUERIES = 500, 500
PRESET = "the preset"
CHANGES: dict[str, tuple[str, ...]] = {
    PRESET: (),
    "no KoLeo": ("loss.koleo=0.0",),
    "no iBOT": ("loss.ibot=0.0",),
    "centring instead of Sinkhorn": ("loss.targets=centering",),
    "one head for both": ("heads.tied=true",),
    "no local crops": ("crops.n_local=0",),
    "four registers": ("vit.num_register_tokens=4",),
    "KoLeo on one view (paper)": ("loss.koleo_views=paper",),
    "iBOT divided by all crops (released)": ("loss.ibot_divisor=released",),
    "lengths of prototypes learn (released)": ("heads.weight_g=released",),
    "one clipping for all": ("optim.clip_scope=global",),
}
READINGS = {"knn": "k-NN", "map": "found again, mAP", "miou": "mIoU of patches", "rmse": "depth RMSE (m)"}
SIGNS = (("no KoLeo", "map"), ("no iBOT", "miou"))  # what the paper says gets worse


def config_of(name: str, seed: int, steps: int = STEPS) -> RunConfig:
    run = (f"run.steps={steps}", f"run.seed={seed}", f"run.knn_every={steps}", "run.keep_checkpoints=1")
    return override(preset("scenes-cpu"), [*run, f"data.scene_seed={REPORTING}", *CHANGES[name]])


@cache
def world() -> World:
    return open_world(config_of(PRESET, 0), RUNS / "unused")


def folder_of(name: str, seed: int) -> Path:
    return RUNS / f"ablations-{'-'.join(name.split())}-{seed}"


def network(name: str, seed: int) -> Run:
    """The run of one change."""
    return learned(config_of(name, seed), folder_of(name, seed), world())


def learned(config: RunConfig, folder: Path, seen: World) -> Run:
    """The run of a folder, trained or trained on where it is not finished."""
    if not (folder / "weights.safetensors").exists():
        pretrain(config, folder, seen, resume=(folder / "config.json").exists())
    return Run(folder)


def reading(run: Run, seen: World) -> dict[str, float]:
    """Whole pictures, pictures found again by a part of them, and patches; asked once of each network."""
    path = run.folder / "reading.json"
    if path.exists():
        return json.loads(path.read_text())
    config, net = run.config(), {"trained": trained_backbone(run, pick_device())}
    knn = judge_knn(seen, class_tokens(seen, config, net).items())["trained"]
    patches = judge_patches(seen, config, net)["trained"]
    found = {"knn": knn["k=20"], "knn_best": knn["best"], "map": found_again(net["trained"], config, seen),
             "miou": patches["miou"], "rmse": patches["rmse"]}  # fmt: skip
    print(run.folder.name, found, flush=True)
    write_atomically(path, json.dumps(found).encode())
    return found


@torch.no_grad()
def found_again(net: torch.nn.Module, config: RunConfig, seen: World) -> float:
    """mAP of held-out scenes, each asked for by a distorted crop of itself, among all held-out scenes."""
    n = min(N_QUERIES, len(seen.test))
    images, sizes = seen.test.batch(torch.arange(n))
    first, second, local = crop_laws(preset("scenes-cpu").crops)
    seeds = [crop_seed(REPORTING, 0, i) for i in range(n)]
    asked = multi_crop(images, sizes, [first, second], local, 0, seeds)[0][0]
    queries = torch.cat([net(part) for part in asked.split(250)])
    database = class_tokens(seen, config, {"trained": net})["trained"][1]
    return mean_average_precision(similarity(queries, database), [Query([row]) for row in range(n)])["map"]


def learn(seeds: int, only: list[str]) -> None:
    for seed in range(seeds):  # all changes of a seed before the next: a study that is cut short still compares
        for name in only or CHANGES:
            print(network(name, seed).folder, flush=True)


def judge(seeds: int) -> None:
    rows = {}
    for name in CHANGES:
        if not all((folder_of(name, seed) / "weights.safetensors").exists() for seed in range(seeds)):
            print(f"not learned yet: {name}")
            continue
        runs = [reading(network(name, seed), world()) | {"seed": seed} for seed in range(seeds)]
        rows[name] = {"changes": CHANGES[name], "runs": runs,
                      "summary": {key: spread([run[key] for run in runs]) for key in READINGS}}  # fmt: skip
    if PRESET not in rows:
        sys.exit(f"nothing to compare with, and nothing stored: ablations.py learn --seeds {seeds} comes first")
    signs = [{"change": name, "reading": key, **paired(rows[PRESET]["runs"], rows[name]["runs"], key)}
             for name, key in SIGNS if name in rows]  # fmt: skip
    store("ablations", {"steps": STEPS, "world": REPORTING, "n_queries": N_QUERIES, "signs": signs, "rows": rows})


def paired(with_it: list[dict[str, float]], without: list[dict[str, float]], key: str) -> dict[str, float]:
    """How much a part is worth: the mean difference of runs of one seed, and its standard error."""
    gains = np.array([one[key] - other[key] for one, other in zip(with_it, without, strict=True)])
    return {"gain": float(gains.mean()), "standard_error": float(gains.std(ddof=1) / math.sqrt(len(gains)))}


# ---------------------------------------------------------------- the tables


def tables() -> dict[str, str]:
    found = json.loads((RESULTS / "ablations.json").read_text())
    lines = [f"| changed | {' | '.join(READINGS.values())} |", "|---" * (len(READINGS) + 1) + "|"]
    for name, row in found["rows"].items():
        cells = [f"{s['mean']:.3f} ± {s['sd']:.3f}" for s in (row["summary"][key] for key in READINGS)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    n = len(found["rows"][PRESET]["runs"])
    lines += ["", f"{found['steps']} steps, 2,000 held-out scenes, mean ± standard deviation over {n} seeds. "
              f"{made_on(found)}"]  # fmt: skip
    return {"parts": "\n".join(lines)}


def picture(path: Path) -> dict[str, list[float]]:
    """What each change gains or loses beside the preset, pair by pair, with two standard errors; what was drawn."""
    rows, drawn = json.loads((RESULTS / "ablations.json").read_text())["rows"], {}
    names = [name for name in rows if name != PRESET][::-1]
    figure, axes = figure_of(1, len(READINGS), 4.2, "What changes when one part of the recipe does")
    for ax, (key, words) in zip(axes[0], READINGS.items(), strict=True):
        pairs = [paired(rows[name]["runs"], rows[PRESET]["runs"], key) for name in names]
        drawn[key] = [pair["gain"] for pair in pairs]
        ax.errorbar(drawn[key], range(len(names)), xerr=[2 * p["standard_error"] for p in pairs], fmt="o", capsize=3)
        ax.axvline(0, color="0.6", linewidth=1)
        ax.set(xlabel=f"change of\n{words}", yticks=range(len(names)), yticklabels=names if ax is axes[0, 0] else [])
    save(figure, path)
    return drawn


def draw() -> None:
    put(tables())
    picture(DOCS / "ablations.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("learn", "judge", "draw"))
    parser.add_argument("--seeds", type=count, default=3)
    parser.add_argument("--only", nargs="+", choices=CHANGES, metavar="CHANGE", help=", ".join(CHANGES))
    options = parser.parse_args()
    if options.what == "judge" and options.seeds < 2:
        parser.error(f"judge: expected --seeds of at least 2, since differences come with their error; got {options.seeds}")
    {"learn": lambda: learn(options.seeds, options.only), "judge": lambda: judge(options.seeds), "draw": draw}[
        options.what
    ]()


if __name__ == "__main__":
    main()
