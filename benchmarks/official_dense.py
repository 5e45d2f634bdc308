"""Heads for pixels and distillation, whose training DINOv2's authors released with DINOv3, beside ours on the same inputs.

    python benchmarks/official_dense.py run CHECKOUT    of facebookresearch/dinov3; wants omegaconf and torchmetrics
    python benchmarks/official_dense.py draw            the tables of what was found

On a CPU, on drawn scenes, random numbers, and what the small trained network that comes along says of scenes. A difference of
more than the stated share of the largest number of theirs is an error, and so is a change of ours that is not seen. Results:
data/results/official-dense.json.
"""

import logging
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import official_distill
import torch
import torch.nn.functional as F
from official import _brief, _stored, _table
from official_depth import (
    DECAY,
    EXACT,
    LR,
    ONE_RATE,
    STEPS,
    Look,
    depth_errors,
    depth_losses,
    depth_rates,
    depth_training,
    doubles,
    scenes,
)
from official_distill import Rows, distillation, relative, there
from official_probes import compared, halves
from recipe import store
from released import borrow, checked, command_line
from torch import Tensor, nn

from minidino.images.corruptions import mean_corruption_error
from minidino.learning import train
from minidino.learning.optim import cosine_schedule
from minidino.probes import depth, logistic, segmentation

COMMIT = "6876159"  # of facebookresearch/dinov3
KINDS = 14  # classes of pixels
GIVEN = {"steps": STEPS, "batch_size": 16, "weight_decay": DECAY, "pixels": None}  # for our head of pixels


class Frame:
    """Of pandas."""

    def __init__(self, columns: dict[str, Any]): ...

    def to_string(self, **_: Any) -> str:
        return ""


KINDS_OF_NUMBERS = [f"{kind}Dtype" for kind in (
    "Int8", "Int16", "Int32", "Int64", "UInt8", "UInt16", "UInt32", "Float32", "Float64", "Boolean", "String")]  # fmt: skip
STAND_INS = {  # for what only writes tables and logs
    "termcolor": {"colored": lambda text, *_, **__: text},
    "pandas": {"__spec__": ModuleSpec("pandas", None), "set_option": lambda *_: None, "DataFrame": Frame,
               **dict.fromkeys([*KINDS_OF_NUMBERS, "Series"], str)},
}  # fmt: skip


# ---------------------------------------------------------------- classes of pixels


