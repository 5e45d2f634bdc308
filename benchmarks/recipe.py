"""The small-data recipe: what it reaches, what each setting is worth, and why the published ones do not start here.

    python benchmarks/recipe.py report                     three seeds of the preset on scenes never used for choosing
    python benchmarks/recipe.py ablate [--seeds 3]         one setting changed at a time, on the scenes of choosing
    python benchmarks/recipe.py ladder [--seeds 3]         from the published settings to the preset, step by step
    python benchmarks/recipe.py grain                      hand-made descriptors against the grain of the scenes
    python benchmarks/recipe.py choices --data PATH        imagenette-cpu changed in one thing, at equal time on one core
    python benchmarks/recipe.py photographs --data PATH    one longer run of imagenette-cpu with its curve
    python benchmarks/recipe.py adapt --minutes 8          the same network, gone on with at 64 px
    python benchmarks/recipe.py draw                       the tables of the stored results

Scenes of choosing: world 1, judged on world 1001. Scenes of reporting: world 11, judged on world 1011.
Results go to data/results/recipe-*.json with machine, versions and commit; no run is left out.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from functools import cache
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from minidino.config import RunConfig, flatten, override, preset
from minidino.images.pixels import Pixels
from minidino.images.scenes import GRAIN, KINDS, TEST_WORLD, draw_scenes
from minidino.judge import hand_made, judge, judge_knn, whole_pictures
from minidino.learning import doctor
from minidino.learning.adapt import adapted
from minidino.learning.train import State, start, train
from minidino.runs import Run, environment, keep_freed_memory, peak_memory_mb, pick_device, write_atomically
from minidino.stages import OnlineKnn, World, adapt, open_world, pretrain
from minidino.tour import draw as draw_run
from minidino.tour import fit_steps

ROOT = Path(__file__).resolve().parents[1]
RESULTS, DOCS = ROOT / "data" / "results", ROOT / "docs"
HOUR = ROOT / "runs" / "recipe-imagenette"  # of `photographs`
HIGH = 64  # px of a global crop in the high-resolution phase
PHOTOGRAPHS = (  # rows of the table; one that ends in 64px goes on where the one before ends
    "tour-imagenette", "recipe-imagenette-34min", "recipe-imagenette-48min", "recipe-imagenette-52min",
    "recipe-imagenette-69min", f"recipe-imagenette-69min-{HIGH}px", HOUR.name, f"{HOUR.name}-{HIGH}px",
)  # fmt: skip
CHOOSING, REPORTING = 1, 11  # worlds of drawn scenes
PUBLISHED: dict[str, tuple[str, ...]] = {  # what the preset changes besides sizes, in the order of the ladder
    "teacher temperatures": (
        "teacher.warmup_temp=0.04", "teacher.temp=0.07", "teacher.warmup_frac=0.3", "teacher.patch_temp=none"),
    "first weights": (
        "vit.init_std=0.02", "vit.layerscale=1e-5", "heads.mlp_gain=none", "heads.prototype_std=none",
        "heads.weight_g=released"),
    "teacher momentum": ("teacher.momentum=0.992",),
    "optimizer": (
        "optim.base_lr=0.004", "optim.final_lr=1e-6", "optim.warmup_frac=0.1", "optim.warmup_start=released",
        "optim.final_weight_decay=0.4", "optim.layerwise_decay=0.9", "optim.patch_embed_lr_mult=0.2",
        "optim.freeze_last_layer_frac=0.01", "vit.drop_path_rate=0.3"),
    "iBOT": ("loss.ibot=1.0", "loss.ibot_start_frac=0.0", "loss.ibot_full_frac=0.0", "loss.ibot_divisor=released"),
    "colours of the crops": (
        "crops.brightness=0.4", "crops.contrast=0.4", "crops.saturation=0.2", "crops.hue=0.1",
        "crops.grayscale_probability=0.2", "crops.solarize_probability=0.2", "crops.blur=released"),
}  # fmt: skip
FACTORS: dict[str, tuple[str, ...]] = {
    "the preset": (),
    "published teacher temperatures": PUBLISHED["teacher temperatures"],
    "published teacher momentum 0.992": PUBLISHED["teacher momentum"],
    "published weight init 0.02": ("vit.init_std=0.02",),
    "published LayerScale 1e-5": ("vit.layerscale=1e-5",),
    "published colour jitter": ("crops.brightness=0.4", "crops.contrast=0.4", "crops.saturation=0.2", "crops.hue=0.1"),
    "published iBOT weight 1 from the start": ("loss.ibot=1.0", "loss.ibot_start_frac=0.0", "loss.ibot_full_frac=0.0"),
    "half the learning rate": ("optim.base_lr=0.004",),
    "twice the learning rate": ("optim.base_lr=0.016",),
    "teacher momentum 0.9": ("teacher.momentum=0.9",),
    "teacher temperature 0.03": ("teacher.warmup_temp=0.03", "teacher.temp=0.03"),
    "prototypes start small": ("heads.prototype_std=0.02",),
    "no iBOT": ("loss.ibot=0.0",),
    "no KoLeo": ("loss.koleo=0.0",),
    "centring instead of Sinkhorn": ("loss.targets=centering",),
    "no local crops": ("crops.n_local=0",),
}

CHOICES: dict[str, tuple[str, ...]] = {  # of imagenette-cpu, two at a time: those of a line run side by side
    "the preset": (), "six local crops": ("crops.n_local=6",),
    "crops of 48 and 24 px": ("crops.global_size=48", "crops.local_size=24"),
    "twice the learning rate": ("optim.base_lr=0.016",),
    "six blocks": ("vit.depth=6",), "teacher momentum 0.97": ("teacher.momentum=0.97",),
}  # fmt: skip


def ladder() -> dict[str, tuple[str, ...]]:
    """From all settings as published to the preset, one group after the other; and what else may help the published.

    The sizes of net, heads, crops and batch are the preset's on every rung.
    """
    left = dict(PUBLISHED)
    everything = tuple(chain.from_iterable(left.values()))
    rungs = {"all as published": everything}
    for group in PUBLISHED:
        del left[group]
        rungs[f"+ our {group}"] = tuple(chain.from_iterable(left.values()))
    return rungs | {
        "all as published, four times the steps": (*everything, "run.steps=2000"),
        "all as published, four times the batch": (*everything, "optim.batch_size=256"),
    }


def store(name: str, payload: dict[str, Any]) -> Path:
    """Write data/results/NAME.json with what the numbers depend on."""
    path = RESULTS / f"{name}.json"
    payload = {"environment": environment(0, pick_device()) | {"commit": _commit()}} | payload
    write_atomically(path, (json.dumps(payload, indent=1) + "\n").encode())
    return path


@cache
def _commit() -> str | None:
    """That of before the first result, which would make it "-dirty"."""
    return environment(0, pick_device())["commit"]


def made_on(found: dict[str, Any]) -> str:
    """On what a stored result was made, as the notes of tables end; what was not stored was made in toy sizes."""
    if "environment" not in found:
        return "Toy sizes, whose times mean nothing."
    e = found["environment"]
    return f"{e['machine']}; torch {e['versions']['torch']}, {e['date'][:10]}, commit {e['commit']}."


def count(text: str) -> int:
    """A number on a command line that counts something: at least 1."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {text}")
    return int(text)


