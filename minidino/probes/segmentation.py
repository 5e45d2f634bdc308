"""Which thing each pixel belongs to, told from frozen features by a linear head, and how good that is.

    linear_segmentation(train_maps, train_masks, test_maps, test_masks, n_classes)    the published probe
    predict_windows(predict, images, window, stride, scales)                          "+ms": windows, several scales
    mean_iou(prediction, target, n_classes)                                           IoU, accuracies
"""

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from minidino.probes.dense import at_pixels, checked, feature_maps, upsample
from minidino.probes.features import frozen, in_float32
from minidino.probes.knn import Rows, class_numbers

MS_SCALES = (1.0, 1.32, 1.73, 2.28, 3.0)  # published, of the multi-scale test
WARMUP = 1500 / 40_000  # share of the steps, as published
AT_ONCE = 2**25  # logits at a time when predicting: 128 MiB of float32

# ---------------------------------------------------------------- scores


def confusion(prediction: Rows, target: Rows, n_classes: int) -> Int[Tensor, "K K"]:
    """Count the pixels of each true class (rows) that were given each class (columns); a target of -1 is ignored.

    Raises:
        ValueError: unequal shapes, a target that is no class and not -1, a prediction that is no class, such as a
            probability.
    """
    prediction, target = class_numbers(prediction).cpu(), class_numbers(target).cpu()
    if prediction.shape != target.shape:
        raise ValueError(f"expected one prediction per target, got {tuple(prediction.shape)}, {tuple(target.shape)}")
    expect_classes(target, n_classes)
    known = target >= 0
    prediction, target = prediction[known], target[known]
    if len(prediction) and not 0 <= int(prediction.min()) <= int(prediction.max()) < n_classes:
        raise ValueError(f"expected predictions from 0 to {n_classes - 1}, got {prediction.unique().tolist()[:20]}")
    return torch.bincount(target * n_classes + prediction, minlength=n_classes**2).view(n_classes, n_classes)


def expect_classes(target: Tensor, n_classes: int) -> None:
    """Raises ValueError where a label is neither a class nor -1."""
    if n_classes < 1:
        raise ValueError(f"expected at least one class, got n_classes {n_classes}")
    low, high = (int(target.min()), int(target.max())) if target.numel() else (0, 0)
    if low < -1 or high >= n_classes:
        raise ValueError(f"expected labels from 0 to {n_classes - 1}, or -1 = ignored, got {low} to {high}")


def scores(counts: Int[Tensor, "K K"]) -> dict:
    """IoU and accuracies of a confusion matrix; what `mean_iou` returns.

        IoU of a class = pixels that are it and are called it / pixels that are it or are called it
    """
    counts = counts.double()
    if counts.sum() == 0:
        raise ValueError("every pixel is ignored (-1): nothing to judge")
    hits, true, called = counts.diag(), counts.sum(1), counts.sum(0)
    iou = hits / (true + called - hits)  # 0 / 0 = nan: absent in both
    recall = hits / true
    return {
        "miou": iou.nanmean().item(),
        "accuracy": (hits.sum() / counts.sum()).item(),
        "mean_accuracy": recall.nanmean().item(),
        "iou": iou.tolist(),
    }


def mean_iou(prediction: Rows, target: Rows, n_classes: int) -> dict:
    """Judge a segmentation over all pixels of all pictures together.

    Args:
        prediction, target: classes, any equal shape; a target of -1 is ignored.
    Returns:
        "miou" over the classes that occur in prediction or target, "accuracy" of pixels, "mean_accuracy" over the
        classes that occur in the target, "iou" of every class (nan where it occurs in neither).
    Raises:
        ValueError: no pixel counts; labels out of range.
    Source: mmsegmentation 0.27, mean_iou, as official dinov2 uses it.
    """
    return scores(confusion(prediction, target, n_classes))


# ---------------------------------------------------------------- the linear head


class LinearHead(nn.Module):
    """BatchNorm and one linear map, the same at every place: features (n, C, Hp, Wp) to logits (n, K, Hp, Wp).

    Source: official dinov2/eval/segmentation/models/decode_heads/linear_head.py; weights from N(0, 0.01), biases 0.
    """

    def __init__(self, in_channels: int, n_classes: int, generator: torch.Generator | None = None):
        super().__init__()
        self.bn = nn.BatchNorm2d(in_channels)
        self.conv_seg = nn.Conv2d(in_channels, n_classes, 1)
        with torch.no_grad():
            self.conv_seg.weight.normal_(0, 0.01, generator=generator)
            self.conv_seg.bias.zero_()

    def forward(self, maps: Float[Tensor, "n C Hp Wp"]) -> Float[Tensor, "n K Hp Wp"]:
        return self.conv_seg(self.bn(maps))


