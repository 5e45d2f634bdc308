"""The Imagenette record: how soon does DINOv2's whole objective, from scratch, on one GPU, reach 80, 85 and more?

    python benchmarks/imagenette.py run --data PATH [--minutes 60] [key=value ...]   in runs/imagenette-record
    python benchmarks/imagenette.py draw                                             the curve beside the public marks

ViT-S/16 of the preset imagenette-gpu, no other data. A run that was killed goes on when it is asked for again. Result:
data/results/imagenette-record.json, with the curve of the k-NN that is read during the run (2,000 labelled pictures, 500
queries) and the one of all pictures at its end. `--preset imagenette-cpu` proves it in small where there is no GPU.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from recipe import RESULTS, curve, store

from minidino.config import RunConfig, flatten, override, preset
from minidino.judge import judge
from minidino.pictures import figure_of, save
from minidino.runs import Run, peak_memory_mb, pick_device
from minidino.stages import open_world, pretrain
from minidino.tour import fit_steps

FOLDER, NAME = Path("runs/imagenette-record"), "imagenette-record"
READINGS = 40  # of k-NN over a run
GOALS = (0.80, 0.85, 0.90)
MARKS = {"SwAV": 0.864, "DINO": 0.838, "iBOT": 0.433}  # k-NN, ViT-S/16, 200 epochs, one A100, stable-pretraining


def record(data: str, minutes: float, name: str, changes: list[str], folder: Path = FOLDER) -> dict[str, Any]:
    """Train for as long as asked, or go on with it, and say when each goal was reached."""
    config = override(preset(name), [f"data.source={data}", *changes])
    if (folder / "config.json").exists():
        run, world = pretrain(config, folder, resume=True)
    else:
        world = open_world(config, folder / "pixels")
        run, world = pretrain(fitted(config, world, minutes), folder, world)
    found = judge(run, world)
    told = curve(run.records())
    last = run.records()[-1]
    return {
        "config": flatten(run.config()), "minutes": last["seconds"] / 60, "images_per_s": last["images"] / last["seconds"],
        "peak_memory_mb": memory_mb(), "reached": reached(told), "marks": MARKS, "curve": told, "run": found,
    }  # fmt: skip


def fitted(config: RunConfig, world: Any, minutes: float) -> RunConfig:
    config = fit_steps(config, world, pick_device(config.run.device), minutes, print)
    return replace(config, run=replace(config.run, knn_every=max(config.run.steps // READINGS, 1)))


def reached(told: dict[str, list[float]]) -> dict[str, float | None]:
    """Minutes of learning until k-NN was first at each goal; None: never."""
    first = {goal: [s / 60 for s, knn in zip(told["seconds"], told["knn"], strict=True) if knn >= goal] for goal in GOALS}
    return {f"{goal:.2f}": minutes[0] if minutes else None for goal, minutes in first.items()}


def memory_mb() -> float | None:
    """The most memory that was held: the GPU's where there is one."""
    return torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else peak_memory_mb()


def picture(found: dict[str, Any], path: Path) -> dict[str, list[float]]:
    """k-NN against minutes, the public marks as lines; what was drawn."""
    figure, axes = figure_of(1, 1, 4.0, "Imagenette from scratch: k-NN against minutes of learning")
    minutes = [s / 60 for s in found["curve"]["seconds"]]
    axes[0, 0].plot(minutes, found["curve"]["knn"], label="minidino, read during the run")
    for (who, mark), style in zip(found["marks"].items(), ("--", ":", "-."), strict=True):
        axes[0, 0].axhline(mark, color="0.4", linestyle=style, label=f"{who}, 200 epochs")
    axes[0, 0].set(xlabel="minutes", ylabel="k-NN accuracy", ylim=(0, 1))
    axes[0, 0].legend(fontsize=8)
    save(figure, path)
    return {"minutes": minutes, "knn": found["curve"]["knn"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "draw"))
    parser.add_argument("--data", default="imagenette", help="folder of Imagenette")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--preset", default="imagenette-gpu")
    parser.add_argument("changes", nargs="*", metavar="key=value")
    options = parser.parse_intermixed_args()
    if options.what == "run":
        found = record(options.data, options.minutes, options.preset, options.changes)
        print(store(NAME, found), found["reached"])
    else:
        if not (RESULTS / f"{NAME}.json").exists():
            parser.error(f"draw: no {RESULTS / f'{NAME}.json'} yet: run comes first")
        picture(json.loads((RESULTS / f"{NAME}.json").read_text()), Run(FOLDER).folder / "record.png")


if __name__ == "__main__":
    main()
