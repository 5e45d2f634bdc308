"""Linear probes on frozen features: the class of an image, the class of a patch, the distance of a patch."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from minidino.learning.optim import cosine_schedule
from minidino.model.attention import autocast_off
from minidino.probes.features import in_float32
from minidino.probes.knn import Rows, as_tensor, class_numbers
from minidino.probes.segmentation import mean_iou

PUBLISHED_LRS = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1)
CHUNK = 4096  # rows judged at a time


# ---------------------------------------------------------------- the class of an image


@in_float32
def linear_probe(
    train_x: Rows,
    train_y: Rows,
    test_x: Rows,
    test_y: Rows,
    n_classes: int | None = None,
    lrs: Sequence[float] = PUBLISHED_LRS,
    epochs: int = 50,
    batch_size: int = 256,
    seed: int = 0,
    val_frac: float = 0.1,
) -> dict:
    """Train one linear classifier per learning rate, all in one pass, and report the one that a held-out part prefers.

    Plain SGD on the cross-entropy: momentum 0.9, no weight decay, rate lr * batch_size / 256 with a cosine to 0,
    weights from N(0, 0.01), biases 0.

    Args:
        train_x, train_y, test_x, test_y: features (n, D) and labels; rows with a label below 0 (unknown) are dropped.
        n_classes: labels are below it; None counts those that occur, whatever their numbers.
        lrs: the grid, before the batch rule.
        epochs: passes over the training rows.
        batch_size: rows a step; a last incomplete batch is left out.
        seed: draws the held-out part, the order of the rows and the first weights.
        val_frac: share of the training rows that is held out to choose the learning rate.
    Returns:
        "accuracy" top-1 fraction on the test rows, "best_lr", and "table" {lr: top-1 fraction on the held-out rows}.
    Raises:
        ValueError: fewer than two labelled training rows, or no labelled test row; features that are not finite, or of
            another width; nothing to train: no rate, no epoch, no batch.
    Source: DINOv2 paper, section 7; official dinov2/eval/linear.py (the 13 learning rates, optimizer, schedule).
    Differs: the rate is chosen on held-out training rows, not on the test rows; features are standardised with the
        mean and deviation of the training rows, and are computed once, so there is no augmentation.
    """
    generator = torch.Generator().manual_seed(seed)
    train_x, train_y, test_x, test_y = labelled_parts(train_x, train_y, test_x, test_y)
    if n_classes is None:
        train_y, test_y, n_classes = counted(train_y, test_y)
    val, train = held_out(len(train_x), val_frac, generator)
    parts = _standardised(train_x[train], train_x[val], test_x)
    x, val_x, test_x = (F.pad(part, (0, 1), value=1.0) for part in parts)  # the weights of the last column are biases
    spans = [(0, x.shape[1])]
    batch_size, steps = steps_of(len(train), epochs, batch_size)
    batches = shuffled(x, train_y[train], batch_size, generator)
    (weights,) = train_heads(batches, spans, x.shape[1] - 1, n_classes, lrs, steps, generator)
    table = head_accuracies([weights], spans, len(lrs), val_x, train_y[val])
    best = int(table.argmax())  # the first, that is the smallest rate, where several are equal
    accuracy = head_accuracies([weights], spans, len(lrs), test_x, test_y)[best].item()
    return {"accuracy": accuracy, "best_lr": lrs[best], "table": dict(zip(lrs, table.tolist(), strict=True))}


def counted(
    train_y: Int[Tensor, "n"], test_y: Int[Tensor, "m"]
) -> tuple[Int[Tensor, "n"], Int[Tensor, "m"], int]:
    """The labels that occur as 0, 1, ..., and how many there are: a number, such as a year, takes no row in a head."""
    classes = torch.cat([train_y, test_y]).unique()
    return torch.searchsorted(classes, train_y), torch.searchsorted(classes, test_y), len(classes)


def held_out(n: int, val_frac: float, generator: torch.Generator) -> tuple[Int[Tensor, "v"], Int[Tensor, "t"]]:
    """Rows to choose by and rows to learn from: at least one of each."""
    order = torch.randperm(n, generator=generator)
    n_val = min(max(1, round(val_frac * n)), n - 1)
    return order[:n_val], order[n_val:]


def steps_of(n: int, epochs: int, batch_size: int) -> tuple[int, int]:
    """Rows of a batch, at most n, and whole batches in so many epochs. Raises ValueError where either is below 1."""
    if min(epochs, batch_size) < 1:
        raise ValueError(f"expected epochs and batch_size of at least 1, got {epochs} and {batch_size}")
    batch_size = min(batch_size, n)
    return batch_size, epochs * (n // batch_size)


def shuffled(
    x: Float[Tensor, "n F"], y: Int[Tensor, "n"], batch_size: int, generator: torch.Generator
) -> Iterator[tuple[Float[Tensor, "B F"], Int[Tensor, "B"]]]:
    """Batches without end, in a new order each epoch; a last incomplete batch is left out."""
    while True:
        order = torch.randperm(len(x), generator=generator)
        for rows in order[: len(x) // batch_size * batch_size].split(batch_size):
            yield x[rows], y[rows]


# ---------------------------------------------------------------- many heads in one pass


def train_heads(
    batches: Iterable[tuple[Float[Tensor, "B F"], Int[Tensor, "B"]]],
    spans: Sequence[tuple[int, int]],
    ones: int,
    n_classes: int,
    lrs: Sequence[float],
    steps: int,
    generator: torch.Generator,
) -> list[Float[Tensor, "rC w"]]:
    """SGD on every head at once: the heads that read the same columns are one matrix, their losses one softmax.

    The weights of column `ones` are the biases.
    """
    if not len(lrs):
        raise ValueError("expected at least one learning rate, got none")
    weights = [_first_weights(stop - start, ones - start, n_classes, len(lrs), generator) for start, stop in spans]
    velocity = [torch.zeros_like(w) for w in weights]
    rates = torch.tensor(lrs, dtype=torch.float32).repeat_interleave(n_classes)[:, None]  # (r * C, 1)
    factor = cosine_schedule(1.0, 0.0, steps)
    done = 0
    for x, y in islice(batches, steps):
        if len(y) == 0 or y.min() < 0 or y.max() >= n_classes:
            raise ValueError(f"expected batches with labels from 0 to {n_classes - 1}, got {y.unique().tolist()}")
        with autocast_off(x):  # under which a network may look at the batches
            logits = torch.stack([w @ x[:, start:stop].T for w, (start, stop) in zip(weights, spans)])  # (V, r * C, B)
            error = logits.view(-1, n_classes, len(y)).softmax(1)  # (V * r, C, B)
            error.scatter_add_(1, y.expand(len(error), 1, -1), error.new_full((1, 1, 1), -1).expand(len(error), 1, len(y)))
            change = -factor(done) * len(y) / 256 * rates
            for w, v, e, (start, stop) in zip(weights, velocity, error.view_as(logits), spans):
                v.addmm_(e, x[:, start:stop], beta=0.9, alpha=1 / len(y))
                w.addcmul_(v, change)
        done += 1
    if done < steps:
        raise ValueError(f"expected {steps} batches, got {done}; the cosine of the learning rate would be cut off")
    return weights


def _first_weights(width: int, ones: int, n_classes: int, n_rates: int, generator: torch.Generator) -> Tensor:
    """N(0, 0.01) and biases of 0, alike for all rates: (r * C, width)."""
    weights = 0.01 * torch.randn(n_classes, width, generator=generator, dtype=torch.float32)
    weights[:, ones] = 0
    return weights.repeat(n_rates, 1)


@in_float32
def head_accuracies(
    weights: list[Tensor], spans: Sequence[tuple[int, int]], n_rates: int, x: Float[Tensor, "n F"], y: Int[Tensor, "n"]
) -> Float[Tensor, "heads"]:
    """Top-1 fraction of every head; a rate that blew up is right about nothing."""
    right = torch.zeros(len(spans), n_rates, dtype=torch.float64)
    for x_part, y_part in zip(x.split(CHUNK), y.split(CHUNK)):
        for row, w, (start, stop) in zip(right, weights, spans):
            logits = (w @ x_part[:, start:stop].T).view(n_rates, -1, len(x_part))  # (r, C, n)
            row += ((logits.argmax(1) == y_part) & logits.isfinite().all(1)).sum(-1)
    return right.flatten() / len(x)


# ---------------------------------------------------------------- the class of a patch


@in_float32
def patch_probe(
    train_patches: Rows,
    train_masks: Rows,
    test_patches: Rows,
    test_masks: Rows,
    n_classes: int,
    l2: float = 1e-4,
) -> dict:
    """Name what every patch shows from its own feature alone: softmax regression on frozen patch tokens.

        minimise  mean cross-entropy + l2 / 2 * ||weights||^2        (convex: no seed, one answer)

    Args:
        train_patches, test_patches: (n, N, D).
        train_masks, test_masks: (n, N) class of each patch; below 0 is ignored.
        n_classes: classes 0 to n_classes - 1.
        l2: penalty on the weights (not the biases), features standardised.
    Returns:
        "miou": mean over the classes that occur in prediction or truth; "iou": per class, nan where it occurs in
        neither; "accuracy": share of patches named rightly.
    Differs: a simple probe on whole patches; the published one is a trained 1 x 1 convolution judged per pixel.
    """
    x, y = labelled(*_patch_rows(train_patches, train_masks))
    test_x, test_y = labelled(*_patch_rows(test_patches, test_masks))
    if len(x) == 0 or len(test_x) == 0:
        raise ValueError(f"expected patches with a class of 0 or more, got {len(x)} to train and {len(test_x)} to test")
    x, test_x = _standardised(x, test_x)
    predicted = F.linear(test_x, *_softmax_regression(x, y, n_classes, l2)).argmax(1)
    found = mean_iou(predicted, test_y, n_classes)
    return {key: found[key] for key in ("miou", "iou", "accuracy")}


def _softmax_regression(
    x: Float[Tensor, "n D"], y: Int[Tensor, "n"], n_classes: int, l2: float
) -> tuple[Float[Tensor, "C D"], Float[Tensor, "C"]]:
    """Weights and biases of the fitted map from features to logits."""
    weight = torch.zeros(n_classes, x.shape[1], requires_grad=True)
    bias = torch.zeros(n_classes, requires_grad=True)
    search = torch.optim.LBFGS(
        [weight, bias], max_iter=200, history_size=20, tolerance_grad=1e-5, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        search.zero_grad()
        value = F.cross_entropy(F.linear(x, weight, bias), y) + l2 / 2 * weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        search.step(loss)
    return weight.detach(), bias.detach()


# ---------------------------------------------------------------- the distance of a patch


@in_float32
def patch_depth_probe(
    train_patches: Rows, train_depth: Rows, test_patches: Rows, test_depth: Rows, ridge: float = 10.0
) -> dict:
    """Tell how far away every patch is from its own feature alone: ridge regression on log-metres.

        minimise  sum (log depth - x w - b)^2 + ridge * ||w||^2

    Args:
        train_patches, test_patches: (n, N, D).
        train_depth, test_depth: (n, N) metres; what is not a number above 0 is ignored.
        ridge: penalty on the weights (not the bias), features standardised.
    Returns:
        "log_rmse": root mean square error of log-metres, and "constant": the same for the one best distance, which
        a feature must beat before it knows anything; "rmse": of metres, guesses kept within the training distances.
    Differs: a simple probe; the published ones classify into 256 bins of depth per pixel.
    """
    x, log_depth = _with_depth(train_patches, train_depth)
    test_x, test_log_depth = _with_depth(test_patches, test_depth)
    x, test_x = (part.double() for part in _standardised(x, test_x))
    mean = log_depth.mean()
    gram = x.T @ x + ridge * torch.eye(x.shape[1], dtype=torch.float64)
    weight = torch.linalg.solve(gram, x.T @ (log_depth - mean))  # x has mean 0, so the bias is the mean
    error = test_x @ weight + mean - test_log_depth
    constant = mean - test_log_depth
    guess = (error + test_log_depth).clamp(log_depth.min(), log_depth.max())
    metres = guess.exp() - test_log_depth.exp()
    found = {"log_rmse": error, "constant": constant, "rmse": metres}
    return {name: value.square().mean().sqrt().item() for name, value in found.items()}


def _with_depth(patches: Rows, depth: Rows) -> tuple[Float[Tensor, "n D"], Float[Tensor, "n"]]:
    x, depth = _patch_rows(patches, depth)
    valid = torch.isfinite(depth) & (depth > 0)
    if not valid.any():
        raise ValueError("no patch has a depth above 0 m: nothing to learn from or to judge")
    return _finite(x[valid]), depth[valid].double().log()


# ---------------------------------------------------------------- rows


def labelled(x: Rows, y: Rows) -> tuple[Float[Tensor, "n D"], Int[Tensor, "n"]]:
    """The rows with a label of 0 or more. Raises ValueError for labels that are no numbers, and features not finite."""
    x, y = as_tensor(x).float(), class_numbers(y).cpu()
    if x.ndim != 2 or y.shape != x.shape[:1]:
        raise ValueError(f"expected features (n, D) and labels (n,), got {tuple(x.shape)} and {tuple(y.shape)}")
    return _finite(x[y >= 0]), y[y >= 0]


def labelled_parts(
    train_x: Rows, train_y: Rows, test_x: Rows, test_y: Rows
) -> tuple[Float[Tensor, "n D"], Int[Tensor, "n"], Float[Tensor, "m D"], Int[Tensor, "m"]]:
    """The same of rows to learn from and rows to judge with. Raises ValueError also for fewer than two and one."""
    (x, y), (test_x, test_y) = labelled(train_x, train_y), labelled(test_x, test_y)
    if len(x) < 2 or len(test_x) < 1:
        raise ValueError(f"expected 2 labelled training rows and 1 test row, got {len(x)} and {len(test_x)}")
    return x, y, test_x, test_y


def _finite(x: Float[Tensor, "n D"]) -> Float[Tensor, "n D"]:
    """The same, or a ValueError: no head learns anything from what is no number."""
    if not torch.isfinite(x).all():
        raise ValueError("the features hold NaN or infinity: the network that made them is broken")
    return x


def _patch_rows(patches: Rows, values: Rows) -> tuple[Float[Tensor, "nN D"], Tensor]:
    """One row per patch instead of one per image."""
    patches, values = as_tensor(patches), as_tensor(values)
    if patches.ndim != 3 or values.shape != patches.shape[:2]:
        raise ValueError(
            f"expected patches (n, N, D) and one value per patch (n, N), got {tuple(patches.shape)} "
            f"and {tuple(values.shape)}"
        )
    return patches.float().flatten(0, 1), values.flatten()


def _standardised(train: Float[Tensor, "n D"], *others: Float[Tensor, "_ D"]) -> list[Float[Tensor, "_ D"]]:
    """Mean 0 and deviation 1 in each feature of the training rows; a feature that never changes becomes 0."""
    for other in others:
        if other.shape[1] != train.shape[1]:
            wide = f"{train.shape[1]} and {other.shape[1]}"
            raise ValueError(f"expected features of one width to train and to test, got {wide}: not the same features")
    mean, std = train.mean(0), train.std(0, correction=0)
    return [torch.where(std > 1e-6, (x - mean) / std.clamp_min(1e-6), 0.0) for x in (train, *others)]
