"""Prototypes, softmax and cross-entropy in Triton: the logits of the student are never written.

    prototype_loss(student, prototypes, teacher ...) -> one loss a row        with gradients for student and prototypes

With z = x w / temp and the targets T of a row:

    loss_r = mass_r lse_k(z_rk) - sum_k T_rk z_rk        T_rk = sum_j weight_rj t(index_rj, k),   mass_r = sum_k T_rk
    d loss_r / d z_rk = mass_r softmax_k(z_rk) - T_rk    t(i, k) = exp((l_ik - peak) / temp + row_i + column_k)

Tiles of z live in registers only: the way forward keeps four numbers a row, the way back makes each tile again, once
for the student and once for the prototypes. Sums over parts of K are added up in a fixed order: a run can be repeated.
The readable twin is `minidino.learning.prototypes`; tests hold this file to it.

Source: the idea of Wijmans et al. 2024 (Cut Your Losses, arXiv 2411.09009) and of Liger-Kernel's fused linear
    cross-entropy, here for soft targets that are themselves never written; Cuturi 2013 for the potentials.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from minidino.kernels.sinkhorn import probability
from minidino.kernels.tuning import Tiling, dense, fastest, launch_options, precision, shape_class, shares

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_WIDTH = 512
BOOST = 1024.0  # the largest gradient of a logit, before it is rounded to half precision
SMALLEST = 1e-30


class Tilings(NamedTuple):
    """Of each kernel, the first of them where nothing was measured."""

    forward: tuple[Tiling, ...]
    student: tuple[Tiling, ...]
    prototypes: tuple[Tiling, ...]


CLASSES: dict[tuple[int, int], Tilings] = {  # (widest bottleneck, bytes of a number); none spills registers
    (256, 2): Tilings(
        (Tiling(128, 64, 8, 3), Tiling(64, 64, 8, 2)),
        (Tiling(64, 64, 8, 2), Tiling(64, 32, 8, 3)),
        (Tiling(32, 64, 8, 3), Tiling(32, 64, 4, 2)),
    ),
    (MAX_WIDTH, 2): Tilings(
        (Tiling(64, 64, 8, 2), Tiling(64, 32, 4, 2)),
        (Tiling(64, 16, 8, 2), Tiling(32, 32, 8, 2)),
        (Tiling(16, 64, 8, 2), Tiling(16, 32, 8, 2)),
    ),
    (256, 4): Tilings(
        (Tiling(64, 64, 8, 2), Tiling(64, 32, 4, 3)),
        (Tiling(32, 32, 8, 2), Tiling(64, 16, 8, 2)),
        (Tiling(32, 32, 8, 2), Tiling(16, 64, 8, 2)),
    ),
    (MAX_WIDTH, 4): Tilings(
        (Tiling(32, 32, 4, 2), Tiling(16, 32, 4, 2)),
        (Tiling(32, 16, 8, 2), Tiling(32, 16, 8, 1)),
        (Tiling(16, 32, 8, 2), Tiling(16, 32, 8, 1)),
    ),
}


def tilings_of(width: int, dtype: torch.dtype) -> Tilings:
    """The choices for a bottleneck of this width."""
    return next(found for (widest, size), found in CLASSES.items() if width <= widest and size == dtype.itemsize)


def pieces_of(width: int) -> tuple[int, int]:
    """A width as two powers of two that cover it, as tiles must be; the second may be 0. 384 = 256 + 128, 48 = 64.

    A second piece of 16 is not made: as part of a tf32 product Triton 3.6 compiled it to addresses out of bounds.
    """
    whole = 1 << width.bit_length() - 1
    if width - whole < 64:
        return max(triton.next_power_of_2(width), 16), 0
    return whole, triton.next_power_of_2(width - whole)


# -- kernels -----------------------------------------------------------------------------------------------------------
# Numbers of a row or a column come as (n, 1) or (1, n), so a tile may stand either way.


@triton.jit
def _part(base, row, n_rows, FIRST: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr):
    """SIZE numbers of some rows, from column FIRST on; zeros outside. 64 bits: there may be more than 2^31 numbers."""
    column = FIRST + tl.arange(0, SIZE)
    inside = (row < n_rows)[:, None] & (column < WIDTH)[None, :]
    return tl.load(base + row.to(tl.int64)[:, None] * WIDTH + column[None, :], mask=inside, other=0.0)


@triton.jit
def _store_part(base, row, n_rows, value, FIRST: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr):
    column = FIRST + tl.arange(0, SIZE)
    inside = (row < n_rows)[:, None] & (column < WIDTH)[None, :]
    place = base + row.to(tl.int64)[:, None] * WIDTH + column[None, :]
    tl.store(place, value.to(base.dtype.element_ty), mask=inside)


@triton.jit
def _asked(logits, index, row, column, R, K, j, J: tl.constexpr):
    """Logits of the j-th teacher row of each student row."""
    taught = tl.load(index + row * J + j, mask=row < R, other=0).to(tl.int64)
    return tl.load(logits + taught * K + column, mask=(row < R) & (column < K), other=0.0).to(tl.float32)


@triton.jit
def _targets(
    told, logits, columns, index, shifts, weights, row, column, R, K, peak, sharpness, floor, J: tl.constexpr
):  # fmt: skip
    """T of a tile; `told` are the logits of its first teacher, on their way since before the product."""
    column_shift = tl.load(columns + column, mask=column < K, other=float("-inf"))
    found = tl.zeros(told.shape, tl.float32)
    for j in tl.static_range(J):
        if j > 0:
            told = _asked(logits, index, row, column, R, K, j, J)
        shift = tl.load(shifts + row * J + j, mask=row < R, other=float("-inf"))
        weight = tl.load(weights + row * J + j, mask=row < R, other=0.0)
        found += weight * probability(told, shift + column_shift, peak, sharpness, floor)
    return found


@triton.jit
def forward_kernel(
    x, w, logits, columns, index, shifts, weights, peak, parts, R, K, share, cold, sharpness, floor,
    J: tl.constexpr, WIDTH: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Some rows against a share of the prototypes: maximum and sum of the softmax, sum T z, sum T."""
    split = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    top = tl.load(peak)
    x0 = _part(x, row, R, 0, D0, WIDTH)
    if D1 > 0:
        x1 = _part(x, row, R, D0, D1, WIDTH)
    highest = tl.full((ROWS,), float("-inf"), tl.float32)
    total, cross, mass = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
    for start in range(split * share, tl.minimum(split * share + share, K), COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        told = _asked(logits, index, row[:, None], column[None, :], R, K, 0, J)
        z = tl.dot(x0, tl.trans(_part(w, column, K, 0, D0, WIDTH)), input_precision=PRECISION)
        if D1 > 0:
            z = tl.dot(x1, tl.trans(_part(w, column, K, D0, D1, WIDTH)), z, input_precision=PRECISION)
        z *= cold
        target = _targets(
            told, logits, columns, index, shifts, weights, row[:, None], column[None, :], R, K, top, sharpness, floor, J
        )
        mass += tl.sum(target, 1)
        cross += tl.sum(target * z, 1)
        z = tl.where((column < K)[None, :], z, float("-inf"))
        higher = tl.maximum(highest, tl.max(z, 1))
        total = total * tl.exp(highest - higher) + tl.sum(tl.exp(z - higher[:, None]), 1)
        highest = higher
    place, step = parts + split * R + row, tl.num_programs(1) * R
    tl.store(place, highest, mask=row < R)
    tl.store(place + step, total, mask=row < R)
    tl.store(place + 2 * step, cross, mask=row < R)
    tl.store(place + 3 * step, mass, mask=row < R)


@triton.jit
def student_kernel(
    x, w, logits, columns, index, shifts, weights, peak, lse, mass, gain, parts, R, K, share, cold, sharpness, floor,
    J: tl.constexpr, WIDTH: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of some rows of the student from a share of the prototypes: G w."""
    split = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    top = tl.load(peak)
    x0 = _part(x, row, R, 0, D0, WIDTH)
    found0 = tl.zeros((ROWS, D0), tl.float32)
    if D1 > 0:
        x1 = _part(x, row, R, D0, D1, WIDTH)
        found1 = tl.zeros((ROWS, D1), tl.float32)
    norm, total = tl.load(lse + row, mask=row < R, other=0.0), tl.load(mass + row, mask=row < R, other=0.0)
    up = tl.load(gain + row, mask=row < R, other=0.0)
    for start in range(split * share, tl.minimum(split * share + share, K), COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        told = _asked(logits, index, row[:, None], column[None, :], R, K, 0, J)
        w0 = _part(w, column, K, 0, D0, WIDTH)
        z = tl.dot(x0, tl.trans(w0), input_precision=PRECISION)
        if D1 > 0:
            w1 = _part(w, column, K, D0, D1, WIDTH)
            z = tl.dot(x1, tl.trans(w1), z, input_precision=PRECISION)
        target = _targets(
            told, logits, columns, index, shifts, weights, row[:, None], column[None, :], R, K, top, sharpness, floor, J
        )
        grad = (total[:, None] * tl.exp(z * cold - norm[:, None]) - target) * up[:, None]
        grad = grad.to(w0.dtype)  # of prototypes beyond K it meets zeros
        found0 = tl.dot(grad, w0, found0, input_precision=PRECISION)
        if D1 > 0:
            found1 = tl.dot(grad, w1, found1, input_precision=PRECISION)
    place = parts + split.to(tl.int64) * R * WIDTH
    _store_part(place, row, R, found0, 0, D0, WIDTH)
    if D1 > 0:
        _store_part(place, row, R, found1, D0, D1, WIDTH)


@triton.jit
def prototypes_kernel(
    x, w, logits, columns, index, shifts, weights, peak, lse, mass, gain, unit, out, R, K, cold, sharpness, floor,
    J: tl.constexpr, WIDTH: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of some prototypes from all rows: G^T x. Tiles stand on end: prototypes down, rows across."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    top = tl.load(peak)
    w0 = _part(w, column, K, 0, D0, WIDTH)
    found0 = tl.zeros((COLUMNS, D0), tl.float32)
    if D1 > 0:
        w1 = _part(w, column, K, D0, D1, WIDTH)
        found1 = tl.zeros((COLUMNS, D1), tl.float32)
    for start in range(0, R, ROWS):
        row = start + tl.arange(0, ROWS)
        told = _asked(logits, index, row[None, :], column[:, None], R, K, 0, J)
        norm, total = tl.load(lse + row, mask=row < R, other=0.0), tl.load(mass + row, mask=row < R, other=0.0)
        up = tl.load(gain + row, mask=row < R, other=0.0)
        x0 = _part(x, row, R, 0, D0, WIDTH)
        z = tl.dot(w0, tl.trans(x0), input_precision=PRECISION)
        if D1 > 0:
            x1 = _part(x, row, R, D0, D1, WIDTH)
            z = tl.dot(w1, tl.trans(x1), z, input_precision=PRECISION)
        target = _targets(
            told, logits, columns, index, shifts, weights, row[None, :], column[:, None], R, K, top, sharpness, floor, J
        )
        grad = (total[None, :] * tl.exp(z * cold - norm[None, :]) - target) * up[None, :]
        grad = grad.to(x0.dtype)
        found0 = tl.dot(grad, x0, found0, input_precision=PRECISION)
        if D1 > 0:
            found1 = tl.dot(grad, x1, found1, input_precision=PRECISION)
    scale = tl.load(unit)
    _store_part(out, column, K, found0 * scale, 0, D0, WIDTH)
    if D1 > 0:
        _store_part(out, column, K, found1 * scale, D0, D1, WIDTH)


# -- the loss ----------------------------------------------------------------------------------------------------------


def prototype_loss(
    student: Float[Tensor, "R b"],
    prototypes: Float[Tensor, "K b"],
    logits: Float[Tensor, "n K"],
    row: Float[Tensor, "n"],
    column: Float[Tensor, "K"],
    peak: Float[Tensor, ""],
    index: Int[Tensor, "R J"],
    weight: Float[Tensor, "R J"],
    student_temp: float,
    teacher_temp: float,
    floor: float,
) -> Float[Tensor, "R"]:
    """Cross-entropy of every student row with its teacher rows; see `minidino.learning.prototypes.prototype_loss`.

    Args:
        student, prototypes: of one dtype, float16, bfloat16 or float32.
        logits, row, column, peak, floor: the teacher's probabilities, exp((l - peak) / temp + row + column).
    Raises:
        ValueError: a bottleneck wider than 512, or shapes that do not fit together.
        TypeError: another dtype, or two of them.
    Differs: float32 is multiplied as such, or as tf32 where `torch.set_float32_matmul_precision` allows it.
    """
    if student.dtype != prototypes.dtype or student.dtype not in DTYPES:
        raise TypeError(f"expected student and prototypes of one dtype of {DTYPES}, got {student.dtype} and "
                        f"{prototypes.dtype}")  # fmt: skip
    if student.shape[1] > MAX_WIDTH:
        raise ValueError(f"expected a bottleneck of at most {MAX_WIDTH}, got {student.shape[1]}")
    (n_rows, width), (n_teachers, n_columns) = student.shape, logits.shape
    expected = (n_columns, width), (n_rows, index.shape[-1]), (n_rows, index.shape[-1]), (n_teachers,), (n_columns,), ()
    got = tuple(tuple(x.shape) for x in (prototypes, index, weight, row, column, peak))
    if got != expected:  # the kernels would read and write beyond what is there
        raise ValueError(f"expected prototypes, index, weight, row, column and peak of shapes {expected}, to fit student "
                         f"{tuple(student.shape)} and logits {tuple(logits.shape)}, got {got}")  # fmt: skip
    shift = row.float()[index]  # (R, J)
    teacher = logits, column.float(), peak.float(), index, shift, weight.float()
    return _loss(student, prototypes, *teacher, student_temp, teacher_temp, floor)[0]


@torch.library.custom_op("minidino::prototype_loss", mutates_args=())
def _loss(
    student: Tensor, prototypes: Tensor, logits: Tensor, column: Tensor, peak: Tensor, index: Tensor, shift: Tensor,
    weight: Tensor, student_temp: float, teacher_temp: float, floor: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """loss, lse and mass of each row."""
    tensors = dense(student, prototypes, logits, column, index, shift, weight, peak)
    n_rows, n_columns, scales = len(student), len(prototypes), (1 / student_temp, 1 / teacher_temp, floor)

    def launch(tiling: Tiling) -> Tensor:
        tiles = triton.cdiv(n_rows, tiling.rows)
        splits, share = shares(n_columns, tiling.columns, tiles, student.device)
        parts = student.new_empty(4, splits, n_rows, dtype=torch.float32)
        forward_kernel[tiles, splits](*tensors, parts, n_rows, n_columns, share, *scales, **_options(tensors, tiling))
        return parts

    highest, total, cross, mass = launch(_choose("forward", tensors, launch))
    lse, mass = (highest + total.log()).logsumexp(0), mass.sum(0)
    return mass * lse - cross.sum(0), lse, mass


@_loss.register_fake
def _(student, prototypes, logits, column, peak, index, shift, weight, student_temp, teacher_temp, floor):
    return tuple(student.new_empty(len(student), dtype=torch.float32) for _ in range(3))


@torch.library.custom_op("minidino::prototype_loss_backward", mutates_args=())
def _gradients(
    grad: Tensor, student: Tensor, prototypes: Tensor, logits: Tensor, column: Tensor, peak: Tensor, index: Tensor,
    shift: Tensor, weight: Tensor, lse: Tensor, mass: Tensor, student_temp: float, teacher_temp: float, floor: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Of the student and of the prototypes. The largest weight becomes BOOST, so that half precision loses nothing."""
    n_rows, n_columns = len(student), len(prototypes)
    if not n_rows:
        return torch.empty_like(student), torch.zeros_like(prototypes)
    tensors = dense(student, prototypes, logits, column, index, shift, weight, peak)
    scales = 1 / student_temp, 1 / teacher_temp, floor
    largest = (grad[:, None] * weight).abs().amax().clamp(min=SMALLEST)
    unit = (largest / BOOST / student_temp).float()
    rows = *dense(lse, mass), (grad * BOOST / largest).float().contiguous()
    d_prototypes = prototypes.new_empty(prototypes.shape)

    def launch_student(tiling: Tiling) -> Tensor:
        tiles = triton.cdiv(n_rows, tiling.rows)
        splits, share = shares(n_columns, tiling.columns, tiles, student.device)
        parts = student.new_empty(splits, *student.shape, dtype=torch.float32)
        student_kernel[tiles, splits](
            *tensors, *rows, parts, n_rows, n_columns, share, *scales, **_options(tensors, tiling)
        )
        return parts

    def launch_prototypes(tiling: Tiling) -> None:
        prototypes_kernel[(triton.cdiv(n_columns, tiling.columns),)](
            *tensors, *rows, unit, d_prototypes, n_rows, n_columns, *scales, **_options(tensors, tiling)
        )

    d_student = launch_student(_choose("student", tensors, launch_student)).sum(0) * unit
    launch_prototypes(_choose("prototypes", tensors, launch_prototypes))
    return d_student.to(student.dtype), d_prototypes


@_gradients.register_fake
def _(grad, student, prototypes, *teacher_and_temperatures):
    return student.new_empty(student.shape), prototypes.new_empty(prototypes.shape)


def _keep(ctx, inputs, output) -> None:
    *tensors, ctx.student_temp, ctx.teacher_temp, ctx.floor = inputs
    ctx.save_for_backward(*tensors, *output[1:])


def _backward(ctx, grad: Tensor, *_: Tensor | None):
    found = _gradients(grad, *ctx.saved_tensors, ctx.student_temp, ctx.teacher_temp, ctx.floor)
    return *found, *[None] * 9


_loss.register_autograd(_backward, setup_context=_keep)


# -- launching ---------------------------------------------------------------------------------------------------------


def _options(tensors: tuple[Tensor, ...], tiling: Tiling) -> dict[str, int | str]:
    width, n_teachers = tensors[0].shape[1], tensors[4].shape[1]
    whole, rest = pieces_of(width)
    return {"J": n_teachers, "WIDTH": width, "D0": whole, "D1": rest, "PRECISION": precision()} | launch_options(tiling)


def _choose(kernel: str, tensors: tuple[Tensor, ...], launch: Callable[[Tiling], object]) -> Tiling:
    student, prototypes, logits = tensors[:3]
    key = kernel, *shape_class(student), *shape_class(prototypes), logits.dtype, tensors[4].shape[1], precision()
    return fastest(key, getattr(tilings_of(student.shape[1], student.dtype), kernel), launch, student)