def spread(values: list[float]) -> dict[str, float]:
    sd = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return {"mean": float(np.mean(values)), "sd": sd, "n": len(values)}


def step_seconds(config: RunConfig, world: World, state: State | None = None) -> float:
    """Median over the steps of a short run after the first three, which wake the machine up."""
    stamps = [record["seconds"] for record in train(config, world.train, state or start(config, pick_device()))]
    return statistics.median(b - a for a, b in zip(stamps[2:], stamps[3:]))


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


@cache  # once in each process
def world_of_choosing() -> World:
    return open_world(override(preset("scenes-cpu"), [f"data.scene_seed={CHOOSING}"]), Path("unused"))


def short_run(changes: tuple[str, ...]) -> dict[str, Any]:
    """Train on one core, without a folder; the end's k-NN and entropy."""
    torch.set_num_threads(1)
    keep_freed_memory()
    world, config, records = world_of_choosing(), override(preset("scenes-cpu"), list(changes)), []
    state = start(config, pick_device(config.run.device))
    for record in train(config, world.train, state):
        records += [record] if "loss" in record else []
    last = records[-1]
    return {
        "knn": OnlineKnn(world, config.crops.global_size)(state.teacher.backbone),
        "teacher_entropy": last["teacher_entropy"], "rankme": last["rankme"], "seconds": last["seconds"],
        "precision": state.precision, "doctor": [f.title for f in doctor.diagnose(records, asdict(config))],
    }  # fmt: skip


