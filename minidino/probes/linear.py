"""Linear probes on frozen features: the class of an image, the class of a patch, the distance of a patch."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from minidino.learning.optim import cosine_schedule

Rows = Tensor | np.ndarray
PUBLISHED_LRS = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1)


# ---------------------------------------------------------------- the class of an image


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
        n_classes: None counts from the largest label.
        lrs: the grid, before the batch rule.
        epochs: passes over the training rows.
        batch_size: rows a step; a last incomplete batch is left out.
        seed: draws the held-out part, the order of the rows and the first weights.
        val_frac: share of the training rows that is held out to choose the learning rate.
    Returns:
        "accuracy" top-1 fraction on the test rows, "best_lr", and "table" {lr: top-1 fraction on the held-out rows}.
    Raises:
        ValueError: fewer than two labelled training rows, or no labelled test row.
    Source: DINOv2 paper, section 7; official dinov2/eval/linear.py (the 13 learning rates, optimizer, schedule).
    Differs: the rate is chosen on held-out training rows, not on the test rows; features are standardised with the
        mean and deviation of the training rows, and are computed once, so there is no augmentation.
    """
    generator = torch.Generator().manual_seed(seed)
    train_x, train_y = _labelled(train_x, train_y)
    test_x, test_y = _labelled(test_x, test_y)
    if len(train_x) < 2 or len(test_x) < 1:
        raise ValueError(f"expected 2 labelled training rows and 1 test row, got {len(train_x)} and {len(test_x)}")
    n_classes = n_classes or int(max(train_y.max(), test_y.max())) + 1
    order = torch.randperm(len(train_x), generator=generator)
    n_val = min(max(1, round(val_frac * len(order))), len(order) - 1)
    val, train = order[:n_val], order[n_val:]
    x, val_x, test_x = _standardised(train_x[train], train_x[val], test_x)
    weights = _sgd_grid(x, train_y[train], n_classes, lrs, epochs, batch_size, generator)
    table = _grid_accuracy(weights, val_x, train_y[val])
    best = int(table.argmax())  # the first, that is the smallest rate, where several are equal
    accuracy = _grid_accuracy(weights[best : best + 1], test_x, test_y).item()
    return {"accuracy": accuracy, "best_lr": lrs[best], "table": dict(zip(lrs, table.tolist(), strict=True))}


def _sgd_grid(
    x: Float[Tensor, "n D"],
    y: Int[Tensor, "n"],
    n_classes: int,
    lrs: Sequence[float],
    epochs: int,
    batch_size: int,
    generator: torch.Generator,
) -> Float[Tensor, "r C D1"]:
    """One classifier per learning rate, side by side; the last column of the weights is the bias."""
    batch_size = min(batch_size, len(x))
    x, targets = F.pad(x, (0, 1), value=1.0), F.one_hot(y, n_classes).float()
    weights = 0.01 * torch.randn(n_classes, x.shape[1], generator=generator)
    weights[:, -1] = 0
    weights = weights.repeat(len(lrs), 1, 1)  # (r, C, D + 1): all start alike
    velocity = torch.zeros_like(weights)
    scaled = torch.tensor(lrs).view(-1, 1, 1) * batch_size / 256
    per_epoch = len(x) // batch_size
    factor = cosine_schedule(1.0, 0.0, epochs * per_epoch)
    for step in range(epochs * per_epoch):
        if step % per_epoch == 0:
            order = torch.randperm(len(x), generator=generator)
        rows = order[step % per_epoch * batch_size :][:batch_size]
        probs = torch.softmax(x[rows] @ weights.mT, -1)  # (r, B, C)
        gradient = (probs - targets[rows]).mT @ x[rows] / batch_size
        velocity = 0.9 * velocity + gradient
        weights = weights - factor(step) * scaled * velocity
    return weights


def _grid_accuracy(
    weights: Float[Tensor, "r C D1"], x: Float[Tensor, "n D"], y: Int[Tensor, "n"]
) -> Float[Tensor, "r"]:
    logits = F.pad(x, (0, 1), value=1.0) @ weights.mT  # (r, n, C)
    right = (logits.argmax(-1) == y) & logits.isfinite().all(-1)  # a rate that blew up is right about nothing
    return right.double().mean(-1)


# ---------------------------------------------------------------- the class of a patch


