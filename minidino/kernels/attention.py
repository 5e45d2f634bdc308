"""Attention of packed crops in Triton: the matrix of all pairs is never written.

    packed_attention(q, k, v, seqlens) -> out        with gradients for q, k and v

DINOv2's crops are short: 37 or 50 tokens of a local one, 197 or 257 of a global one. So there are two kinds of tiles:

    short   whole crops, together at most `rows` tokens, which are queries and keys at once: the softmax needs no
            second look, nothing is kept for the way back, and one program gives dq, dk and dv
    long    some queries of one crop against its keys in turns, with a running maximum; on the way back one pass for
            the queries and one for the keys

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


class Tiling(NamedTuple):
    """How a shape class is cut; what tuning chooses among."""

    rows: int  # of a tile
    columns: int  # looked at in one turn; 0: a short tile, whose rows are its columns
    warps: int
    stages: int = 1


SHORT, LONG = (64, 128), 1 << 30  # longest crop of each class
CLASSES = {  # its tilings, the first of them where nothing was measured
    SHORT[0]: (Tiling(64, 0, 4), Tiling(64, 0, 8), Tiling(128, 0, 8)),
    SHORT[1]: (Tiling(128, 0, 8), Tiling(128, 0, 4)),
    LONG: (Tiling(64, 64, 4, 2), Tiling(128, 64, 8, 2), Tiling(64, 128, 8, 2), Tiling(64, 32, 4, 3)),
}


class Run(NamedTuple):
    """Crops next to each other of one shape class."""

    longest: int  # key of CLASSES
    crops: tuple[tuple[int, int], ...]  # first row and row behind the last of each


@lru_cache(maxsize=256)
def runs_of(seqlens: tuple[int, ...]) -> tuple[Run, ...]:
    """Group crops by shape class, in their order within each."""
    groups: dict[int, list[tuple[int, int]]] = {}
    first = 0
    for n in seqlens:
        longest = next(longest for longest in CLASSES if n <= longest)
        groups.setdefault(longest, []).append((first, first + n))
        first += n
    return tuple(Run(longest, tuple(crops)) for longest, crops in groups.items())


@lru_cache(maxsize=256)
def tiles_of(run: Run, rows: int, whole: bool, device: torch.device) -> Tensor:
    """What each program works on: (tiles, 3) int32, first row and the crop's or tile's first row and end.

    Args:
        rows: of a tile, at most.
        whole: short tiles, of whole crops; else each crop is cut into tiles of its own.
    """
    tiles: list[tuple[int, int, int]] = []
    for first, end in run.crops:
        if not whole:
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


# -- kernels -----------------------------------------------------------------------------------------------------------
# Scores are powers of two, s = q . k * power with power = scale log2(e), since exp2 is what the chip has.


@triton.jit
def _load(base, row, column, inside, step):
    """Rows of one head, (rows, D); zeros outside. 64 bits: a pack may have more than 2^31 numbers."""
    return tl.load(base + row.to(tl.int64)[:, None] * step + column[None, :], mask=inside[:, None], other=0.0)


@triton.jit
def _store(base, row, column, inside, step, value):
    place = base + row.to(tl.int64)[:, None] * step + column[None, :]
    tl.store(place, value.to(base.dtype.element_ty), mask=inside[:, None])


@triton.jit
def _softmax(q, k, crop, power, PRECISION: tl.constexpr):
    """Probabilities within a short tile; tokens beyond its end are a crop of their own, so no row is empty."""
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * power
    s = tl.where(crop[:, None] == crop[None, :], s, float("-inf"))
    p = tl.exp2(s - tl.max(s, 1)[:, None])
    return p / tl.sum(p, 1)[:, None]


@triton.jit
def short_forward(
    q, k, v, out, tiles, crops, q_step, k_step, v_step, q_head, k_head, v_head, out_step, out_head, power,
    D: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out = softmax(q k^T) v of the crops in one tile."""
    tile, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row, column = tl.load(tiles + 3 * tile) + tl.arange(0, ROWS), tl.arange(0, D)
    inside = row < tl.load(tiles + 3 * tile + 2)
    crop = tl.load(crops + row, mask=inside, other=-1)
    qs = _load(q + head * q_head, row, column, inside, q_step)
    ks = _load(k + head * k_head, row, column, inside, k_step)
    vs = _load(v + head * v_head, row, column, inside, v_step)
    p = _softmax(qs, ks, crop, power, PRECISION)
    found = tl.dot(p.to(vs.dtype), vs, input_precision=PRECISION)
    _store(out + head * out_head, row, column, inside, out_step, found)


