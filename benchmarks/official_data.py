"""Do crops, masks, order and schedules follow the laws of the released code? Both are run on the same pictures.

    python benchmarks/official_data.py run CHECKOUT [--data PATH] [--toy]     data/results/official-data.json

CHECKOUT is a clone of facebookresearch/dinov2 at b8931f7, which reads its configs with omegaconf. PATH holds JPEG
photographs, of which 64 are taken; without it scenes are drawn. Crops have half the published sizes. The two draw from
different streams, so distributions are compared: shares by z-tests, all else by Kolmogorov-Smirnov. It fails where a
p-value lies below 0.001 / number of tests, or where what must be the same differs by more than its bound. One difference
is known: PIL cuts fractions of 8 bits off, which makes jittered crops darker by what "signed" says, of 255; with many more
draws than these it would show in the means of colours. --toy: few draws, nothing is stored.
"""

import argparse
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import reduce
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torchvision.transforms.functional as TF
from loader import pictures
from PIL import Image
from recipe import store
from released import borrow
from scipy.ndimage import label
from scipy.stats import chi2_contingency, ks_2samp, norm
from torch import Tensor

from minidino.config import MaskConfig, RunConfig, flatten, override, preset
from minidino.images import crops, masks
from minidino.images.batches import batch_indices, collate, crop_laws, largest_block, make_batch
from minidino.images.pixels import Pixels
from minidino.learning.train import schedules

ALPHA = 1e-3  # chance that any test fails though all laws are the same
RUNS = {  # released config: our preset, what is changed of it, GPUs
    "vitl16_short": ("vitl16-short", [], 32),
    "vitl14": ("vitl14-lvd", [], 96),
    "vitg14": ("vitl14-lvd", ["vit.name=vit_giant2"], 256),
}
NAMES = """
crops.n_local=crops.local_crops_number crops.global_size=crops.global_crops_size crops.local_size=crops.local_crops_size
crops.global_scale=crops.global_crops_scale crops.local_scale=crops.local_crops_scale
masks.probability=ibot.mask_sample_probability masks.ratio=ibot.mask_ratio_min_max vit.name=student.arch
vit.patch_size=student.patch_size vit.num_register_tokens=student.num_register_tokens vit.layerscale=student.layerscale
vit.drop_path_rate=student.drop_path_rate vit.interpolate_offset=student.interpolate_offset
vit.interpolate_antialias=student.interpolate_antialias heads.n_prototypes=dino.head_n_prototypes
heads.hidden_dim=dino.head_hidden_dim heads.bottleneck_dim=dino.head_bottleneck_dim heads.n_layers=dino.head_nlayers
heads.ibot_n_prototypes=ibot.head_n_prototypes heads.ibot_bottleneck_dim=ibot.head_bottleneck_dim
loss.dino=dino.loss_weight loss.ibot=ibot.loss_weight loss.koleo=dino.koleo_loss_weight
teacher.momentum=teacher.momentum_teacher teacher.final_momentum=teacher.final_momentum_teacher
teacher.temp=teacher.teacher_temp teacher.warmup_temp=teacher.warmup_teacher_temp optim.base_lr=optim.base_lr
optim.lr=optim.lr optim.final_lr=optim.min_lr optim.beta2=optim.adamw_beta2 optim.clip=optim.clip_grad
optim.weight_decay=optim.weight_decay optim.final_weight_decay=optim.weight_decay_end
optim.layerwise_decay=optim.layerwise_decay optim.patch_embed_lr_mult=optim.patch_embed_lr_mult
run.precision=compute_precision.student.backbone.mixed_precision.param_dtype
"""  # our settings, and what the released configs call them
GRIDS = ((224, 14), (224, 16), (112, 16), (518, 14))  # side of a crop and of a patch, px: 16, 14, 7 and 37 patches
JITTER = ("adjust_brightness", "adjust_contrast", "adjust_saturation", "adjust_hue")
HEARD = ("resized_crop", "hflip", *JITTER, "rgb_to_grayscale", "gaussian_blur", "solarize", "normalize")
SIZES = {"n_local": 4, "global_size": 112, "local_size": 48}  # px
APART = {  # of 255: mean and largest difference between crops of PIL, in 8 bits from step to step, and ours
    "neither jitter nor solarizing": (0.4, 25.0), "solarizing, no jitter": (0.4, 25.0), "jitter": (2.0, 40.0),
}  # fmt: skip

