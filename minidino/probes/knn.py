"""Nearest-neighbour classification on frozen features: the quickest honest look at what was learned."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from minidino.probes.features import in_float32

Rows = Tensor | np.ndarray
PAIRS_AT_A_TIME = 2**26  # similarities held at once: 256 MiB of float32


@in_float32
def neighbours(train_x: Rows, test_x: Rows, k: int) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """Find the k most similar rows of the bank for each query, exactly.

    Args:
        train_x: the bank (m, D); its device does the work.
        test_x: the queries (n, D).
        k: how many; at most m.
    Returns:
        Cosine similarity, falling along each row, and the index into the bank.
    Raises:
        ValueError: k is not within the bank, the widths differ, or a feature is not finite.
    """
    bank, queries = _unit_rows(train_x, "train_x"), _unit_rows(test_x, "test_x")
    if not 1 <= k <= len(bank):
        raise ValueError(f"expected 1 <= k <= {len(bank)} rows in the bank, got k = {k}; ask for fewer neighbours")
    if bank.shape[1] != queries.shape[1]:
        raise ValueError(f"the bank is {bank.shape[1]} wide and the queries {queries.shape[1]}: not the same features")
    chunks = queries.to(bank.device).split(max(1, PAIRS_AT_A_TIME // len(bank)))
    found = [(chunk @ bank.T).topk(k, dim=1) for chunk in chunks]
    return torch.cat([top.values for top in found]), torch.cat([top.indices for top in found])


def as_tensor(x: Rows) -> Tensor:
    """On the CPU; arrays are copied, because torch cannot hold a read-only memory map, nor one of other byte order or
    with negative strides. Unsigned numbers of 16 bits and more, with which torch hardly computes, become int64."""
    if isinstance(x, Tensor):
        x = x.detach().cpu()
    else:
        x = np.array(x, order="C")
        x = torch.from_numpy(x.astype(x.dtype.newbyteorder("="), copy=False))
    return x.long() if x.dtype in (torch.uint16, torch.uint32, torch.uint64) else x


def _unit_rows(x: Rows, name: str) -> Float[Tensor, "n D"]:
    """A float32 copy with rows of length 1 (rows of zeros stay zeros)."""
    x = x.detach().float() if isinstance(x, Tensor) else torch.from_numpy(np.array(x, dtype=np.float32))
    if x.ndim != 2 or len(x) == 0:
        raise ValueError(f"expected {name} of shape (n, D) with n > 0, got {tuple(x.shape)}")
    if not torch.isfinite(x).all():
        raise ValueError(f"{name} holds NaN or infinity: the network that made these features is broken")
    return F.normalize(x, dim=1)


def class_numbers(y: Rows) -> Int[Tensor, "*n"]:
    """Labels as a tensor of integers. Raises ValueError for what is no whole number, such as words, NaN and shares."""
    if not isinstance(y, Tensor):
        y = np.asarray(y)
        if y.dtype.kind not in "biuf":
            few = y.ravel()[:3].tolist()
            raise ValueError(f"expected labels as the numbers of classes, below 0 where unknown, got {few}")
        y = as_tensor(y)
    if y.is_floating_point() and (y.frac() != 0).any():  # also where it is not finite
        raise ValueError(f"expected labels as whole numbers, got {y[y.frac() != 0][:3].tolist()}")
    return y.long()


def _vote(
    similarity: Float[Tensor, "n k"], labels: Int[Tensor, "n k"], n_classes: int, temperature: float
) -> Int[Tensor, "n"]:
    """The class with the largest sum of softmax(similarity / temperature) among the neighbours."""
    weights = torch.softmax(similarity / temperature, dim=1)
    votes = weights.new_zeros(len(weights), n_classes).scatter_add_(1, labels, weights)
    return votes.argmax(1)


def knn_predict(
    train_x: Rows, train_y: Rows, test_x: Rows, k: int = 20, temperature: float = 0.07
) -> Int[Tensor, "n"]:
    """Name each query by a vote of its k nearest neighbours, the near ones counting more.

        vote of neighbour i = exp(cosine_i / temperature)

    Args:
        train_x, train_y: bank and its labels; rows with a label below 0 (unknown) do not vote.
        test_x: the queries.
        k: voters per query.
        temperature: 0.07, as published.
    Returns:
        One label per query.
    Source: Wu et al. 2018; official dinov2/eval/knn.py.
    """
    return _predictions(train_x, train_y, test_x, [k], temperature)[k]


def knn_accuracy(
    train_x: Rows,
    train_y: Rows,
    test_x: Rows,
    test_y: Rows,
    ks: Sequence[int] = (10, 20, 100, 200),
    temperature: float = 0.07,
) -> dict[int, float]:
    """Share of queries that the weighted vote of their nearest neighbours names rightly.

    Args:
        train_x, train_y, test_x, test_y: features (any length) and labels; rows with a label below 0 are left out.
        ks: voters per query, all judged from one search.
        temperature: 0.07, as published.
    Returns:
        {k: top-1 fraction}.
    Raises:
        ValueError: no k, one below 1 or larger than the bank, the lengths do not fit, labels are no whole numbers,
            nothing is labelled, or a temperature that is not above 0.
    Source: DINOv2 paper, section 7; official dinov2/eval/knn.py.
    """
    test_y = class_numbers(test_y)
    if test_y.shape != (len(test_x),):
        raise ValueError(f"expected a label for each of {len(test_x)} queries, got shape {tuple(test_y.shape)}")
    known = test_y >= 0
    if not known.any():
        raise ValueError("no query has a label of 0 or more: nothing to judge")
    predictions = _predictions(train_x, train_y, test_x[known.cpu().numpy()], ks, temperature)
    return {k: (p.cpu() == test_y[known].cpu()).double().mean().item() for k, p in predictions.items()}


def _predictions(
    train_x: Rows, train_y: Rows, test_x: Rows, ks: Sequence[int], temperature: float
) -> dict[int, Int[Tensor, "n"]]:
    train_y = class_numbers(train_y)
    if train_y.shape != (len(train_x),):
        shape = tuple(train_y.shape)
        raise ValueError(f"expected a label for each of {len(train_x)} rows of the bank, got shape {shape}")
    if temperature <= 0:
        raise ValueError(f"expected a temperature above 0, got {temperature}")
    known = train_y >= 0
    if not known.any():
        raise ValueError("no row of the bank has a label of 0 or more: nobody to vote")
    if not ks or min(ks) < 1:
        raise ValueError(f"expected ks of 1 or more neighbours, got {list(ks)}")
    similarity, index = neighbours(train_x[known.cpu().numpy()], test_x, max(ks))
    classes, labels = train_y[known].to(index.device).unique(return_inverse=True)  # however large their numbers are
    labels = labels[index]  # (n, k), nearest first
    return {k: classes[_vote(similarity[:, :k], labels[:, :k], len(classes), temperature)] for k in ks}