@triton.jit
def short_backward(
    q, k, v, grad, dq, dk, dv, tiles, crops, q_step, k_step, v_step, q_head, k_head, v_head, grad_step, grad_head,
    out_step, out_head, power, scale, D: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dv = p^T g,   ds = p (g v^T - rowsum(p g v^T)),   dq = ds k,   dk = ds^T q, all of one tile."""
    tile, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row, column = tl.load(tiles + 3 * tile) + tl.arange(0, ROWS), tl.arange(0, D)
    inside = row < tl.load(tiles + 3 * tile + 2)
    crop = tl.load(crops + row, mask=inside, other=-1)
    qs = _load(q + head * q_head, row, column, inside, q_step)
    ks = _load(k + head * k_head, row, column, inside, k_step)
    vs = _load(v + head * v_head, row, column, inside, v_step)
    gs = _load(grad + head * grad_head, row, column, inside, grad_step)
    p = _softmax(qs, ks, crop, power, PRECISION)
    found = tl.dot(tl.trans(p.to(gs.dtype)), gs, input_precision=PRECISION)
    _store(dv + head * out_head, row, column, inside, out_step, found)
    dp = tl.dot(gs, tl.trans(vs), input_precision=PRECISION)
    ds = (p * (dp - tl.sum(p * dp, 1)[:, None]) * scale).to(qs.dtype)
    found = tl.dot(ds, ks, input_precision=PRECISION)
    _store(dq + head * out_head, row, column, inside, out_step, found)
    found = tl.dot(tl.trans(ds), qs, input_precision=PRECISION)
    _store(dk + head * out_head, row, column, inside, out_step, found)


@triton.jit
def long_forward(
    q, k, v, out, lse, tiles, q_step, k_step, v_step, q_head, k_head, v_head, out_step, out_head, power,
    D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Some queries against all keys of their crop, COLUMNS at a time; lse = log2 sum_j 2^s for the way back."""
    tile, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    first, end = tl.load(tiles + 3 * tile + 1), tl.load(tiles + 3 * tile + 2)
    row, column = tl.load(tiles + 3 * tile) + tl.arange(0, ROWS), tl.arange(0, D)
    inside = row < end
    qs = _load(q + head * q_head, row, column, inside, q_step)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    found = tl.zeros((ROWS, D), tl.float32)
    for start in range(first, end, COLUMNS):
        key = start + tl.arange(0, COLUMNS)
        there = key < end
        ks = _load(k + head * k_head, key, column, there, k_step)
        vs = _load(v + head * v_head, key, column, there, v_step)
        s = tl.where(there[None, :], tl.dot(qs, tl.trans(ks), input_precision=PRECISION) * power, float("-inf"))
        higher = tl.maximum(top, tl.max(s, 1))
        p, shrink = tl.exp2(s - higher[:, None]), tl.exp2(top - higher)
        total = total * shrink + tl.sum(p, 1)
        found = found * shrink[:, None] + tl.dot(p.to(vs.dtype), vs, input_precision=PRECISION)
        top = higher
    _store(out + head * out_head, row, column, inside, out_step, found / total[:, None])
    tl.store(lse + row.to(tl.int64) * tl.num_programs(1) + head, top + tl.log2(total), mask=inside)


@triton.jit
def long_backward_queries(
    q, k, v, out, grad, dq, lse, delta, tiles, q_step, k_step, v_step, q_head, k_head, v_head, grad_step, grad_head,
    out_step, out_head, power, scale, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of some queries, all keys in turns; keeps delta = rowsum(g out) for the keys' pass."""
    tile, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    first, end = tl.load(tiles + 3 * tile + 1), tl.load(tiles + 3 * tile + 2)
    row, column = tl.load(tiles + 3 * tile) + tl.arange(0, ROWS), tl.arange(0, D)
    inside = row < end
    qs = _load(q + head * q_head, row, column, inside, q_step)
    gs = _load(grad + head * grad_head, row, column, inside, grad_step)
    outs = _load(out + head * out_head, row, column, inside, out_step)
    mean = tl.sum(gs.to(tl.float32) * outs.to(tl.float32), 1)
    place = row.to(tl.int64) * tl.num_programs(1) + head
    tl.store(delta + place, mean, mask=inside)
    norm = tl.load(lse + place, mask=inside, other=0.0)
    found = tl.zeros((ROWS, D), tl.float32)
    for start in range(first, end, COLUMNS):
        key = start + tl.arange(0, COLUMNS)
        there = key < end
        ks = _load(k + head * k_head, key, column, there, k_step)
        vs = _load(v + head * v_head, key, column, there, v_step)
        s = tl.dot(qs, tl.trans(ks), input_precision=PRECISION) * power
        p = tl.where(there[None, :], tl.exp2(s - norm[:, None]), 0.0)
        ds = p * (tl.dot(gs, tl.trans(vs), input_precision=PRECISION) - mean[:, None])
        found += tl.dot(ds.to(ks.dtype), ks, input_precision=PRECISION)
    _store(dq + head * out_head, row, column, inside, out_step, found * scale)


@triton.jit
def long_backward_keys(
    q, k, v, grad, dk, dv, lse, delta, tiles, q_step, k_step, v_step, q_head, k_head, v_head, grad_step, grad_head,
    out_step, out_head, power, scale, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of some keys, all queries in turns."""
    tile, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    first, end = tl.load(tiles + 3 * tile + 1), tl.load(tiles + 3 * tile + 2)
    key, column = tl.load(tiles + 3 * tile) + tl.arange(0, ROWS), tl.arange(0, D)
    inside = key < end
    ks = _load(k + head * k_head, key, column, inside, k_step)
    vs = _load(v + head * v_head, key, column, inside, v_step)
    dks, dvs = tl.zeros((ROWS, D), tl.float32), tl.zeros((ROWS, D), tl.float32)
    for start in range(first, end, COLUMNS):
        row = start + tl.arange(0, COLUMNS)
        there = row < end
        qs = _load(q + head * q_head, row, column, there, q_step)
        gs = _load(grad + head * grad_head, row, column, there, grad_step)
        place = row.to(tl.int64) * tl.num_programs(1) + head
        norm = tl.load(lse + place, mask=there, other=0.0)
        mean = tl.load(delta + place, mask=there, other=0.0)
        s = tl.dot(ks, tl.trans(qs), input_precision=PRECISION) * power  # keys down, queries across
        p = tl.where(there[None, :], tl.exp2(s - norm[None, :]), 0.0)
        dvs += tl.dot(p.to(gs.dtype), gs, input_precision=PRECISION)
        ds = p * (tl.dot(vs, tl.trans(gs), input_precision=PRECISION) - mean[None, :])
        dks += tl.dot(ds.to(qs.dtype), qs, input_precision=PRECISION)
    _store(dk + head * out_head, key, column, inside, out_step, dks * scale)
    _store(dv + head * out_head, key, column, inside, out_step, dvs)


# -- operation ---------------------------------------------------------------------------------------------------------


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
    """out, and log2 of what each softmax was divided by, (T, h), known of long crops only."""
    q, k, v = _dense(q), _dense(k), _dense(v)
    out, lse = _empty(q)
    steps, power = _steps(q, k, v, out), q.shape[2] ** -0.5 * LOG2_E
    for run in runs_of(tuple(seqlens)):
        if run.longest in SHORT:
            _run(short_forward, run, seqlens, (q, k, v, out), steps, power)
        else:
            _run(long_forward, run, seqlens, (q, k, v, out, lse), steps, power)
    return out, lse


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, seqlens: list[int]) -> tuple[Tensor, Tensor]:
    return _empty(q)


@torch.library.custom_op("minidino::packed_attention_backward", mutates_args=())
def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, seqlens: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    grad, q, k, v = _dense(grad), _dense(q), _dense(k), _dense(v)
    dq, dk, dv, delta = *(torch.empty_like(out) for _ in range(3)), torch.empty_like(lse)
    steps, scale = _steps(q, k, v, grad, out), q.shape[2] ** -0.5
    scales = scale * LOG2_E, scale
    for run in runs_of(tuple(seqlens)):
        if run.longest in SHORT:
            _run(short_backward, run, seqlens, (q, k, v, grad, dq, dk, dv), steps, *scales)
        else:
            _run(long_backward_queries, run, seqlens, (q, k, v, out, grad, dq, lse, delta), steps, *scales)
            _run(long_backward_keys, run, seqlens, (q, k, v, grad, dk, dv, lse, delta), steps, *scales)
    return dq, dk, dv


@_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, seqlens: list[int]):
    return tuple(torch.empty_like(out) for _ in range(3))


def _keep(ctx, inputs, output) -> None:
    q, k, v, ctx.seqlens = inputs
    ctx.save_for_backward(q, k, v, *output)


def _gradients(ctx, grad: Tensor, _: Tensor | None):
    return *_backward(grad, *ctx.saved_tensors, ctx.seqlens), None


_forward.register_autograd(_gradients, setup_context=_keep)


def _empty(q: Tensor) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)


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
        tiles = tiles_of(run, tiling.rows, not tiling.columns, q.device)
        blocks = {"ROWS": tiling.rows} | ({"COLUMNS": tiling.columns} if tiling.columns else {})
        crops = () if tiling.columns else (crop_of_rows(tuple(seqlens), q.device),)
        kernel[len(tiles), q.shape[1]](*tensors, tiles, *crops, *steps, *scales, D=q.shape[2], PRECISION=precision,
                                       num_warps=tiling.warps, num_stages=tiling.stages, **blocks)  # fmt: skip

    launch(_fastest(kernel, run, q, launch))


FASTEST: dict[tuple, Tiling] = {}  # what was measured in this process


def _fastest(kernel, run: Run, q: Tensor, launch: Callable[[Tiling], None]) -> Tiling:
    """The tiling of this shape class that took least time on this device; the first where nothing can be measured."""
    tilings = CLASSES[run.longest]
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
