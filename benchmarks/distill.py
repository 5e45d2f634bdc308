"""Is a small network better off with a teacher? The same student, the same pictures seen, with and without one.

    python benchmarks/distill.py choose [--seeds 1]  ways to distil, on world 1
    python benchmarks/distill.py learn [--seeds 3]   every arm, with the three networks of `probes.py scenes` as teachers
    python benchmarks/distill.py judge [--seeds 3]   all of them under the same probes
    python benchmarks/distill.py heads [--seeds 3]   going on from a backbone without heads: shall they learn alone first?
    python benchmarks/distill.py photographs --data PATH   the chain of all stages on Imagenette
    python benchmarks/distill.py cost                a step with and without a teacher, on a quiet machine
    python benchmarks/distill.py draw                the table

Teachers: the preset scenes-cpu, 900 steps. Chosen on world 1, reported on world 11, judged on worlds 1001 and 1011.
Networks go to runs/distill-*, results to data/results/distill-*.json.
"""

import argparse
import json
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from probes import network as teacher_of
from recipe import CHOOSING, REPORTING, RESULTS, count, put, spread, step_seconds, store

from minidino.chain import Chain, run_chain
from minidino.config import RunConfig, override, preset
from minidino.judge import class_tokens, judge_knn, judge_linear, judge_patches, trained_backbone
from minidino.learning.distill import distilled, frozen_teacher, imitating, start_distilled
from minidino.runs import Run, keep_freed_memory, pick_device
from minidino.stages import World, distill, go_on, guard_of, open_world, pretrain

RUNS = Path("runs")
TEACHER_STEPS, STEPS, CHOICE_STEPS = 900, 400, 300
STUDENT = "vit_tiny,width=32,depth=4,heads=1"
ARMS: dict[str, tuple[str, tuple[str, ...]]] = {  # name: (what the table calls it, changes)
    "scratch": ("alone", ()),
    "distilled": ("taught through the teacher's heads", ()),
    "fresh": ("the same, prototypes of its own", ("distill.prototypes=fresh", "heads.prototype_std=none")),
    "features": ("imitating the teacher's tokens", ()),
}
HEADS_FIRST, HEADS_STEPS = (0.0, 0.3), 150
CHOICES: dict[str, tuple[str, ...]] = {  # what was tried on world 1, each a change of "distilled"
    "as it is": (),
    "fresh prototypes": ("distill.prototypes=fresh",),
    "fresh prototypes, small": ("distill.prototypes=fresh", "heads.prototype_std=none"),
    "half the learning rate": ("optim.base_lr=4e-3",),
    "twice the learning rate": ("optim.base_lr=16e-3",),
    "iBOT weight 1": ("loss.ibot=1.0",),
    "no KoLeo": ("loss.koleo=0.0",),
    "teacher temperatures 0.03, 0.06": ("teacher.temp=0.03", "teacher.warmup_temp=0.03", "teacher.patch_temp=0.06"),
}


def scratch_config(world: int, seed: int, steps: int) -> RunConfig:
    return override(preset("scenes-cpu"), [
        f"run.seed={seed}", f"run.steps={steps}", f"run.knn_every={steps}", f"data.scene_seed={world}",
        "vit.width=32", "vit.heads=1",
    ])  # fmt: skip


@cache
def scenes(world: int) -> World:
    return open_world(scratch_config(world, 0, 1), RUNS / "distill-pixels")


def teacher(world: int, seed: int) -> Path:
    """A run of the preset; those of the world of reporting are shared with benchmarks/probes.py."""
    if world == REPORTING:
        return teacher_of(seed)
    folder = RUNS / f"distill-teacher-{world}-{seed}"
    if not (folder / "weights.safetensors").exists():
        changes = [f"run.steps={TEACHER_STEPS}", f"run.seed={seed}", f"data.scene_seed={world}", "run.knn_every=300"]
        pretrain(override(preset("scenes-cpu"), changes), folder, scenes(world))
    return folder


