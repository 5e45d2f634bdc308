"""What does more compute buy? Networks of drawn scenes, each length a run of its own, and a power law with a held-out point.

    python benchmarks/compute.py learn [--seeds 3]     networks of drawn scenes, kept in runs/compute-*
    python benchmarks/compute.py judge [--seeds 3]     their k-NN error, laws, and what they say of the longest runs
    python benchmarks/compute.py draw                  the table of the stored result

The preset scenes-cpu on world 11, judged on world 1011, at two widths and four lengths, of which the longest takes ten
times the compute of the shortest. A law is fitted to the three shorter ones and says the error of the longest. Compute is
the FLOPs of the whole run, by formula. Results: data/results/compute.json.
"""

import argparse
import json
from functools import cache
from typing import Any

import numpy as np
from ablations import RUNS, learned
from recipe import REPORTING, RESULTS, count, made_on, put, spread, store

from minidino.config import RunConfig, override, preset
from minidino.judge import class_tokens, judge_knn, trained_backbone
from minidino.plan import make_plan
from minidino.runs import Run, pick_device, write_atomically
from minidino.scaling import Device, fit_power_law
from minidino.stages import World, open_world

WIDTHS, STEPS = (32, 64), (100, 200, 400, 1000)


def config_of(width: int, steps: int, seed: int) -> RunConfig:
    run = (f"run.steps={steps}", f"run.seed={seed}", f"run.knn_every={steps}", "run.keep_checkpoints=1")
    return override(preset("scenes-cpu"), [*run, f"vit.width={width}", f"data.scene_seed={REPORTING}"])


@cache
def world() -> World:
    return open_world(config_of(WIDTHS[0], STEPS[0], 0), RUNS / "unused")


def network(width: int, steps: int, seed: int) -> Run:
    """The run of one width and length."""
    return learned(config_of(width, steps, seed), RUNS / f"compute-{width}-{steps}-{seed}", world())


def error(run: Run) -> float:
    """Share of the held-out scenes that k-NN names wrongly, k = 20; asked once of each network."""
    path = run.folder / "error.json"
    if not path.exists():
        tokens = class_tokens(world(), run.config(), {"trained": trained_backbone(run, pick_device())})
        write_atomically(path, json.dumps(1 - judge_knn(world(), tokens.items())["trained"]["k=20"]).encode())
    return json.loads(path.read_text())


def flops_of(width: int, steps: int) -> float:
    """Of the whole run; neither the rate nor the memory of a machine has a say in it."""
    return make_plan(config_of(width, steps, 0), device="cpu", limit=Device(1.0, 1.0)).run_flops


def law(width: int, errors: list[list[float]]) -> dict[str, Any]:
    """What the shorter runs say of the longest one, beside what it turned out to be; errors: for each length its seeds."""
    compute, means = [flops_of(width, steps) for steps in STEPS], [float(np.mean(each)) for each in errors]
    rows = [{"steps": steps, "flops": flops, "errors": each, **spread(each)}
            for steps, flops, each in zip(STEPS, compute, errors, strict=True)]  # fmt: skip
    fitted = fit_power_law(compute[:-1], means[:-1])
    return {"rows": rows, "law": fitted._asdict(), "predicted": float(fitted.predict(compute[-1])),
            "ten_times": float(10**-fitted.b)}  # fmt: skip


def learn(seeds: int) -> None:
    for seed in range(seeds):  # all runs of a seed before the next: a study that is cut short still compares
        for width in WIDTHS:
            for steps in STEPS:
                print(network(width, steps, seed).folder, flush=True)


def judge(seeds: int) -> None:
    found = {str(width): law(width, [[error(network(width, steps, seed)) for seed in range(seeds)] for steps in STEPS])
             for width in WIDTHS}  # fmt: skip
    store("compute", {"world": REPORTING, "n_test": len(world().test), "widths": found})


# ---------------------------------------------------------------- the tables


def tables() -> dict[str, str]:
    found = json.loads((RESULTS / "compute.json").read_text())
    lines = ["| width | steps | TFLOP | k-NN error | the law said |", "|---|---|---|---|---|"]
    for width, each in found["widths"].items():
        for row in each["rows"]:
            said = f"{each['predicted']:.3f}" if row["steps"] == STEPS[-1] else ""
            lines.append(f"| {width} | {row['steps']:,} | {row['flops'] / 1e12:,.1f} | {row['mean']:.3f} ± {row['sd']:.3f} | "
                         f"{said} |")  # fmt: skip
    n = len(next(iter(found["widths"].values()))["rows"][0]["errors"])
    lines += ["", f"Mean ± standard deviation over {n} seeds, {found['n_test']:,} held-out scenes. {made_on(found)}"]
    return {"compute": "\n".join(lines)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("learn", "judge", "draw"))
    parser.add_argument("--seeds", type=count, default=3)
    options = parser.parse_args()
    {"learn": lambda: learn(options.seeds), "judge": lambda: judge(options.seeds), "draw": lambda: put(tables())}[
        options.what
    ]()


if __name__ == "__main__":
    main()
