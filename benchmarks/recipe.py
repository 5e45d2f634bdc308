"""The small-data recipe: what it reaches, what each setting is worth, and why the published ones do not start here.

    python benchmarks/recipe.py report                     three seeds of the preset on scenes never used for choosing
    python benchmarks/recipe.py ablate [--seeds 3]         one setting changed at a time, on the scenes of choosing
    python benchmarks/recipe.py grain                      hand-made descriptors against the grain of the scenes
    python benchmarks/recipe.py photographs --data PATH    one longer run of imagenette-cpu with its curve
    python benchmarks/recipe.py draw                       the README's tables of the stored results

Scenes of choosing: world 1, judged on world 1001. Scenes of reporting: world 11, judged on world 1011.
Results go to data/results/recipe-*.json with machine, versions and commit; no run is left out.
"""

import argparse
import json
import shutil
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from minidino.config import RunConfig, flatten, override, preset
from minidino.images.pixels import Pixels
from minidino.images.scenes import GRAIN, KINDS, draw_scenes
from minidino.judge import class_tokens, hand_made, judge, judge_knn, trained_backbone
from minidino.learning import doctor
from minidino.learning.train import start, train
from minidino.runs import Run, environment, keep_freed_memory, peak_memory_mb, pick_device, write_atomically
from minidino.stages import TEST_WORLD, OnlineKnn, World, open_world, pretrain
from minidino.tour import draw as draw_run
from minidino.tour import fit_steps

ROOT = Path(__file__).resolve().parents[1]
RESULTS, DOCS = ROOT / "data" / "results", ROOT / "docs"
CHOOSING, REPORTING = 1, 11  # worlds of drawn scenes
PUBLISHED_TEMPS = (
    "teacher.warmup_temp=0.04", "teacher.temp=0.07", "teacher.warmup_frac=0.3", "teacher.patch_temp=none",
)  # fmt: skip
FACTORS: dict[str, tuple[str, ...]] = {
    "the preset": (),
    "published teacher temperatures": PUBLISHED_TEMPS,
    "published teacher momentum 0.992": ("teacher.momentum=0.992",),
    "published weight init 0.02": ("vit.init_std=0.02",),
    "published LayerScale 1e-5": ("vit.layerscale=1e-5",),
    "published colour jitter": ("crops.brightness=0.4", "crops.contrast=0.4", "crops.saturation=0.2", "crops.hue=0.1"),
    "published iBOT weight 1 from the start": ("loss.ibot=1.0", "loss.ibot_start_frac=0.0", "loss.ibot_full_frac=0.0"),
    "no iBOT": ("loss.ibot=0.0",),
    "no KoLeo": ("loss.koleo=0.0",),
    "centring instead of Sinkhorn": ("loss.targets=centering",),
    "prototypes start small": ("heads.prototype_std=0.02",),
    "no local crops": ("crops.n_local=0",),
    "half the learning rate": ("optim.base_lr=0.004",),
    "twice the learning rate": ("optim.base_lr=0.016",),
    "teacher momentum 0.9": ("teacher.momentum=0.9",),
    "teacher temperature 0.03": ("teacher.warmup_temp=0.03", "teacher.temp=0.03"),
}


def store(name: str, payload: dict[str, Any]) -> Path:
    """Write data/results/NAME.json with what the numbers depend on."""
    path = RESULTS / f"{name}.json"
    payload = {"environment": environment(0, pick_device())} | payload
    write_atomically(path, (json.dumps(payload, indent=1) + "\n").encode())
    return path


def spread(values: list[float]) -> dict[str, float]:
    sd = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return {"mean": float(np.mean(values)), "sd": sd, "n": len(values)}


def report(seeds: int) -> None:
    """The preset scenes-cpu, three seeds, on the scenes of reporting: every probe, every baseline."""
    runs = []
    for seed in range(seeds):
        config = override(preset("scenes-cpu"), [f"run.seed={seed}", f"data.scene_seed={REPORTING}"])
        with tempfile.TemporaryDirectory() as folder:
            run, world = pretrain(config, Path(folder) / "run")
            runs.append(judge(run, world) | {"seed": seed, "curve": curve(run.records())})
            if seed == 0:
                keep_pictures(run, world, config)
        print(f"seed {seed}: {runs[-1]['knn']} in {runs[-1]['training']['seconds']:.0f} s", flush=True)
        store("recipe-scenes", {"config": flatten(config), "runs": runs, "summary": summary(runs)})


