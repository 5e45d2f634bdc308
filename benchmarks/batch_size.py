"""Does a small batch learn as much from as many images, and what has to change with it?

    python benchmarks/batch_size.py learn [--seeds 3] [--only NAME]   networks of drawn scenes, kept in runs/batch-*
    python benchmarks/batch_size.py judge [--seeds 3]                 their k-NN
    python benchmarks/batch_size.py draw                              the table of the stored result

The preset scenes-cpu, made for batches of 64, on world 11, judged on world 1011; a run sees 32,000 images, or the
preset's 96,000. What is changed with the batch: the learning rate alone, by the square root as everywhere; the
teacher's momentum too, so that it forgets after as many images; a queue of earlier teacher logits, as SwAV has for
small batches; or the memory alone, a batch of 64 computed in parts, with KoLeo's neighbours from all or from one of them.
Results: data/results/batch-size.json.
"""

import argparse
import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from ablations import RUNS, learned, paired
from compute import error, world
from recipe import REPORTING, RESULTS, count, made_on, put, spread, store
from torch import Tensor

from minidino.config import RunConfig, override, preset
from minidino.learning.losses import sinkhorn_knopp
from minidino.learning.objective import Targets, TeacherLogits, make_targets
from minidino.plan import make_plan
from minidino.runs import Run
from minidino.scaling import Device

FEW, MANY, USUAL = 32_000, 96_000, 64  # images of a run; of a batch
QUEUE = 96  # rows of class tokens; with the 32 of a batch of 16 as many as a batch of 64 has


def forgets_as_slowly(batch_size: int) -> str:
    """The momentum with which a teacher remembers as many images as with the preset's batch."""
    return f"teacher.momentum={preset('scenes-cpu').teacher.momentum ** (batch_size / USUAL):.6f}"


RATE, MOMENTUM = "learning rate", "learning rate, momentum"
QUEUED = f"{MOMENTUM}, a queue of {QUEUE} rows"
PARTS, APART = "nothing; computed in 4 parts", "nothing; 4 parts, KoLeo within each"


class Row(NamedTuple):
    batch_size: int
    changed: str  # with the batch
    fields: tuple[str, ...] = ()  # of the config
    images: int = FEW


ROWS = {
    **{f"{n}": Row(n, RATE) for n in (8, 16, 32, USUAL, 128, 256)},
    **{f"{n}-momentum": Row(n, MOMENTUM, (forgets_as_slowly(n),)) for n in (8, 16, 256)},
    "16-queue": Row(16, QUEUED, (forgets_as_slowly(16),)),
    "64-parts": Row(USUAL, PARTS, ("optim.accumulate=4",)),
    "64-apart": Row(USUAL, APART, ("optim.accumulate=4",)),
    **{f"{n}-long": Row(n, RATE, images=MANY) for n in (32, USUAL)},
}


def config_of(name: str, seed: int) -> RunConfig:
    batch_size, _, changes, images = ROWS[name]
    steps = images // batch_size
    run = (f"run.steps={steps}", f"run.seed={seed}", f"run.knn_every={steps}", "run.keep_checkpoints=1")
    data = f"data.scene_seed={REPORTING}", f"optim.batch_size={batch_size}"
    return override(preset("scenes-cpu"), [*run, *data, *changes])


@contextmanager
def queued(n_rows: int) -> Iterator[None]:
    """Let Sinkhorn balance the class rows of the steps before together with those of the batch.

    Source: Caron et al. 2020 (SwAV, arXiv 2006.09882), appendix A. It did not help here, so minidino has none.
    """
    before: list[Tensor] = []

    def targets_of(logits: TeacherLogits, teacher_temp: Any, *others: Any, **named: Any) -> tuple[Targets, None]:
        targets, memory = make_targets(logits, teacher_temp, *others, **named)
        rows = logits.dino.flatten(0, 1)
        together = torch.cat([*before, rows])
        before[:] = [together[-n_rows:]]
        temp = teacher_temp[0] if isinstance(teacher_temp, tuple) else teacher_temp
        return targets._replace(dino=sinkhorn_knopp(together, temp)[-len(rows) :].view_as(logits.dino)), memory

    with patch("minidino.learning.train.make_targets", targets_of):
        yield