class Wrapped(nn.Module):
    """As DistributedDataParallel has its model."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module, self.forward = module, module.forward


def their_pixels(maps: Tensor, labels: Tensor) -> tuple[nn.Module, list[float]]:
    """Their model after their training with 16 scenes, from the weights that ours begins with, and the rate of each step."""
    share = (labels[:16] >= 0).double().mean()  # theirs is the mean loss of all pixels, ours of those with a label
    first = segmentation.train_head.__wrapped__(maps[:16], labels[:16], KINDS, **GIVEN | {"steps": 1}, lr=0.0)
    head = there("eval.segmentation.models.heads.linear_head").LinearHead([maps.shape[1]], KINDS, dropout=0.0)
    head.conv.load_state_dict(first.conv_seg.state_dict())
    decoder = there("eval.segmentation.models").FeatureDecoder(nn.ModuleList([Look([maps]), head]), nullcontext)
    optimizer = torch.optim.AdamW(head.parameters(), lr=LR, weight_decay=DECAY)
    kwargs = ONE_RATE | {"warmup_iters": 4, "warmup_ratio": 1e-6, "final_div_factor": float("inf")}
    scheduler = there("eval.segmentation.schedulers").build_scheduler("WarmupOneCycleLR", optimizer, LR, STEPS, kwargs)
    loss, rates = there("eval.segmentation.loss").MultiSegmentationLoss(celoss_weight=1.0), []
    batch = torch.arange(16), (None, torch.where(labels[:16] < 0, 255, labels[:16]))
    for step in range(STEPS):
        rates.append(optimizer.param_groups[0]["lr"])
        there("eval.segmentation.train").train_step(Wrapped(decoder), batch, "cpu", None, optimizer, float("inf"), scheduler,
                                                    lambda *x: loss(*x) / share, None, step)  # fmt: skip
    return decoder.eval(), rates


def pixel_training() -> Rows:
    maps, _, masks = scenes()
    ignored = torch.where(torch.rand(masks.shape) < 0.1, -1, masks)
    for what, labels in (("all pixels labelled", masks), ("a tenth ignored", ignored)):
        with doubles():
            decoder, rates = their_pixels(maps, labels)
            with patch.object(segmentation, "poly", lambda step, n: rates[step] / LR):
                ours = segmentation.train_head.__wrapped__(maps[:16], labels[:16], KINDS, **GIVEN, lr=LR)
            learned = ([x.double() for x in head.state_dict().values()] for head in (decoder.segmentation_model[1], ours))
            yield compared("segmentation", f"linear head, {what}: weights after {STEPS} steps", *relative(*learned), EXACT)
            said = decoder.predict(torch.arange(16, 24), masks.shape[1:]).argmax(1)
            told = torch.cat(list(segmentation.predict(ours, maps[16:], masks.shape[1:])))
        yield compared("segmentation", f"linear head, {what}: scores of 8 scenes", *both_scores(said, told, labels[16:]))


def both_scores(theirs: Tensor, ours: Tensor, truth: Tensor) -> tuple[list[Any], list[Any]]:
    metrics, known = there("eval.segmentation.metrics"), torch.where(truth < 0, 255, truth)
    areas = [metrics.calculate_intersect_and_union(p, t, KINDS) for p, t in zip(theirs, known, strict=True)]
    found = metrics.calculate_segmentation_metrics(areas, metrics=["mIoU", "dice", "fscore"])
    mine = segmentation.mean_iou(ours, truth, KINDS)
    return [found[k] for k in ("mIoU", "aAcc", "acc")], [mine[k] for k in ("miou", "accuracy", "mean_accuracy")]


def pixel_scores() -> Rows:
    truth = torch.randint(-1, KINDS - 3, (6, 40, 50))  # three classes never occur, of which two are named
    seen = torch.where(torch.rand(truth.shape) < 0.5, truth.clamp_min(0), torch.randint(0, KINDS - 1, truth.shape))
    yield compared("segmentation", "scores with ignored pixels and absent classes", *both_scores(seen, seen, truth))


@torch.no_grad()
def windows() -> Rows:
    inference, look = there("eval.segmentation.inference"), nn.Conv2d(3, KINDS, 3, padding=1)
    model = SimpleNamespace(predict=lambda x, rescale_to: look(x / 99))
    for size, window, stride in (((40, 60), 32, 21), ((70, 33), 32, 32), ((33, 95), 64, 43), ((64, 64), 64, 43)):
        images = torch.randint(0, 256, (1, 3, *size), dtype=torch.uint8)
        ask = partial(inference.make_inference, segmentation_model=model, inference_mode="slide", rescale_to=size,
                      n_output_channels=KINDS, crop_size=(window, window), stride=(stride, stride),
                      output_activation=partial(torch.softmax, dim=1))  # fmt: skip
        seen = ask(images.float()), ask(images.flip(3).float(), apply_horizontal_flip=True)
        ours = segmentation.predict_windows(lambda x: look(x / 99), images, window, stride, flip=True)
        what = f"{size[0]} x {size[1]} px through {window} px every {stride} px, and mirrored"
        yield compared("segmentation", what, (seen[0] + seen[1]) / 2, ours)


# ---------------------------------------------------------------- classes of pictures


def logistic_regression() -> Rows:
    theirs, metrics, (x, y, test_x, test_y) = there("eval.log_regression"), there("eval.metrics"), halves()
    config, theirs.C_POWER_RANGE = theirs.TrainConfig(), torch.linspace(-6, 5, 45)[10:32:7]  # scikit-learn takes its time
    order = torch.randperm(500, generator=torch.Generator().manual_seed(0))
    val, rows = order[:50], order[50:]
    metric = metrics.build_classification_metric(metrics.ClassificationMetricType.MEAN_ACCURACY, num_classes=int(y.max()) + 1)
    best, c = theirs.sweep_C_values(
        train_features=x[rows], train_labels=y[rows], val_metric=metric, logreg_config=config,
        val_data_loader=[(x[val], (val, y[val]))])  # fmt: skip
    ours = logistic.logistic_regression(x, y, test_x, test_y, logistic.PUBLISHED_CS[10:32:7])
    mine = ours["best_c"], ours["table"][ours["best_c"]]
    yield compared("logistic", "C that is chosen, and its accuracy", (c, best["top-1"]), mine)
    model = theirs.train_for_C(C=c, train_features=x, train_labels=y, logreg_config=config)
    yield compared("logistic", "probabilities", model(test_x, y)["preds"], ours["model"].logits(test_x).softmax(1), 1e-4)


def corruptions() -> Rows:
    theirs = there("eval.metrics.imagenet_c")
    alexnet = {name: list(levels.values()) for name, levels in theirs.ALEXNET_INVERSE_SCORES.items()}
    errors = {name: torch.rand(5).double().tolist() for name in alexnet}
    right = {name: {i + 1: 1 - x for i, x in enumerate(xs)} for name, xs in errors.items()}
    found = float(theirs.compute_relative_average_scores(right)), mean_corruption_error(errors, alexnet)["mce"]
    yield compared("corruptions", f"mean corruption error of {len(alexnet)} kinds", *found, EXACT)


PARTS = (depth_training, depth_rates, depth_losses, depth_errors, pixel_training, pixel_scores, windows, distillation,
         logistic_regression, corruptions)  # fmt: skip


# ---------------------------------------------------------------- would a difference be seen?


def changes() -> dict[str, tuple[Callable[[], Rows], Any]]:
    """Of ours alone: what is changed, in which part it should be seen, and how it is done."""
    silog, losses, confusion = depth.silog_loss, train.student_losses, segmentation.confusion
    late = cosine_schedule(1.0, 0.0, 38_400, 12_800, 1e-3)
    counted = SimpleNamespace(cross_entropy=lambda x, y, **_: F.cross_entropy(x, y.clamp_min(0), reduction="sum"))

    def starts(side: int, window: int, stride: int) -> list[int]:
        return [*range(max(side - window, 0), 0, -stride), 0]

    found = {
        "depth: logarithms begin at 2 mm": (depth_losses, patch.object(depth, "EPS", 2e-3)),
        "depth: the coarsest scale of gradients is 8": (depth_losses, patch.object(depth, "SCALES", (1, 2, 4, 8))),
        "depth: no first steps": (depth_training, patch.object(depth, "silog_loss", lambda *x, **_: silog(*x))),
        "depth: the cosine waits for the warm-up": (depth_rates, patch.object(depth, "warmed_cosine", lambda i, _: late(i))),
        "segmentation: ignored pixels are class 0": (pixel_training, patch.object(segmentation, "F", counted)),
        "segmentation: truth and answer exchanged": (
            pixel_scores, patch.object(segmentation, "confusion", lambda *x: confusion(*x).T)),
        "segmentation: windows from the far end": (windows, patch.object(segmentation, "_starts", starts)),
        "distillation: patches are hidden": (
            distillation, patch.object(train, "student_losses", lambda *x, **o: losses(*x, **o | {"hide": True}))),
    }  # fmt: skip
    for change in ("loss.koleo_views=paper", "loss.ibot_divisor=paper", "loss.student_temp=0.11", "loss.targets=centering",
                   "teacher.momentum=0.99"):  # fmt: skip
        found[f"distillation: {change}"] = distillation, patch.object(official_distill, "OURS", [change])
    return found


def excess(row: dict[str, Any]) -> float:
    """How many times as far off as it may be."""
    return row["difference"] / max(row["tolerance"] * row["scale"], 1e-12)


def run(checkout: Path) -> None:
    nn.SyncBatchNorm, nn.Module.compile = nn.BatchNorm2d, lambda self, *_, **__: None  # what wants GPUs
    checked(checkout, "facebookresearch/dinov3", "dinov3/eval", COMMIT)
    commit = borrow(checkout, STAND_INS, "dinov3")
    logging.disable(logging.INFO)
    warnings.filterwarnings("ignore")  # of scikit-learn, and of autocast without a GPU
    rows, seen = [], []
    for part in PARTS:
        torch.manual_seed(0)
        rows += part()
    for what, (part, change) in changes().items():
        torch.manual_seed(0)
        with change:
            furthest = max(part(), key=excess)
        share = furthest["difference"] / furthest["scale"]
        seen.append({"changed": what, "seen_in": furthest["what"], "difference": share, "excess": excess(furthest)})
    wrong = [row for row in rows if not excess(row) <= 1] + [row for row in seen if not row["excess"] > 10]
    if wrong:
        raise SystemExit("not the same, or not seen:\n" + "\n".join(map(str, wrong)))
    print(store("official-dense", {"released": commit, "rows": rows, "changed": seen}))


# ---------------------------------------------------------------- the tables


def tables() -> dict[str, str]:
    stored, rows, groups = _stored("dense"), [], {}
    for row in stored["rows"]:
        loose = row["tolerance"] > 1e-4  # what need not be the same has a line of its own
        groups.setdefault(f"{row['part']}: {row['what'].split(': ')[-1]}" if loose else row["part"], []).append(row)
    for group, found in groups.items():
        largest = max(row["difference"] / row["scale"] for row in found)
        rows.append([group, len(found), f"{sum(row['n'] for row in found):,}", f"{largest:.1e}" if largest else "0"])
    changed = [[row["changed"], row["seen_in"], _brief(row["difference"])] for row in stored["changed"]]
    heads, note = ["changed here alone", "seen most in", "difference"], f"DINOv3's code at {stored['released'][:7]}"
    made = {"official-dense-changed": _table(heads, changed, stored, note)}
    heads = ["", "comparisons", "numbers", "largest difference, as a share of the largest number"]
    return made | {"official-dense": _table(heads, rows, stored, note)}


if __name__ == "__main__":
    command_line(__doc__, run, tables, "a checkout of facebookresearch/dinov3")
