"""The published linear probe: 52 heads in one pass, on cached features or on features of augmented crops."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from minidino.images.crops import CropLaw, crop_seed, multi_crop
from minidino.images.pixels import Pixels
from minidino.probes.features import in_float32, look
from minidino.probes.knn import Rows, as_tensor, class_numbers
from minidino.probes.linear import (
    PUBLISHED_LRS,
    counted,
    head_accuracies,
    held_out,
    labelled,
    labelled_parts,
    shuffled,
    steps_of,
    train_heads,
)


@in_float32
def linear_grid(
    train: dict[str, Rows],
    train_y: Rows,
    test: dict[str, Rows],
    test_y: Rows,
    n_classes: int | None = None,
    lrs: Sequence[float] = PUBLISHED_LRS,
    blocks: Sequence[int] = (1, 4),
    epochs: int = 10,
    batch_size: int = 256,
    seed: int = 0,
    val_frac: float = 0.1,
    choose: str = "held-out",
) -> dict:
    """Train the published 52 heads in one pass over cached features and report the best one.

        13 learning rates x class tokens of the last {1, 4} blocks x {without, with} the mean patch token

    Args:
        train, test: what `features.extract(..., blocks=4)` gives: "cls_blocks" (n, b, D), "mean_patch" (n, D).
        train_y, test_y: labels; rows with a label below 0 (unknown) are dropped.
        n_classes: labels are below it; None counts those that occur, whatever their numbers.
        lrs: the grid, before the batch rule.
        blocks: how many last blocks the heads see; the features must hold that many.
        epochs: passes over the training rows.
        batch_size: rows a step; a last incomplete batch is left out.
        seed: draws the held-out part, the order of the rows and the first weights.
        val_frac: share of the training rows that is held out, where the choice is made there.
        choose: "held-out" takes the head that is best on held-out training rows; "test", as published, trains on all
            training rows and takes the head that is best on the test rows, which is optimistic.
    Returns:
        "accuracy" of the chosen head, top-1 fraction on the test rows; "best_lr", "blocks", "avgpool" say which;
        "table" has a dict for each head: "lr", "blocks", "avgpool", "accuracy" on the rows that chose.
    Raises:
        ValueError: another way to choose, too few labelled rows, features that lack the blocks; nothing to train, as
            for `linear_probe`.
    Source: DINOv2 paper, section 7.1; official dinov2/eval/linear.py (b8931f7).
    Differs: the features are computed once, so there is no augmentation: for that see `train_grid` and
        `augmented_features`; heads of one input start from the same weights. In batches under about 200 the official code
        loses heads: it names them by lr * batch_size / 256 in five decimals, and of equal names it trains the last alone.
    """
    if choose not in ("held-out", "test"):
        raise ValueError(f"expected choose 'held-out' or 'test', got {choose!r}")
    generator = torch.Generator().manual_seed(seed)
    train_x, test_x = (_joined(found, max(blocks)) for found in (train, test))
    x, y, test_x, test_y = labelled_parts(train_x, train_y, test_x, test_y)
    if n_classes is None:
        y, test_y, n_classes = counted(y, test_y)
    val_x, val_y = test_x, test_y
    if choose == "held-out":
        val, rows = held_out(len(x), val_frac, generator)
        x, y, val_x, val_y = x[rows], y[rows], x[val], y[val]
    batch_size, steps = steps_of(len(x), epochs, batch_size)
    width = torch.as_tensor(train["mean_patch"]).shape[1]
    spans = _spans(width, blocks)
    batches = shuffled(x, y, batch_size, generator)
    weights = train_heads(batches, spans, max(blocks) * width, n_classes, lrs, steps, generator)
    table = _table(lrs, blocks, head_accuracies(weights, spans, len(lrs), val_x, val_y))
    best = max(range(len(table)), key=lambda i: table[i]["accuracy"])  # the first where several are equal
    accuracy = head_accuracies(weights, spans, len(lrs), test_x, test_y)[best].item()
    chosen = table[best]
    return {"accuracy": accuracy, "best_lr": chosen["lr"], "blocks": chosen["blocks"], "avgpool": chosen["avgpool"],
            "table": table}  # fmt: skip


@dataclass(frozen=True)
class HeadGrid:
    """Trained heads: for each input one (r * C, width) matrix, a head's classes in consecutive rows."""

    weights: list[Float[Tensor, "rC w"]]
    lrs: Sequence[float]
    blocks: Sequence[int]
    width: int  # D

    def table(self, found: dict[str, Rows], y: Rows) -> list[dict]:
        """Judge every head on labelled features: dicts of "lr", "blocks", "avgpool", "accuracy" (top-1 fraction)."""
        x, y = labelled(_joined(found, max(self.blocks)), y)
        if len(x) == 0:
            raise ValueError("no row has a label of 0 or more: nothing to judge")
        spans = _spans(self.width, self.blocks)
        scores = head_accuracies(self.weights, spans, len(self.lrs), x, y)
        return _table(self.lrs, self.blocks, scores)


