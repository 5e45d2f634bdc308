"""Attention of packed crops in Triton: the matrix of all pairs is never written.

    packed_attention(q, k, v, seqlens) -> out        with gradients for q, k and v

DINOv2's crops are short, and their lengths are a square plus one: 37 or 50 tokens of a local crop, 197 or 257 of a
global one. So there are two kinds of tiles:

    short   whole crops, together at most `rows` tokens, which are queries and keys at once: the softmax needs no
            second look, nothing is kept for the way back, and one program gives dq, dk and dv
    long    some queries of one crop against its keys in turns, with a running maximum; on the way back one pass for
            the queries and one for the keys. What is left over beside whole tiles, one token of 257 = 4 x 64 + 1, is
            a tile of its own of TAIL rows: nothing is padded from 257 to 320

The readable twin is `minidino.model.attention.attention_reference`; tests hold this file to it.

Source: Dao 2023 (FlashAttention-2, arXiv 2307.08691) for the long tiles; packing as in xFormers' BlockDiagonalMask.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

LOG2_E = 1.4426950408889634
WIDTHS = (32, 64, 128)  # of a head
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
TAIL: tl.constexpr = tl.constexpr(16)  # rows or columns of a leftover; the least that a matrix instruction takes


# -- what each program works on ----------------------------------------------------------------------------------------


class Tiling(NamedTuple):
    """How a shape class is cut; what tuning chooses among."""

    rows: int  # of a tile
    columns: int  # looked at in one turn; 0: a short tile, whose rows are its columns
    warps: int
    stages: int = 1


SHORT, LONG = 64, 1 << 30  # longest crop of each class
TILINGS = {  # the first of them where nothing was measured
    SHORT: (Tiling(64, 0, 4), Tiling(64, 0, 8), Tiling(128, 0, 8)),
    LONG: (Tiling(64, 64, 4, 2), Tiling(64, 64, 4, 3), Tiling(128, 64, 8, 2), Tiling(64, 32, 4, 3)),
}


class Run(NamedTuple):
    """Crops of one shape class."""

    longest: int  # key of TILINGS
    crops: tuple[tuple[int, int], ...]  # first row and row behind the last of each


@lru_cache(maxsize=256)
def runs_of(seqlens: tuple[int, ...]) -> tuple[Run, ...]:
    """Group crops by shape class, in their order within each."""
    groups: dict[int, list[tuple[int, int]]] = {}
    first = 0
    for n in seqlens:
        groups.setdefault(SHORT if n <= SHORT else LONG, []).append((first, first + n))
        first += n
    return tuple(Run(longest, tuple(crops)) for longest, crops in groups.items())


@lru_cache(maxsize=256)
def tiles_of(run: Run, rows: int, device: torch.device) -> Tensor:
    """What each program works on: (tiles, 3) int32, the tile's first row, and the first row and the end of its crop.

    A short tile counts as one crop, and has as many whole crops as fit.
    """
    tiles: list[tuple[int, int, int]] = []
    for first, end in run.crops:
        if run.longest == LONG:
            tiles += [(start, first, end) for start in range(first, end, rows)]
        elif tiles and tiles[-1][2] == first and end - tiles[-1][0] <= rows:
            tiles[-1] = (tiles[-1][0], tiles[-1][0], end)
        else:
            tiles.append((first, first, end))
    return torch.tensor(tiles, dtype=torch.int32, device=device).view(-1, 3)


@lru_cache(maxsize=64)
def crop_of_rows(seqlens: tuple[int, ...], device: torch.device) -> Tensor:
    """Number of the crop that each token is in, (T,) int32."""
    lengths = torch.tensor(seqlens, dtype=torch.int64)
    return torch.repeat_interleave(torch.arange(len(seqlens), dtype=torch.int32), lengths).to(device)


# -- short crops -------------------------------------------------------------------------------------------------------
# Scores are powers of two, s = q . k * power with power = scale log2(e), since exp2 is what the chip has.


@triton.jit
def _load(base, row, inside, step, D: tl.constexpr):
    """Rows of one head, (rows, D); zeros outside. 64 bits: a pack may have more than 2^31 numbers."""
    return tl.load(base + row.to(tl.int64)[:, None] * step + tl.arange(0, D)[None, :], mask=inside[:, None], other=0.0)


@triton.jit
def _store(base, row, inside, step, value, D: tl.constexpr):
    place = base + row.to(tl.int64)[:, None] * step + tl.arange(0, D)[None, :]
    tl.store(place, value.to(base.dtype.element_ty), mask=inside[:, None])


@triton.jit
def _softmax(q, k, crop, power, PRECISION: tl.constexpr):
    """Probabilities within a short tile; rows behind its end are a crop of their own, so none is without a key."""
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    s = tl.where(crop[:, None] == crop[None, :], s, float("-inf"))
    p = tl.exp2(s * power - tl.max(s, 1)[:, None] * power)
    return p / tl.sum(p, 1)[:, None]


@triton.jit
def short_forward(
    q, k, v, out, tiles, crops, q_step, k_step, v_step, q_head, k_head, v_head, out_step, out_head, power,
    D: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out = softmax(q k^T) v of the crops in one tile."""
    tile, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row = tl.load(tiles + 3 * tile) + tl.arange(0, ROWS)
    inside = row < tl.load(tiles + 3 * tile + 2)
    crop = tl.load(crops + row, mask=inside, other=-1)
    qs = _load(q + head * q_head, row, inside, q_step, D)
    ks = _load(k + head * k_head, row, inside, k_step, D)
    vs = _load(v + head * v_head, row, inside, v_step, D)
    p = _softmax(qs, ks, crop, power, PRECISION)
    _store(out + head * out_head, row, inside, out_step, tl.dot(p.to(vs.dtype), vs, input_precision=PRECISION), D)


