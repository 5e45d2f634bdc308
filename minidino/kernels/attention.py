"""Attention of packed crops in Triton: the matrix of all pairs is never written.

    packed_attention(q, k, v, seqlens) -> out        with gradients for q, k and v

DINOv2's crops are short, and their lengths are a square plus one: 37 or 50 tokens of a local crop, 197 or 257 of a
global one. So a tile of ROWS tokens is one of two kinds, and one launch has them all:

    whole   crops that fit into a tile together: queries and keys at once, so the softmax needs no second look, and
            one look gives dq, dk and dv
    part    some queries of a longer crop against its keys in turns, with a running maximum; on the way back the same
            program gives dq of its rows as queries, and dk and dv of the same rows as keys. What is left over beside
            whole blocks, one token of 257 = 4 x 64 + 1, is a tile of TAIL rows: nothing is padded from 257 to 320

The readable twin is `minidino.model.attention.attention_reference`; tests hold this file to it.

Source: Dao 2023 (FlashAttention-2, arXiv 2307.08691) for the parts; packing as in xFormers' BlockDiagonalMask.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from minidino.kernels.plans import plan_of, runs_of
from minidino.kernels.tuning import Tiling, fastest, launch_options, precision

LOG2_E = 1.4426950408889634
WIDTHS = (32, 64, 128)  # of a head
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
TAIL = tl.constexpr(16)  # rows or columns of a leftover; the least that a matrix instruction takes


# -- kernels -----------------------------------------------------------------------------------------------------------
# Scores are powers of two, s = q . k * power with power = scale log2(e), since exp2 is what the chip has.


@triton.jit
def forward_kernel(
    q, k, v, out, norm, tiles, crops, q_step, k_step, v_step, q_head, k_head, v_head, out_step, out_head, power,
    D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out = softmax(q k^T) v of one tile; keeps the maximum and 1 / sum of each softmax.

    Both, not the logarithm of the sum, whose rounding would be an error of a millionth in every probability.
    """
    tile, head, heads = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.num_programs(1)
    start, first, end = tl.load(tiles + 3 * tile), tl.load(tiles + 3 * tile + 1), tl.load(tiles + 3 * tile + 2)
    q, k, v, out, norm = q + head * q_head, k + head * k_head, v + head * v_head, out + head * out_head, norm + 2 * head
    if end - first <= ROWS:
        _attend_whole(q, k, v, out, norm, crops, start, end, q_step, k_step, v_step, out_step, heads, power,
                      D, ROWS, PRECISION)  # fmt: skip
    elif end - start <= TAIL:
        _attend_part(q, k, v, out, norm, start, first, end, q_step, k_step, v_step, out_step, heads, power,
                     D, TAIL, COLUMNS, PRECISION)  # fmt: skip
    else:
        _attend_part(q, k, v, out, norm, start, first, end, q_step, k_step, v_step, out_step, heads, power,
                     D, ROWS, COLUMNS, PRECISION)  # fmt: skip


