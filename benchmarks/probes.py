"""What `minidino probe` finds on drawn scenes and on photographs, beside its baselines, and what probing costs.

    python benchmarks/probes.py scenes                      three networks of the tour, every pixel judged
    python benchmarks/probes.py photographs --data PATH     every task on real pictures, one small network
    python benchmarks/probes.py decoders --data PATH        distance by linear heads and by a decoder of convolutions
    python benchmarks/probes.py finetuning                  the same networks trained on labels, and from scratch
    python benchmarks/probes.py speed                       extraction beside timm, 52 heads beside one
    python benchmarks/probes.py draw                        the tables of the stored results

Networks of scenes: the preset with as many steps as fit into four minutes, on world 11, judged on world 1011. PATH holds
imagenette, camvid, rgbd-indoor, instances and coil-objects. Results: data/results/probes-*.json.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from loader import in_turns
from recipe import RESULTS, made_on, put, spread, store
from torch import Tensor

from minidino.config import override, preset
from minidino.evaluate import HEADS, TASKS, evaluate
from minidino.images.crops import normalise
from minidino.judge import judge_patches, random_backbone, trained_backbone
from minidino.model.vit import build_vit
from minidino.probes.features import extract
from minidino.probes.grid import linear_grid
from minidino.probes.linear import linear_probe
from minidino.runs import Run, peak_memory_mb, pick_device
from minidino.stages import open_world, pretrain

RUNS = Path("runs")
STEPS, WORLD, SEEDS = 900, 11, (0, 1, 2)
NETWORK = RUNS / "recipe-imagenette-64px"  # of benchmarks/recipe.py: an hour on photographs, then at 64 px
QUESTIONS = (  # task, folder, size in px
    ("knn", "imagenette", 64), ("linear", "imagenette", 64), ("logreg", "imagenette", 64),
    ("robustness", "imagenette", 64), ("retrieval", "instances", 128), ("retrieval", "coil-objects", 128),
    ("segmentation", "camvid", (192, 256)), ("depth", "rgbd-indoor", (192, 256)),
)  # fmt: skip
BOTH = ("random", "pixels")
REPEATS = 20
WHO = {  # as `evaluate` and as `judge_patches` call them
    "position": "position", "pixels + position": "pixels + position", "random ViT": "random_vit", "trained": "trained",
    "random ViT + position": "random_vit + position", "trained + position": "trained + position",
}  # fmt: skip


# ---------------------------------------------------------------- what is found


def network(seed: int, registers: int = 0) -> Path:
    """A run folder of drawn scenes, trained where it is not there yet."""
    folder = RUNS / (f"probes-scenes-{seed}" if not registers else f"probes-scenes-{seed}-registers")
    if not (folder / "weights.safetensors").exists():
        changes = [f"run.steps={STEPS}", f"run.seed={seed}", f"data.scene_seed={WORLD}", "run.knn_every=300",
                   f"vit.num_register_tokens={registers}"]  # fmt: skip
        pretrain(override(preset("scenes-cpu"), changes), folder)
    return folder


def scenes() -> None:
    """Segmentation and depth of three networks; the baselines are asked each time, random ones with their seed."""
    runs = []
    for seed in SEEDS:
        found = {task: ask(network(seed), task)["answers"] for task in ("segmentation", "depth", "linear")}
        run, device = Run(network(seed)), pick_device()
        config = run.config()
        nets = {"random_vit": random_backbone(config, device), "trained": trained_backbone(run, device)}
        patches = judge_patches(open_world(config, run.folder / "pixels"), config, nets)
        runs.append({"seed": seed, "answers": found, "patches": patches})
    patches = {who: {key: spread([run["patches"][who][key] for run in runs]) for key in ("miou", "rmse", "log_rmse")}
               for who in runs[0]["patches"]}  # fmt: skip
    summary = {task: {who: spread([run["answers"][task][who][TASKS[task].score] for run in runs])
                      for who in runs[0]["answers"][task]} for task in runs[0]["answers"]}  # fmt: skip
    about = {"steps": STEPS, "world": WORLD, "n_train": 2000, "n_test": 500, "size_px": 48}
    store("probes-scenes", {**about, "summary": summary, "patches": patches, "runs": runs})


def photographs(data: Path) -> None:
    """Every task from raw files to its answer, nothing kept from one to the next."""
    asked = []
    for task, folder, size in QUESTIONS:
        asked.append(ask(NETWORK, task, str(data / folder), size))
        found = {"network": str(NETWORK), "peak_memory_mb": peak_memory_mb(), "questions": asked}
        store("probes-photographs", found)  # after each, so that none is lost


def decoders(data: Path) -> None:
    """Distance from one block, from four, and from these four by DPT: networks of scenes, and one of photographs."""
    asked: dict[str, list[dict[str, Any]]] = {"scenes": [], "rgbd-indoor": []}
    jobs = [("scenes", network(seed), None, None) for seed in SEEDS]
    jobs.append(("rgbd-indoor", NETWORK, str(data / "rgbd-indoor"), (192, 256)))
    for name, folder, pictures, size in jobs:
        asked[name].append({task: ask(folder, task, pictures, size, ("random",)) for task in ("depth", "dpt")})
        store("probes-decoders", {"network_steps": STEPS, "network": str(NETWORK), "asked": asked})


def finetuning() -> None:
    """Fine-tuned and linear, from the trained network and from its own start: three networks of scenes."""
    asked = [ask(network(seed), "finetune", baselines=("random",)) for seed in SEEDS]
    store("probes-finetuning", {"network_steps": STEPS, "steps": HEADS["finetune"]["steps"], "asked": asked})


def ask(
    source: Path, task: str, data: str | None = None, size: Any = None, baselines: tuple[str, ...] = BOTH
) -> dict[str, Any]:
    """What `minidino probe` finds with an empty cache, less what is long."""
    with tempfile.TemporaryDirectory() as folder:
        evaluate(source, task, data, size, baselines, Path(folder) / "out", cache=Path(folder) / "cache")
        found = json.loads((Path(folder) / "out" / "results.json").read_text())
    print(found["row"], f"{found['seconds']:.0f} s")
    for answer in found["answers"].values():
        if task in ("linear", "logreg"):
            del answer["table"]
    return {key: value for key, value in found.items() if key not in ("environment", "source", "report")}


# ---------------------------------------------------------------- what it costs


def speed() -> None:
    """Extraction beside timm's forward_features on the same images, in turn; 52 heads beside one."""
    found: dict[str, Any] = {"repeats": REPEATS, "extraction": [], "heads": []}
    for name, width, depth, heads, patch, size, batch in (
        ("vit_small, 16 px patches", 384, 12, 6, 16, 224, 16),
        ("the network of an hour", 96, 4, 3, 8, 64, 256),
    ):
        found["extraction"].append({"network": name, "images": batch, "size_px": size,
                                    **beside_timm(width, depth, heads, patch, size, batch)})  # fmt: skip
        print(found["extraction"][-1])
    for width, n_classes in ((96, 10), (384, 10), (384, 100)):
        found["heads"].append({"width": width, "n_classes": n_classes, **grid_beside_one(width, n_classes)})
        print(found["heads"][-1])
    store("probes-speed", found)


