"""Figure 6 of the paper in small: what is a short phase at 128 px worth, beside training there from the start?

    python benchmarks/highres.py rates             how much to lower the learning rate: one network of world 1
    python benchmarks/highres.py learn [--seeds 3] before the phase, after it, and at 128 px from the start, for
                                                   as much time and for as many steps
    python benchmarks/highres.py judge [--seeds 3] all of them under the same probes, at 128 px
    python benchmarks/highres.py cost              a step at either size, on a quiet machine
    python benchmarks/highres.py draw              the table

The preset scenes-cpu on scenes of 128 px. Chosen on world 1, reported on world 11, judged on world 1011. Networks go to
runs/highres-*, results to data/results/highres-*.json.
"""

import argparse
import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from recipe import CHOOSING, REPORTING, RESULTS, count, made_on, put, spread, step_seconds, store

from minidino.config import RunConfig, override, preset
from minidino.images.scenes import MASK_CLASSES
from minidino.judge import class_tokens, judge_knn, patch_truth, trained_backbone
from minidino.learning.adapt import adapted
from minidino.probes.features import extract
from minidino.probes.linear import patch_depth_probe, patch_probe
from minidino.runs import Run, keep_freed_memory, pick_device, write_atomically
from minidino.stages import World, adapt, open_world, pretrain

RUNS = Path("runs")
SMALL, LARGE = 64, 128  # px of a global crop
STEPS, PHASE = 500, 60  # at the small size, and in the phase at the large one
SAME_COST = 163  # steps at the large size that take as long as STEPS and PHASE together: 0.60 s and 2.94 s on one core
RATES = (1.0, 0.5, 0.25)  # of the phase, times the base learning rate
N_PATCHED = 600  # scenes whose patches are learned from; half as many are judged
WAYS = {  # name: what the table calls it
    "small": f"{STEPS} steps at {SMALL} px",
    "adapted": f"{STEPS} steps at {SMALL} px, then {PHASE} at {LARGE} px",
    "same-cost": f"{SAME_COST} steps at {LARGE} px",
    "large": f"{STEPS + PHASE} steps at {LARGE} px",
}


def config_of(seed: int, world: int, size: int, steps: int) -> RunConfig:
    """The preset with global crops of `size` px, local ones of half that, on scenes of 128 px."""
    return override(preset("scenes-cpu"), [
        f"run.seed={seed}", f"run.steps={steps}", f"run.knn_every={steps}", "run.keep_checkpoints=1",
        f"data.scene_seed={world}", "data.n_scenes=4000", "data.n_test_scenes=1000", f"data.short_side={LARGE}",
        f"crops.global_size={size}", f"crops.local_size={size // 2}",
    ])  # fmt: skip


@cache
def scenes(world: int) -> World:
    return open_world(config_of(0, world, LARGE, 1), RUNS / "highres-pixels")


def network(way: str, seed: int, world: int = REPORTING, rate: float = 0.5) -> Run:
    """The run of one way, trained where that has not been done yet."""
    folder = RUNS / f"highres-{way}-{world}-{seed}"
    if (folder / "weights.safetensors").exists():
        return Run(folder)
    if (folder / "config.json").exists():
        return pretrain(config_of(0, world, LARGE, 1), folder, scenes(world), resume=True)[0]
    if way.startswith("adapted"):
        source = network("small", seed, world)
        base = source.config().optim.base_lr
        changes = [f"data.short_side={LARGE}", f"run.knn_every={PHASE}", f"optim.base_lr={base * rate}"]
        return adapt(source.folder, folder, LARGE, PHASE, changes)[0]
    size, steps = {"small": (SMALL, STEPS), "same-cost": (LARGE, SAME_COST), "large": (LARGE, STEPS + PHASE)}[way]
    return pretrain(config_of(seed, world, size, steps), folder, scenes(world))[0]


