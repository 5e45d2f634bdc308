"""What learners answer: the truth of each exercise of notebooks 00 to 11, and two typical mistakes, each with its why.

An answer whose first parameter is `book` looks names up there that the exercise takes from its notebook.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

TRUTH: dict[str, Callable] = {}
MISTAKES: dict[str, tuple[Callable, Callable]] = {}

# ------------------------------------------------------------------------------------------------- 00: the tour

TRUTH["0a"] = lambda n_local: 2 * (1 + n_local)
MISTAKES["0a"] = (
    lambda n_local: 2 * (2 + n_local),  # with itself
    lambda n_local: 2 * n_local,  # the other global crop is forgotten
)
TRUTH["0b"] = lambda bank, labels, queries: labels[(queries @ F.normalize(bank, dim=1).T).argmax(1)]
MISTAKES["0b"] = (
    lambda bank, labels, queries: labels[(queries @ bank.T).argmax(1)],  # long rows win
    lambda bank, labels, queries: labels[torch.cdist(queries, bank).argmin(1)],  # the nearest, not the most similar
)
TRUTH["0c"] = lambda: ["crops.n_local=6"]
MISTAKES["0c"] = (
    lambda: ["crops.n_local=4"],  # six with the global ones
    lambda: ["crops.n_local=8"],  # six more than the preset's two
)

# ------------------------------------------------------------------------------------- 01: images become tokens


def cut(image, patch, begins):
    """`begins`: where patches begin along a side, by how many px may stand before the last one."""
    tops, lefts = (begins(side - patch) for side in image.shape[1:])
    return torch.stack([image[:, y : y + patch, x : x + patch].flatten() for y in tops for x in lefts])


def swiglu(x, w12, w3, silu_of):
    gate, signal = (x @ w12.T).chunk(2, dim=1)
    return ((F.silu(gate) if "g" in silu_of else gate) * (F.silu(signal) if "u" in silu_of else signal)) @ w3.T


TRUTH["1a"] = lambda y, x, width, patch, registers: 1 + registers + y // patch * (width // patch) + x // patch
MISTAKES["1a"] = (
    lambda y, x, width, patch, registers: 1 + y // patch * (width // patch) + x // patch,  # registers are forgotten
    lambda y, x, width, patch, registers: 1 + registers + x // patch * (width // patch) + y // patch,  # by columns
)
TRUTH["1b"] = lambda x, w12, w3: swiglu(x, w12, w3, "g")
MISTAKES["1b"] = (
    lambda x, w12, w3: swiglu(x, w12, w3, "u"),  # the halves are swapped
    lambda x, w12, w3: swiglu(x, w12, w3, "gu"),  # the signal goes through silu, too
)
TRUTH["1c"] = lambda image, patch, stride: cut(image, patch, lambda room: range(0, room + 1, stride))
MISTAKES["1c"] = (
    # the last patches stick out, and are filled up with zeros
    lambda image, patch, stride: TRUTH["1c"](F.pad(image, (0, patch - 1, 0, patch - 1)), patch, stride),
    # the last patch always begins at H - P, whatever the stride leaves over
    lambda image, patch, stride: cut(image, patch, lambda room: torch.linspace(0, room, room // stride + 1).int()),
)

# ------------------------------------------------------------------------------------------------ 02: attention


def merge(a, b, shrink):
    top = max(a[0], b[0])
    return top, *(x * shrink(a[0] - top) + y * shrink(b[0] - top) for x, y in zip(a[1:], b[1:], strict=True))


def attend(q, k, v, before=None, after=None):
    """`before` and `after` the softmax: what stands where a token looks at itself."""
    itself = torch.eye(len(q), dtype=torch.bool)
    weights = torch.einsum("ihd,jhd->hij", q, k) / q.shape[-1] ** 0.5
    weights = weights.masked_fill(itself, before).softmax(-1) if before is not None else weights.softmax(-1)
    weights = weights.masked_fill(itself, after) if after is not None else weights
    return torch.einsum("hij,jhd->ihd", weights, v)


TRUTH["2a"] = lambda side, patch, heads: heads * ((side // patch) ** 2 + 1) ** 2
MISTAKES["2a"] = (
    lambda side, patch, heads: heads * (side // patch) ** 4,  # the class token is forgotten
    lambda side, patch, heads: heads * ((side // patch) ** 2 + 1),  # tokens, not pairs of tokens
)
TRUTH["2b"] = lambda *numbers: merge(numbers[:3], numbers[3:], torch.exp)
MISTAKES["2b"] = (
    lambda *numbers: merge(numbers[:3], numbers[3:], lambda above: 1),  # sums of different maxima are added
    lambda *numbers: merge(numbers[:3], numbers[3:], lambda above: math.exp(-above)),  # grows where it has to shrink
)
TRUTH["2c"] = lambda q, k, v: attend(q, k, v, before=-math.inf)
MISTAKES["2c"] = (
    lambda q, k, v: attend(q, k, v, before=0),  # a score of 0 is a weight of exp(0) = 1
    lambda q, k, v: attend(q, k, v, after=0),  # weights no longer sum to 1
)

# ------------------------------------------------------------------------------------------------- 03: curation


def components_around_their_first(degrees):
    n, first = 1, degrees[0]
    for angle in degrees:
        if math.cos(math.radians(angle - first)) <= 0.6:
            n, first = n + 1, angle
    return n


def gaps_over(bound, degrees):
    return sum(after - before > bound for before, after in zip(degrees, degrees[1:], strict=False))


def n_links(degrees):
    return sum(math.cos(math.radians(b - a)) > 0.6 for i, a in enumerate(degrees) for b in degrees[i + 1 :])


def first_of_each(labels, *other_keys):
    order = np.lexsort((*other_keys, labels))  # the last key counts most
    return order[np.unique(labels[order], return_index=True)[1]]


def first_k(good):
    return next(k for k in range(1, 100) if good(k))


TRUTH["3a"] = lambda degrees: 1 + gaps_over(math.degrees(math.acos(0.6)), degrees)
MISTAKES["3a"] = (
    components_around_their_first,  # links do not chain
    lambda degrees: len(degrees) - n_links(degrees),  # a link within a component joins nothing new
)
TRUTH["3b"] = lambda labels, quality: first_of_each(labels, -quality[:, 1], -quality[:, 0])
MISTAKES["3b"] = (
    lambda labels, quality: first_of_each(labels, -quality[:, 0], -quality[:, 1]),  # lexsort's keys in reading order
    lambda labels, quality: first_of_each(labels, -quality[:, 0]),  # sharpness is forgotten
)
TRUTH["3c"] = lambda book: first_k(lambda k: book["unique"](k) < 100 * k / 2)
MISTAKES["3c"] = (
    lambda book: first_k(lambda k: book["unique"](k) < 100 * k / 2) - 1,  # the last that still brings half
    lambda book: first_k(lambda k: book["unique"](k) > 500 / 2),  # half of the pool, not of what is requested
)

# ------------------------------------------------------------------------------------------ 04: crops and masks


def moved(box, region):
    return region[0] + box[0], region[1] + box[1], *box[2:]


TRUTH["4a"] = lambda n_images: (n_images - 1) / (2 * (2 * n_images - 1))
MISTAKES["4a"] = (
    lambda n_images: 1 / 4,  # a coin for each crop
    lambda n_images: n_images / (2 * n_images - 1) / 2,  # the first crop may be drawn again
)
TRUTH["4b"] = lambda masks: (1 / masks.sum(2, keepdim=True)).expand(masks.shape)[masks]
MISTAKES["4b"] = (
    lambda masks: 1 / masks.sum(2)[masks.any(2)],  # one for each crop
    lambda masks: torch.full((int(masks.sum()),), 1 / int(masks.sum())),  # 1 / number hidden in the batch
)
TRUTH["4c"] = lambda book, u, region, scale: moved(book["slow_box"](u, *region[2:], scale), region)
MISTAKES["4c"] = (
    lambda book, u, region, scale: book["slow_box"](u, *region[2:], scale),  # counted from the region's corner
    # a share of the picture of 120 x 160 px
    lambda book, u, region, scale: moved(book["slow_box"](u, 120, 160, scale), region),
)

# ------------------------------------------------------------------------------------- 05: student and teacher


def mean_of_pairs(x):
    return (x @ x.T)[~torch.eye(len(x), dtype=torch.bool)].mean()


TRUTH["5a"] = lambda n_steps: math.exp(math.log(0.5) / n_steps)
MISTAKES["5a"] = (
    lambda n_steps: 1 - 1 / n_steps,  # 1 / (1 - m) is taken for the half-life
    lambda n_steps: 0.5**n_steps,  # the power, not the root
)
TRUTH["5b"] = lambda x: mean_of_pairs(F.normalize(x, dim=1))
MISTAKES["5b"] = (
    lambda x: (F.normalize(x, dim=1) @ F.normalize(x, dim=1).T).mean(),  # everyone is paired with himself, too
    mean_of_pairs,  # rows keep their lengths
)
TRUTH["5c"] = lambda: ["loss.koleo=0"]
MISTAKES["5c"] = (
    lambda: ["teacher.momentum=0", "teacher.final_momentum=0"],  # KoLeo still spreads features
    lambda: ["loss.targets=sinkhorn", "loss.ibot=0"],  # balance is back, and keeps targets apart
)

# -------------------------------------------------------------------------------------------- 06: three losses


def dino_gradient(student_logits, teacher_probs, temp, with_itself=False):
    probs, total = (student_logits / temp).softmax(-1), torch.zeros_like(student_logits)
    pairs = [(g, v) for g in range(len(teacher_probs)) for v in range(len(probs)) if g != v or with_itself]
    for g, v in pairs:
        total[v] += (probs[v] - teacher_probs[g]) / temp
    return total / len(pairs) / probs.shape[1]


def uneven_sinkhorn(logits, temp, at_first=1, in_each=1):
    q = ((logits - logits.max()) / temp).exp() * at_first
    for _ in range(3):
        q = q / q.sum(0) * in_each
        q = q / q.sum(1, keepdim=True)
    return q


TRUTH["6a"] = lambda n: -math.log(2 * math.sin(math.pi / n))
MISTAKES["6a"] = (
    lambda n: -math.log(2 * math.pi / n),  # the arc, not the chord
    lambda n: -n * math.log(2 * math.sin(math.pi / n)),  # the sum, not the mean
)
TRUTH["6b"] = dino_gradient
MISTAKES["6b"] = (
    lambda logits, probs, temp: dino_gradient(logits, probs, temp, with_itself=True),  # teacher's crop and its twin
    lambda logits, probs, temp: dino_gradient(logits, probs, temp) * temp,  # the chain rule ends before the temperature
)
TRUTH["6c"] = lambda logits, temp, times: uneven_sinkhorn(logits, temp, in_each=times)
MISTAKES["6c"] = (
    lambda logits, temp, times: uneven_sinkhorn(logits, temp, at_first=times),  # which the first division undoes
    lambda logits, temp, times: uneven_sinkhorn(logits, temp) * times,  # at the end: rows no longer sum to 1
)

# ---------------------------------------------------------------------------------------------- 07: pretraining

TRUTH["7a"] = lambda n_prototypes: math.log(n_prototypes)
MISTAKES["7a"] = (
    lambda n_prototypes: math.log2(n_prototypes),  # bits
    lambda n_prototypes: math.log(n_prototypes) / n_prototypes,  # one term of the sum
)
TRUTH["7b"] = lambda logits, center, temp: ((logits - center) / temp).softmax(-1)
MISTAKES["7b"] = (
    lambda logits, center, temp: (logits / temp - center).softmax(-1),  # taken away after the division
    lambda logits, center, temp: ((logits - center) / temp).softmax(0),  # over the images
)
TRUTH["7c"] = lambda: ["teacher.warmup_temp=0.015", "teacher.temp=0.015", "vit.init_std=0.08"]
MISTAKES["7c"] = (
    lambda: ["optim.base_lr=0.002"],  # the doctor's lesser advice
    lambda: ["teacher.warmup_temp=0.1", "teacher.temp=0.1"],  # softer, not sharper
)

# ------------------------------------------------------------------------------------------- 08: probing images


def precisions(relevant):
    return [sum(relevant[: rank + 1]) / (rank + 1) for rank, is_right in enumerate(relevant) if is_right]


TRUTH["8a"] = lambda n_lrs, n_blocks: n_lrs * n_blocks * 2
MISTAKES["8a"] = (
    lambda n_lrs, n_blocks: n_lrs * n_blocks,  # the mean patch is forgotten
    lambda n_lrs, n_blocks: n_lrs + n_blocks + 2,  # choices are added, not combined
)
TRUTH["8b"] = lambda relevant, k: sum(relevant[:k]) / sum(relevant)
MISTAKES["8b"] = (
    lambda relevant, k: sum(relevant[:k]) / k,  # precision
    lambda relevant, k: sum(relevant[:k]) / min(k, sum(relevant)),  # of those that fit into k
)
TRUTH["8c"] = lambda relevant: sum(precisions(relevant)) / sum(relevant)
MISTAKES["8c"] = (
    lambda relevant: sum(precisions(relevant)) / len(relevant),  # the mean over all that was looked at
    lambda book, relevant: book["average_precision"](relevant),  # with the trapezoid
)

# ------------------------------------------------------------------------------------------ 09: probing patches

TRUTH["9a"] = lambda height, width, patch: math.ceil(height / patch) * math.ceil(width / patch)
MISTAKES["9a"] = (
    lambda height, width, patch: (height // patch) * (width // patch),  # cut off, not padded
    lambda height, width, patch: math.ceil(height * width / patch**2),  # the area is padded, not the sides
)
TRUTH["9b"] = lambda p, t: ((p / t).log().abs() < math.log(1.25)).double().mean()
MISTAKES["9b"] = (
    lambda p, t: (p / t < 1.25).double().mean(),  # too near is always forgiven
    lambda p, t: ((p / t - 1).abs() < 0.25).double().mean(),  # a quarter more or less is no factor
)
TRUTH["9c"] = lambda logits, distances: (logits.softmax(0) * distances).sum()
MISTAKES["9c"] = (
    lambda logits, distances: (logits.relu() + 0.1) @ distances / (logits.relu() + 0.1).sum(),  # as it was
    lambda logits, distances: distances[logits.argmax()],  # the likeliest, not the mean
)

# ------------------------------------------------------------------------------------------ 10: high resolution

TRUTH["10a"] = lambda size, patch: 1 + (size // patch) ** 2
MISTAKES["10a"] = (
    lambda size, patch: (size // patch) ** 2,  # the class token is forgotten
    lambda size, patch: 1 + size // patch,  # one row of patches
)
TRUTH["10b"] = lambda batch, before, after: max(1, math.floor(batch * before / after))
MISTAKES["10b"] = (
    lambda batch, before, after: max(1, round(batch * before / after)),  # more tokens than before
    lambda batch, before, after: batch * before // after,  # may be none
)
TRUTH["10c"] = lambda i, n, m: (i + 0.5) / ((n + 0.1) / m) - 0.5
MISTAKES["10c"] = (
    lambda i, n, m: i / ((n + 0.1) / m),  # of the edge, not the middle
    lambda i, n, m: (i + 0.5) * ((n + 0.1) / m) - 0.5,  # times the scale
)

# --------------------------------------------------------------------------------------------- 11: distillation

TRUTH["11a"], MISTAKES["11a"] = TRUTH["0a"], MISTAKES["0a"]
TRUTH["11b"] = lambda average, student, momentum: average.lerp_(student, 1 - momentum)
MISTAKES["11b"] = (
    lambda average, student, momentum: momentum * student + (1 - momentum) * average,  # swapped
    lambda average, student, momentum: momentum * average + student,  # weights sum to more than 1
)
TRUTH["11c"] = lambda scores, temperature: (scores / temperature).softmax(1)
MISTAKES["11c"] = (
    lambda scores, temperature: scores.softmax(1) / temperature,  # divided last
    lambda scores, temperature: (scores / temperature).softmax(0),  # over the images
)