def study(name: str, rows: dict[str, tuple[str, ...]], seeds: int, steps: int, only: str | None) -> None:
    """Each row over seeds, at the same number of steps, in the world of choosing; one run a core, none is timed."""
    path = RESULTS / f"{name}.json"
    stored = json.loads(path.read_text()) if path.exists() else {"steps": steps, "rows": {}}
    done: dict[str, Any] = stored["rows"]  # an interrupted study goes on
    there = {(stored["steps"], row["knn"]["n"]) for row in done.values()} - {(steps, seeds)}
    if there:
        found = " and ".join(f"{n} seeds of {each} steps" for each, n in sorted(there))
        sys.exit(f"{path} holds {found}, and {seeds} of {steps} are asked for: move it away to begin anew")
    if not any((only or "") in row for row in rows):
        sys.exit(f"--only: expected a part of one of {', '.join(rows)}; got {only!r}")
    todo = [row for row in rows if row not in done and (not only or only in row)]
    jobs = [(f"run.steps={steps}", *rows[row], f"run.seed={seed}") for row in todo for seed in range(seeds)]
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        results = pool.map(short_run, jobs)
        for row in tqdm(todo, desc=name, unit="row"):
            runs = [next(results) for _ in range(seeds)]
            done[row] = {"changes": rows[row], "knn": spread([run["knn"] for run in runs]), "runs": runs}
            tqdm.write(f"{row:40} {done[row]['knn']}  entropy {runs[0]['teacher_entropy']:.2f}")
            ordered = {key: done[key] for key in rows if key in done}
            ln_k = float(np.log(preset("scenes-cpu").heads.n_prototypes))
            store(name, {"steps": steps, "cores_per_run": 1, "ln_k": ln_k, "rows": ordered})


def timed_run(data: str, minutes: float, changes: tuple[str, ...]) -> dict[str, Any]:
    """Train imagenette-cpu on one core for as long as asked; k-NN on whole pictures."""
    torch.set_num_threads(1)
    keep_freed_memory()
    config, device = override(preset("imagenette-cpu"), [f"data.source={data}", *changes]), pick_device()
    world = open_world(config, HOUR / "pixels")
    config = fit_steps(config, world, device, minutes, lambda line: None)
    state = start(config, device)
    records = [record for record in train(config, world.train, state) if "loss" in record]
    found = judge_knn(world, whole_pictures(world, config, state.teacher.backbone).items())
    return {"steps": config.run.steps, "seconds": records[-1]["seconds"], "knn_readings": found}


