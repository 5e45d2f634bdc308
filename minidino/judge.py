"""What frozen features are worth: baselines and backbones under the same probes."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minidino.config import RunConfig
from minidino.images.scenes import MASK_CLASSES
from minidino.learning import doctor
from minidino.learning.teacher import build_backbone, build_student
from minidino.model.vit import VisionTransformer
from minidino.model.weights import load_weights
from minidino.probes import features
from minidino.probes.knn import knn_accuracy
from minidino.probes.linear import linear_probe, patch_depth_probe, patch_probe
from minidino.runs import Run, environment, pick_device, pick_precision
from minidino.stages import K, World

CHUNK = 512  # images described at a time
BASELINES = ("pixels", "gray_pixels", "color_histogram", "hog")


def random_backbone(config: RunConfig, device: torch.device) -> VisionTransformer:
    """The backbone before its first step."""
    torch.manual_seed(config.run.seed)
    return build_student(config).backbone.to(device).eval()


Rows = dict[str, tuple[Tensor, Tensor]]  # {name: (features of the bank, features of the held-out images)}


def class_tokens(world: World, config: RunConfig, backbones: dict[str, VisionTransformer]) -> Rows:
    """Frozen class tokens of all training and held-out images, cut to the size of a global crop."""
    size = config.crops.global_size
    images = world.train.squares(size), world.test.squares(size)
    return {name: tuple(features.extract(net, part)["cls"] for part in images) for name, net in backbones.items()}


def whole_pictures(world: World, config: RunConfig, backbone: VisionTransformer) -> Rows:
    """Class tokens of all images at the size they are stored in, where that is larger than a global crop."""
    size = config.data.short_side - config.data.short_side % config.vit.patch_size
    if size <= config.crops.global_size:
        return {}
    larger = replace(config, crops=replace(config.crops, global_size=size))
    return class_tokens(world, larger, {f"trained, seen at {size} px": backbone})


def hand_made(world: World, config: RunConfig) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    """Baselines that nobody trained, from the stored images, which are at least as sharp as what a network sees.

    One after the other and in small chunks: raw pixels of all images are the largest thing in a run.
    """
    images = world.train.squares(config.data.short_side), world.test.squares(config.data.short_side)
    mean = sum(chunk.float().sum(0) for chunk in images[0].split(CHUNK)) / (255 * len(images[0]))
    for name in (name for name in BASELINES if name != "color_histogram" or world.train.channels == 3):
        describe = partial(features.pixels, mean=mean) if name == "pixels" else getattr(features, name)
        yield name, tuple(torch.cat([describe(chunk) for chunk in part.split(CHUNK)]) for part in images)


def judge_knn(world: World, rows: Iterable[tuple[str, tuple[Tensor, Tensor]]]) -> dict[str, dict[str, float]]:
    """k-NN on the held-out images: {name: {"k=20": ..., "best": ...}}.

    Every descriptor, ours included, is read twice, as it is and with the bank's mean taken away, at k = 5, 20 and
    100; "best" is the best of the six, "k=20" the published way.
    """
    return {name: _readings(*pair, world.train.labels, world.test.labels) for name, pair in rows}


def _readings(bank: Tensor, queries: Tensor, bank_y: np.ndarray, queries_y: np.ndarray) -> dict[str, float]:
    ks = [k for k in (5, K, 100) if k <= (bank_y >= 0).sum()] or [1]
    plain = knn_accuracy(bank, bank_y, queries, queries_y, ks)
    mean = bank.mean(0)
    centred = knn_accuracy(bank - mean, bank_y, queries - mean, queries_y, ks)
    return {f"k={K}": plain.get(K, plain[ks[-1]]), "best": max(*plain.values(), *centred.values())}


def judge_linear(world: World, rows: Rows, seeds: int = 3) -> dict[str, dict[str, float]]:
    """Linear probe: {name: {"mean", "sd", "n"}} over the seeds of the probe."""
    found = {}
    for name, (bank, queries) in rows.items():
        labels = world.train.labels, world.test.labels
        runs = [linear_probe(bank, labels[0], queries, labels[1], epochs=10, seed=seed) for seed in range(seeds)]
        scores = np.array([run["accuracy"] for run in runs])
        found[name] = {"mean": scores.mean(), "sd": scores.std(ddof=1), "n": seeds}
    return found


def judge_patches(
    world: World, config: RunConfig, backbones: dict[str, VisionTransformer], n_train: int = 2000
) -> dict[str, dict]:
    """What single patches of drawn scenes know: mIoU of the mask classes and error of depth, beside two baselines."""
    size, patch = config.crops.global_size, config.vit.patch_size
    grid = size // patch
    parts = [
        (world.train, world.train_scenes, min(n_train, len(world.train))),
        (world.test, world.test_scenes, min(n_train // 2, len(world.test))),
    ]
    truth = [patch_truth(scenes.masks[:n], scenes.depth[:n], grid) for _, scenes, n in parts]
    position = [torch.eye(grid**2).expand(n, -1, -1) for _, _, n in parts]
    images = [pixels.select(np.arange(n)).squares(size) for pixels, _, n in parts]
    inside = [F.pixel_unshuffle(part.float() / 255, patch).flatten(2).mT for part in images]  # (n, N, C P P)
    tokens = {"position": position}
    tokens["pixels + position"] = [torch.cat(pair, -1) for pair in zip(inside, position, strict=True)]
    for name, backbone in backbones.items():
        seen = [features.extract(backbone, part, patches=True)["patch"] for part in images]
        tokens |= {name: seen, f"{name} + position": [torch.cat(pair, -1) for pair in zip(seen, position, strict=True)]}
    found = {}
    for name, (x, test_x) in tokens.items():
        segments = patch_probe(x, truth[0][0], test_x, truth[1][0], len(MASK_CLASSES))
        depth = patch_depth_probe(x, truth[0][1], test_x, truth[1][1])
        found[name] = {"miou": segments["miou"], "accuracy": segments["accuracy"], **depth}
    return found


def patch_truth(masks: np.ndarray, depth: np.ndarray, grid: int) -> tuple[Tensor, Tensor]:
    """Commonest class (n, N) and harmonic mean depth (n, N), metres, of every patch."""
    classes = F.one_hot(torch.from_numpy(masks).long(), len(MASK_CLASSES)).permute(0, 3, 1, 2).float()
    nearness = F.adaptive_avg_pool2d(1 / torch.from_numpy(depth)[:, None], grid)
    return F.adaptive_avg_pool2d(classes, grid).argmax(1).flatten(1), 1 / nearness.flatten(1)


def n_parameters(config: RunConfig) -> int:
    """Of the backbone of a config; nothing is built for it."""
    with torch.device("meta"):
        return sum(p.numel() for p in build_backbone(config).parameters())


def is_run(folder: str | Path) -> bool:
    """A run of this package, and not a Hugging Face folder, which has a config.json as well."""
    run = Run(folder)
    return run.config_path.exists() and not (run.folder / "model.safetensors").exists()


def trained_backbone(run: Run, device: torch.device) -> VisionTransformer:
    """The EMA teacher's backbone of a finished run. Raises FileNotFoundError where it is not finished."""
    weights = run.folder / "weights.safetensors"
    if not weights.exists():
        raise FileNotFoundError(f"{run.folder} has no {weights.name} yet: finish it with train --resume {run.folder}")
    return load_weights(build_backbone(run.config()), weights).to(device).eval()


