"""What a learner may answer: the truth of each exercise of the notebooks, and two typical mistakes, each with its why.

A first parameter `book` is the notebook: the names that it has made before the exercise.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F

# ----------------------------------------------------------------------------------------------- 00: the tour


def pairs(n_local):
    return 2 * (1 + n_local)


def pairs_with_itself(n_local):
    return 2 * (2 + n_local)


def pairs_of_local_crops(n_local):  # the other global crop is forgotten
    return 2 * n_local


def nearest(bank, labels, queries):
    return labels[(F.normalize(queries, dim=1) @ F.normalize(bank, dim=1).T).argmax(1)]


def nearest_by_product(bank, labels, queries):  # long rows win
    return labels[(queries @ bank.T).argmax(1)]


def nearest_by_distance(bank, labels, queries):
    return labels[torch.cdist(queries, bank).argmin(1)]


def six_local_crops():
    return ["crops.n_local=6"]


def six_crops():  # with the global ones
    return ["crops.n_local=4"]


def six_more():  # than the preset's two
    return ["crops.n_local=8"]


# ----------------------------------------------------------------------------------- 01: images become tokens


def token(y, x, width, patch, registers):
    return 1 + registers + (y // patch) * (width // patch) + x // patch


def token_without_registers(y, x, width, patch, registers):
    return 1 + (y // patch) * (width // patch) + x // patch


def token_column_by_column(y, x, width, patch, registers):
    return 1 + registers + (x // patch) * (width // patch) + y // patch


def swiglu(x, w12, w3):
    gate, signal = (x @ w12.T).chunk(2, dim=1)
    return (gate * gate.sigmoid() * signal) @ w3.T


def swiglu_swapped(x, w12, w3):  # the gate is taken for the signal
    signal, gate = (x @ w12.T).chunk(2, dim=1)
    return (F.silu(gate) * signal) @ w3.T


def swiglu_of_both(x, w12, w3):  # the signal goes through silu, too
    gate, signal = F.silu(x @ w12.T).chunk(2, dim=1)
    return (gate * signal) @ w3.T


def cut(image, patch, stride):
    return _cut(image, patch, stride, stride)


def cut_over_the_rim(image, patch, stride):  # the last patches stick out: filled with zeros
    return _cut(F.pad(image, (0, patch - 1, 0, patch - 1)), patch, stride, stride)


def cut_without_overlap_across(image, patch, stride):  # only one of the two loops is changed
    return _cut(image, patch, stride, patch)


def _cut(image, patch, down, across):
    tops, lefts = range(0, image.shape[1] - patch + 1, down), range(0, image.shape[2] - patch + 1, across)
    return torch.stack([image[:, y : y + patch, x : x + patch].flatten() for y in tops for x in lefts])


# ---------------------------------------------------------------------------------------------- 02: attention


def weights_of_a_picture(side, patch, heads):
    return heads * ((side // patch) ** 2 + 1) ** 2


def weights_without_class_token(side, patch, heads):
    return heads * (side // patch) ** 4


def tokens_of_a_picture(side, patch, heads):  # N where N x N are asked
    return heads * ((side // patch) ** 2 + 1)


def merged(top_a, total_a, mixed_a, top_b, total_b, mixed_b):
    top = max(top_a, top_b)
    a, b = math.exp(top_a - top), math.exp(top_b - top)
    return top, a * total_a + b * total_b, a * mixed_a + b * mixed_b


def merged_unshrunk(top_a, total_a, mixed_a, top_b, total_b, mixed_b):  # each sum belongs to its own maximum
    return max(top_a, top_b), total_a + total_b, mixed_a + mixed_b


def merged_upside_down(top_a, total_a, mixed_a, top_b, total_b, mixed_b):  # grows where it has to shrink
    top = max(top_a, top_b)
    a, b = math.exp(top - top_a), math.exp(top - top_b)
    return top, a * total_a + b * total_b, a * mixed_a + b * mixed_b


def attention_to_others(q, k, v):
    return _attention(q, k, v, before=-math.inf)


def attention_with_a_zero_score(q, k, v):  # exp(0) is 1
    return _attention(q, k, v, before=0)


def attention_masked_afterwards(q, k, v):  # weights no longer sum to 1
    return _attention(q, k, v, after=0)


def _attention(q, k, v, before=None, after=None):
    itself = torch.eye(len(q), dtype=torch.bool)
    weights = torch.einsum("ihd,jhd->hij", q, k) / q.shape[-1] ** 0.5
    weights = weights if before is None else weights.masked_fill(itself, before)
    weights = weights.softmax(-1)
    weights = weights if after is None else weights.masked_fill(itself, after)
    return torch.einsum("hij,jhd->ihd", weights, v)


# ----------------------------------------------------------------------------------------------- 03: curation


def components(degrees):
    return 1 + sum(after - before > math.degrees(math.acos(0.6)) for before, after in zip(degrees, degrees[1:]))


def components_around_their_first(degrees):  # who is not like the first begins another; links do not chain
    n, first = 1, degrees[0]
    for angle in degrees:
        if math.cos(math.radians(angle - first)) <= 0.6:
            n, first = n + 1, angle
    return n


def components_at_sixty_degrees(degrees):
    return 1 + sum(after - before > 60 for before, after in zip(degrees, degrees[1:]))


def keep(labels, quality):
    return _first_of_each(labels, np.lexsort((-quality[:, 1], -quality[:, 0], labels)))


def keep_the_sharpest(labels, quality):  # keys in the order of the sentence, which lexsort reads backwards
    return _first_of_each(labels, np.lexsort((-quality[:, 0], -quality[:, 1], labels)))


def keep_the_first_of_the_largest(labels, quality):
    return _first_of_each(labels, np.lexsort((-quality[:, 0], labels)))


def _first_of_each(labels, order):
    return order[np.unique(labels[order], return_index=True)[1]]


def k_that_repeats(book):
    return next(k for k in range(1, 100) if book["unique"](k) < 100 * k / 2)


def k_that_does_not_yet(book):  # the largest k that still brings half
    return k_that_repeats(book) - 1


def k_of_half_the_pool(book):  # compared with the pool, not with what was requested
    return next(k for k in range(1, 100) if book["unique"](k) > 500 / 2)


# ---------------------------------------------------------------------------------------- 04: crops and masks


def chance(n_images):
    return (n_images - 1) / (2 * (2 * n_images - 1))


def chance_of_two_coins(n_images):
    return 1 / 4


def chance_with_replacement(n_images):  # the first crop may be drawn again
    return 1 / 2 * n_images / (2 * n_images - 1)


def weights(masks):
    return (1 / masks.sum(2, keepdim=True).clamp(min=1)).expand(masks.shape)[masks]


def weights_of_the_crops(masks):  # one for each crop
    counts = masks.sum(2).flatten()
    return 1 / counts[counts > 0]


def weights_of_the_batch(masks):  # every patch alike
    return torch.full((int(masks.sum()),), 1 / int(masks.sum()))


def box(book, u, region, scale):
    top, left, height, width = book["slow_box"](u, *region[2:], scale)
    return region[0] + top, region[1] + left, height, width


def box_not_moved(book, u, region, scale):
    return book["slow_box"](u, *region[2:], scale)


def box_of_the_picture(book, u, region, scale):  # of 120 x 160 px: as large as before, and then moved
    top, left, height, width = book["slow_box"](u, 120, 160, scale)
    return region[0] + top, region[1] + left, height, width


# ----------------------------------------------------------------------------------- 05: student and teacher


def momentum(n_steps):
    return math.exp(math.log(0.5) / n_steps)


def momentum_of_the_horizon(n_steps):  # 1 / (1 - m) is taken for the half-life
    return 1 - 1 / n_steps


def momentum_upside_down(n_steps):
    return 0.5**n_steps


def mean_cosine(x):
    unit = F.normalize(x, dim=1)
    return (unit @ unit.T)[~torch.eye(len(x), dtype=torch.bool)].mean()


def mean_cosine_with_oneself(x):
    unit = F.normalize(x, dim=1)
    return (unit @ unit.T).mean()


def mean_product(x):  # of rows of any length
    return (x @ x.T)[~torch.eye(len(x), dtype=torch.bool)].mean()


def collapse_of_both():
    return ["loss.koleo=0"]


def collapse_by_a_fast_teacher():
    return ["teacher.momentum=0", "teacher.final_momentum=0"]


def balance_again():  # which keeps targets apart
    return ["loss.targets=sinkhorn", "loss.ibot=0"]


# ------------------------------------------------------------------------------------------ 06: three losses


def even_koleo(n):
    return -math.log(2 * math.sin(math.pi / n))


def even_koleo_of_the_arc(n):  # not of the chord
    return -math.log(2 * math.pi / n)


def even_koleo_of_all(n):  # the sum, not the mean
    return -n * math.log(2 * math.sin(math.pi / n))


def dino_gradient(student_logits, teacher_probs, student_temp):
    return _dino_gradient(student_logits, teacher_probs, student_temp)


def dino_gradient_with_itself(student_logits, teacher_probs, student_temp):
    return _dino_gradient(student_logits, teacher_probs, student_temp, skip_itself=False)


def dino_gradient_without_temp(student_logits, teacher_probs, student_temp):  # it stands in the softmax only
    return _dino_gradient(student_logits, teacher_probs, student_temp) * student_temp


def _dino_gradient(student_logits, teacher_probs, temp, skip_itself=True):
    probs, total = (student_logits / temp).softmax(-1), torch.zeros_like(student_logits)
    pairs = [(g, v) for g in range(len(teacher_probs)) for v in range(len(probs)) if g != v or not skip_itself]
    for g, v in pairs:
        total[v] += (probs[v] - teacher_probs[g]) / temp
    return total / len(pairs) / probs.shape[1]


def uneven_sinkhorn(logits, teacher_temp, times):
    return _uneven_sinkhorn(logits, teacher_temp, in_each=times)


def uneven_sinkhorn_at_the_start(logits, teacher_temp, times):  # the first division of columns forgets it
    return _uneven_sinkhorn(logits, teacher_temp, at_first=times)


def uneven_sinkhorn_at_the_end(logits, teacher_temp, times):  # rows no longer sum to 1
    return _uneven_sinkhorn(logits, teacher_temp) * times


def _uneven_sinkhorn(logits, temp, at_first=1, in_each=1):
    q = ((logits - logits.max()) / temp).exp() * at_first
    for _ in range(3):
        q = q / q.sum(0) * in_each
        q = q / q.sum(1, keepdim=True)
    return q


# -------------------------------------------------------------------------------------------- 07: pretraining


def start_loss(n_prototypes):
    return math.log(n_prototypes)


def start_loss_in_bits(n_prototypes):
    return math.log2(n_prototypes)


def start_loss_of_one_prototype(n_prototypes):  # one term of the sum
    return math.log(n_prototypes) / n_prototypes


def softmax_center(logits, center, teacher_temp):
    return ((logits - center) / teacher_temp).softmax(-1)


def softmax_center_at_last(logits, center, teacher_temp):  # taken away after the division
    return (logits / teacher_temp - center).softmax(-1)


def softmax_center_of_columns(logits, center, teacher_temp):  # over the images
    return ((logits - center) / teacher_temp).softmax(0)


def cure():
    return ["teacher.warmup_temp=0.015", "teacher.temp=0.015", "vit.init_std=0.08"]


def cure_by_the_rate():  # the doctor's other advice
    return ["optim.base_lr=0.002"]


def cure_by_softness():  # the wrong way
    return ["teacher.warmup_temp=0.1", "teacher.temp=0.1"]


# ----------------------------------------------------------------------------------------- 08: probing images


def heads(n_lrs, n_blocks):
    return n_lrs * n_blocks * 2


def heads_without_mean_patch(n_lrs, n_blocks):
    return n_lrs * n_blocks


def heads_added(n_lrs, n_blocks):  # not combined
    return n_lrs + n_blocks + 2


def recall(relevant, k):
    return sum(relevant[:k]) / sum(relevant)


def precision(relevant, k):
    return sum(relevant[:k]) / k


def recall_at_best(relevant, k):  # of those that fit into k
    return sum(relevant[:k]) / min(k, sum(relevant))


def step_precision(relevant):
    return sum(_precisions(relevant)) / sum(relevant)


def step_precision_over_ranks(relevant):  # divided by all that was looked at
    return sum(_precisions(relevant)) / len(relevant)


def trapezoid_precision(relevant):  # as it was
    right, area = 0, 0.0
    for rank, is_right in enumerate(relevant):
        if is_right:
            area += ((right / rank if rank else 1) + (right + 1) / (rank + 1)) / 2
            right += 1
    return area / right


def _precisions(relevant):
    return [sum(relevant[: rank + 1]) / (rank + 1) for rank, is_right in enumerate(relevant) if is_right]


# ---------------------------------------------------------------------------------------- 09: probing patches


def patches(height, width, patch):
    return math.ceil(height / patch) * math.ceil(width / patch)


def whole_patches(height, width, patch):  # cut, not padded
    return (height // patch) * (width // patch)


def patches_by_area(height, width, patch):
    return math.ceil(height * width / patch**2)


def delta(p, t):
    return (torch.maximum(p / t, t / p) < 1.25).double().mean()


def delta_of_the_far(p, t):  # too near is always forgiven
    return (p / t < 1.25).double().mean()


def delta_of_a_quarter(p, t):  # a difference of a quarter, which is another bound for what is too near
    return ((p / t - 1).abs() < 0.25).double().mean()


def depth(logits, distances):
    return (logits.softmax(0) * distances).sum()


def depth_of_relu(logits, distances):  # as it was
    shares = logits.relu() + 0.1
    return (shares / shares.sum() * distances).sum()


def depth_of_the_likeliest(logits, distances):
    return distances[logits.argmax()]


# ---------------------------------------------------------------------------------------- 10: high resolution


def tokens(size, patch):
    return (size // patch) ** 2 + 1


def tokens_without_class(size, patch):
    return (size // patch) ** 2


def tokens_of_a_row(size, patch):
    return size // patch + 1


def batch(batch, tokens_before, tokens_after):
    return max(1, batch * tokens_before // tokens_after)


def batch_rounded(batch, tokens_before, tokens_after):  # may be too many
    return max(1, round(batch * tokens_before / tokens_after))


def batch_of_none(batch, tokens_before, tokens_after):
    return batch * tokens_before // tokens_after


def place(i, n, m):
    return (i + 0.5) / ((n + 0.1) / m) - 0.5


def place_of_the_corner(i, n, m):
    return i * m / (n + 0.1)


def place_upside_down(i, n, m):  # times the scale
    return (i + 0.5) * (n + 0.1) / m - 0.5


# ------------------------------------------------------------------------------------------- 11: distillation


def average(average, student, momentum):
    return momentum * average + (1 - momentum) * student


def average_swapped(average, student, momentum):
    return momentum * student + (1 - momentum) * average


def average_added(average, student, momentum):  # weights sum to more than 1
    return momentum * average + student


def soft_targets(scores, temperature):
    return (scores / temperature).softmax(-1)


def soft_targets_divided_last(scores, temperature):
    return scores.softmax(-1) / temperature


def soft_targets_of_columns(scores, temperature):  # over the images
    return (scores / temperature).softmax(0)


# ------------------------------------------------------------------------------------------------ 12: kernels


def tiles(lengths):
    n, filled = 0, 64
    for length in lengths:
        if length > 64:
            n, filled = n + math.ceil(length / 64), 64
        elif filled + length > 64:
            n, filled = n + 1, length
        else:
            filled += length
    return n


def tiles_without_gaps(lengths):  # crops are torn apart
    return math.ceil(sum(lengths) / 64)


def tiles_of_their_own(lengths):  # nothing is shared
    return sum(math.ceil(length / 64) for length in lengths)


def logsumexp(parts):
    top, total = -torch.inf, 0.0
    for part in parts:
        higher = max(top, float(part.max()))
        total = total * math.exp(top - higher) + float((part - higher).exp().sum())
        top = higher
    return top + math.log(total)


def logsumexp_that_overflows(parts):
    return sum(part.exp().sum() for part in parts).log()


def logsumexp_unshrunk(parts):  # what came before belongs to a smaller maximum
    top, total = -torch.inf, 0.0
    for part in parts:
        top = max(top, float(part.max()))
        total += float((part - top).exp().sum())
    return top + math.log(total)


def least(flops, moved, tflops, tb_per_s):
    return 1e3 * (flops / (tflops * 1e12) + moved / (tb_per_s * 1e12))


def least_of_both_at_once(flops, moved, tflops, tb_per_s):  # the larger of the two
    return 1e3 * max(flops / (tflops * 1e12), moved / (tb_per_s * 1e12))


def least_in_seconds(flops, moved, tflops, tb_per_s):
    return flops / (tflops * 1e12) + moved / (tb_per_s * 1e12)


# ------------------------------------------------------------------------------------------ 13: many processes


def rows(n, processes, rank):
    size = n // processes
    return list(range(rank * size, rank * size + size))


def rows_dealt_like_cards(n, processes, rank):
    return list(range(rank, n, processes))


def rows_as_many_as_processes(n, processes, rank):
    return list(range(rank * processes, rank * processes + processes))


def mean(sums, counts):
    return sum(sums) / sum(counts) if sum(counts) else 0.0


def mean_of_means(sums, counts):  # few rows count as much as many
    return sum(s / max(c, 1) for s, c in zip(sums, counts)) / len(sums)


def mean_of_sums(sums, counts):  # over processes
    return sum(sums) / len(sums)


def held_bytes(parameters, processes):
    return 14 * parameters / processes


def held_bytes_of_float32(parameters, processes):  # the average as before
    return 16 * parameters / processes


def held_bytes_with_a_whole_average(parameters, processes):  # only the other three are shared out
    return 12 * parameters / processes + 2 * parameters


# ------------------------------------------------------------------------------------------------- 14: scaling


def seconds(flops, tflops, gpus, utilisation):
    return flops / (tflops * 1e12 * gpus * utilisation)


def seconds_of_gigaflops(flops, tflops, gpus, utilisation):
    return flops / (tflops * 1e9 * gpus * utilisation)


def seconds_of_idle_chips(flops, tflops, gpus, utilisation):  # less used, and faster
    return flops * utilisation / (tflops * 1e12 * gpus)


def forecast(seen, errors, compute):
    slope, height = np.polyfit(np.log(seen), np.log(errors), 1)
    return math.exp(height + slope * math.log(compute))


def forecast_by_a_line(seen, errors, compute):  # falls below zero
    slope, height = np.polyfit(seen, errors, 1)
    return height + slope * compute


def forecast_by_half_a_logarithm(seen, errors, compute):  # of compute alone
    slope, height = np.polyfit(np.log(seen), errors, 1)
    return height + slope * math.log(compute)


def times(b, share):
    return share ** (-1 / b)


def times_upside_down(b, share):  # what is left after so many times the compute
    return share**-b


def times_of_less(b, share):  # a share of the compute
    return share ** (1 / b)


# ---------------------------------------------------------------------------------------- 15: is it DINOv2?


def positions(side, patch, width):
    return ((side // patch) ** 2 + 1) * width


def positions_without_class(side, patch, width):
    return (side // patch) ** 2 * width


def places(side, patch, width):  # places, not numbers
    return (side // patch) ** 2 + 1


def hidden(width):
    return math.ceil(4 * width * 2 / 3 / 8) * 8


def hidden_rounded_down(width):
    return 4 * width * 2 // 3 // 8 * 8


def hidden_not_rounded(width):
    return 4 * width * 2 // 3


def parts(qkv):
    width = qkv.shape[1]
    return qkv[:width], qkv[width : 2 * width], qkv[2 * width :]


def parts_of_columns(qkv):
    return qkv.chunk(3, dim=1)


def parts_interleaved(qkv):
    return qkv[0::3], qkv[1::3], qkv[2::3]


TRUTH = {
    "0a": pairs, "0b": nearest, "0c": six_local_crops,
    "1a": token, "1b": swiglu, "1c": cut,
    "2a": weights_of_a_picture, "2b": merged, "2c": attention_to_others,
    "3a": components, "3b": keep, "3c": k_that_repeats,
    "4a": chance, "4b": weights, "4c": box,
    "5a": momentum, "5b": mean_cosine, "5c": collapse_of_both,
    "6a": even_koleo, "6b": dino_gradient, "6c": uneven_sinkhorn,
    "7a": start_loss, "7b": softmax_center, "7c": cure,
    "8a": heads, "8b": recall, "8c": step_precision,
    "9a": patches, "9b": delta, "9c": depth,
    "10a": tokens, "10b": batch, "10c": place,
    "11a": pairs, "11b": average, "11c": soft_targets,
    "12a": tiles, "12b": logsumexp, "12c": least,
    "13a": rows, "13b": mean, "13c": held_bytes,
    "14a": seconds, "14b": forecast, "14c": times,
    "15a": positions, "15b": hidden, "15c": parts,
}  # fmt: skip
MISTAKES = {
    "0a": (pairs_with_itself, pairs_of_local_crops),
    "0b": (nearest_by_product, nearest_by_distance),
    "0c": (six_crops, six_more),
    "1a": (token_without_registers, token_column_by_column),
    "1b": (swiglu_swapped, swiglu_of_both),
    "1c": (cut_over_the_rim, cut_without_overlap_across),
    "2a": (weights_without_class_token, tokens_of_a_picture),
    "2b": (merged_unshrunk, merged_upside_down),
    "2c": (attention_with_a_zero_score, attention_masked_afterwards),
    "3a": (components_around_their_first, components_at_sixty_degrees),
    "3b": (keep_the_sharpest, keep_the_first_of_the_largest),
    "3c": (k_that_does_not_yet, k_of_half_the_pool),
    "4a": (chance_of_two_coins, chance_with_replacement),
    "4b": (weights_of_the_crops, weights_of_the_batch),
    "4c": (box_not_moved, box_of_the_picture),
    "5a": (momentum_of_the_horizon, momentum_upside_down),
    "5b": (mean_cosine_with_oneself, mean_product),
    "5c": (collapse_by_a_fast_teacher, balance_again),
    "6a": (even_koleo_of_the_arc, even_koleo_of_all),
    "6b": (dino_gradient_with_itself, dino_gradient_without_temp),
    "6c": (uneven_sinkhorn_at_the_start, uneven_sinkhorn_at_the_end),
    "7a": (start_loss_in_bits, start_loss_of_one_prototype),
    "7b": (softmax_center_at_last, softmax_center_of_columns),
    "7c": (cure_by_the_rate, cure_by_softness),
    "8a": (heads_without_mean_patch, heads_added),
    "8b": (precision, recall_at_best),
    "8c": (step_precision_over_ranks, trapezoid_precision),
    "9a": (whole_patches, patches_by_area),
    "9b": (delta_of_the_far, delta_of_a_quarter),
    "9c": (depth_of_relu, depth_of_the_likeliest),
    "10a": (tokens_without_class, tokens_of_a_row),
    "10b": (batch_rounded, batch_of_none),
    "10c": (place_of_the_corner, place_upside_down),
    "11a": (pairs_with_itself, pairs_of_local_crops),
    "11b": (average_swapped, average_added),
    "11c": (soft_targets_divided_last, soft_targets_of_columns),
    "12a": (tiles_without_gaps, tiles_of_their_own),
    "12b": (logsumexp_that_overflows, logsumexp_unshrunk),
    "12c": (least_of_both_at_once, least_in_seconds),
    "13a": (rows_dealt_like_cards, rows_as_many_as_processes),
    "13b": (mean_of_means, mean_of_sums),
    "13c": (held_bytes_of_float32, held_bytes_with_a_whole_average),
    "14a": (seconds_of_gigaflops, seconds_of_idle_chips),
    "14b": (forecast_by_a_line, forecast_by_half_a_logarithm),
    "14c": (times_upside_down, times_of_less),
    "15a": (positions_without_class, places),
    "15b": (hidden_rounded_down, hidden_not_rounded),
    "15c": (parts_of_columns, parts_interleaved),
}
TRAINED = {"5c": ({"teacher_entropy": 0.0, "prototypes_used": 1.0, "rankme": 2.99},{"teacher_entropy": 0.0, "prototypes_used": 1.0, "rankme": 25.1},{"teacher_entropy": 3.19, "prototypes_used": 242.6, "rankme": 21.4}), "7c": ({"teacher_entropy":4.0},{"teacher_entropy":5.5}, {"teacher_entropy":5.5})}