def beside_timm(width: int, depth: int, heads: int, patch: int, size: int, batch: int) -> dict[str, Any]:
    """Images a second of both, and how many times as fast ours is; timm is spared the normalisation."""
    from timm.models.vision_transformer import VisionTransformer

    images = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8)
    ours = build_vit("vit_tiny", width=width, depth=depth, heads=heads, patch_size=patch, img_size=size).eval()
    theirs = VisionTransformer(img_size=size, patch_size=patch, embed_dim=width, depth=depth, num_heads=heads,
                               num_classes=0, init_values=1.0).eval()  # fmt: skip
    normal = normalise(images)

    def look(_: int) -> Tensor:
        with torch.no_grad():
            return theirs.forward_features(normal)

    own, other = in_turns({"ours": lambda _: extract(ours, images, progress=False), "timm": look}, REPEATS).values()
    return {"ours_per_s": batch / own["median"], "timm_per_s": batch / other["median"], "ours_s": own, "timm_s": other,
            "ratio": other.pop("ratio")}  # fmt: skip


def grid_beside_one(width: int, n_classes: int, n: int = 4000) -> dict[str, Any]:
    """52 heads and one, an epoch on the same features (the one reads the widest input), and with their extraction."""
    x = {"cls_blocks": torch.randn(n, 4, width), "mean_patch": torch.randn(n, width)}
    y = torch.arange(n) % n_classes
    widest = torch.cat([x["cls_blocks"].flatten(1), x["mean_patch"]], 1)
    one, grid = in_turns({
        "one": lambda _: linear_probe(widest, y, widest, y, lrs=(1e-2,), epochs=2),
        "grid": lambda _: linear_grid(x, y, x, y, epochs=2),
    }, REPEATS).values()  # fmt: skip
    patch = 16 if width == 384 else 8
    size, depth = (224, 12) if width == 384 else (64, 4)
    vit = build_vit("vit_tiny", width=width, depth=depth, heads=width // 32, patch_size=patch, img_size=size).eval()
    few = torch.zeros(32, 3, size, size, dtype=torch.uint8)
    look = in_turns({"look": lambda _: extract(vit, few, progress=False, blocks=4)}, REPEATS)["look"]
    extraction = look["median"] * n / len(few)
    return {"grid_s": grid, "one_s": one, "heads_alone": grid.pop("ratio"), "extraction_s": extraction,
            "with_extraction": (extraction + grid["median"]) / (extraction + one["median"])}  # fmt: skip


# ---------------------------------------------------------------- the tables


def stored(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"probes-{name}.json").read_text())


def tables() -> dict[str, str]:
    """The tables of docs/measured.md, written from what is stored."""
    return {
        "probes-scenes": _scenes_table(stored("scenes")),
        "probes-photographs": _photographs_table(stored("photographs")),
        "probes-decoders": _decoders_table(stored("decoders")),
        "probes-finetuning": _finetuning_table(stored("finetuning")),
    }