@triton.jit
def short_backward(
    q, k, v, grad, dq, dk, dv, tiles, crops, q_step, k_step, v_step, q_head, k_head, v_head, grad_step, grad_head,
    out_step, out_head, power, scale, D: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dv = p^T g,   ds = p (g v^T - rowsum(p g v^T)),   dq = ds k,   dk = ds^T q, all of one tile."""
    tile, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row = tl.load(tiles + 3 * tile) + tl.arange(0, ROWS)
    inside = row < tl.load(tiles + 3 * tile + 2)
    crop = tl.load(crops + row, mask=inside, other=-1)
    qs = _load(q + head * q_head, row, inside, q_step, D)
    ks = _load(k + head * k_head, row, inside, k_step, D)
    vs = _load(v + head * v_head, row, inside, v_step, D)
    gs = _load(grad + head * grad_head, row, inside, grad_step, D)
    p = _softmax(qs, ks, crop, power, PRECISION)
    found = tl.dot(tl.trans(p.to(gs.dtype)), gs, input_precision=PRECISION)
    _store(dv + head * out_head, row, inside, out_step, found, D)
    dp = tl.dot(gs, tl.trans(vs), input_precision=PRECISION)
    ds = (p * (dp - tl.sum(p * dp, 1)[:, None]) * scale).to(qs.dtype)
    _store(dq + head * out_head, row, inside, out_step, tl.dot(ds, ks, input_precision=PRECISION), D)
    _store(dk + head * out_head, row, inside, out_step, tl.dot(tl.trans(ds), qs, input_precision=PRECISION), D)


# -- long crops --------------------------------------------------------------------------------------------------------
# Each pass walks over the other side of its crop: whole blocks without a mask first, then what is left over.


@triton.jit
def long_forward(
    q, k, v, out, norm, tiles, q_step, k_step, v_step, q_head, k_head, v_head, out_step, out_head, power,
    D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Some queries against all keys of their crop, COLUMNS at a time; keeps each softmax's maximum and 1 / sum.

    Both, not the logarithm of the sum, whose rounding would be an error of a millionth in every probability.
    """
    tile, head, heads = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.num_programs(1)
    start, first, end = tl.load(tiles + 3 * tile), tl.load(tiles + 3 * tile + 1), tl.load(tiles + 3 * tile + 2)
    q, k, v, out, norm = q + head * q_head, k + head * k_head, v + head * v_head, out + head * out_head, norm + 2 * head
    if end - start <= TAIL:
        _gather(q, k, v, out, norm, start, first, end, q_step, k_step, v_step, out_step, heads, power,
                D, TAIL, COLUMNS, PRECISION)  # fmt: skip
    else:
        _gather(q, k, v, out, norm, start, first, end, q_step, k_step, v_step, out_step, heads, power,
                D, ROWS, COLUMNS, PRECISION)  # fmt: skip


@triton.jit
def _gather(
    q, k, v, out, norm, start, first, end, q_step, k_step, v_step, out_step, heads, power,
    D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row = start + tl.arange(0, ROWS)
    qs = _load(q, row, row < end, q_step, D)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total, found = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS, D), tl.float32)
    rest = end - (end - first) % COLUMNS
    for key in range(first, rest, COLUMNS):
        top, total, found = _attend(qs, k, v, key, end, k_step, v_step, power, top, total, found,
                                    D, COLUMNS, False, PRECISION)  # fmt: skip
    if rest < end:
        if end - rest <= TAIL:
            top, total, found = _attend(qs, k, v, rest, end, k_step, v_step, power, top, total, found,
                                        D, TAIL, True, PRECISION)  # fmt: skip
        else:
            top, total, found = _attend(qs, k, v, rest, end, k_step, v_step, power, top, total, found,
                                        D, COLUMNS, True, PRECISION)  # fmt: skip
    _store(out, row, row < end, out_step, found / total[:, None], D)
    place = 2 * row.to(tl.int64) * heads
    tl.store(norm + place, top, mask=row < end)
    tl.store(norm + place + 1, 1 / total, mask=row < end)