@in_float32
def train_head(
    maps: Rows,
    masks: Rows,
    n_classes: int,
    steps: int = 1000,
    batch_size: int = 16,
    lr: float = 1e-3,
    weight_decay: float = 1e-4,
    pixels: int | None = 2048,
    patch_size: int | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> LinearHead:
    """Fit the head: cross-entropy of pixels, logits upsampled bilinearly to the labels; AdamW, warm-up, then to 0.

    Args:
        maps, masks, n_classes, patch_size: as for `linear_segmentation`.
        pixels: drawn from each picture at each step, at which the upsampled logits are computed exactly: the same
            expectation for a fraction of the time. None takes all.
    """
    maps, masks = checked(maps, masks, "training")
    masks = class_numbers(masks)
    expect_classes(masks, n_classes)
    if not (masks >= 0).any():
        raise ValueError("every training pixel is ignored (-1): nothing to learn from")
    if min(steps, batch_size, 1 if pixels is None else pixels) < 1:
        raise ValueError(f"expected steps, batch_size, pixels of at least 1, got {steps}, {batch_size}, {pixels}")
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):  # modules first draw from the global generator
        head = LinearHead(maps.shape[1], n_classes, generator).to(device)
    search = torch.optim.AdamW(head.parameters(), lr=lr, weight_decay=weight_decay)
    size, flat = masks.shape[1:], masks.flatten(1)
    with torch.enable_grad():
        for step, rows in enumerate(batches(len(maps), batch_size, steps, generator)):
            for group in search.param_groups:
                group["lr"] = lr * poly(step, steps)
            logits, labels = head(maps[rows].to(device).float()), flat[rows]
            if pixels is None:
                logits = upsample(logits, size, patch_size).flatten(2)
            else:
                chosen = torch.randint(flat.shape[1], (len(rows), pixels), generator=generator)
                logits, labels = at_pixels(logits, chosen.to(device), size, patch_size), labels.gather(1, chosen)
            labels = labels.to(device)
            loss = F.cross_entropy(logits, labels, ignore_index=-1, reduction="sum") / (labels >= 0).sum().clamp_min(1)
            search.zero_grad()
            loss.backward()
            search.step()
    return head.eval()


def poly(step: int, steps: int) -> float:
    """Factor of the learning rate: linear warm-up, times 1 - step / steps ("poly" of power 1)."""
    warmup = max(1, round(WARMUP * steps))
    return min(1.0, (step + 1) / warmup) * (1 - step / steps)


def batches(n: int, batch_size: int, steps: int, generator: torch.Generator) -> Iterable[Tensor]:
    """Rows of each step: all are shuffled and dealt out, again and again; a last incomplete batch is left out."""
    batch_size = min(batch_size, n)
    per_epoch = n // batch_size
    for step in range(steps):
        if step % per_epoch == 0:
            order = torch.randperm(n, generator=generator)
        yield order[step % per_epoch * batch_size :][:batch_size]