def network(arm: str, world: int, seed: int, steps: int = STEPS, changes: tuple[str, ...] = ()) -> Run:
    """The run of one arm, trained where that has not been done yet."""
    folder = RUNS / f"distill-{arm.replace(' ', '-')}-{world}-{seed}-{steps}"
    if (folder / "weights.safetensors").exists():
        return Run(folder)
    if arm == "scratch":
        return pretrain(scratch_config(world, seed, steps), folder, scenes(world))[0]
    changes = (f"run.seed={seed + 10}", f"run.knn_every={steps}", *changes)  # not the crops the teacher saw
    base = override(preset("scenes-cpu"), [f"data.scene_seed={world}"]) if arm == "features" else None
    return distill(teacher(world, seed), folder, [STUDENT], steps, changes, base, world=scenes(world))[0][0]


def reading(run: Run, world: World) -> dict[str, float]:
    config, nets = run.config(), {"trained": trained_backbone(run, pick_device())}
    tokens = class_tokens(world, config, nets)
    knn, patches = judge_knn(world, tokens.items())["trained"], judge_patches(world, config, nets)
    found = {"knn": knn["k=20"], "knn_best": knn["best"], "linear": judge_linear(world, tokens)["trained"]["mean"]}
    found |= {key: patches["trained"][key] for key in ("miou", "rmse", "log_rmse")}
    print(run.folder.name, found, flush=True)
    return found | {"parameters": sum(p.numel() for p in nets["trained"].parameters())}


def choose(seeds: int) -> None:
    """Each change by itself, on the world of choosing."""
    rows: dict[str, list[dict[str, float]]] = {}
    arms = {"scratch": (), "features": ()} | CHOICES
    for seed in range(seeds):
        for name, changes in arms.items():
            run = network(name, CHOOSING, seed, CHOICE_STEPS, changes)
            rows.setdefault(name, []).append(reading(run, scenes(CHOOSING)))
            store("distill-choices", {"world": CHOOSING, "steps": CHOICE_STEPS, "student": STUDENT, "runs": rows})


def learn(seeds: int) -> None:
    for seed in range(seeds):
        for arm, (_, changes) in ARMS.items():
            print(network(arm, REPORTING, seed, STEPS, changes).folder, flush=True)


def judge_all(seeds: int) -> None:
    rows: dict[str, list[dict[str, float]]] = {}
    for seed in range(seeds):
        runs = {"teacher": Run(teacher(REPORTING, seed))} | {arm: network(arm, REPORTING, seed) for arm in ARMS}
        for arm, run in runs.items():
            rows.setdefault(arm, []).append(reading(run, scenes(REPORTING)))
    summary = {arm: {key: spread([run[key] for run in runs]) for key in runs[0]} for arm, runs in rows.items()}
    gains = {key: spread([a[key] - b[key] for a, b in zip(rows["distilled"], rows["scratch"], strict=True)])
             for key in ("knn", "linear", "miou")}  # fmt: skip
    store("distill-scenes", {"world": REPORTING, "steps": STEPS, "teacher_steps": TEACHER_STEPS, "student": STUDENT,
                             "n_train": 8000, "n_test": 2000, "summary": summary, "distilled_minus_scratch": gains,
                             "runs": rows})  # fmt: skip


def heads(seeds: int) -> None:
    """k-NN before and after going on with fresh heads, which learn alone for a share of the steps."""
    rows: dict[str, list[dict[str, float]]] = {}
    for seed in range(seeds):
        source = teacher(REPORTING, seed)
        before = reading(Run(source), scenes(REPORTING))
        for share in HEADS_FIRST:
            folder = RUNS / f"distill-heads-{share}-{seed}"
            config = override(preset("scenes-cpu"), [
                f"run.steps={HEADS_STEPS}", f"run.seed={seed + 20}", f"data.scene_seed={REPORTING}", "optim.base_lr=4e-3",
                "loss.ibot_start_frac=0.0", "loss.ibot_full_frac=0.0", f"run.knn_every={HEADS_STEPS}"])  # fmt: skip
            run = Run(folder)
            if not (folder / "heads.safetensors").exists():
                run = go_on(source / "weights.safetensors", folder, config, share, scenes(REPORTING))[0]
            after = reading(run, scenes(REPORTING))
            rows.setdefault(str(share), []).append({"before": before, "after": after, "guard": guard_of(run)})
    gains = {share: spread([run["after"]["knn"] - run["before"]["knn"] for run in runs]) for share, runs in rows.items()}
    store("distill-heads", {"world": REPORTING, "steps": HEADS_STEPS, "knn_gain": gains, "runs": rows})