@triton.jit
def _attend(
    qs, k, v, key, end, k_step, v_step, power, top, total, found,
    D: tl.constexpr, COLUMNS: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Take one more block of keys into the running maximum, the sum and the mixture."""
    keys = key + tl.arange(0, COLUMNS)
    there = (keys < end) if MASKED else (keys >= 0)
    ks, vs = _load(k, keys, there, k_step, D), _load(v, keys, there, v_step, D)
    s = tl.dot(qs, tl.trans(ks), input_precision=PRECISION)
    if MASKED:
        s = tl.where(there[None, :], s, float("-inf"))
    higher = tl.maximum(top, tl.max(s, 1) * power)
    p, shrink = tl.exp2(s * power - higher[:, None]), tl.exp2(top - higher)
    found = tl.dot(p.to(vs.dtype), vs, found * shrink[:, None], input_precision=PRECISION)
    return higher, total * shrink + tl.sum(p, 1), found


@triton.jit
def long_backward_queries(
    q, k, v, out, grad, dq, norm, delta, tiles, q_step, k_step, v_step, q_head, k_head, v_head, out_step, out_head,
    grad_step, grad_head, power, scale, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of some queries, all keys in turns; keeps delta = rowsum(g out) for the keys' pass."""
    tile, head, heads = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.num_programs(1)
    start, first, end = tl.load(tiles + 3 * tile), tl.load(tiles + 3 * tile + 1), tl.load(tiles + 3 * tile + 2)
    q, k, v, grad = q + head * q_head, k + head * k_head, v + head * v_head, grad + head * grad_head
    out, dq, norm, delta = out + head * out_head, dq + head * out_head, norm + 2 * head, delta + head
    if end - start <= TAIL:
        _queries(q, k, v, out, grad, dq, norm, delta, start, first, end, q_step, k_step, v_step, out_step, grad_step,
                 heads, power, scale, D, TAIL, COLUMNS, PRECISION)  # fmt: skip
    else:
        _queries(q, k, v, out, grad, dq, norm, delta, start, first, end, q_step, k_step, v_step, out_step, grad_step,
                 heads, power, scale, D, ROWS, COLUMNS, PRECISION)  # fmt: skip


@triton.jit
def _queries(
    q, k, v, out, grad, dq, norm, delta, start, first, end, q_step, k_step, v_step, out_step, grad_step, heads, power, scale,
    D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row = start + tl.arange(0, ROWS)
    inside, place = row < end, row.to(tl.int64) * heads
    qs, gs = _load(q, row, inside, q_step, D), _load(grad, row, inside, grad_step, D)
    mean = tl.sum(gs.to(tl.float32) * _load(out, row, inside, out_step, D).to(tl.float32), 1)
    tl.store(delta + place, mean, mask=inside)
    top, share = tl.load(norm + 2 * place, mask=inside, other=0.0), tl.load(norm + 2 * place + 1, mask=inside, other=0.0)
    found = tl.zeros((ROWS, D), tl.float32)
    rest = end - (end - first) % COLUMNS
    for key in range(first, rest, COLUMNS):
        found = _to_queries(qs, gs, k, v, key, end, k_step, v_step, power, top, mean, found, D, COLUMNS, False, PRECISION)
    if rest < end:
        if end - rest <= TAIL:
            found = _to_queries(qs, gs, k, v, rest, end, k_step, v_step, power, top, mean, found, D, TAIL, True, PRECISION)
        else:
            found = _to_queries(qs, gs, k, v, rest, end, k_step, v_step, power, top, mean, found, D, COLUMNS, True, PRECISION)
    _store(dq, row, inside, out_step, found * (share * scale)[:, None], D)


@triton.jit
def _to_queries(
    qs, gs, k, v, key, end, k_step, v_step, power, top, mean, found,
    D: tl.constexpr, COLUMNS: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq += ds k of one block of keys; keys that are none are zeros and give nothing."""
    keys = key + tl.arange(0, COLUMNS)
    there = (keys < end) if MASKED else (keys >= 0)
    ks, vs = _load(k, keys, there, k_step, D), _load(v, keys, there, v_step, D)
    p = tl.exp2(tl.dot(qs, tl.trans(ks), input_precision=PRECISION) * power - top[:, None])
    ds = p * (tl.dot(gs, tl.trans(vs), input_precision=PRECISION) - mean[:, None])
    return tl.dot(ds.to(ks.dtype), ks, found, input_precision=PRECISION)


@triton.jit
def long_backward_keys(
    q, k, v, grad, dk, dv, norm, delta, tiles, q_step, k_step, v_step, q_head, k_head, v_head, grad_step, grad_head,
    out_step, out_head, power, scale, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of some keys, all queries in turns."""
    tile, head, heads = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.num_programs(1)
    start, first, end = tl.load(tiles + 3 * tile), tl.load(tiles + 3 * tile + 1), tl.load(tiles + 3 * tile + 2)
    q, k, v, grad = q + head * q_head, k + head * k_head, v + head * v_head, grad + head * grad_head
    dk, dv, norm, delta = dk + head * out_head, dv + head * out_head, norm + 2 * head, delta + head
    if end - start <= TAIL:
        _keys(q, k, v, grad, dk, dv, norm, delta, start, first, end, q_step, k_step, v_step, grad_step, out_step,
              heads, power, scale, D, TAIL, COLUMNS, PRECISION)  # fmt: skip
    else:
        _keys(q, k, v, grad, dk, dv, norm, delta, start, first, end, q_step, k_step, v_step, grad_step, out_step,
              heads, power, scale, D, ROWS, COLUMNS, PRECISION)  # fmt: skip


@triton.jit
def _keys(
    q, k, v, grad, dk, dv, norm, delta, start, first, end, q_step, k_step, v_step, grad_step, out_step, heads, power, scale,
    D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    key = start + tl.arange(0, ROWS)
    ks, vs = _load(k, key, key < end, k_step, D), _load(v, key, key < end, v_step, D)
    dks, dvs = tl.zeros((ROWS, D), tl.float32), tl.zeros((ROWS, D), tl.float32)
    rest = end - (end - first) % COLUMNS
    for row in range(first, rest, COLUMNS):
        dks, dvs = _to_keys(ks, vs, q, grad, norm, delta, row, end, q_step, grad_step, heads, power, dks, dvs,
                            D, COLUMNS, False, PRECISION)  # fmt: skip
    if rest < end:
        if end - rest <= TAIL:
            dks, dvs = _to_keys(ks, vs, q, grad, norm, delta, rest, end, q_step, grad_step, heads, power, dks, dvs,
                                D, TAIL, True, PRECISION)  # fmt: skip
        else:
            dks, dvs = _to_keys(ks, vs, q, grad, norm, delta, rest, end, q_step, grad_step, heads, power, dks, dvs,
                                D, COLUMNS, True, PRECISION)  # fmt: skip
    _store(dk, key, key < end, out_step, dks * scale, D)
    _store(dv, key, key < end, out_step, dvs, D)


@triton.jit
def _to_keys(
    ks, vs, q, grad, norm, delta, row, end, q_step, grad_step, heads, power, dks, dvs,
    D: tl.constexpr, COLUMNS: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dv += p^T g and dk += ds^T q of one block of queries, keys down and queries across; absent queries are zeros."""
    rows = row + tl.arange(0, COLUMNS)
    there, place = (rows < end) if MASKED else (rows >= 0), rows.to(tl.int64) * heads
    qs, gs = _load(q, rows, there, q_step, D), _load(grad, rows, there, grad_step, D)
    top, share = tl.load(norm + 2 * place, mask=there, other=0.0), tl.load(norm + 2 * place + 1, mask=there, other=0.0)
    mean = tl.load(delta + place, mask=there, other=0.0)
    p = tl.exp2(tl.dot(ks, tl.trans(qs), input_precision=PRECISION) * power - top[None, :]) * share[None, :]
    dvs = tl.dot(p.to(gs.dtype), gs, dvs, input_precision=PRECISION)
    ds = p * (tl.dot(vs, tl.trans(gs), input_precision=PRECISION) - mean[None, :])
    return tl.dot(ds.to(qs.dtype), qs, dks, input_precision=PRECISION), dvs


# -- the operation -----------------------------------------------------------------------------------------------------

KERNELS = {SHORT: (short_forward, short_backward), LONG: (long_forward, long_backward_queries, long_backward_keys)}


def packed_attention(
    q: Float[Tensor, "T h d"], k: Float[Tensor, "T h d"], v: Float[Tensor, "T h d"], seqlens: Sequence[int]
) -> Float[Tensor, "T h d"]:
    """Let every token gather from the tokens of its own crop.

        out_i = sum_j softmax_j( q_i . k_j / sqrt(d) ) v_j        (i, j tokens of the same crop, each head alone)

    Args:
        q, k, v: crops packed end to end, float16, bfloat16 or float32, d = 32, 64 or 128; views such as the thirds of
            one projection are read where they lie.
        seqlens: tokens of each crop, in order.
    Raises:
        ValueError: another width, dtypes or shapes that differ.
        TypeError: another dtype.
    Differs: float32 is multiplied as such, or as tf32 where `torch.set_float32_matmul_precision` allows it.
    """
    if not q.shape == k.shape == v.shape or q.dim() != 3 or q.shape[2] not in WIDTHS:
        raise ValueError(f"expected q, k and v of one shape (T, h, d) with d of {WIDTHS}, got {tuple(q.shape)}, "
                         f"{tuple(k.shape)} and {tuple(v.shape)}")  # fmt: skip
    if not q.dtype == k.dtype == v.dtype or q.dtype not in DTYPES:
        raise TypeError(f"expected q, k and v of one dtype of {DTYPES}, got {q.dtype}, {k.dtype} and {v.dtype}")
    return _forward(q, k, v, list(seqlens))[0]


@torch.library.custom_op("minidino::packed_attention", mutates_args=())
def _forward(q: Tensor, k: Tensor, v: Tensor, seqlens: list[int]) -> tuple[Tensor, Tensor]:
    """out, and of long crops each softmax's greatest power of two and 1 / sum beside it, (T, h, 2)."""
    q, k, v = _dense(q), _dense(k), _dense(v)
    out, norm = _empty(q)
    steps, power = _steps(q, k, v, out), q.shape[2] ** -0.5 * LOG2_E
    for run in runs_of(tuple(seqlens)):
        if run.longest == SHORT:
            _run(short_forward, run, seqlens, (q, k, v, out), steps, power)
        else:
            _run(long_forward, run, seqlens, (q, k, v, out, norm), steps, power)
    return out, norm


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, seqlens: list[int]) -> tuple[Tensor, Tensor]:
    return _empty(q)


@torch.library.custom_op("minidino::packed_attention_backward", mutates_args=())
def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, norm: Tensor, seqlens: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    grad, q, k, v = _dense(grad), _dense(q), _dense(k), _dense(v)
    dq, dk, dv = (torch.empty_like(out) for _ in range(3))
    delta, scale = grad.new_empty(q.shape[:2], dtype=torch.float32), q.shape[2] ** -0.5
    scales, steps = (scale * LOG2_E, scale), _steps(q, k, v, grad, out)
    for run in runs_of(tuple(seqlens)):
        if run.longest == SHORT:
            _run(short_backward, run, seqlens, (q, k, v, grad, dq, dk, dv), steps, *scales)
        else:
            own = _steps(q, k, v, out, grad)
            _run(long_backward_queries, run, seqlens, (q, k, v, out, grad, dq, norm, delta), own, *scales)
            _run(long_backward_keys, run, seqlens, (q, k, v, grad, dk, dv, norm, delta), steps, *scales)
    return dq, dk, dv


@_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, norm: Tensor, seqlens: list[int]):
    return tuple(torch.empty_like(out) for _ in range(3))


def _keep(ctx, inputs, output) -> None:
    q, k, v, ctx.seqlens = inputs
    ctx.save_for_backward(q, k, v, *output)


def _gradients(ctx, grad: Tensor, _: Tensor | None):
    return *_backward(grad, *ctx.saved_tensors, ctx.seqlens), None


_forward.register_autograd(_gradients, setup_context=_keep)


def _empty(q: Tensor) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(*q.shape[:2], 2, dtype=torch.float32)


def _dense(x: Tensor) -> Tensor:
    """Tokens and heads may lie anywhere, the numbers of one head side by side."""
    return x if x.stride(2) == 1 else x.contiguous()


def _steps(*tensors: Tensor) -> tuple[int, ...]:
    """From token to token in each of the first three, then from head to head; both at once for those that follow."""
    read, more = tensors[:3], tensors[3:]
    own = [x.stride(0) for x in read] + [x.stride(1) for x in read]
    return *own, *(step for x in more for step in x.stride()[:2])


def _run(kernel, run: Run, seqlens: Sequence[int], tensors: tuple[Tensor, ...], steps, *scales: float) -> None:
    """Launch a kernel over the tiles of a run, cut as it is fastest on this device."""
    q = tensors[0]
    precision = "tf32" if torch.get_float32_matmul_precision() != "highest" else "ieee"

    def launch(tiling: Tiling) -> None:
        tiles = tiles_of(run, tiling.rows, q.device)
        blocks = {"ROWS": tiling.rows} | ({"COLUMNS": tiling.columns} if tiling.columns else {})
        crops = () if tiling.columns else (crop_of_rows(tuple(seqlens), q.device),)
        kernel[len(tiles), q.shape[1]](*tensors, tiles, *crops, *steps, *scales, D=q.shape[2], PRECISION=precision,
                                       num_warps=tiling.warps, num_stages=tiling.stages, **blocks)  # fmt: skip

    launch(_fastest(kernel, run, q, launch))


FASTEST: dict[tuple, Tiling] = {}  # what was measured in this process


def _fastest(kernel, run: Run, q: Tensor, launch: Callable[[Tiling], None]) -> Tiling:
    """The tiling of this shape class that took least time on this device; the first where nothing can be measured."""
    tilings = TILINGS[run.longest]
    key = (kernel.fn.__name__, run.longest, *q.shape[1:], q.dtype, q.device)
    if key not in FASTEST:
        if not q.is_cuda or torch.cuda.is_current_stream_capturing():
            return tilings[0]
        FASTEST[key] = min(tilings, key=lambda tiling: _milliseconds(launch, tiling))
    return FASTEST[key]


def _milliseconds(launch: Callable[[Tiling], None], tiling: Tiling) -> float:
    try:
        return triton.testing.do_bench(lambda: launch(tiling), warmup=5, rep=20)
    except triton.runtime.errors.OutOfResources:  # too wide for this chip
        return float("inf")