def judge(run: Run, world: World) -> dict[str, Any]:
    """Probe a finished run: what results.json holds."""
    config = run.config()
    device = pick_device(config.run.device)
    nets = {"random_vit": random_backbone(config, device), "trained": trained_backbone(run, device)}
    records = run.records()
    findings = doctor.diagnose(records, asdict(config))
    results: dict[str, Any] = {
        "data": world.name,
        "n_train": len(world.lessons),
        "n_test": 0 if world.test is None else len(world.test),
        "training": {
            "preset": config.preset, "steps": config.run.steps, "batch_size": config.optim.batch_size,
            "precision": pick_precision(config.run.precision, device),
            "seconds": records[-1]["seconds"], "images": records[-1]["images"],
            "largest_teacher_entropy": max(r["teacher_entropy"] for r in records if "teacher_entropy" in r),
            "ln_k": float(np.log(config.heads.n_prototypes)), "doctor": [asdict(finding) for finding in findings],
        },
        "environment": environment(config.run.seed, device),
    }  # fmt: skip
    if world.test is not None:
        rows = class_tokens(world, config, nets)
        readings = judge_knn(world, chain(hand_made(world, config), rows.items()))
        results["knn"] = {name: reading["best"] for name, reading in readings.items()}
        results["knn_readings"] = readings | judge_knn(world, whole_pictures(world, config, nets["trained"]).items())
        results["linear"] = judge_linear(world, rows)
        if world.test_scenes is not None:
            results["patches"] = judge_patches(world, config, nets)
    return results