def _scenes_table(found: dict[str, Any]) -> str:
    lines = ["| a linear map of | patches: mIoU | patches: depth RMSE (m) | pixels: mIoU | pixels: depth log10 | "
             "pixels: depth RMSE (m) |", "|---|---|---|---|---|---|"]  # fmt: skip
    for name, who in WHO.items():
        patches = found["patches"][who]
        pixels = [spread([run["answers"][task][name][key] for run in found["runs"]])
                  for task, key in (("segmentation", "miou"), ("depth", "log10"), ("depth", "rmse"))]  # fmt: skip
        cells = " | ".join(map(_said, (patches["miou"], patches["rmse"], *pixels)))
        lines.append(f"| {name} | {cells} |")
    lines += ["", f"Mean ± standard deviation over {len(found['runs'])} networks of {found['steps']} steps. Patches: the "
              "commonest class and the mean distance of each, by softmax and ridge regression, as in the tour's report, "
              f"2,000 and 1,000 scenes; pixels: every one, by the published heads, {found['n_train']:,} and "
              f"{found['n_test']} scenes; {found['size_px']} px, none seen in training. {made_on(found)}"]  # fmt: skip
    return "\n".join(lines)


def _said(value: dict[str, float]) -> str:
    return f"{value['mean']:.3f} ± {value['sd']:.3f}" if value["sd"] > 5e-4 else f"{value['mean']:.3f}"


def _photographs_table(found: dict[str, Any]) -> str:
    lines = ["| pictures | task | | trained | random ViT | without a network | minutes |", "|---|---|---|---|---|---|---|"]
    for asked in found["questions"]:
        task = TASKS[asked["task"]]
        scores = {who: f"{answer[task.score]:.3f}" for who, answer in asked["answers"].items()}
        trained, fresh = (scores.pop(who) + (f" ({scores.pop(f'{who} + position')})" if f"{who} + position" in scores else "")
                          for who in ("trained", "random ViT"))  # fmt: skip
        others = ", ".join(f"{who} {score}" for who, score in scores.items())
        lines.append(f"| {asked['data']} | {asked['task']} | {task.unit} | {trained} | {fresh} | {others} | "
                     f"{asked['seconds'] / 60:.1f} |")  # fmt: skip
    lines += ["", "In brackets: with its position told. Minutes: all subjects together, from raw files. One network, one run "
              f"of each; {found['peak_memory_mb']:,.0f} MiB at most. {made_on(found)}"]  # fmt: skip
    return "\n".join(lines)


def by_head(asked: dict[str, Any], who: str) -> dict[str, dict[str, float]]:
    """Errors of each head on one subject of `decoders`."""
    dpt = asked["dpt"]["answers"][who]
    return {"one block": asked["depth"]["answers"][who], "four blocks": dpt["linear"], "DPT on these four": dpt}


def _decoders_table(found: dict[str, Any]) -> str:
    sets = found["asked"]
    columns = {f"{who}: {name}": (who, key) for who in ("trained", "random ViT")
               for name, key in (("log10", "log10"), ("RMSE (m)", "rmse"))}  # fmt: skip
    lines = [f"| pictures | distance from | {' | '.join(columns)} |", "|---|---|" + "---|" * len(columns)]
    for name, asked in sets.items():
        for head in by_head(asked[0], "trained"):
            cells = [_said(spread([by_head(one, who)[head][key] for one in asked])) for who, key in columns.values()]
            lines.append(f"| {name} | {head} | {' | '.join(cells)} |")
    lines += ["", f"Scenes: mean ± standard deviation over {len(sets['scenes'])} networks of {found['network_steps']} steps; "
              f"rooms: the network of an hour, one run. {made_on(found)}"]  # fmt: skip
    return "\n".join(lines)


def _finetuning_table(found: dict[str, Any]) -> str:
    lines = ["| class of a scene by | the trained network | its own start |", "|---|---|---|"]
    for words, key in (("a linear head, network frozen", "linear"), ("the whole network", "accuracy")):
        cells = [_said(spread([one["answers"][who][key] for one in found["asked"]])) for who in ("trained", "random ViT")]
        lines.append(f"| {words} | {' | '.join(cells)} |")
    one = found["asked"][0]
    lines += ["", f"Mean ± standard deviation over {len(found['asked'])} networks of {found['network_steps']} steps without "
              f"labels, then {found['steps']} with those of {one['n_train']:,} scenes; {one['n_test']:,} held-out ones. "
              f"{made_on(found)}"]  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("scenes", "photographs", "decoders", "finetuning", "speed", "draw"))
    parser.add_argument("--data", type=Path, help="folder with the sets of photographs")
    options = parser.parse_args()
    if options.what in ("photographs", "decoders") and options.data is None:
        parser.error(f"{options.what}: expected --data PATH, the folder with the sets of photographs")
    do = {"scenes": scenes, "photographs": lambda: photographs(options.data), "decoders": lambda: decoders(options.data),
          "finetuning": finetuning, "speed": speed, "draw": lambda: put(tables())}  # fmt: skip
    do[options.what]()


if __name__ == "__main__":
    main()