def patch_probe(
    train_patches: Rows,
    train_masks: Rows,
    test_patches: Rows,
    test_masks: Rows,
    n_classes: int,
    l2: float = 1e-4,
    max_iterations: int = 200,
) -> dict:
    """Name what every patch shows from its own feature alone: softmax regression on frozen patch tokens.

        minimise  mean cross-entropy + l2 / 2 * ||weights||^2        (convex: no seed, one answer)

    Args:
        train_patches, test_patches: (n, N, D).
        train_masks, test_masks: (n, N) class of each patch; below 0 is ignored.
        n_classes: classes 0 to n_classes - 1.
        l2: penalty on the weights (not the biases), features standardised.
        max_iterations: of L-BFGS.
    Returns:
        "miou": mean over the classes that occur in prediction or truth; "iou": per class, nan where it occurs in
        neither; "accuracy": share of patches named rightly.
    Differs: a simple probe on whole patches; the published one is a trained 1 x 1 convolution judged per pixel.
    """
    x, y = _labelled(*_patch_rows(train_patches, train_masks))
    test_x, test_y = _labelled(*_patch_rows(test_patches, test_masks))
    if len(x) == 0 or len(test_x) == 0:
        raise ValueError(f"expected patches with a class of 0 or more, got {len(x)} to train and {len(test_x)} to test")
    x, test_x = _standardised(x, test_x)
    predicted = _softmax_regression(x, y, n_classes, l2, max_iterations)(test_x).argmax(1)
    pairs = torch.bincount(test_y * n_classes + predicted, minlength=n_classes**2).view(n_classes, n_classes).double()
    hits = pairs.diag()
    iou = hits / (pairs.sum(0) + pairs.sum(1) - hits)  # 0 / 0 = nan: a class that is nowhere
    return {"miou": iou.nanmean().item(), "iou": iou.tolist(), "accuracy": (hits.sum() / pairs.sum()).item()}


def _softmax_regression(x: Float[Tensor, "n D"], y: Int[Tensor, "n"], n_classes: int, l2: float, max_iterations: int):
    """The fitted map from features to logits."""
    weight = torch.zeros(n_classes, x.shape[1], requires_grad=True)
    bias = torch.zeros(n_classes, requires_grad=True)
    search = torch.optim.LBFGS(
        [weight, bias], max_iter=max_iterations, history_size=20, tolerance_grad=1e-5, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        search.zero_grad()
        value = F.cross_entropy(F.linear(x, weight, bias), y) + l2 / 2 * weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        search.step(loss)
    weight, bias = weight.detach(), bias.detach()
    return lambda features: F.linear(features, weight, bias)


# ---------------------------------------------------------------- the distance of a patch


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
        a feature must beat before it knows anything.
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
    return {"log_rmse": error.square().mean().sqrt().item(), "constant": constant.square().mean().sqrt().item()}


def _with_depth(patches: Rows, depth: Rows) -> tuple[Float[Tensor, "n D"], Float[Tensor, "n"]]:
    x, depth = _patch_rows(patches, depth)
    valid = torch.isfinite(depth) & (depth > 0)
    if not valid.any():
        raise ValueError("no patch has a depth above 0 m: nothing to learn from or to judge")
    return x[valid], depth[valid].double().log()


# ---------------------------------------------------------------- rows


def _tensor(x: Rows) -> Tensor:
    """On the CPU; arrays are copied, because torch cannot hold a read-only memory map."""
    return x.detach().cpu() if isinstance(x, Tensor) else torch.from_numpy(np.array(x))


def _labelled(x: Rows, y: Rows) -> tuple[Float[Tensor, "n D"], Int[Tensor, "n"]]:
    """The rows with a label of 0 or more."""
    x, y = _tensor(x).float(), _tensor(y).long()
    if x.ndim != 2 or y.shape != x.shape[:1]:
        raise ValueError(f"expected features (n, D) and labels (n,), got {tuple(x.shape)} and {tuple(y.shape)}")
    return x[y >= 0], y[y >= 0]


def _patch_rows(patches: Rows, values: Rows) -> tuple[Float[Tensor, "nN D"], Tensor]:
    """One row per patch instead of one per image."""
    patches, values = _tensor(patches), _tensor(values)
    if patches.ndim != 3 or values.shape != patches.shape[:2]:
        raise ValueError(
            f"expected patches (n, N, D) and one value per patch (n, N), got {tuple(patches.shape)} "
            f"and {tuple(values.shape)}"
        )
    return patches.float().flatten(0, 1), values.flatten()


def _standardised(train: Float[Tensor, "n D"], *others: Float[Tensor, "_ D"]) -> list[Float[Tensor, "_ D"]]:
    """Mean 0 and deviation 1 in each feature of the training rows; a feature that never changes becomes 0."""
    mean, std = train.mean(0), train.std(0, correction=0)
    return [torch.where(std > 1e-6, (x - mean) / std.clamp_min(1e-6), 0.0) for x in (train, *others)]