def reading(run: Run, world: World) -> dict[str, float]:
    """k-NN of class tokens, and what single patches know, of pictures of LARGE px; asked once of each network."""
    path = run.folder / f"reading-{LARGE}px.json"
    if path.exists():
        return json.loads(path.read_text())
    config = run.config()
    config = replace(config, crops=replace(config.crops, global_size=LARGE))
    net, grid = trained_backbone(run, pick_device()), LARGE // config.vit.patch_size
    knn = judge_knn(world, class_tokens(world, config, {"trained": net}).items())["trained"]
    parts = [(world.train, world.train_scenes, N_PATCHED), (world.test, world.test_scenes, N_PATCHED // 2)]
    truth = [patch_truth(scenes.masks[:n], scenes.depth[:n], grid) for _, scenes, n in parts]
    seen = [extract(net, pixels.select(np.arange(n)).squares(LARGE), patches=True)["patch"] for pixels, _, n in parts]
    placed = [torch.cat([part, torch.eye(grid**2).expand(len(part), -1, -1)], -1) for part in seen]
    found = {"knn": knn["k=20"], "knn_best": knn["best"]}
    for word, (x, test_x) in (("", seen), ("position ", placed)):
        found[f"{word}miou"] = patch_probe(x, truth[0][0], test_x, truth[1][0], len(MASK_CLASSES))["miou"]
        depth = patch_depth_probe(x, truth[0][1], test_x, truth[1][1])
        found |= {f"{word}{key}": depth[key] for key in ("rmse", "log_rmse")}
    print(run.folder.name, found, flush=True)
    write_atomically(path, json.dumps(found).encode())
    return found


def rates() -> None:
    """The phase of one network with three learning rates."""
    rows = {"small": reading(network("small", 0, CHOOSING), scenes(CHOOSING))}
    for rate in RATES:
        rows[str(rate)] = reading(network(f"adapted-{rate}", 0, CHOOSING, rate), scenes(CHOOSING))
        store("highres-rates", {"world": CHOOSING, "phase_steps": PHASE, "readings": rows})


def ways(seeds: int) -> list[tuple[str, int]]:
    return [(way, seed) for seed in range(seeds) for way in WAYS]


def learn(seeds: int) -> None:
    for way, seed in ways(seeds):
        print(network(way, seed).folder, flush=True)


def judge_all(seeds: int) -> None:
    """Every network at the large size; the differences that count are those of one seed."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for way, seed in ways(seeds):
        rows.setdefault(way, []).append(reading(network(way, seed), scenes(REPORTING)) | {"seed": seed})
    summary = {name: {key: spread([run[key] for run in runs]) for key in runs[0] if key != "seed"}
               for name, runs in rows.items()}  # fmt: skip
    store("highres-scenes", {"world": REPORTING, "steps": STEPS, "phase_steps": PHASE, "same_cost": SAME_COST,
                             "n_train": 4000, "n_test": 1000, "n_patched": N_PATCHED, "summary": summary, "runs": rows})


def cost() -> None:
    """Seconds of a step, median over 20 after three to warm up, with all losses at work."""
    keep_freed_memory()
    seconds = {}
    for size in (SMALL, LARGE):
        seconds[size] = step_seconds(adapted(config_of(0, REPORTING, size, 1), size, 23), scenes(REPORTING))
    store("highres-cost", {"step_s": seconds, "minutes": minutes(seconds[SMALL], seconds[LARGE])})


def minutes(small_s: float, large_s: float) -> dict[str, float]:
    """Of each way, from the seconds of a step at either size."""
    seconds = {"small": STEPS * small_s, "adapted": STEPS * small_s + PHASE * large_s, "same-cost": SAME_COST * large_s,
               "large": (STEPS + PHASE) * large_s}  # fmt: skip
    return {way: value / 60 for way, value in seconds.items()}


# ---------------------------------------------------------------- the tables


def stored(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"highres-{name}.json").read_text())


def tables() -> dict[str, str]:
    found, step_s = stored("scenes"), stored("cost")["step_s"]
    taken = minutes(step_s[str(SMALL)], step_s[str(LARGE)])
    lines = ["| training | minutes | k-NN | mIoU | mIoU, position told | depth RMSE, position told (m) |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    for way, row in found["summary"].items():
        cells = [_said(row[key]) for key in ("knn", "miou", "position miou", "position rmse")]
        lines.append(f"| {WAYS[way]} | {taken[way]:.1f} | {' | '.join(cells)} |")
    lines += ["", f"Judged at {LARGE} px on {found['n_test']:,} held-out scenes (patches: {found['n_patched'] // 2}); "
              "mean ± standard deviation over 3 seeds; minutes by the measured time of a step on "
              f"{made_on(found)}"]  # fmt: skip
    return {"highres": "\n".join(lines)}


def _said(value: dict[str, float]) -> str:
    return f"{value['mean']:.3f} ± {value['sd']:.3f}" if value["n"] > 1 else f"{value['mean']:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("rates", "learn", "judge", "cost", "draw"))
    parser.add_argument("--seeds", type=count, default=3)
    options = parser.parse_args()
    {"rates": rates, "learn": lambda: learn(options.seeds), "judge": lambda: judge_all(options.seeds), "cost": cost,
     "draw": lambda: put(tables())}[options.what]()  # fmt: skip


if __name__ == "__main__":
    main()