def predict(
    head: nn.Module, maps: Rows, size: Sequence[int], patch_size: int | None = None
) -> Iterable[Int[Tensor, "_ H W"]]:
    """The class of every pixel, some pictures at a time (on the CPU): argmax of the upsampled logits."""
    device = next(head.parameters()).device
    with frozen(head):
        some = head(torch.as_tensor(maps[:1]).to(device).float()).shape[1] * size[0] * size[1]
        for part in torch.as_tensor(maps).split(max(1, AT_ONCE // some)):
            yield upsample(head(part.to(device).float()), size, patch_size).argmax(1).cpu()


@in_float32
def linear_segmentation(
    train_maps: Rows,
    train_masks: Rows,
    test_maps: Rows,
    test_masks: Rows,
    n_classes: int,
    steps: int = 1000,
    batch_size: int = 16,
    lr: float = 1e-3,
    seed: int = 0,
    *,
    weight_decay: float = 1e-4,
    pixels: int | None = 2048,
    patch_size: int | None = None,
    classes: Sequence[str] | None = None,
    device: torch.device | str = "cpu",
) -> dict:
    """Name every pixel by a linear head on frozen maps, as published: BatchNorm, 1x1 convolution, bilinear upsampling.

    Args:
        train_maps, test_maps: (n, C, Hp, Wp) from `feature_maps`; one block, or several side by side ("+ms" takes 4).
        train_masks, test_masks: (n, H, W) classes, -1 = ignored.
        n_classes: classes 0 to n_classes - 1.
        steps, batch_size, lr, weight_decay: of AdamW; published: 40,000 steps of 16 pictures.
        seed: draws weights, batches and pixels.
        pixels: per picture and step in training (`train_head`); scores always count every pixel.
        patch_size: side of a patch in px where pictures were padded; None: maps span the masks exactly.
        classes: names for the table; None numbers them, as it does those that have one name.
    Returns:
        What `mean_iou` returns, and "table" {class: IoU}, "commonest": the same scores for naming everything by the
        commonest training class, "head": the trained LinearHead.
    Raises:
        ValueError: shapes that do not fit, labels out of range, nothing labelled, features that are not finite.
    Source: DINOv2 paper, section 7.4; official dinov2/eval/segmentation/models/decode_heads/linear_head.py; recipe
        (AdamW 1e-3, weight decay 1e-4, warm-up 1,500 of 40,000, poly 1) of a third-party replication, as none was
        released.
    Differs: features are computed once, so there is no augmentation; BatchNorm in one process; fewer steps; the loss is
        the mean over labelled pixels, that of mmsegmentation and of DINOv3 over all, where an ignored one counts as 0.
    """
    test_maps, test_masks = checked(test_maps, test_masks, "test")
    test_masks = class_numbers(test_masks)
    expect_classes(test_masks, n_classes)
    if not (test_masks >= 0).any():
        raise ValueError("every test pixel is ignored (-1): nothing to judge")
    if classes is not None and len(classes) != n_classes:
        raise ValueError(f"expected a name for each of {n_classes} classes, got {len(classes)}")
    head = train_head(train_maps, train_masks, n_classes, steps, batch_size, lr, weight_decay, pixels, patch_size, seed,
                      device)  # fmt: skip
    predictions = predict(head, test_maps, test_masks.shape[1:], patch_size)
    found = judged(predictions, test_masks, n_classes)
    labels = class_numbers(train_masks).cpu()
    commonest = torch.bincount(labels[labels >= 0], minlength=n_classes).argmax()
    constant = scores(confusion(commonest.expand(test_masks.shape), test_masks, n_classes))
    names = classes or [f"class {i}" for i in range(n_classes)]
    names = [name if names.count(name) == 1 else f"{name} ({i})" for i, name in enumerate(names)]
    table = dict(zip(names, found["iou"], strict=True))
    return {**found, "table": table, "commonest": constant, "head": head}


def judged(predictions: Iterable[Tensor], masks: Int[Tensor, "n H W"], n_classes: int) -> dict:
    """The scores of predictions that come some pictures at a time."""
    counts, start = torch.zeros(n_classes, n_classes, dtype=torch.long), 0
    for part in predictions:
        counts += confusion(part, masks[start : start + len(part)], n_classes)
        start += len(part)
    return scores(counts)


# ---------------------------------------------------------------- windows and scales

Predict = Callable[[UInt8[Tensor, "B 3 h w"]], Float[Tensor, "B K h w"]]  # pixels to logits of every pixel


def segmenter(
    vit: nn.Module, head: nn.Module, blocks: int | Sequence[int] = 1, norm: bool = True, class_token: bool = False
) -> Predict:
    """Backbone and trained head as one function of pixels, for pictures of any size."""

    def logits(images: UInt8[Tensor, "B 3 h w"]) -> Float[Tensor, "B K h w"]:
        maps = feature_maps(vit, images, blocks, norm, class_token, progress=False)
        with frozen(head):
            found = head(maps.to(next(head.parameters()).device))
        return upsample(found, images.shape[2:], vit.patch_size).cpu()

    return logits


def predict_windows(
    predict: Predict,
    images: UInt8[Tensor, "B 3 H W"],
    window: int,
    stride: int,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
) -> Float[Tensor, "B K H W"]:
    """Look through a sliding window, at several scales, and average what is seen.

    Args:
        predict: logits for every pixel of what it is shown, as `segmenter` makes them.
        window, stride: px of the scaled picture; the last window of a row is moved back to end with the picture, and a
            picture smaller than the window is one window.
        scales: factors of the size; published for "+ms": MS_SCALES.
        flip: look at the mirrored picture too.
    Returns:
        Probabilities: logits are averaged where windows overlap, probabilities over scales and mirrors.
    Raises:
        ValueError: not 1 <= stride <= window (pixels would be left out), no scale or one that is not above 0.
    Source: mmsegmentation 0.27, slide_inference and aug_test, with the ratios of the official "ms" configs.
    """
    if not 1 <= stride <= window:
        raise ValueError(f"expected 1 <= stride <= window px, got stride {stride} and window {window}")
    if not scales or min(scales) <= 0:
        raise ValueError(f"expected at least one scale above 0, got {list(scales)}")
    total, size = 0.0, images.shape[2:]
    for scale in scales:
        sides = [max(1, round(n * scale)) for n in size]
        scaled = images
        if sides != list(size):
            scaled = F.interpolate(images.float(), sides, mode="bilinear", antialias=True).round().to(torch.uint8)
        looks = [_slide(predict, scaled, window, stride)]
        looks += [_slide(predict, scaled.flip(3), window, stride).flip(3)] if flip else []
        for logits in looks:
            if sides != list(size):
                logits = F.interpolate(logits, size, mode="bilinear", align_corners=False)
            total = total + logits.softmax(1) / (len(scales) * len(looks))
    return total


def _slide(predict: Predict, images: UInt8[Tensor, "B 3 H W"], window: int, stride: int) -> Float[Tensor, "B K H W"]:
    total, looks = 0.0, torch.zeros(images.shape[2:])
    for top in _starts(images.shape[2], window, stride):
        for left in _starts(images.shape[3], window, stride):
            here = (..., slice(top, top + window), slice(left, left + window))
            logits = predict(images[here])
            total = logits.new_zeros(*logits.shape[:2], *images.shape[2:]) if isinstance(total, float) else total
            total[here] += logits
            looks[here] += 1
    return total / looks


def _starts(side: int, window: int, stride: int) -> list[int]:
    last = max(side - window, 0)
    return [*range(0, last, stride), last]
