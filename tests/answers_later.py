"""What learners answer in the notebooks from 12 on; `answers` has those before."""

import math

import numpy as np
import torch
from answers import MISTAKES, TRUTH

# -------------------------------------------------------------------------------------------------- 12: kernels


def tiles(lengths):
    n, room = 0, 0
    for length in lengths:
        if length > 64:
            n, room = n + math.ceil(length / 64), 0
        elif length > room:
            n, room = n + 1, 64 - length
        else:
            room -= length
    return n


def logsumexp(parts, shrinks=True):
    top, total = -math.inf, 0.0
    for part in parts:
        higher = max(top, float(part.max()))
        total = total * (math.exp(top - higher) if shrinks else 1) + float((part - higher).exp().sum())
        top = higher
    return top + math.log(total)


TRUTH["12a"] = tiles
MISTAKES["12a"] = (
    lambda lengths: math.ceil(sum(lengths) / 64),  # crops are torn apart
    lambda lengths: sum(math.ceil(length / 64) for length in lengths),  # nothing is shared
)
TRUTH["12b"] = logsumexp
MISTAKES["12b"] = (
    lambda parts: sum(part.exp().sum() for part in parts).log(),  # overflows
    lambda parts: logsumexp(parts, shrinks=False),  # what came before belongs to a smaller maximum
)
TRUTH["12c"] = lambda flops, moved, tflops, tb_per_s: 1e3 * (flops / (tflops * 1e12) + moved / (tb_per_s * 1e12))
MISTAKES["12c"] = (
    lambda flops, moved, tflops, tb_per_s: 1e-9 * max(flops / tflops, moved / tb_per_s),  # both at once
    lambda flops, moved, tflops, tb_per_s: 1e-12 * (flops / tflops + moved / tb_per_s),  # seconds
)

# -------------------------------------------------------------------------------------------- 13: many processes

TRUTH["13a"] = lambda n, processes, rank: [row for row in range(n) if row // (n // processes) == rank]
MISTAKES["13a"] = (
    lambda n, processes, rank: list(range(rank, n, processes)),  # dealt like cards
    lambda n, processes, rank: list(range(rank * processes, rank * processes + processes)),  # n / R is taken for R
)
TRUTH["13b"] = lambda sums, counts: sum(sums) / sum(counts) if any(counts) else 0.0
MISTAKES["13b"] = (
    # few rows count as much as many
    lambda sums, counts: sum(s / max(c, 1) for s, c in zip(sums, counts, strict=True)) / len(sums),
    lambda sums, counts: sum(sums) / len(sums),  # over processes, not rows
)
TRUTH["13c"] = lambda parameters, processes: (3 * 4 + 2) * parameters / processes
MISTAKES["13c"] = (
    lambda parameters, processes: 4 * 4 * parameters / processes,  # the average is left in float32
    lambda parameters, processes: 3 * 4 * parameters / processes + 2 * parameters,  # each holds a whole average
)

# -------------------------------------------------------------------------------------------------- 14: scaling


def line(x, y, at):
    slope, height = np.polyfit(x, y, 1)
    return height + slope * at


TRUTH["14a"] = lambda flops, tflops, gpus, utilisation: flops / (1e12 * tflops * gpus * utilisation)
MISTAKES["14a"] = (
    lambda flops, tflops, gpus, utilisation: flops / (1e9 * tflops * gpus * utilisation),  # a giga for a tera
    lambda flops, tflops, gpus, utilisation: flops * utilisation / (1e12 * tflops * gpus),  # the idler, the faster
)
TRUTH["14b"] = lambda seen, errors, compute: math.exp(line(np.log(seen), np.log(errors), math.log(compute)))
MISTAKES["14b"] = (
    lambda seen, errors, compute: line(seen, errors, compute),  # without logarithms: falls below zero
    lambda seen, errors, compute: line(np.log(seen), errors, math.log(compute)),  # the logarithm of compute alone
)
TRUTH["14c"] = lambda b, share: share ** (-1 / b)
MISTAKES["14c"] = (
    lambda b, share: share**-b,  # the exponent is not turned over
    lambda b, share: share ** (1 / b),  # the part of the compute that is enough for the larger error
)

# --------------------------------------------------------------------------------------------- 15: is it DINOv2?

TRUTH["15a"] = lambda side, patch, width: width + width * (side // patch) ** 2
MISTAKES["15a"] = (
    lambda side, patch, width: width * (side // patch) ** 2,  # the class token is forgotten
    lambda side, patch, width: 1 + (side // patch) ** 2,  # places, not numbers
)
TRUTH["15b"] = lambda width: 8 * math.ceil(width / 3)
MISTAKES["15b"] = (
    lambda width: 8 * width // 3 // 8 * 8,  # rounded down
    lambda width: 8 * width // 3,  # not rounded
)
TRUTH["15c"] = lambda qkv: (qkv[: len(qkv) // 3], qkv[len(qkv) // 3 : -len(qkv) // 3], qkv[-len(qkv) // 3 :])
MISTAKES["15c"] = (
    lambda qkv: qkv.chunk(3, dim=1),  # columns
    lambda qkv: (qkv[0::3], qkv[1::3], qkv[2::3]),  # every third row
)

# -------------------------------------------------------------------------------------------- 16: looking inside


def rollout(maps, keep=0.5):
    passed = torch.eye(maps.shape[1], dtype=maps.dtype)
    for mixture in maps:
        passed = keep * passed + (1 - keep) * mixture @ passed
    return passed[0]


TRUTH["16a"] = lambda n, share: math.ceil(n * share)
MISTAKES["16a"] = (
    lambda n, share: int(n * share),  # the patch that holds the last bit is forgotten
    lambda n, share: int(n * share) + 1,  # one more, also where nothing is left over
)
TRUTH["16b"] = rollout
MISTAKES["16b"] = (
    lambda maps: rollout(maps, keep=0.0),  # without what a token keeps of itself
    lambda maps: rollout(maps.flip(0)),  # the first block leftmost
)
TRUTH["16c"] = lambda lengths, times: lengths > times * np.median(lengths, axis=1, keepdims=True)
MISTAKES["16c"] = (
    lambda lengths, times: lengths > times * np.median(lengths),  # one median for all pictures
    lambda lengths, times: lengths > times * lengths.mean(1, keepdims=True),  # the outliers raise the bar
)

# --------------------------------------------------------------------------------------- 17: who is left out


def distances(right, slices, labels, outside=True):
    found = []
    for name in np.unique(slices):
        here, total = slices == name, 0.0
        for label in labels[here]:
            others = labels == label
            total += right[others & ~here if outside else others].mean()
        found.append(right[here].mean() - total / here.sum())
    return found


TRUTH["17a"] = lambda half: math.ceil(round((1.96 * 0.5 / half) ** 2, 9))
MISTAKES["17a"] = (
    lambda half: math.ceil(round((1.96 / half) ** 2, 9)),  # p (1 - p) is a quarter
    lambda half: int((1.96 * 0.5 / half) ** 2),  # one picture short
)
TRUTH["17b"] = lambda right, slices: np.mean([np.mean(right[slices == name]) for name in np.unique(slices)])
MISTAKES["17b"] = (
    lambda right, slices: right.mean(),  # large slices count more
    lambda right, slices: np.sum([np.sum(right[slices == name]) for name in np.unique(slices)]),  # sums, not shares
)
TRUTH["17c"] = distances
MISTAKES["17c"] = (
    lambda right, slices, labels: distances(right, slices, labels, outside=False),  # compared with itself, too
    lambda right, slices, labels: [right[slices == name].mean() - right.mean() for name in np.unique(slices)],  # no classes
)