def apart() -> AbstractContextManager:
    """Let KoLeo look for neighbours within a part of the batch alone, as accumulated gradients usually do."""
    return patch("minidino.learning.train._neighbours", lambda _, __, parts, holes: [lambda own: own] * len(parts))


ALTERED = {QUEUED: lambda: queued(QUEUE), APART: apart}


def network(name: str, seed: int) -> Run:
    """The run of one row. A queue does not survive a kill; three steps fill it again."""
    with ALTERED.get(ROWS[name].changed, nullcontext)():
        return learned(config_of(name, seed), RUNS / f"batch-{name}-{seed}", world())


def step_mib(name: str) -> float:
    """What a step holds, by formula."""
    return make_plan(config_of(name, 0), device="cpu", limit=Device(1.0, 1.0)).memory["peak"] / 2**20


def learn(seeds: int, only: list[str]) -> None:
    for seed in range(seeds):  # all rows of a seed before the next: a study that is cut short still compares
        for name in only or ROWS:
            print(network(name, seed).folder, flush=True)


def judge(seeds: int) -> None:
    rows = {}
    for name, row in ROWS.items():
        runs = [{"seed": seed, "knn": 1 - error(network(name, seed))} for seed in range(seeds)]
        summary = spread([run["knn"] for run in runs])
        rows[name] = row._asdict() | {"mib": step_mib(name), "runs": runs, "summary": summary}
    usual = {row.images: rows[name]["runs"] for name, row in ROWS.items() if row[:3] == (USUAL, RATE, ())}
    beside = {name: paired(row["runs"], usual[row["images"]], "knn") for name, row in rows.items()}
    n = len(world().test)
    store("batch-size", {"world": REPORTING, "n_test": n, "rows": rows, "beside_batches_of_64": beside})


# ---------------------------------------------------------------- the tables


def tables() -> dict[str, str]:
    found = json.loads((RESULTS / "batch-size.json").read_text())
    lines = ["| images | batch | steps | changed with it | MiB of a step | k-NN | against 64 |", "|---" * 7 + "|"]
    for name, row in found["rows"].items():
        size, steps, knn = row["batch_size"], row["images"] // row["batch_size"], row["summary"]
        about = f"{row['images']:,} | {size} | {steps:,} | {row['changed']} | {row['mib']:,.0f}"
        gain = found["beside_batches_of_64"][name]
        more = f"{gain['gain']:+.3f} ± {gain['standard_error']:.3f}" if gain["gain"] else ""
        lines.append(f"| {about} | {knn['mean']:.3f} ± {knn['sd']:.3f} | {more} |")
    lines += ["", f"k = 20, {found['n_test']:,} held-out scenes, mean ± standard deviation over {knn['n']} seeds; against "
              "batches of 64 with as many images seed by seed, with its standard error; memory by formula. "
              f"{made_on(found)}"]  # fmt: skip
    return {"batch-size": "\n".join(lines)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("learn", "judge", "draw"))
    parser.add_argument("--seeds", type=count, default=3)
    parser.add_argument("--only", nargs="+", choices=ROWS, metavar="NAME", help=", ".join(ROWS))
    options = parser.parse_args()
    if options.what == "judge" and options.seeds < 2:
        parser.error(f"judge: expected --seeds of at least 2, since differences come with their error; got {options.seeds}")
    {"learn": lambda: learn(options.seeds, options.only), "judge": lambda: judge(options.seeds),
     "draw": lambda: put(tables())}[options.what]()  # fmt: skip


if __name__ == "__main__":
    main()
