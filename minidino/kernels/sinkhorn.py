"""Sums of a teacher's probabilities in Triton: one look at the logits each, and nothing of their size is written.

    log_row_sums, column_sums -> what Sinkhorn-Knopp and centring need

of p_ik = exp((l_ik - peak) / temp + row_i + column_k).

Sums over parts are added up in a fixed order: a run can be repeated.
The readable twins are `_log_row_sums` and `_column_sums` of `minidino.learning.prototypes`; tests hold them equal.

Source: Cuturi 2013 (Sinkhorn distances, arXiv 1306.0895).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from minidino.kernels.tuning import Tiling, dense, fastest, launch_options, shape_class, shares

ROW_SUMS = (Tiling(4, 1024, 4), Tiling(1, 4096, 8))
COLUMN_SUMS = (Tiling(8, 256, 4), Tiling(8, 1024, 8))


@triton.jit
def probability(logit, shift, peak, sharpness, floor):
    """exp((logit - peak) / temp + shift); 0 where the readable Sinkhorn's first exp is, and never for a NaN."""
    z = (logit - peak) * sharpness
    return tl.where(z <= floor, 0.0, tl.exp(z + shift))


@triton.jit
def row_sums_kernel(
    logits, columns, peak, parts, R, K, share, sharpness, floor, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Some rows over a share of the columns: maximum and sum of exp((l - peak) / temp + column)."""
    split = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    base, top = logits + row.to(tl.int64)[:, None] * K, tl.load(peak)
    highest, total = tl.full((ROWS,), float("-inf"), tl.float32), tl.zeros((ROWS,), tl.float32)
    for start in range(split * share, tl.minimum(split * share + share, K), COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = (row < R)[:, None] & (column < K)[None, :]
        z = (tl.load(base + column[None, :], mask=inside, other=0.0).to(tl.float32) - top) * sharpness
        shift = tl.load(columns + column, mask=column < K, other=float("-inf"))
        z = tl.where(z <= floor, float("-inf"), z + shift[None, :])
        higher = tl.maximum(highest, tl.max(z, 1))
        level = tl.maximum(higher, -1e30)  # a number, also while nothing but -inf was seen
        total = total * tl.exp(highest - level) + tl.sum(tl.exp(z - level[:, None]), 1)
        highest = higher
    place = parts + split * R + row
    tl.store(place, highest, mask=row < R)
    tl.store(place + tl.num_programs(1) * R, total, mask=row < R)


@triton.jit
def column_sums_kernel(
    logits, rows, columns, peak, parts, R, K, share, sharpness, floor, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Some columns over a share of the rows: the sum of exp((l - peak) / temp + row + column)."""
    split = tl.program_id(1)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    shift = tl.load(columns + column, mask=column < K, other=float("-inf"))
    top, found = tl.load(peak), tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(split * share, tl.minimum(split * share + share, R), ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < R)[:, None] & (column < K)[None, :]
        logit = tl.load(logits + row.to(tl.int64)[:, None] * K + column[None, :], mask=inside, other=0.0)
        level = tl.load(rows + row, mask=row < R, other=float("-inf"))
        found += probability(logit.to(tl.float32), level[:, None] + shift[None, :], top, sharpness, floor)
    tl.store(parts + split.to(tl.int64) * K + column, tl.sum(found, 0), mask=column < K)


@torch.library.custom_op("minidino::log_row_sums", mutates_args=())
def log_row_sums(logits: Tensor, column: Tensor, peak: Tensor, temp: float, floor: float) -> Tensor:
    """log sum_k exp((l_ik - peak) / temp + column_k) of each row, (n,); one look at the logits."""
    logits, column = dense(logits, column)
    n_rows, n_columns = logits.shape

    def launch(tiling: Tiling) -> Tensor:
        tiles = triton.cdiv(n_rows, tiling.rows)
        splits, share = shares(n_columns, tiling.columns, tiles, logits.device)
        parts = logits.new_empty(2, splits, n_rows, dtype=torch.float32)
        row_sums_kernel[tiles, splits](
            logits, column, peak, parts, n_rows, n_columns, share, 1 / temp, floor, **launch_options(tiling)
        )
        return parts

    highest, total = launch(fastest(("row sums", *shape_class(logits)), ROW_SUMS, launch, logits))
    return (highest + total.log()).logsumexp(0)


@log_row_sums.register_fake
def _(logits, column, peak, temp, floor):
    return logits.new_empty(len(logits), dtype=torch.float32)


@torch.library.custom_op("minidino::column_sums", mutates_args=())
def column_sums(logits: Tensor, row: Tensor, column: Tensor, peak: Tensor, temp: float, floor: float) -> Tensor:
    """sum_i exp((l_ik - peak) / temp + row_i + column_k) of each column, (K,); one look at the logits."""
    logits, row, column = dense(logits, row, column)
    n_rows, n_columns = logits.shape

    def launch(tiling: Tiling) -> Tensor:
        tiles = triton.cdiv(n_columns, tiling.columns)
        splits, share = shares(n_rows, tiling.rows, tiles, logits.device)
        parts = logits.new_empty(splits, n_columns, dtype=torch.float32)
        column_sums_kernel[tiles, splits](
            logits, row, column, peak, parts, n_rows, n_columns, share, 1 / temp, floor, **launch_options(tiling)
        )
        return parts

    return launch(fastest(("column sums", *shape_class(logits)), COLUMN_SUMS, launch, logits)).sum(0)


@column_sums.register_fake
def _(logits, row, column, peak, temp, floor):
    return logits.new_empty(logits.shape[1], dtype=torch.float32)