def train_grid(
    batches: Iterable[tuple[dict[str, Tensor], Tensor]],
    steps: int,
    n_classes: int,
    lrs: Sequence[float] = PUBLISHED_LRS,
    blocks: Sequence[int] = (1, 4),
    seed: int = 0,
) -> HeadGrid:
    """Train the published heads on whatever batches come along, such as features of augmented crops.

    Args:
        batches: (features, labels) as from `augmented_features` or `cached_features`: "cls_blocks" (B, b, D) and
            "mean_patch" (B, D), and (B,).
        steps: batches to take, the length of the cosine; 12,500 of 1,024 images in the paper.
        n_classes: labels are 0 to n_classes - 1.
        lrs: before the rule lr * B / 256.
        seed: draws the first weights.
    Raises:
        ValueError: fewer batches than steps.
    Source: official dinov2/eval/linear.py (b8931f7).
    """
    batches = iter(batches)
    first = next(batches, None)
    if first is None or steps < 1:
        raise ValueError(f"expected at least one batch and one step, got steps = {steps}")
    width = first[0]["mean_patch"].shape[1]
    rows = ((_joined(found, max(blocks)), as_tensor(y).long()) for found, y in chain([first], batches))
    generator = torch.Generator().manual_seed(seed)
    spans = _spans(width, blocks)
    weights = train_heads(rows, spans, max(blocks) * width, n_classes, lrs, steps, generator)
    return HeadGrid(weights, tuple(lrs), tuple(blocks), width)


def cached_features(
    found: dict[str, Rows], y: Rows, batch_size: int = 256, seed: int = 0
) -> Iterator[tuple[dict[str, Tensor], Int[Tensor, "B"]]]:
    """Shuffle cached features into batches without end, for `train_grid`: heads that are to be judged on several sets.

    Args:
        found: what `features.extract(..., blocks=4)` gives.
        y: labels; rows with a label below 0 (unknown) are left out.
        batch_size: rows a batch; a last incomplete batch of an epoch is left out.
        seed: draws the order.
    Raises:
        ValueError: no labelled row.
    """
    y = class_numbers(y).cpu()
    known = (y >= 0).nonzero()[:, 0]
    if len(known) == 0:
        raise ValueError("no row has a label of 0 or more: nothing to learn from")
    cls, mean = as_tensor(found["cls_blocks"]), as_tensor(found["mean_patch"])
    generator = torch.Generator().manual_seed(seed)
    for rows, labels in shuffled(known, y[known], min(batch_size, len(known)), generator):
        yield {"cls_blocks": cls[rows], "mean_patch": mean[rows]}, labels