def photographs(data: str) -> None:
    """All stages on photographs, in a budget for two cores."""
    plan = Chain(
        preset="imagenette-cpu", changes=(f"data.source={data}", "run.steps=1500"), adapt_size=64, adapt_steps=120,
        students=("vit_tiny,width=48,depth=4,heads=1",), distill_steps=400, tasks=("knn", "linear"), size=64,
    )  # fmt: skip
    found = run_chain(plan, RUNS / "distill-chain-imagenette")
    store("distill-imagenette", {"plan": asdict(plan), "networks": found})


def cost() -> None:
    """Seconds of a step, median over 30 after three to warm up, with all losses at work."""
    keep_freed_memory()
    config, device = scratch_config(REPORTING, 0, 33), pick_device()
    config = override(config, ["loss.ibot_start_frac=0.0", "loss.ibot_full_frac=0.0"])
    source = teacher(REPORTING, 0)
    taught = distilled(Run(source).config(), source, STUDENT, 33)
    imitated = imitating(preset("scenes-cpu"), source, STUDENT, 33)
    found = {"scratch": step_seconds(config, scenes(REPORTING))}
    for arm, plan in {"distilled": taught, "features": imitated}.items():
        state = start_distilled(plan, device, frozen_teacher(plan, device))
        found[arm] = step_seconds(plan, scenes(REPORTING), state)
    store("distill-cost", {"step_s": found})


# ---------------------------------------------------------------- the tables


def stored(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"distill-{name}.json").read_text())


def tables() -> dict[str, str]:
    found, step_s = stored("scenes"), stored("cost")["step_s"]
    lines = ["| network | parameters | ms a step | k-NN, k = 20 | linear probe | mIoU of patches |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    rows = {"teacher": f"the teacher, {found['teacher_steps']} steps"}
    rows |= {arm: f"student, {words}" for arm, (words, _) in ARMS.items()}
    for arm, words in rows.items():
        row = found["summary"][arm]
        cells = [f"{row[key]['mean']:.3f} ± {row[key]['sd']:.3f}" for key in ("knn", "linear", "miou")]
        pace = step_s.get("distilled" if arm == "fresh" else arm)
        lines.append(f"| {words} | {row['parameters']['mean']:,.0f} | {'' if pace is None else f'{1000 * pace:.0f}'} | "
                     f"{' | '.join(cells)} |")  # fmt: skip
    e = found["environment"]
    lines += ["", f"Students: {found['steps']} steps of 64 drawn scenes; {found['n_test']:,} held-out scenes; mean ± "
              f"standard deviation over 3 seeds, each with its teacher; {e['machine']}; torch {e['versions']['torch']}, "
              f"{e['date'][:10]}, commit {e['commit']}."]  # fmt: skip
    return {"distill": "\n".join(lines)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("choose", "learn", "judge", "heads", "photographs", "cost", "draw"))
    parser.add_argument("--data", help="Imagenette, for photographs")
    parser.add_argument("--seeds", type=count)
    options = parser.parse_args()
    if options.what == "photographs" and options.data is None:
        parser.error("photographs: expected --data PATH, the folder of Imagenette")
    seeds = options.seeds or (1 if options.what == "choose" else 3)
    {"choose": lambda: choose(seeds), "learn": lambda: learn(seeds), "judge": lambda: judge_all(seeds),
     "heads": lambda: heads(seeds), "photographs": lambda: photographs(options.data), "cost": cost,
     "draw": lambda: put(tables())}[options.what]()  # fmt: skip


if __name__ == "__main__":
    main()