def keep_pictures(run: Run, world: World, config: RunConfig) -> None:
    """The README's pictures, drawn from the very run that is stored."""
    draw_run(world, config, run)
    DOCS.mkdir(exist_ok=True)
    for name in ("scenes.png", "pca.png", "curves.png"):
        shutil.copy(run.folder / name, DOCS / name)


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean, deviation and n over seeds of every number that the README quotes."""
    return {
        "knn": {name: spread([run["knn"][name] for run in runs]) for name in runs[0]["knn"]},
        "knn_readings": {
            name: {key: spread([run["knn_readings"][name][key] for run in runs]) for key in reading}
            for name, reading in runs[0]["knn_readings"].items()
        },
        "linear": {name: spread([run["linear"][name]["mean"] for run in runs]) for name in runs[0]["linear"]},
        "patches": {
            name: {key: spread([run["patches"][name][key] for run in runs]) for key in ("miou", "log_rmse")}
            for name in runs[0].get("patches", {})
        },
        "seconds": spread([run["training"]["seconds"] for run in runs]),
        "largest_teacher_entropy": max(run["training"]["largest_teacher_entropy"] for run in runs),
        "ln_k": runs[0]["training"]["ln_k"],
    }


def curve(records: list[dict[str, Any]]) -> dict[str, list[float]]:
    """What a picture of the run needs."""
    read = [record for record in records if "knn" in record]
    return {key: [record.get(key) for record in read] for key in ("step", "seconds", "knn", "dino", "teacher_entropy")}


def short_run(config: RunConfig, world: World, watch: OnlineKnn) -> dict[str, Any]:
    """Train without a folder; the end's k-NN and entropy."""
    state, records = start(config, pick_device(config.run.device)), []
    for record in train(config, world.train, state):
        records += [record] if "loss" in record else []
    last = records[-1]
    return {
        "knn": watch(state.teacher.backbone), "teacher_entropy": last["teacher_entropy"], "rankme": last["rankme"],
        "seconds": last["seconds"], "doctor": [f.title for f in doctor.diagnose(records, asdict(config))],
    }  # fmt: skip


def ablate(seeds: int, steps: int, only: str | None) -> None:
    """Each factor alone, over seeds, at the same number of steps; the world of choosing."""
    base = override(preset("scenes-cpu"), [f"run.steps={steps}", f"data.scene_seed={CHOOSING}"])
    world = open_world(base, Path("unused"))
    watch = OnlineKnn(world, base.crops.global_size)
    path = RESULTS / "recipe-ablations.json"
    stored = json.loads(path.read_text()) if path.exists() else {"steps": None}
    rows: dict[str, Any] = stored["rows"] if stored["steps"] == steps else {}  # an interrupted study goes on
    for name, changes in FACTORS.items():
        if name in rows or (only and only not in name):
            continue
        runs = [short_run(override(base, [*changes, f"run.seed={seed}"]), world, watch) for seed in range(seeds)]
        rows[name] = {"changes": changes, "knn": spread([run["knn"] for run in runs]), "runs": runs}
        print(f"{name:40} {rows[name]['knn']}  entropy {runs[0]['teacher_entropy']:.2f}", flush=True)
        store("recipe-ablations", {"steps": steps, "ln_k": float(np.log(base.heads.n_prototypes)), "rows": rows})


def grain() -> None:
    """What the grain of the scenes does to hand-made descriptors: 2,000 scenes against 500 of the world of choosing."""
    rows = {}
    for deviation in (0.0, 0.05, 0.1, GRAIN):
        sets = (2000, CHOOSING), (500, CHOOSING + TEST_WORLD)
        parts = [draw_scenes(n, seed=seed, grain=deviation) for n, seed in sets]
        worlds = World("grain", *(Pixels.from_array(s.images, s.labels, list(KINDS)) for s in parts))
        readings = judge_knn(worlds, hand_made(worlds, preset("scenes-cpu")))
        rows[str(deviation)] = {name: reading["best"] for name, reading in readings.items()}
        print(deviation, rows[str(deviation)], flush=True)
    store("recipe-grain", {"n_bank": 2000, "n_queries": 500, "best_knn": rows})