def augmented_features(
    vit: nn.Module,
    pixels: Pixels,
    size: int = 224,
    batch_size: int = 256,
    blocks: int = 4,
    seed: int = 0,
    scale: tuple[float, float] = (0.08, 1.0),
) -> Iterator[tuple[dict[str, Tensor], Int[Tensor, "B"]]]:
    """Look at randomly cropped and flipped pictures with a frozen network, batch after batch without end.

    Args:
        pixels: pictures with labels; those with a label below 0 (unknown) are left out.
        size: side of the crops, px.
        batch_size: pictures a batch; a last incomplete batch of an epoch is left out.
        blocks: last blocks whose class tokens are kept.
        seed: the crop of a picture depends on seed, step and picture alone.
        scale: share of the picture's area, smallest and largest; torchvision's default, as published.
    Yields:
        Features, on the CPU, and labels, for `train_grid`.
    Raises:
        ValueError: no labelled picture.
    """
    for crops, labels in labelled_crops(pixels, size, batch_size, seed, scale, next(vit.parameters()).device):
        yield look(vit, crops.to(next(vit.parameters()).dtype), blocks), labels


def labelled_crops(
    pixels: Pixels,
    size: int,
    batch_size: int,
    seed: int,
    scale: tuple[float, float] = (0.08, 1.0),
    device: torch.device | str = "cpu",
) -> Iterator[tuple[Float[Tensor, "B C size size"], Int[Tensor, "B"]]]:
    """Crop and flip labelled pictures at random, batch after batch without end; see `augmented_features`.

    Yields:
        Normalised crops on the device, and labels.
    Raises:
        ValueError: no labelled picture.
    Source: official dinov2/data/transforms.py (b8931f7), make_classification_train_transform.
    """
    law = CropLaw(size=size, scale=scale, jitter_p=0.0, gray_p=0.0, blur_p=0.0)
    known = np.flatnonzero(pixels.labels >= 0)
    if len(known) == 0:
        raise ValueError("no picture has a label of 0 or more: nothing to learn from")
    order = shuffled(torch.from_numpy(known), torch.from_numpy(pixels.labels[known]), min(batch_size, len(known)),
                      torch.Generator().manual_seed(seed))  # fmt: skip
    for step, (rows, labels) in enumerate(order):
        images, sizes = pixels.batch(rows.numpy())
        seeds = [crop_seed(seed, step, index) for index in rows.tolist()]
        crops, _ = multi_crop(images.to(device), sizes, [law], law, 0, seeds)
        yield crops[0], labels


def _joined(found: dict[str, Rows], blocks: int) -> Float[Tensor, "n F"]:
    """Side by side: class tokens of the last blocks, oldest first, a one for the bias, the mean patch token.

    So every input of a head is a run of neighbouring columns, and none is ever copied.
    """
    if "cls_blocks" not in found or "mean_patch" not in found:
        raise ValueError(f"expected 'cls_blocks' and 'mean_patch', got {sorted(found)}; extract with blocks={blocks}")
    cls, mean = as_tensor(found["cls_blocks"]).float(), as_tensor(found["mean_patch"]).float()
    if cls.ndim != 3 or cls.shape[1] < blocks or mean.shape != cls[:, 0].shape:
        raise ValueError(
            f"expected cls_blocks (n, {blocks} or more, D) and mean_patch (n, D), got {tuple(cls.shape)} and "
            f"{tuple(mean.shape)}; extract with blocks={blocks}"
        )
    return torch.cat([cls[:, -blocks:].flatten(1), mean.new_ones(len(mean), 1), mean], dim=1)


def _spans(width: int, blocks: Sequence[int]) -> list[tuple[int, int]]:
    """Columns of `_joined` that each input of a head takes, without and with the mean patch token."""
    ones = max(blocks) * width
    return [(ones - n * width, ones + 1 + pool * width) for n in blocks for pool in (0, 1)]


def _table(lrs: Sequence[float], blocks: Sequence[int], scores: Float[Tensor, "heads"]) -> list[dict]:
    names = [{"lr": lr, "blocks": n, "avgpool": pool} for n in blocks for pool in (False, True) for lr in lrs]
    return [name | {"accuracy": score} for name, score in zip(names, scores.tolist(), strict=True)]