@triton.jit
def backward_kernel(
    q, k, v, out, grad, dq, dk, dv, norm, tiles, crops, q_step, k_step, v_step, q_head, k_head, v_head, out_step,
    out_head, grad_step, grad_head, power, scale,
    D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, dk and dv of the rows of one tile."""
    tile, head, heads = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.num_programs(1)
    start, first, end = tl.load(tiles + 3 * tile), tl.load(tiles + 3 * tile + 1), tl.load(tiles + 3 * tile + 2)
    q, k, v, grad = q + head * q_head, k + head * k_head, v + head * v_head, grad + head * grad_head
    out, norm = out + head * out_head, norm + 2 * head
    dq, dk, dv = dq + head * out_head, dk + head * out_head, dv + head * out_head
    if end - first <= ROWS:
        _gradients_of_whole(q, k, v, grad, dq, dk, dv, crops, start, end, q_step, k_step, v_step, out_step, grad_step,
                            power, scale, D, ROWS, PRECISION)  # fmt: skip
    elif end - start <= TAIL:
        _gradients_of_keys(q, k, v, out, grad, dk, dv, norm, start, first, end, q_step, k_step, v_step, out_step,
                           grad_step, heads, power, scale, D, TAIL, COLUMNS, PRECISION)  # fmt: skip
        _gradients_of_queries(q, k, v, out, grad, dq, norm, start, first, end, q_step, k_step, v_step, out_step,
                              grad_step, heads, power, scale, D, TAIL, COLUMNS, PRECISION)  # fmt: skip
    else:
        _gradients_of_keys(q, k, v, out, grad, dk, dv, norm, start, first, end, q_step, k_step, v_step, out_step,
                           grad_step, heads, power, scale, D, ROWS, COLUMNS, PRECISION)  # fmt: skip
        _gradients_of_queries(q, k, v, out, grad, dq, norm, start, first, end, q_step, k_step, v_step, out_step,
                              grad_step, heads, power, scale, D, ROWS, COLUMNS, PRECISION)  # fmt: skip


@triton.jit
def _load(base, row, inside, step, D: tl.constexpr):
    """Rows of one head, (rows, D); zeros outside. 64 bits: a pack may have more than 2^31 numbers."""
    return tl.load(base + row.to(tl.int64)[:, None] * step + tl.arange(0, D)[None, :], mask=inside[:, None], other=0.0)


@triton.jit
def _store(base, row, inside, step, value, D: tl.constexpr):
    place = base + row.to(tl.int64)[:, None] * step + tl.arange(0, D)[None, :]
    tl.store(place, value.to(base.dtype.element_ty), mask=inside[:, None])


# Whole crops, side by side in a tile; rows behind its end are a crop of their own, so that none is without a key.


@triton.jit
def _scores(q, k, crops, row, inside, PRECISION: tl.constexpr):
    crop = tl.load(crops + row, mask=inside, other=-1)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    return tl.where(crop[:, None] == crop[None, :], s, float("-inf"))


@triton.jit
def _attend_whole(
    q, k, v, out, norm, crops, start, end, q_step, k_step, v_step, out_step, heads, power,
    D: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row = start + tl.arange(0, ROWS)
    inside = row < end
    s = _scores(_load(q, row, inside, q_step, D), _load(k, row, inside, k_step, D), crops, row, inside, PRECISION)
    vs = _load(v, row, inside, v_step, D)
    top = tl.max(s, 1) * power
    p = tl.exp2(s * power - top[:, None])
    total = tl.sum(p, 1)
    found = tl.dot(p.to(vs.dtype), vs, input_precision=PRECISION)
    _store(out, row, inside, out_step, found / total[:, None], D)
    _keep_softmax(norm, row, inside, heads, top, total)


@triton.jit
def _gradients_of_whole(
    q, k, v, grad, dq, dk, dv, crops, start, end, q_step, k_step, v_step, out_step, grad_step, power, scale,
    D: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dv = p^T g,   ds = p (g v^T - rowsum(p g v^T)),   dq = ds k,   dk = ds^T q"""
    row = start + tl.arange(0, ROWS)
    inside = row < end
    qs, ks = _load(q, row, inside, q_step, D), _load(k, row, inside, k_step, D)
    vs, gs = _load(v, row, inside, v_step, D), _load(grad, row, inside, grad_step, D)
    s = _scores(qs, ks, crops, row, inside, PRECISION) * power
    p = tl.exp2(s - tl.max(s, 1)[:, None])
    p = p / tl.sum(p, 1)[:, None]
    _store(dv, row, inside, out_step, tl.dot(tl.trans(p.to(gs.dtype)), gs, input_precision=PRECISION), D)
    dp = tl.dot(gs, tl.trans(vs), input_precision=PRECISION)
    ds = (p * (dp - tl.sum(p * dp, 1)[:, None]) * scale).to(qs.dtype)
    _store(dq, row, inside, out_step, tl.dot(ds, ks, input_precision=PRECISION), D)
    _store(dk, row, inside, out_step, tl.dot(tl.trans(ds), qs, input_precision=PRECISION), D)


@triton.jit
def _keep_softmax(norm, row, inside, heads, top, total):
    place = norm + 2 * row.to(tl.int64) * heads
    tl.store(place, top, mask=inside)
    tl.store(place + 1, 1 / total, mask=inside)


# Parts walk over the other side of their crop: in whole blocks without a mask, then over what is left, TAIL at a time.


@triton.jit
def _attend_part(
    q, k, v, out, norm, start, first, end, q_step, k_step, v_step, out_step, heads, power,
    D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row = start + tl.arange(0, ROWS)
    qs = _load(q, row, row < end, q_step, D)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total, found = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS, D), tl.float32)
    rest = end - (end - first) % COLUMNS
    for key in range(first, rest, COLUMNS):
        top, total, found = _attend_block(qs, k, v, key, end, k_step, v_step, power, top, total, found,
                                    D, COLUMNS, False, PRECISION)  # fmt: skip
    for key in range(rest, end, TAIL):
        top, total, found = _attend_block(qs, k, v, key, end, k_step, v_step, power, top, total, found,
                                    D, TAIL, True, PRECISION)  # fmt: skip
    _store(out, row, row < end, out_step, found / total[:, None], D)
    _keep_softmax(norm, row, row < end, heads, top, total)


