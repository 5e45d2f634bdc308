"""Logistic regression on frozen features, as published, and what a few labelled images per class are worth."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.optimize import minimize
from torch import Tensor

from minidino.probes.knn import Rows, as_tensor, class_numbers, knn_predict
from minidino.probes.linear import held_out, labelled, labelled_parts

PUBLISHED_CS = tuple((10 ** np.linspace(-6, 5, 45)).tolist())
MAX_ITERATIONS = 1000  # of L-BFGS, for each C
TOLERANCE = 1e-6  # it stops when no component of the gradient of the mean loss exceeds this


class LogisticModel(NamedTuple):
    """A fitted map from features to classes; `classes` are the labels that occurred in training."""

    weight: Float[Tensor, "K D"]
    bias: Float[Tensor, "K"]
    classes: Int[Tensor, "K"]

    def logits(self, x: Rows) -> Float[Tensor, "n K"]:
        """Up to a constant, the logarithms of the probabilities; float64."""
        return as_tensor(x).double() @ self.weight.T + self.bias

    def predict(self, x: Rows) -> Int[Tensor, "n"]:
        """The likeliest class of each row."""
        return self.classes[self.logits(x).argmax(1)]


def logistic_path(x: Rows, y: Rows, cs: Sequence[float] = PUBLISHED_CS) -> list[LogisticModel]:
    """Fit one classifier for each strength of the penalty, each starting where the one before ended.

        minimise  C * sum_i cross-entropy_i + ||weights||^2 / 2        (biases are free; convex: one answer)

    Two classes have one vector of weights between them, more have one each: scikit-learn's and cuML's conventions.

    Args:
        x, y: features (n, D), as they are, and labels; rows with a label below 0 (unknown) are dropped.
        cs: values of C; fastest in ascending order.
    Returns:
        One model for each C, in their order.
    Raises:
        ValueError: no labelled row, features that are not finite, or a C that is not above 0.
    Source: official dinov2/eval/log_regression.py (b8931f7).
    Differs: scipy's L-BFGS in float64 instead of cuML's; features are first centred, turned to their principal axes
        and measured in the curvature of each axis, which changes the road and not the answer.
    """
    x, y = labelled(x, y)
    if len(x) == 0 or min(cs) <= 0:
        raise ValueError(f"expected labelled rows and C above 0, got {len(x)} rows and a smallest C of {min(cs)}")
    classes, y = y.unique(return_inverse=True)
    x = x.double()
    mean = x.mean(0)
    axes, spread = _principal_axes(x - mean)  # (r, D), (r,)
    z, parameters, models = (x - mean) @ axes.T, None, []
    for c in cs:
        parameters = _fit(z, y, len(classes), c, spread, parameters)
        weight = parameters[:, :-1] @ axes
        bias = parameters[:, -1] - weight @ mean
        models.append(LogisticModel(weight, bias, classes))
    return models


def _principal_axes(x: Float[Tensor, "n D"]) -> tuple[Float[Tensor, "r D"], Float[Tensor, "r"]]:
    """Orthonormal axes that hold every row, and the mean square along each; r is the smaller of n and D."""
    if len(x) < x.shape[1]:
        _, length, axes = torch.linalg.svd(x, full_matrices=False)
        return axes, length.square() / len(x)
    square, axes = torch.linalg.eigh(x.T @ x / len(x))
    return axes.T.contiguous(), square.clamp_min(0)


def _fit(
    z: Float[Tensor, "n r"],
    y: Int[Tensor, "n"],
    n_classes: int,
    c: float,
    spread: Float[Tensor, "r"],
    start: Float[Tensor, "K r1"] | None,
) -> Float[Tensor, "K r1"]:
    """Weights and, in the last column, biases; the first class of two has zeros."""
    n, free = len(z), n_classes if n_classes > 2 else n_classes - 1
    penalty = 1 / (c * n)
    if free == 0:
        return spread.new_zeros(1, len(spread) + 1)
    curvature = 1 / n_classes if start is None else _curvature(z, start)
    scale = torch.cat([(curvature * spread + penalty).rsqrt(), spread.new_tensor([curvature]).rsqrt()])

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        inner = torch.from_numpy(flat).view(free, -1) * scale
        weight, bias = inner[:, :-1], inner[:, -1]
        logits = z @ weight.T + bias
        logits = logits if free > 1 else torch.cat([torch.zeros_like(logits), logits], 1)  # (n, n_classes)
        log_probs = logits.log_softmax(1)
        value = -log_probs.gather(1, y[:, None]).mean() + penalty / 2 * weight.square().sum()
        error = log_probs.exp_()
        error[torch.arange(n), y] -= 1
        error = error[:, -free:] / n
        gradient = torch.cat([error.T @ z + penalty * weight, error.sum(0)[:, None]], 1) * scale
        return value.item(), gradient.flatten().numpy()

    begin = torch.zeros(free, len(scale), dtype=torch.float64) if start is None else start[-free:] / scale
    options = {"maxiter": MAX_ITERATIONS, "maxfun": 2 * MAX_ITERATIONS, "gtol": TOLERANCE, "ftol": 0, "maxcor": 20}
    found = minimize(loss, begin.flatten().numpy(), jac=True, method="L-BFGS-B", options=options).x
    found = torch.from_numpy(found).view(free, -1) * scale
    return found if free > 1 else torch.cat([torch.zeros_like(found), found])


def _curvature(z: Float[Tensor, "n r"], parameters: Float[Tensor, "K r1"]) -> float:
    """Mean of p (1 - p): how strongly the loss of a row bends, on average."""
    probs = (z @ parameters[:, :-1].T + parameters[:, -1]).softmax(1)
    return max((probs * (1 - probs)).mean().item(), 1e-12)


def logistic_regression(
    train_x: Rows,
    train_y: Rows,
    test_x: Rows,
    test_y: Rows,
    cs: Sequence[float] = PUBLISHED_CS,
    val_frac: float = 0.1,
    seed: int = 0,
) -> dict:
    """Choose C on a held-out part of the training rows, fit again on all of them, and judge on the test rows.

    Args:
        train_x, train_y, test_x, test_y: features (n, D), as they are (neither standardised nor of unit length), and
            labels; rows with a label below 0 (unknown) are dropped.
        cs: candidates; 45 from 1e-6 to 1e5 as published. Where several are equal the first is taken.
        val_frac: share of the training rows that chooses.
        seed: draws them.
    Returns:
        "accuracy" top-1 fraction on the test rows, "mean_class_accuracy" the mean over the classes of the test rows,
        "best_c", "table" {C: top-1 fraction on the held-out rows}, and "model": the LogisticModel that was judged.
    Raises:
        ValueError: fewer than two labelled training rows, or no labelled test row; features that are not finite.
    Source: DINOv2 paper, section 7.2 (the twelve finer-grained sets); official dinov2/eval/log_regression.py (b8931f7).
    Differs: see `logistic_path`. The official mean over classes counts one that no test row has as 0 where it was named.
    """
    x, y, test_x, test_y = labelled_parts(train_x, train_y, test_x, test_y)
    val, rows = held_out(len(x), val_frac, torch.Generator().manual_seed(seed))
    models = logistic_path(x[rows], y[rows], cs)
    table = {c: _share_right(model.predict(x[val]), y[val]) for c, model in zip(cs, models, strict=True)}
    best = max(table, key=table.get)
    (model,) = logistic_path(x, y, [best])
    predicted = model.predict(test_x)
    per_class = [_share_right(predicted[test_y == k], k) for k in test_y.unique()]
    return {"accuracy": _share_right(predicted, test_y), "mean_class_accuracy": float(np.mean(per_class)),
            "best_c": best, "table": table, "model": model}  # fmt: skip


def _share_right(predicted: Int[Tensor, "n"], y: Tensor) -> float:
    return (predicted == y).double().mean().item()


# ---------------------------------------------------------------- a few labels


def few_per_class(y: Rows, n: int, seed: int = 0) -> Int[Tensor, "m"]:
    """Draw n rows of each class, without replacement.

    Args:
        y: labels; rows with a label below 0 (unknown) are never drawn, and classes that do not occur have none.
        n: rows of each class.
    Returns:
        Row numbers, class after class.
    Raises:
        ValueError: n below 1, no labelled row, or a class with fewer than n rows.
    """
    y = class_numbers(y).cpu()
    classes, counts = y[y >= 0].unique(return_counts=True)
    if n < 1 or len(classes) == 0:
        raise ValueError(f"expected n of 1 or more and labels of 0 or more, got n = {n} and {len(classes)} classes")
    if counts.min() < n:
        rarest = int(classes[counts.argmin()])
        raise ValueError(f"expected at least {n} rows of each class, got {int(counts.min())} of class {rarest}")
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for k in classes:
        rows = (y == k).nonzero()[:, 0]
        drawn.append(rows[torch.randperm(len(rows), generator=generator)[:n]])
    return torch.cat(drawn)


def low_shot(
    train_x: Rows,
    train_y: Rows,
    test_x: Rows,
    test_y: Rows,
    ns: Sequence[int] = (1, 2, 5, 10),
    seeds: int = 5,
    k: int = 20,
    temperature: float = 0.07,
    c: float = 1.0,
) -> dict[int, dict[str, dict[str, float]]]:
    """Learn from n labelled images of each class, by weighted k-NN and by logistic regression.

    Args:
        train_x, train_y, test_x, test_y: features (n, D) and labels; rows with a label below 0 (unknown) are dropped.
        ns: labelled images of each class.
        seeds: draws of these images, 0 to seeds - 1; test rows are always all.
        k: voters of the k-NN; as many as there are where there are fewer.
        temperature: of the vote.
        c: of the logistic regression. It is fixed, since a tenth of ten images cannot choose.
    Returns:
        {n: {"knn": {"mean", "sd", "n"}, "logistic": {...}}}, top-1 fractions; sd between draws, nan for one draw.
    Raises:
        ValueError: a class with fewer than n images, or nothing labelled.
    """
    x, y = labelled(train_x, train_y)
    test_x, test_y = labelled(test_x, test_y)
    if len(test_x) == 0 or seeds < 1:
        raise ValueError(f"expected labelled test rows and 1 seed or more, got {len(test_x)} rows and {seeds} seeds")
    found = {}
    for n in ns:
        scores = {"knn": [], "logistic": []}
        for rows in (few_per_class(y, n, seed) for seed in range(seeds)):
            vote = knn_predict(x[rows], y[rows], test_x, min(k, len(rows)), temperature)
            (model,) = logistic_path(x[rows], y[rows], [c])
            scores["knn"].append(_share_right(vote, test_y))
            scores["logistic"].append(_share_right(model.predict(test_x), test_y))
        found[n] = {name: _summary(values) for name, values in scores.items()}
    return found


def _summary(values: Sequence[float]) -> dict[str, float]:
    sd = float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")
    return {"mean": float(np.mean(values)), "sd": sd, "n": len(values)}