Row = dict[str, Any]
Call = tuple[str, tuple, Any]  # of a function: its name, what it was given, what it answered


def official(checkout: Path) -> SimpleNamespace:
    """The released functions; xFormers, which nothing here asks, is stood in for."""
    commit = borrow(checkout, {"xformers.ops": {"fmha": None}})
    from dinov2 import configs, data
    from dinov2.data import samplers
    from dinov2.train.train import build_schedulers
    from dinov2.utils.config import apply_scaling_rules_to_cfg

    def config(name: str) -> Any:
        with patch("dinov2.distributed.get_global_size", lambda: RUNS[name][2]):
            return apply_scaling_rules_to_cfg(configs.load_and_merge_config(f"train/{name}"))

    return SimpleNamespace(commit=commit, config=config, data=data, samplers=samplers, build_schedulers=build_schedulers)


@contextmanager
def listening(owner: Any, *names: str) -> Iterator[list[Call]]:
    """Every call of these functions until the block ends."""
    heard = []

    def also(name: str, work: Callable) -> Callable:
        def call(*args, **kwargs):
            answer = work(*args, **kwargs)
            heard.append((name, args, answer))
            return answer

        return call

    with patch.multiple(owner, **{name: also(name, getattr(owner, name)) for name in names}):
        yield heard


# ---------------------------------------------------------------- rows


def drawn(part: str, what: str, ours: Any, theirs: Any) -> Row:
    """Two samples of one law? Shares (bool) by z, the difference of means in standard errors; kinds (int16) by chi square."""
    x, y = np.asarray(ours), np.asarray(theirs)
    error = np.sqrt(x.var() / len(x) + y.var() / len(y))
    z = float((x.mean() - y.mean()) / error) if error else 0.0 if x.mean() == y.mean() else np.inf
    if x.dtype == np.int16:
        p = chi2_contingency([[np.sum(each == kind) for kind in np.union1d(x, y)] for each in (x, y)]).pvalue
    else:
        p = 2 * norm.sf(abs(z)) if x.dtype == bool else ks_2samp(x, y).pvalue
    means = {"ours": float(x.mean()), "theirs": float(y.mean())}
    return {"part": part, "what": what, "n": [len(x), len(y)], **means, "z": z, "p": float(p)}


def same(part: str, what: str, n: int, largest: float, bound: float, **more: Any) -> Row:
    """What must be the same, up to a bound."""
    return {"part": part, "what": what, "n": n, "largest": float(largest), "bound": bound, **more}


def failures(rows: list[Row]) -> list[tuple[str, str]]:
    """What differs, as does what is no number."""
    p = ALPHA / max(1, sum("p" in row for row in rows))
    bad = (row for row in rows if not (row["p"] >= p if "p" in row else row["largest"] <= row["bound"]))
    return [(row["part"], row["what"]) for row in bad]


# ---------------------------------------------------------------- crops


def plan_of(calls: list[Call]) -> crops.ViewPlan:
    """What torchvision was asked to do for one view, as a row of ours."""
    told = {name: args[1:] for name, args, _ in calls}
    order = [JITTER.index(name) for name in told if name in JITTER] or [0, 1, 2, 3]
    factors = [float(told[name][0]) if name in told else 0.0 for name in JITTER]
    sigma = told["gaussian_blur"][1][0] if "gaussian_blur" in told else 0.0
    chances = ("hflip", JITTER[0], "rgb_to_grayscale", "gaussian_blur", "solarize")
    flip, jitter, gray, blur, solarize = torch.tensor([[name in told] for name in chances])
    box, factors, order = (torch.tensor([row]) for row in (told["resized_crop"][:4], factors, order))
    return crops.ViewPlan(box.float(), flip, jitter, factors, order, gray, blur, torch.tensor([sigma]), solarize)


