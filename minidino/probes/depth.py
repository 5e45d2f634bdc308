"""How far away each pixel is, told from frozen features: the published linear heads, their losses, the errors.

    taps(depth, head)                                      which blocks: "lin1" the last, "lin4" four of them
    linear_depth(train_maps, train_depth, test_maps, ...)  one linear map into 256 bins of depth
    fit_depth(make, train_maps, ...)                       the same for any head, such as DPT's
    expected_depth(logits, bins)                           bins -> metres
    silog_loss, gradient_loss                              what is minimised
    depth_errors(prediction, target)                       RMSE and its kin

Distances are in metres; 0 = not known.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from minidino.probes.dense import at_pixels, checked, expect_finite, upsample
from minidino.probes.features import frozen, in_float32
from minidino.probes.knn import Rows, as_tensor
from minidino.probes.segmentation import batches

EPS = 1e-3  # metres, added before every logarithm
SCALES = (1, 2, 4, 6)  # every so many-th pixel in the gradient loss, as released
UPSAMPLE = 4  # bins per side of a patch, as released
PUBLISHED_LR, PUBLISHED_STEPS, LARGEST_LR = 1e-4, 38_400, 1e-2
FIRST = 1e-3  # share of the learning rate that the warm-up begins with
RELEASED_TAPS = {24: [4, 11, 17, 23]}  # ViT-L; the released blocks of all others are evenly spaced


def taps(depth: int, head: str = "lin4", mode: str = "released") -> list[int]:
    """Name the blocks whose maps a head reads, from 0, for `feature_maps(blocks=...)`.

    Args:
        depth: blocks of the network.
        head: "lin1", the last block, or "lin4", the ends of four equal parts: 2, 5, 8, 11 of 12.
        mode: "released" or "fixed"; they differ for 24 blocks alone, where [4, 11, 17, 23] was released, in the paper
            too, and 5 in place of 4 was meant, as the authors say in DINOv3.
    Raises:
        ValueError: not one of these; "lin4" of fewer than 4 blocks.
    Source: DINOv2 paper, section 7.4; official dinov2/hub/depthers.py.
    """
    if head not in ("lin1", "lin4") or mode not in ("released", "fixed"):
        raise ValueError(f"expected head lin1 or lin4 and mode released or fixed, got {head!r} and {mode!r}")
    least = 1 if head == "lin1" else 4
    if depth < least:
        raise ValueError(f"{head} needs {least} blocks, got {depth}")
    if head == "lin1":
        return [depth - 1]
    even = [(i + 1) * depth // 4 - 1 for i in range(4)]
    return list(RELEASED_TAPS.get(depth, even)) if mode == "released" else even


def bins(min_depth: float = 1e-3, max_depth: float = 10.0, n: int = 256, kind: str = "uniform") -> Float[Tensor, "n"]:
    """The distances a head chooses among, metres, both ends included.

    Args:
        kind: "uniform", as published, or "log": equal ratios.
    Raises:
        ValueError: not 0 < min_depth < max_depth, fewer than two bins, another kind.
    Differs: the released "SID" bins take min_depth and max_depth as powers of ten; "log" takes them as metres.
    """
    if not 0 < min_depth < max_depth < float("inf") or n < 2 or kind not in ("uniform", "log"):
        raise ValueError(
            f"expected 0 < min_depth < max_depth (m), n of at least 2, kind uniform or log, got {min_depth}, "
            f"{max_depth}, {n}, {kind!r}"
        )
    if kind == "uniform":
        return torch.linspace(min_depth, max_depth, n)
    return torch.logspace(np.log10(min_depth), np.log10(max_depth), n, dtype=torch.float64).float()


def expected_depth(logits: Float[Tensor, "B K H W"], bins: Float[Tensor, "K"]) -> Float[Tensor, "B H W"]:
    """Turn votes for bins into metres: the mean of the bins under these votes.

        p = (relu(logit) + 0.1) / sum over bins,   depth = sum p * bin

    Raises:
        ValueError: not one logit per bin.
    Source: official dinov2/eval/depth/models/decode_heads/decode_head.py ("UD", "linear").
    """
    if logits.ndim != 4 or logits.shape[1] != len(bins):
        raise ValueError(f"expected logits (B, {len(bins)}, H, W), one per bin, got {tuple(logits.shape)}")
    votes = logits.relu() + 0.1
    return (bins.to(votes) @ votes.flatten(2)).view_as(votes[:, 0]) / votes.sum(1)


# ---------------------------------------------------------------- losses


def silog_loss(prediction: Tensor, target: Tensor, valid: Tensor, warm_up: bool = False) -> Float[Tensor, ""]:
    """Compare logarithms of depth, forgiving most of one common factor.

        g = log(prediction + 0.001) - log(target + 0.001),   loss = sqrt(var(g) + 0.15 mean(g)^2)

    Args:
        prediction, target: metres, any equal shape.
        valid: bool, which pixels count.
        warm_up: only sqrt(0.15 mean(g)^2), as released for the first 100 steps.
    Returns:
        Scalar, no less than 1e-6 (so that a perfect prediction has a gradient). One valid pixel has no variance.
    Raises:
        ValueError: unequal shapes, valid that is not bool, no valid pixel.
    Source: official dinov2/eval/depth/models/losses/sigloss.py (variance with n - 1).
    """
    if not prediction.shape == target.shape == valid.shape:
        shapes = [tuple(x.shape) for x in (prediction, target, valid)]
        raise ValueError(f"expected prediction, target and valid of one shape, got {shapes}")
    if valid.dtype != torch.bool:  # numbers would choose rows
        raise ValueError(f"expected valid as bool, got {valid.dtype}")
    if not valid.any():
        raise ValueError("no valid pixel: nothing to compare")
    g = (prediction[valid].float() + EPS).log() - (target[valid].float() + EPS).log()
    if warm_up or len(g) == 1:
        return 0.15**0.5 * g.mean().abs()
    return (g.var() + 0.15 * g.mean().square()).clamp_min(1e-12).sqrt()


def gradient_loss(
    prediction: Float[Tensor, "B H W"],
    target: Float[Tensor, "B H W"],
    valid: Bool[Tensor, "B H W"],
    mode: str = "fixed",
) -> Float[Tensor, ""]:
    """Compare how log-depth changes from pixel to the next but one, at four scales: edges where edges are.

        d = log(prediction + 0.001) - log(target + 0.001)
        loss = sum over scales  sum |d[y] - d[y + 2]| + |d[x] - d[x + 2]|  / valid pixels      (both ends valid)

    Args:
        mode: "fixed" slices height and width; "released" slices the first two axes of (B, 1, H, W), as the official
            code does: pictures of the batch are compared with each other, and with one or two of them it is always 0.
    Source: official dinov2/eval/depth/models/losses/gradientloss.py; MegaDepth (Li and Snavely 2018).
    Differs: "fixed" skips a scale without valid pixels, which in the official code gives nan.
    """
    if mode not in ("fixed", "released"):
        raise ValueError(f"expected mode fixed or released, got {mode!r}")
    if not prediction.shape == target.shape == valid.shape or prediction.ndim != 3:
        shapes = [tuple(x.shape) for x in (prediction, target, valid)]
        raise ValueError(f"expected prediction, target and valid of one shape (B, H, W), got {shapes}")
    # metres at unknown pixels are no matter, but their logarithm must exist
    difference = (prediction.float() + EPS).log() - (torch.where(valid, target, 0).float() + EPS).log()
    axes = (1, 2) if mode == "fixed" else (0, 1)
    if mode == "released":
        difference, valid = difference[:, None], valid[:, None]
    total = difference.new_zeros(())
    for scale in SCALES:
        d, known = (x[:, ::scale, ::scale] if mode == "fixed" else x[::scale, ::scale] for x in (difference, valid))
        if known.any() or mode == "released":
            total = total + sum(_changes(d, known, axis) for axis in axes) / known.sum()
    return total


def _changes(d: Tensor, known: Tensor, axis: int) -> Tensor:
    """Sum of |d - its neighbour but one| along an axis, where both are known."""
    n = max(d.shape[axis] - 2, 0)
    a, b = d.narrow(axis, 0, n), d.narrow(axis, d.shape[axis] - n, n)
    both = known.narrow(axis, 0, n) & known.narrow(axis, d.shape[axis] - n, n)
    return torch.where(both, (a - b).abs(), 0.0).sum()


# ---------------------------------------------------------------- errors


def depth_errors(prediction: Rows, target: Rows, valid: Rows | None = None) -> dict:
    """Judge distances picture by picture, and take the mean over pictures, as is the custom.

    Args:
        prediction, target: (n, H, W) metres.
        valid: bool, which pixels count; None: those with a target above 0 that is finite.
    Returns:
        "rmse" (metres), "abs_rel" |p - t| / t, "log10" |log10 p - log10 t|, "delta1" the share within a factor of
        1.25; "n_valid" pixels and "n_images" that have any: pictures without are left out of the means.
    Raises:
        ValueError: no valid pixel at all; a prediction there that is not above 0 and finite; unequal shapes.
    Source: Eigen et al. 2014; the depth toolbox that official dinov2 builds upon (means over pictures).
    Differs: no crop of the border (published: Eigen's for NYU, Garg's for KITTI); give `valid` for that.
    """
    prediction, target = as_tensor(prediction), as_tensor(target)
    valid = (target > 0) & target.isfinite() if valid is None else as_tensor(valid).bool()
    if not prediction.shape == target.shape == valid.shape or target.ndim != 3:
        shapes = [tuple(x.shape) for x in (prediction, target, valid)]
        raise ValueError(f"expected prediction, target and valid of one shape (n, H, W), got {shapes}")
    if not valid.any():
        raise ValueError("no valid pixel in any picture: nothing to judge")
    wrong = ~((prediction[valid] > 0) & prediction[valid].isfinite())
    if wrong.any() or not ((target[valid] > 0) & target[valid].isfinite()).all():
        raise ValueError(f"expected valid depth above 0 m and finite; {int(wrong.sum())} predictions are not")
    pictures = zip(prediction, target, valid, strict=True)
    rows = [_errors_of(p[v].double(), t[v].double()) for p, t, v in pictures if v.any()]
    means = torch.tensor(rows, dtype=torch.float64).mean(0).tolist()
    names = ("rmse", "abs_rel", "log10", "delta1")
    return dict(zip(names, means, strict=True)) | {"n_valid": int(valid.sum()), "n_images": len(rows)}


def _errors_of(p: Float[Tensor, "m"], t: Float[Tensor, "m"]) -> list[float]:
    error, ratio = p - t, torch.maximum(p / t, t / p)
    parts = error.square().mean().sqrt(), (error.abs() / t).mean(), (p / t).log10().abs().mean()
    return [part.item() for part in (*parts, (ratio < 1.25).double().mean())]


# ---------------------------------------------------------------- the linear head


class DepthHead(nn.Module):
    """One linear map into bins, the same at every place: maps (n, C, Hp, Wp) to metres (n, 4 Hp, 4 Wp).

    The released head upsamples 4 times (bilinear) and then applies the map. Both are linear and the weights of bilinear
    interpolation sum to 1, so the order does not matter; the other way round there are 256 channels to upsample and
    16 times fewer products. A BatchNorm before it (DINOv3 has one) is an option.
    """

    def __init__(
        self,
        in_channels: int,
        bins: Float[Tensor, "K"],
        batch_norm: bool = False,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        self.bn = nn.BatchNorm2d(in_channels) if batch_norm else nn.Identity()
        self.conv_depth = nn.Conv2d(in_channels, len(bins), 1)
        self.register_buffer("bins", bins.clone())
        with torch.no_grad():  # PyTorch's own law, from our generator
            for part in (self.conv_depth.weight, self.conv_depth.bias):
                part.uniform_(-(in_channels**-0.5), in_channels**-0.5, generator=generator)

    def forward(self, maps: Float[Tensor, "n C Hp Wp"]) -> Float[Tensor, "n H4 W4"]:
        """Distances in m, at four times the patch grid."""
        logits = self.conv_depth(self.bn(maps))
        logits = F.interpolate(logits, scale_factor=UPSAMPLE, mode="bilinear", align_corners=False)
        return expected_depth(logits, self.bins)


def predict_depth(
    head: nn.Module, maps: Rows, size: Sequence[int], patch_size: int | None = None, batch_size: int = 8
) -> Iterator[Float[Tensor, "_ H W"]]:
    """Metres for every pixel, some pictures at a time (on the CPU). head: a DepthHead or a `DPTHead`."""
    device = next(head.parameters()).device
    with frozen(head):
        for part in torch.as_tensor(maps).split(batch_size):
            found = head(part.to(device).float())
            yield upsample(found[:, None], size, patch_size, part.shape[2:])[:, 0].cpu()


@in_float32
def linear_depth(
    train_maps: Rows,
    train_depth: Rows,
    test_maps: Rows,
    test_depth: Rows,
    min_depth: float = 1e-3,
    max_depth: float = 10.0,
    *,
    batch_norm: bool = False,
    pixels: int | None = 512,
    device: torch.device | str = "cpu",
    **options,
) -> dict:
    """Tell distances by one linear map from frozen features into 256 uniform bins, as published.

    Args:
        train_maps, test_maps: (n, C, Hp, Wp) from `feature_maps(blocks=taps(...), norm=False, class_token=True)`.
        train_depth, test_depth, min_depth, max_depth, options: as for `fit_depth`.
        batch_norm: in front of the map; released without.
        pixels: drawn from each picture at each step, to which features are interpolated straight; nothing is upsampled
            then. None, or any gradient_weight: metres at 4 times the map, interpolated to all pixels, as released and
            as in the test here; several times slower.
    Returns:
        What `fit_depth` does.
    Raises:
        ValueError: as `fit_depth`.
    Source: DINOv2 paper, section 7.4; official dinov2/hub/depthers.py.
    """

    def make(n_channels: int, generator: torch.Generator) -> DepthHead:
        return DepthHead(n_channels, bins(min_depth, max_depth), batch_norm, generator).to(device)

    data = train_maps, train_depth, test_maps, test_depth
    return fit_depth(make, *data, min_depth, max_depth, LARGEST_LR, pixels=pixels, **options)


@in_float32
def fit_depth(
    make: Callable[[int, torch.Generator], nn.Module],
    train_maps: Rows,
    train_depth: Rows,
    test_maps: Rows,
    test_depth: Rows,
    min_depth: float,
    max_depth: float,
    largest_lr: float,
    *,
    steps: int = 500,
    batch_size: int = 8,
    lr: float | None = None,
    seed: int = 0,
    weight_decay: float = 0.01,
    pixels: int | None = None,
    gradient_weight: float = 0.0,
    gradient_mode: str = "fixed",
    patch_size: int | None = None,
) -> dict:
    """Train a head on frozen features to tell distances, and judge it.

    Args:
        make: channels of the maps and a generator -> a head from maps to metres.
        train_maps, test_maps: (n, C, Hp, Wp).
        train_depth, test_depth: (n, H, W) metres; 0 = not known. What is beyond max_depth or not above min_depth does
            not count, in training and in scores.
        steps, batch_size, weight_decay: of AdamW; published: 38,400 steps of 2 pictures per GPU.
        lr: its rate; None: the published 1e-4, times as much as the steps are fewer, at most largest_lr.
        seed: draws weights, batches and pixels.
        pixels: see `linear_depth`, for a DepthHead alone; None: all of them.
        gradient_weight: of `gradient_loss` beside `silog_loss`; published 0.5, which counted for nothing (its mode
            "released" is 0 at 2 pictures).
        patch_size: side of a patch in px where pictures were padded; None: maps span the targets exactly.
    Returns:
        What `depth_errors` returns for the test pictures, and "constant": the same for the median training depth
        everywhere, "head": the trained head.
    Raises:
        ValueError: shapes that do not fit, no valid pixel, values that are not finite (also when training diverged).
    Source: the stored depth configs of official dinov2 (AdamW, `warmed_cosine`, gradients clipped at 35, first steps with
        `warm_up`).
    Differs: features are computed once, so there is no augmentation, and no mirrored second look at test time; fewer
        steps at a higher rate; the first beta of AdamW stays 0.9 (there it goes from 0.95 to 0.85 and back); the border of
        padded pictures is cut off instead of resized; a depth of max_depth counts in scores.
    """
    train_maps, train_depth = checked(train_maps, train_depth, "training")
    test_maps, test_depth = checked(test_maps, test_depth, "test")
    if min(steps, batch_size, 1 if pixels is None else pixels) < 1 or gradient_weight < 0:
        raise ValueError(
            f"expected steps, batch_size, pixels of at least 1 and gradient_weight of at least 0, got {steps}, "
            f"{batch_size}, {pixels}, {gradient_weight}"
        )
    valid, test_valid = (within(d, min_depth, max_depth) for d in (train_depth, test_depth))
    if not valid.any() or not test_valid.any():
        raise ValueError(f"no depth from {min_depth} to {max_depth} m in training or test: nothing to learn or judge")
    lr = min(PUBLISHED_LR * PUBLISHED_STEPS / steps, largest_lr) if lr is None else lr
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):  # modules first draw from the global generator
        head = make(train_maps.shape[1], generator).train()
    dense = pixels is None or gradient_weight > 0
    if not dense and not isinstance(head, DepthHead):
        kind = type(head).__name__
        raise ValueError(f"only a DepthHead can be asked for some pixels alone, got pixels = {pixels} for a {kind}")
    device = next(head.parameters()).device
    search = torch.optim.AdamW(head.parameters(), lr=lr, weight_decay=weight_decay)
    with torch.enable_grad():
        for step, rows in enumerate(batches(len(train_maps), batch_size, steps, generator)):
            if not valid[rows].any():
                continue
            for group in search.param_groups:
                group["lr"] = lr * warmed_cosine(step, steps)
            maps, depth, known = (x[rows].to(device) for x in (train_maps, train_depth, valid))
            chosen = None if dense else _some_pixels(known, pixels, generator)
            found, depth, known = _seen(head, maps.float(), depth.float(), known, chosen, patch_size)
            loss = silog_loss(found, depth, known, warm_up=step < min(100, steps // 10))
            if gradient_weight > 0:
                loss = loss + gradient_weight * gradient_loss(found, depth, known, gradient_mode)
            search.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(head.parameters(), 35.0)
            search.step()
    found = torch.cat(list(predict_depth(head.eval(), test_maps, test_depth.shape[1:], patch_size)))
    expect_finite(found, "the predictions")
    median = train_depth[valid].median().expand(test_depth.shape)
    constant = depth_errors(median, test_depth, test_valid)
    return {**depth_errors(found, test_depth, test_valid), "constant": constant, "head": head}


def warmed_cosine(step: int, steps: int) -> float:
    """Factor of the learning rate: half a cosine over all steps, times a warm-up over their first third.

    The cosine does not wait for the warm-up, so that the largest factor is 3/4.
    Source: mmcv 1.5, lr_updater.py, by which the depth configs of official dinov2 are read; DINOv3's own schedule is less
        than 0.002 away.
    """
    warmup = steps // 3
    warm = FIRST + (1 - FIRST) * step / warmup if step < warmup else 1.0
    return warm * (1 + math.cos(math.pi * step / steps)) / 2


def _seen(
    head: nn.Module,
    maps: Float[Tensor, "B C Hp Wp"],
    depth: Float[Tensor, "B H W"],
    known: Bool[Tensor, "B H W"],
    chosen: Int[Tensor, "B p"] | None,
    patch_size: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What the head says, what is true and what counts: at the chosen pixels (B, p), or at all (B, H, W)."""
    size = depth.shape[1:]
    if chosen is None:
        return upsample(head(maps)[:, None], size, patch_size, maps.shape[2:])[:, 0], depth, known
    features = at_pixels(head.bn(maps), chosen, size, patch_size)  # (B, C, p)
    found = expected_depth(head.conv_depth(features[:, :, None]), head.bins)[:, 0]
    return found, depth.flatten(1).gather(1, chosen), known.flatten(1).gather(1, chosen)


def _some_pixels(known: Bool[Tensor, "B H W"], n: int, generator: torch.Generator) -> Int[Tensor, "B n"]:
    """Pixels drawn with replacement among the known ones of each picture (any where none is known)."""
    places = [k.flatten().nonzero()[:, 0] for k in known.cpu()]
    places = [p if len(p) else torch.zeros(1, dtype=torch.long) for p in places]
    chosen = [p[torch.randint(len(p), (n,), generator=generator)] for p in places]
    return torch.stack(chosen).to(known.device)


def within(depth: Tensor, min_depth: float, max_depth: float) -> Tensor:
    """Pixels whose depth is known and among the bins."""
    return torch.isfinite(depth) & (depth > min_depth) & (depth <= max_depth)