def photographs(data: str, minutes: float, changes: list[str]) -> None:
    """The preset imagenette-cpu for as long as asked, one seed: every baseline, the curve and the pictures."""
    config = override(preset("imagenette-cpu"), [f"data.source={data}", *changes])
    folder, device = ROOT / "runs" / "recipe-imagenette", pick_device(config.run.device)
    world = open_world(config, folder / "pixels")
    config = fit_steps(config, world, device, minutes, print)
    config = replace(config, run=replace(config.run, knn_every=max(config.run.steps // 24, 1)))
    run, world = pretrain(config, folder, world)
    found = judge(run, world)
    whole = replace(config, crops=replace(config.crops, global_size=config.data.short_side))
    seen = class_tokens(world, whole, {f"trained, seen at {config.data.short_side} px": trained_backbone(run, device)})
    found["knn_readings"] |= judge_knn(world, seen.items())
    print(found["knn_readings"])
    found |= {"curve": curve(run.records()), "peak_memory_mb": peak_memory_mb()}
    store("recipe-imagenette", {"config": flatten(config), "runs": [found]})
    draw_run(world, config, run)
    for name in ("curves.png", "pca.png"):
        shutil.copy(folder / name, DOCS / f"photographs-{name}")


def tables() -> dict[str, str]:
    """The README's tables, written from the stored results; a test holds the README to them."""
    found = {}
    if (path := RESULTS / "recipe-scenes.json").exists():
        found["scenes"] = _scenes_table(json.loads(path.read_text()))
    if (path := RESULTS / "recipe-ablations.json").exists():
        found["ablations"] = _ablations_table(json.loads(path.read_text()))
    if (path := RESULTS / "tour-imagenette.json").exists():
        found["photographs"] = _photographs_table(json.loads(path.read_text()))
    return found


def _photographs_table(stored: dict[str, Any]) -> str:
    lines = ["| features | k-NN, k = 20 | k-NN, best of six readings |", "|---|---|---|"]
    lines += [f"| {name} | {r['k=20']:.3f} | {r['best']:.3f} |" for name, r in stored["knn_readings"].items()]
    e, training = stored["environment"], stored["training"]
    lines += ["", f"One run, one seed: {training['seconds'] / 60:.1f} minutes of training ({training['steps']} steps "
              f"of {training['batch_size']}), {stored['minutes']} minutes in all, {stored['peak_memory_mb']:.0f} MiB "
              f"at most; {stored['n_train']:,} training and {stored['n_test']:,} held-out images; {e['machine']}, "
              f"{e['threads']} threads; torch {e['versions']['torch']}, {e['date'][:10]}, commit {e['commit']}."]
    return "\n".join(lines)


def _scenes_table(stored: dict[str, Any]) -> str:
    s = stored["summary"]

    def said(v: dict[str, float]) -> str:
        return f"{v['mean']:.3f} ± {v['sd']:.3f}" if v["sd"] else f"{v['mean']:.3f}"  # no spread: not trained

    lines = ["| features | k-NN, k = 20 | k-NN, best of six readings | linear probe |", "|---|---|---|---|"]
    for name, readings in s["knn_readings"].items():
        linear = said(s["linear"][name]) if name in s["linear"] else ""
        lines.append(f"| {name} | {said(readings['k=20'])} | {said(readings['best'])} | {linear} |")
    lines += ["", "| patch features | mIoU | log-depth RMSE |", "|---|---|---|"]
    lines += [f"| {name} | {said(v['miou'])} | {said(v['log_rmse'])} |" for name, v in s["patches"].items()]
    e, seconds = stored["environment"], s["seconds"]
    lines += ["", f"Mean ± standard deviation over {seconds['n']} seeds of training; {stored['runs'][0]['n_test']:,} "
              f"held-out scenes; {seconds['mean']:.0f} ± {seconds['sd']:.0f} s of training on {e['machine']}, "
              f"{e['threads']} threads; largest teacher entropy {s['largest_teacher_entropy']:.2f} of ln K = "
              f"{s['ln_k']:.2f}; torch {e['versions']['torch']}, {e['date'][:10]}, commit {e['commit']}."]  # fmt: skip
    return "\n".join(lines)


def _ablations_table(stored: dict[str, Any]) -> str:
    lines = ["| changed | k-NN | last teacher entropy |", "|---|---|---|"]
    for name, row in stored["rows"].items():
        entropy = np.mean([run["teacher_entropy"] for run in row["runs"]])
        lines.append(f"| {name} | {row['knn']['mean']:.3f} ± {row['knn']['sd']:.3f} | {entropy:.2f} |")
    n, e = next(iter(stored["rows"].values()))["knn"]["n"], stored["environment"]
    lines += ["", f"One setting changed at a time: {stored['steps']} steps, {n} seeds, world of choosing, 500 queries "
              f"against 2,000 scenes; ln K = {stored['ln_k']:.2f}; {e['machine']}, {e['threads']} thread."]  # fmt: skip
    return "\n".join(lines)


def draw() -> None:
    """Put the tables of the stored results into the README."""
    readme = (ROOT / "README.md").read_text()
    for name, table in tables().items():
        first, last = f"<!-- {name} -->", f"<!-- /{name} -->"
        before, rest = readme.split(first)
        readme = f"{before}{first}\n{table}\n{last}{rest.split(last)[1]}"
    (ROOT / "README.md").write_text(readme)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("report", "ablate", "grain", "photographs", "draw"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=800, help="of each ablation run")
    parser.add_argument("--only", help="factors whose name holds this text")
    parser.add_argument("--data")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("changes", nargs="*", metavar="key=value")
    options = parser.parse_args()
    keep_freed_memory()
    begun = time.perf_counter()
    if options.what == "report":
        report(options.seeds)
    elif options.what == "ablate":
        ablate(options.seeds, options.steps, options.only)
    elif options.what == "grain":
        grain()
    elif options.what == "photographs":
        photographs(options.data, options.minutes, options.changes)
    else:
        draw()
    print(f"{(time.perf_counter() - begun) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