def looks(x: Tensor) -> Tensor:
    """What is seen of normalised crops, in the order of LOOKS: (n, 3, s, s) -> (n, 11)"""
    across = x.diff(dim=3).abs().mean(dim=(1, 2, 3))
    left = x[..., : x.shape[3] // 2].mean(dim=(1, 2, 3)) - x.mean(dim=(1, 2, 3))
    colour = (x.amax(dim=1) - x.amin(dim=1)).mean(dim=(1, 2))
    return torch.stack([*x.mean(dim=(2, 3)).T, *x.var(dim=(2, 3)).T, across, left, colour, *x[:, ::2, 5, 7].T], dim=1)


LOOKS = ("mean of red", "mean of green", "mean of blue", "variance of red", "variance of green", "variance of blue",
         "sharpness", "left less whole", "spread of channels", "one pixel, red", "one pixel, blue")  # fmt: skip
Kinds = tuple[list[tuple[crops.ViewPlan, Tensor]], ...]  # global 1, global 2, local


def told(rows: list[tuple[crops.ViewPlan, Tensor]], sides: Tensor) -> dict[str, Tensor]:
    """Decisions and looks of one kind of view, quantity by quantity; sides (n, 2) of the pictures, px."""
    plans, numbers = zip(*rows)
    plan = crops.ViewPlan(*map(torch.cat, zip(*plans)))
    top, left, height, width = plan.box.T
    orders = (plan.order[plan.jitter] @ torch.tensor([1000, 100, 10, 1])).short()
    return {
        "area of the box": height * width / sides.prod(dim=1), "log aspect": (width / height).log(),
        "middle from the top": (top + height / 2) / sides[:, 0], "middle from the left": (left + width / 2) / sides[:, 1],
        "flip": plan.flip, "jitter": plan.jitter, "gray": plan.gray, "blur": plan.blur, "solarize": plan.solarize,
        "sigma of the blur, 0 without": plan.sigma * plan.blur, **dict(zip(JITTER, plan.factors[plan.jitter].T)),
        "order of the jitter": orders, **dict(zip(LOOKS, torch.cat(numbers).T, strict=True)),
    }  # fmt: skip


def our_views(config: RunConfig, pixels: Pixels, turns: int) -> Kinds:
    """Each turn is a step of training, of which every picture is part."""
    everything, found = torch.arange(len(pixels)), ([], [], [])
    for turn in range(turns):
        with listening(crops, "plan_view") as heard:
            batch = make_batch(config, turn, *pixels.batch(everything), everything)
        views = (*batch.crops_global, batch.crops_local.flatten(0, 1))
        for kind, (_, _, plan), crop in zip(found, heard, views, strict=True):
            kind.append((plan, looks(crop)))
    return found


def their_views(augment: Any, images: list[Image.Image], turns: int) -> tuple[Kinds, dict[str, list[Tensor]]]:
    """The same of the released class, view by view; and how far away some are from ours, by the keys of APART."""
    found, differences = ([], [], []), {}
    torch.manual_seed(0)
    for turn in range(turns):
        for image in images:
            with listening(TF, *HEARD) as heard:
                augment(image)
            ends = [i + 1 for i, call in enumerate(heard) if call[0] == "normalize"]
            for k, (first, end) in enumerate(zip([0, *ends], ends)):
                plan, crop = plan_of(heard[first:end]), heard[end - 1][2][None]
                found[min(k, 2)].append((plan, looks(crop)))
                if turn % 5 == 0:
                    words = list(APART)[2 if plan.jitter else int(plan.solarize)]
                    differences.setdefault(words, []).append(difference(image, plan, crop))
    return found, differences


def difference(image: Image.Image, plan: crops.ViewPlan, crop: Tensor) -> Tensor:
    """How much brighter our crop of the same decisions is, number by number, of 255."""
    lines = torch.from_numpy(np.array(image)).permute(0, 2, 1)[None]
    ours = crops.resize_boxes(lines, plan.box, plan.flip, crop.shape[-1])
    crops.distort(ours, plan)
    return ((crops.normalise(255 * ours) - crop) * crops.mean_and_std(3, "cpu")[1] * 255).flatten().double()


def crop_rows(meta: SimpleNamespace, pixels: Pixels, turns: int) -> Iterator[Row]:
    """Decisions and crops of each kind of view; then released crops made by ours from what was decided for them."""
    config = override(preset("vitl16-short"), [f"crops.{key}={value}" for key, value in SIZES.items()])
    c, sides = meta.config("vitl16_short").crops, torch.from_numpy(pixels.sizes)
    augment = meta.data.DataAugmentationDINO(c.global_crops_scale, c.local_crops_scale, *SIZES.values())
    images = [Image.fromarray(pixels.image(i).transpose(1, 2, 0)) for i in range(len(pixels))]
    of_ours, (of_theirs, differences) = our_views(config, pixels, turns), their_views(augment, images, turns)
    for part, n, ours, theirs in zip(("global 1", "global 2", "local"), (1, 1, SIZES["n_local"]), of_ours, of_theirs):
        ours, theirs = told(ours, sides.repeat(turns * n, 1)), told(theirs, sides.repeat_interleave(n, dim=0).repeat(turns, 1))
        yield from (drawn(part, what, ours[what], theirs[what]) for what in ours)
    for words, some in differences.items():
        d, what, (mean, largest) = torch.cat(some), f"released crops made by ours, with {words}", APART[words]
        yield same("pixels", f"{what}: mean", len(some), d.abs().mean(), mean, signed=d.mean().item())
        yield same("pixels", f"{what}: largest", len(some), d.abs().max(), largest)
    yield same_seed(augment, crop_laws(config.crops), images)


def same_seed(augment: Any, laws: tuple[crops.CropLaw, ...], images: list[Image.Image]) -> Row:
    """The readable reference draws and computes what theirs does."""
    cut, cut_local, largest = augment.geometric_augmentation_global, augment.geometric_augmentation_local, 0.0
    theirs = ((cut, augment.global_transfo1), (cut, augment.global_transfo2), (cut_local, augment.local_transfo))
    for seed, image in enumerate(images):
        for law, (box, change) in zip(laws, theirs, strict=True):
            torch.manual_seed(seed)
            expected = change(box(image))
            found = crops.reference_crop(image, law, torch.Generator().manual_seed(seed))
            largest = max(largest, (found - expected).abs().max().item())
    return same("pixels", "readable reference with the same seed", 3 * len(images), largest, 0.0)


# ---------------------------------------------------------------- masks


def mask_rows(meta: SimpleNamespace, side: int, patch_size: int, turns: int) -> Iterator[Row]:
    """Batches of 16 images, of which only the masks matter: what is asked of each mask, and how it looks."""
    n, grid, law, found, worst = 16, (side // patch_size,) * 2, MaskConfig(max_patches="released"), ([], []), 0.0
    samples = [({"global_crops": [torch.zeros(1)] * 2, "local_crops": [torch.zeros(1)]}, ())] * n
    largest = 0.5 * side // patch_size * side // patch_size  # as in the released training loop
    theirs = SimpleNamespace(draw=meta.data.MaskingGenerator(grid, max_num_patches=largest))
    random.seed(side)
    for turn in range(turns):
        draws, largest = torch.Generator().manual_seed(side * turns + turn), largest_block(law, side, patch_size)
        with listening(masks, "block_mask") as heard:
            whole = masks.batch_masks(2 * n, grid, draws, law.probability, law.ratio, largest)
        found[0].append((whole, [(args[1], answer.numpy()) for _, args, answer in heard]))
        settings = (law.ratio, law.probability, torch.float32, grid[0] * grid[1])
        with listening(theirs, "draw") as heard:
            given = meta.data.collate_data_and_cast(samples, *settings, lambda n_masked: theirs.draw(n_masked))
        found[1].append((given["collated_masks"], [(args[0], answer) for _, args, answer in heard if args[0]]))
        crop = torch.zeros(2, n, 1, 1, 1)
        ours = collate(crop, crop, given["collated_masks"].view(2, n, -1), torch.arange(n))
        worst = max(worst, (ours.mask_weights - given["masks_weight"]).abs().max().item())
    part, (a, b) = f"masks {grid[0]} x {grid[1]}", map(shapes, found)
    yield from (drawn(part, what, a[what], b[what]) for what in a if what != "map")
    a, b = a["map"], b["map"]
    z = np.abs(a.mean(axis=0) - b.mean(axis=0)) / np.sqrt((a.var(axis=0) + b.var(axis=0)) / len(a))
    more = {"z": float(z.max()), "p": float(min(1, 2 * z.size * norm.sf(z.max())))}
    yield {"part": part, "what": "chance of each patch, largest z", "n": [len(a), len(b)], **more}
    yield same(part, "weights of the same masks", turns, worst, 0.0)


def shapes(batches: list[tuple[Tensor, list[tuple[int, np.ndarray]]]]) -> dict[str, Any]:
    """Of each mask how much was asked and hidden, in what shape; of each batch how much, and in which crops."""
    asked = np.array([[one[0] for one in each] for _, each in batches])
    m = np.stack([one[1] for _, each in batches for one in each])
    whole = np.stack([each.numpy() for each, _ in batches])
    first, second = np.split(whole.any(axis=2), 2, axis=1)
    missing = asked.flatten() - m.sum(axis=(1, 2))
    edges = (m[:, 1:] != m[:, :-1]).sum(axis=(1, 2)) + (m[:, :, 1:] != m[:, :, :-1]).sum(axis=(1, 2))
    return {
        "asked": asked.flatten(), "asked of the first stratum": asked[:, 0], "asked of the last stratum": asked[:, -1],
        "share hidden": m.mean(axis=(1, 2)), "missing": missing, "met": missing == 0, "edges": edges,
        "rows touched": m.any(axis=2).sum(axis=1), "connected parts": [label(each)[1] for each in m],
        "share hidden in a batch": whole.mean(axis=(1, 2)), "holes in the first crop": first.flatten(),
        "holes in both crops": (first & second).flatten(), "map": m,
    }  # fmt: skip


# ---------------------------------------------------------------- order, schedules, settings


def order_rows(meta: SimpleNamespace, passes: int, n: int = 103, n_processes: int = 4) -> Iterator[Row]:
    """Passes are permutations; the sampler of the released loop never comes to what equal shares leave over."""
    theirs = list(islice(meta.samplers.InfiniteSampler(sample_count=n, shuffle=True, start=0, step=1), n * passes))
    ours = torch.cat([batch_indices(n, n, step, seed=0) for step in range(passes)]).numpy()
    broken = sum(len(set(row)) < n for each in (ours, theirs) for row in np.reshape(each, (passes, n)).tolist())
    yield same("order", "passes that are no permutation", 2 * passes, broken, 0)
    yield drawn("order", "place of image 0 in a pass", *(np.flatnonzero(np.equal(each, 0)) % n for each in (ours, theirs)))
    sampler, seen = meta.samplers.ShardedInfiniteSampler, set()
    for i in range(n_processes):
        seen |= set(islice(sampler(sample_count=n, shuffle=True, start=i, step=n_processes), 2 * n))
    yield same("order", "images that never come", n, n - len(set(ours.tolist())), 0, theirs=n - len(seen))


def schedule_rows(meta: SimpleNamespace, name: str) -> Iterator[Row]:
    """Every value of every schedule, and two steps past the end; then the settings, field by field."""
    theirs, (ours, changes, n_gpus) = meta.config(name), RUNS[name]
    config, tables = override(preset(ours), changes), meta.build_schedulers(theirs)
    steps, plan = range(tables[0].total_iters + 2), schedules(config)
    for key, table in zip(("lr", "weight_decay", "momentum", "teacher_temp", "last_layer_lr"), tables, strict=True):
        a, b = (np.array([value(step) for step in steps]) for value in (plan[key], table.__getitem__))
        yield same(name, key, len(steps), np.abs(a - b).max() / np.abs(b).max(), 1e-14)
    h, got = config.heads, flatten(config) | {"optim.lr": config.optim.lr}
    left_open = {"vit.ffn": "mlp", "heads.ibot_n_prototypes": h.n_prototypes, "heads.ibot_bottleneck_dim": h.bottleneck_dim}
    got |= {key: value for key, value in left_open.items() if got[key] is None}
    wanted = released_settings(theirs, n_gpus)
    others = {key: [got[key], value] for key, value in wanted.items() if got[key] != value}
    yield same(name, "settings that are others", len(wanted), len(others), 0, others=others)


def released_settings(c: Any, n_gpus: int) -> dict[str, Any]:
    """A released config in our words."""
    pairs = (pair.split("=") for pair in NAMES.split())
    found = {key: reduce(getattr, path.split("."), c) for key, path in pairs}
    epochs = {"teacher.warmup_frac": c.teacher.warmup_teacher_temp_epochs, "optim.warmup_frac": c.optim.warmup_epochs,
              "optim.freeze_last_layer_frac": c.optim.freeze_last_layer_epochs}  # fmt: skip
    return {
        **{key: value if isinstance(value, str | int | float) else tuple(value) for key, value in found.items()},
        **{key: value / c.optim.epochs for key, value in epochs.items()},
        "heads.tied": not c.ibot.separate_head, "vit.ffn": c.student.ffn_layer.removesuffix("fused"),
        "loss.targets": c.train.centering.removesuffix("_knopp"), "optim.batch_size": c.train.batch_size_per_gpu * n_gpus,
        "run.steps": c.optim.epochs * c.train.OFFICIAL_EPOCH_LENGTH,
    }  # fmt: skip


def measure(checkout: Path, data: str | None = None, toy: bool = False) -> dict[str, Any]:
    meta, found = official(checkout), pictures(data)
    rows = [row for name in RUNS for row in schedule_rows(meta, name)]
    rows += order_rows(meta, 100 if toy else 2000)
    rows += [row for grid in GRIDS for row in mask_rows(meta, *grid, 20 if toy else 250)]
    rows += crop_rows(meta, found.pixels, 2 if toy else 40)
    return {"released": meta.commit, "pictures": found.words, "alpha": ALPHA, "n_tests": sum("p" in row for row in rows), "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run",))
    parser.add_argument("checkout", type=Path, help="a clone of facebookresearch/dinov2")
    parser.add_argument("--data", help="JPEG photographs; without it scenes are drawn")
    parser.add_argument("--toy", action="store_true", help="few draws; nothing is stored")
    options = parser.parse_args()
    torch.set_num_threads(1)
    try:
        found = measure(options.checkout, options.data, options.toy)
    except (ImportError, ValueError, OSError) as error:
        parser.error(str(error))
    if not options.toy:
        store("official-data", found)
    for row in found["rows"]:
        print(*(f"{value:.3g}" if isinstance(value, float) else value for value in row.values()), sep=" | ")
    if bad := failures(found["rows"]):
        sys.exit(f"{len(bad)} of {len(found['rows'])} differ: {bad}")


if __name__ == "__main__":
    main()
