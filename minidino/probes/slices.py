"""Whom an average hides: how often each slice of the pictures is named rightly, and whether slices differ at all.

A slice is every picture of one region, one income, one light. The best and the worst of several slices are never quite
alike; so the gap between them is held against that of slices drawn by lot.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int
from scipy.stats import binomtest

SMALLEST = 20  # pictures of a slice that counts in a gap


def slice_accuracies(
    right: Bool[np.ndarray, "n"], slices: Sequence[str], labels: Int[np.ndarray, "n"]
) -> dict[str, dict[str, float]]:
    """How often the pictures of each slice were named rightly.

    Args:
        right: whether each picture was.
        slices: the slice of each picture; "" is unknown and left out.
        labels: the class of each picture.
    Returns:
        {slice: {"n", "accuracy", "low", "high", "by_classes"}}, the worst first. low and high: Wilson's interval of 95 %.
        by_classes: what the slice would come to if its pictures were named rightly as often as all known pictures of
        their classes; a slice of hard classes has a low one.
    Raises:
        ValueError: the lengths differ, or no slice is known.
    """
    right, codes, names, labels = _known(right, slices, labels)
    classes = np.unique(labels, return_inverse=True)[1]
    of_class = (np.bincount(classes, right) / np.bincount(classes))[classes]
    found = {}
    for k, name in enumerate(names):
        here = codes == k
        share = binomtest(int(right[here].sum()), int(here.sum()))
        low, high = share.proportion_ci(method="wilson")
        found[name] = {"n": share.n, "accuracy": share.statistic, "low": low, "high": high,
                       "by_classes": float(of_class[here].mean())}  # fmt: skip
    return dict(sorted(found.items(), key=lambda item: item[1]["accuracy"]))


def slice_gap(
    right: Bool[np.ndarray, "n"],
    slices: Sequence[str],
    labels: Int[np.ndarray, "n"] | None = None,
    shuffles: int = 1000,
    seed: int = 0,
) -> dict[str, float]:
    """How far the best slice is ahead of the worst, and how far it would be if slices meant nothing.

        p = (1 + number of shuffles whose gap is at least as wide) / (1 + shuffles)

    Args:
        right, slices: as for `slice_accuracies`; slices of fewer than 20 pictures do not count.
        labels: pictures change slices only with others of their class, so that a gap of classes is none of slices;
            None: with any other.
        shuffles: drawings by lot.
        seed: of the drawing.
    Returns:
        "gap", "by_lot" (the mean gap of the drawings), "p"; NaN with fewer than two slices that count.
    Raises:
        ValueError: as for `slice_accuracies`.
    Source: the permutation test of Fisher 1935, within strata.
    """
    right, codes, names, classes = _known(right, slices, np.zeros(len(right)) if labels is None else labels)
    sizes = np.bincount(codes)
    counted = sizes >= SMALLEST
    if counted.sum() < 2:
        return {"gap": math.nan, "by_lot": math.nan, "p": math.nan}

    def gap(codes: np.ndarray, right: np.ndarray) -> float:
        return float(np.ptp((np.bincount(codes, right) / sizes)[counted]))

    rng, seen = np.random.default_rng(seed), gap(codes, right)
    places = np.argsort(classes, kind="stable")  # class after class
    drawn = np.array([gap(codes[places], right[np.lexsort((rng.random(len(right)), classes))]) for _ in range(shuffles)])
    wide = int((drawn >= seen - 1e-12).sum())  # equal gaps may differ in their last bit
    return {"gap": seen, "by_lot": float(drawn.mean()), "p": (1 + wide) / (1 + shuffles)}


def _known(right: Any, slices: Sequence[str], labels: Any) -> tuple[np.ndarray, np.ndarray, list[str], np.ndarray]:
    """Of the pictures whose slice is known: right, the number of the slice, the names of all slices, classes."""
    right, labels, values = np.asarray(right, dtype=float), np.asarray(labels), np.asarray(slices, dtype=str)
    if not right.shape == labels.shape == values.shape == (len(right),):
        raise ValueError(f"expected as many slices and labels as answers, got {len(values)}, {len(labels)}, {len(right)}")
    known = values != ""
    if not known.any():
        raise ValueError("no picture has a slice")
    names, codes = np.unique(values[known], return_inverse=True)
    return right[known], codes, names.tolist(), labels[known]