def choices(data: str, minutes: float) -> None:
    """Each choice once, one run a core: what is worth its time at the beginning of a run on photographs."""
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        jobs = {name: pool.submit(timed_run, data, minutes, changes) for name, changes in CHOICES.items()}
        rows = {name: {"changes": CHOICES[name], **job.result()} for name, job in tqdm(jobs.items())}
    store("recipe-photograph-choices", {"minutes": minutes, "rows": rows})


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
    """The preset imagenette-cpu for as long as asked, one seed: every baseline and the curve."""
    config = override(preset("imagenette-cpu"), [f"data.source={data}", *changes])
    world = open_world(config, HOUR / "pixels")
    config = fit_steps(config, world, pick_device(config.run.device), minutes, print)
    config = replace(config, run=replace(config.run, knn_every=max(config.run.steps // 24, 1)))
    run, world = pretrain(config, HOUR, world)
    store_photographs(run, world)
    shutil.copy(run.folder / "curves.png", DOCS / "photographs-curves.png")


def adapt_photographs(minutes: float, changes: list[str]) -> None:
    """The high-resolution phase after `photographs`, as long as asked."""
    config = override(adapted(Run(HOUR).config(), HIGH, 1), changes)
    folder = HOUR.with_name(f"{HOUR.name}-{HIGH}px")
    world = open_world(config, folder / "pixels")
    steps = fit_steps(config, world, pick_device(config.run.device), minutes, print).run.steps
    store_photographs(*adapt(HOUR, folder, HIGH, steps, [f"run.knn_every={max(steps // 8, 1)}", *changes]))


def store_photographs(run: Run, world: World) -> None:
    """Judge a run and keep numbers and pictures."""
    config, found = run.config(), judge(run, world)
    print(found["knn_readings"])
    found |= {"curve": curve(run.records()), "peak_memory_mb": peak_memory_mb()}
    store(run.folder.name, {"config": flatten(config), "runs": [found]})
    draw_run(world, config, run)


def tables() -> dict[str, str]:
    """Tables of the README and of docs/measured.md, written from the stored results; a test holds them to these."""
    stored = {path.stem: json.loads(path.read_text()) for path in RESULTS.glob("*.json")}
    return {
        "scenes": _scenes_table(stored["recipe-scenes"]),
        "photographs": _photographs_table({name: stored[name] for name in PHOTOGRAPHS}),
        "ablations": _study_table(stored["recipe-ablations"], "changed"),
        "ladder": _study_table(stored["recipe-ladder"], "settings"),
    }


def _photographs_table(stored: dict[str, dict[str, Any]]) -> str:
    """What needs no training, then the judged runs one below the other; what was not read in a run stays empty."""

    def cells(reading: dict[str, float]) -> str:
        return " | ".join(f"{reading[key]:.3f}" if reading else "" for key in ("k=20", "best"))

    runs = [one.get("runs", [one])[0] for one in stored.values()]
    lines = ["| not trained | k = 20 | best of six |", "|---|---|---|"]
    untrained = {name: r for name, r in runs[0]["knn_readings"].items() if not name.startswith("trained")}
    lines += [f"| {name} | {cells(reading)} |" for name, reading in untrained.items()]
    columns = ["minutes of training", "steps", "crops, px", "k = 20", "best of six", "whole images, px", "k = 20",
               "best of six", "MiB at most", "commit"]  # fmt: skip
    lines += ["", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    machines = set()
    for (name, one), run in zip(stored.items(), runs, strict=True):
        training, seen = run["training"], run["knn_readings"]
        config = one.get("config") or flatten(preset(training["preset"]))
        whole = f"trained, seen at {config['data.short_side']} px"
        minutes, size = f"{training['seconds'] / 60:.1f}", config["data.short_side"] if whole in seen else ""
        minutes = f"then {minutes} more" if name.endswith(f"{HIGH}px") else minutes
        lines.append(f"| {minutes} | {training['steps']:,} | {config['crops.global_size']} | {cells(seen['trained'])} "
                     f"| {size} | {cells(seen.get(whole, {}))} | {run['peak_memory_mb']:,.0f} "
                     f"| {run['environment']['commit']} |")  # fmt: skip
        e = run["environment"]
        machines.add(f"{e['machine']}; {training['precision']}, torch {e['versions']['torch']}, {e['date'][:10]}")
    lines += ["", f"One run and one seed each, batches of {runs[0]['training']['batch_size']}; {runs[0]['n_train']:,} "
              f"training and {runs[0]['n_test']:,} held-out images, of which a share has a standard error of at most "
              f"0.008. {'; '.join(sorted(machines))}."]  # fmt: skip
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


def _study_table(stored: dict[str, Any], what: str) -> str:
    lines = [f"| {what} | k-NN | last teacher entropy |", "|---|---|---|"]
    for name, row in stored["rows"].items():
        entropy = np.mean([run["teacher_entropy"] for run in row["runs"]])
        knn = row["knn"]
        error = f"± {knn['sd']:.3f}" if knn["n"] > 1 else "(one seed)"
        lines.append(f"| {name} | {knn['mean']:.3f} {error} | {entropy:.2f} |")
    n, e = next(iter(stored["rows"].values()))["knn"]["n"], stored["environment"]
    lines += ["", f"{stored['steps']} steps, mean ± standard deviation over {n} seeds, world of choosing, 500 queries "
              f"against 2,000 scenes; ln K = {stored['ln_k']:.2f}; {e['machine']}, one of them a run; torch "
              f"{e['versions']['torch']}, {e['date'][:10]}, commit {e['commit']}."]  # fmt: skip
    return "\n".join(lines)


def put(written: dict[str, str]) -> None:
    """Put tables between their marks, in the README or in docs/measured.md. Raises ValueError where there are none."""
    pages = {path: path.read_text() for path in (ROOT / "README.md", DOCS / "measured.md")}
    for name, table in written.items():
        first, last = f"<!-- {name} -->\n", f"\n<!-- /{name} -->"
        (path,) = [path for path, text in pages.items() if first in text]
        before, rest = pages[path].split(first)
        pages[path] = f"{before}{first}{table}{last}{rest.split(last)[1]}"
    for path, text in pages.items():
        write_atomically(path, text.encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("report", "ablate", "ladder", "grain", "choices", "photographs", "adapt", "draw"))
    parser.add_argument("--seeds", type=count, default=3)
    parser.add_argument("--steps", type=count, default=500, help="of each ablation run")
    parser.add_argument("--only", help="factors whose name holds this text")
    parser.add_argument("--data")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("changes", nargs="*", metavar="key=value")
    options = parser.parse_intermixed_args()  # key=value may stand after options
    if options.what in ("choices", "photographs") and options.data is None:
        parser.error(f"{options.what}: expected --data PATH, the folder of Imagenette")
    keep_freed_memory()
    begun = time.perf_counter()
    if options.what == "report":
        report(options.seeds)
    elif options.what == "ablate":
        study("recipe-ablations", FACTORS, options.seeds, options.steps, options.only)
    elif options.what == "ladder":
        study("recipe-ladder", ladder(), options.seeds, options.steps, options.only)
    elif options.what == "grain":
        grain()
    elif options.what == "choices":
        choices(options.data, options.minutes)
    elif options.what == "photographs":
        photographs(options.data, options.minutes, options.changes)
    elif options.what == "adapt":
        adapt_photographs(options.minutes, options.changes)
    else:
        put(tables())
    print(f"{(time.perf_counter() - begun) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