@triton.jit
def _attend_block(
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
def _gradients_of_keys(
    q, k, v, out, grad, dk, dv, norm, start, first, end, q_step, k_step, v_step, out_step, grad_step, heads, power,
    scale, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    key = start + tl.arange(0, ROWS)
    ks, vs = _load(k, key, key < end, k_step, D), _load(v, key, key < end, v_step, D)
    dks, dvs = tl.zeros((ROWS, D), tl.float32), tl.zeros((ROWS, D), tl.float32)
    rest = end - (end - first) % COLUMNS
    for row in range(first, rest, COLUMNS):
        dks, dvs = _take_queries(ks, vs, q, out, grad, norm, row, end, q_step, out_step, grad_step, heads, power,
                                 dks, dvs, D, COLUMNS, False, PRECISION)  # fmt: skip
    for row in range(rest, end, TAIL):
        dks, dvs = _take_queries(ks, vs, q, out, grad, norm, row, end, q_step, out_step, grad_step, heads, power,
                                 dks, dvs, D, TAIL, True, PRECISION)  # fmt: skip
    _store(dk, key, key < end, out_step, dks * scale, D)
    _store(dv, key, key < end, out_step, dvs, D)


@triton.jit
def _take_queries(
    ks, vs, q, out, grad, norm, row, end, q_step, out_step, grad_step, heads, power, dks, dvs,
    D: tl.constexpr, COLUMNS: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dv += p^T g and dk += ds^T q of one block of queries, keys down and queries across; absent queries are zeros."""
    rows = row + tl.arange(0, COLUMNS)
    there = (rows < end) if MASKED else (rows >= 0)
    qs, gs = _load(q, rows, there, q_step, D), _load(grad, rows, there, grad_step, D)
    top, share, mean = _of_softmax(norm, out, gs, rows, there, out_step, heads, D)
    p = tl.exp2(tl.dot(ks, tl.trans(qs), input_precision=PRECISION) * power - top[None, :]) * share[None, :]
    dvs = tl.dot(p.to(gs.dtype), gs, dvs, input_precision=PRECISION)
    ds = p * (tl.dot(vs, tl.trans(gs), input_precision=PRECISION) - mean[None, :])
    return tl.dot(ds.to(qs.dtype), qs, dks, input_precision=PRECISION), dvs


@triton.jit
def _of_softmax(norm, out, gs, row, inside, out_step, heads, D: tl.constexpr):
    """Of some queries: maximum, 1 / sum, and rowsum(g out), the mean of dp under the probabilities."""
    place = norm + 2 * row.to(tl.int64) * heads
    outs = _load(out, row, inside, out_step, D)
    mean = tl.sum(gs.to(tl.float32) * outs.to(tl.float32), 1)
    return tl.load(place, mask=inside, other=0.0), tl.load(place + 1, mask=inside, other=0.0), mean


@triton.jit
def _gradients_of_queries(
    q, k, v, out, grad, dq, norm, start, first, end, q_step, k_step, v_step, out_step, grad_step, heads, power, scale,
    D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row = start + tl.arange(0, ROWS)
    qs, gs = _load(q, row, row < end, q_step, D), _load(grad, row, row < end, grad_step, D)
    top, share, mean = _of_softmax(norm, out, gs, row, row < end, out_step, heads, D)
    found = tl.zeros((ROWS, D), tl.float32)
    rest = end - (end - first) % COLUMNS
    for key in range(first, rest, COLUMNS):
        found = _take_keys(qs, gs, k, v, key, end, k_step, v_step, power, top, mean, found,
                           D, COLUMNS, False, PRECISION)  # fmt: skip
    for key in range(rest, end, TAIL):
        found = _take_keys(qs, gs, k, v, key, end, k_step, v_step, power, top, mean, found,
                           D, TAIL, True, PRECISION)  # fmt: skip
    _store(dq, row, row < end, out_step, found * (share * scale)[:, None], D)


@triton.jit
def _take_keys(
    qs, gs, k, v, key, end, k_step, v_step, power, top, mean, found,
    D: tl.constexpr, COLUMNS: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq += ds k of one block of keys; absent keys are zeros."""
    keys = key + tl.arange(0, COLUMNS)
    there = (keys < end) if MASKED else (keys >= 0)
    ks, vs = _load(k, keys, there, k_step, D), _load(v, keys, there, v_step, D)
    p = tl.exp2(tl.dot(qs, tl.trans(ks), input_precision=PRECISION) * power - top[:, None])
    ds = p * (tl.dot(gs, tl.trans(vs), input_precision=PRECISION) - mean[:, None])
    return tl.dot(ds.to(ks.dtype), ks, found, input_precision=PRECISION)


# -- the operation -----------------------------------------------------------------------------------------------------

TILINGS = {  # heads up to 128 bytes; wider in half precision; wider in float32. The first where nothing was measured
    forward_kernel: (
        (Tiling(64, 64, 4, 3), Tiling(64, 32, 4, 3)),
        (Tiling(64, 32, 8, 2),),
        (Tiling(64, 32, 8, 2),),
    ),
    backward_kernel: (
        (Tiling(64, 32, 4, 3), Tiling(64, 32, 4, 2)),
        (Tiling(64, 32, 8, 2), Tiling(32, 32, 4, 1)),
        (Tiling(32, 32, 4, 1),),
    ),
}


def tilings_of(kernel, width: int, dtype: torch.dtype) -> tuple[Tiling, ...]:
    """What tuning chooses among: no register is spilt on compute capability 8.0, 9.0 and 10.0."""
    wide = width * dtype.itemsize > 128
    return TILINGS[kernel][(1 if dtype.itemsize == 2 else 2) if wide else 0]


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
        ValueError: another width, shapes that differ, or lengths that do not sum to T.
        TypeError: another dtype, or dtypes that differ.
        NotImplementedError: on the way back, where gradients are to be differentiated once more.
    Differs: float32 is multiplied as such, or as tf32 where `torch.set_float32_matmul_precision` allows it. A NaN or
        infinity among the values of a short crop spoils the crops in its tile as well, since 0 times it is NaN.
    """
    if not q.shape == k.shape == v.shape or q.dim() != 3 or q.shape[2] not in WIDTHS:
        raise ValueError(f"expected q, k and v of one shape (T, h, d) with d of {WIDTHS}, got {tuple(q.shape)}, "
                         f"{tuple(k.shape)} and {tuple(v.shape)}")  # fmt: skip
    if not q.dtype == k.dtype == v.dtype or q.dtype not in DTYPES:
        raise TypeError(f"expected q, k and v of one dtype of {DTYPES}, got {q.dtype}, {k.dtype} and {v.dtype}")
    runs = runs_of(tuple(seqlens))
    if sum(n * count for n, count in zip(runs[::2], runs[1::2])) != len(q) or min(runs, default=1) < 1:
        raise ValueError(f"expected positive seqlens that sum to {len(q)} packed tokens, got {sum(seqlens)}: {seqlens}")
    if torch.compiler.is_compiling():
        return torch.ops.minidino.packed_attention(q, k, v, runs)[0]
    return _Eager.apply(q, k, v, runs)


def _forward(q: Tensor, k: Tensor, v: Tensor, runs: list[int]) -> tuple[Tensor, Tensor]:
    """out, and each softmax's greatest power of two with 1 / sum beside it, (T, h, 2)."""
    q, k, v = _dense(q), _dense(k), _dense(v)
    out, norm = _empty(q, k, v, runs)
    power = q.shape[2] ** -0.5 * LOG2_E
    _launch(forward_kernel, runs, (q, k, v, out, norm), (*_steps(q, k, v), *out.stride()[:2], power))
    return out, norm


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, norm: Tensor, runs: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    grad, q, k, v = _dense(grad), _dense(q), _dense(k), _dense(v)
    found, scale = _empty_gradients(grad, q, k, v, out, norm, runs), q.shape[2] ** -0.5
    numbers = *_steps(q, k, v), *out.stride()[:2], *grad.stride()[:2], scale * LOG2_E, scale
    _launch(backward_kernel, runs, (q, k, v, out, grad, *found, norm), numbers)
    return found


def _empty(q: Tensor, k: Tensor, v: Tensor, runs: list[int]) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(*q.shape[:2], 2, dtype=torch.float32)


def _empty_gradients(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, norm: Tensor, runs: list[int]):
    return torch.empty_like(out), torch.empty_like(out), torch.empty_like(out)


class _Eager(torch.autograd.Function):
    """The same without torch's dispatcher, which would take longer than the kernels of a small pack do."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, runs: list[int]) -> Tensor:
        out, norm = _forward(q, k, v, runs)
        ctx.runs = runs
        ctx.save_for_backward(q, k, v, out, norm)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        if torch.is_grad_enabled():  # create_graph=True, whose answer would be silent about what it leaves out
            raise NotImplementedError("attention 'triton' has no second derivative; choose 'reference'")
        return *_backward(grad, *ctx.saved_tensors, ctx.runs), None


def _keep(ctx, inputs, output) -> None:
    q, k, v, ctx.runs = inputs
    ctx.save_for_backward(q, k, v, *output)


def _gradients(ctx, grad: Tensor, _: Tensor | None):
    return *torch.ops.minidino.packed_attention_backward(grad, *ctx.saved_tensors, ctx.runs), None


torch.library.define("minidino::packed_attention", "(Tensor q, Tensor k, Tensor v, int[] runs) -> (Tensor, Tensor)")
torch.library.define(
    "minidino::packed_attention_backward",
    "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor norm, int[] runs) -> (Tensor, Tensor, Tensor)",
)
torch.library.impl("minidino::packed_attention", ("cpu", "cuda"), _forward)
torch.library.impl("minidino::packed_attention_backward", ("cpu", "cuda"), _backward)
torch.library.register_fake("minidino::packed_attention", _empty)
torch.library.register_fake("minidino::packed_attention_backward", _empty_gradients)
torch.library.register_autograd("minidino::packed_attention", _gradients, setup_context=_keep)


def _dense(x: Tensor) -> Tensor:
    """Tokens and heads may lie anywhere, the numbers of one head side by side."""
    return x if x.stride(2) == 1 else x.contiguous()


def _steps(q: Tensor, k: Tensor, v: Tensor) -> tuple[int, ...]:
    """From token to token in each of the three, then from head to head."""
    return q.stride(0), k.stride(0), v.stride(0), q.stride(1), k.stride(1), v.stride(1)


def _launch(kernel, runs: list[int], tensors: tuple[Tensor, ...], numbers: tuple) -> None:
    """Run a kernel over all tiles, cut as it is fastest on this device."""
    q = tensors[0]
    plan = plan_of(tuple(runs), q.device)

    def launch(tiling: Tiling) -> None:
        tiles = plan.tiles(tiling.rows)
        kernel[len(tiles), q.shape[1]](
            *tensors, tiles, plan.crops, *numbers, D=q.shape[2], PRECISION=precision(), **launch_options(tiling)
        )

    key = kernel, q.shape[1:], q.dtype, q.device
    launch(fastest(key, tilings_of(kernel, q.shape[2], q.dtype), launch, q))
