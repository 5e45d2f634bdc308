"""Attention over crops of any sizes laid end to end: each token sees its own crop and no other.

Packed layout: crops of lengths n_1, n_2, ... are rows of one (T, h, d) tensor, T = n_1 + n_2 + ..., so the
attention matrix of the whole is block-diagonal. The operation exists three times with the same answer;
`attention` picks by name and `resolve` says what "auto" means on a device.
"""

import os
from contextlib import AbstractContextManager, nullcontext
from itertools import groupby

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def attention_reference(
    q: Float[Tensor, "T h d"], k: Float[Tensor, "T h d"], v: Float[Tensor, "T h d"], seqlens: list[int]
) -> Float[Tensor, "T h d"]:
    """Mix the values of each crop by the similarity of its queries and keys; one crop after the other.

        out_i = sum_j softmax_j( q_i . k_j / sqrt(d) ) v_j        (i, j tokens of the same crop, each head alone)

    Source: official dinov2/layers/attention.py (b8931f7), Attention.forward; xFormers BlockDiagonalMask.
    """
    outputs, start = [], 0
    for probs, n in zip(attention_weights(q, k, seqlens), seqlens):
        outputs.append(torch.einsum("hij,jhd->ihd", probs, v[start : start + n].to(probs.dtype)))  # (n, h, d)
        start += n
    return torch.cat([v[:0], *outputs]).to(q.dtype)


def attention_weights(
    q: Float[Tensor, "T h d"], k: Float[Tensor, "T h d"], seqlens: list[int]
) -> list[Float[Tensor, "h n n"]]:
    """Where each token looks: one (h, n, n) matrix per crop, rows are queries and sum to 1; at least float32."""
    _check_lengths(q, seqlens)
    dtype = torch.promote_types(q.dtype, torch.float32)
    q, k = q.to(dtype) * q.shape[-1] ** -0.5, k.to(dtype)
    crops = zip(q.split(seqlens), k.split(seqlens))
    with autocast_off(q):
        return [torch.einsum("ihd,jhd->hij", q_crop, k_crop).softmax(-1) for q_crop, k_crop in crops]


def attention_sdpa(
    q: Float[Tensor, "T h d"], k: Float[Tensor, "T h d"], v: Float[Tensor, "T h d"], seqlens: list[int]
) -> Float[Tensor, "T h d"]:
    """Same answer as `attention_reference`, fast: each run of equal lengths is one batched call, and no mask exists.

    Two global crops and eight local ones of each image are two calls, whatever the batch.

    Differs: on a CPU half precision is computed in float32, because the fused bfloat16 kernel of torch 2.14 is up to
        five times slower there (128 crops of 37 tokens, AMD EPYC without AMX: 34 ms against 6 to 9 ms).
    """
    _check_lengths(q, seqlens)
    dtype = q.dtype
    if q.device.type == "cpu" and dtype != torch.float64:
        q, k, v = q.float(), k.float(), v.float()
    runs = [(n, len(list(run))) for n, run in groupby(seqlens)]  # (length, crops)
    rows = [n * crops for n, crops in runs]
    outputs = []
    with autocast_off(q):  # autocast would cast back to half what was just cast to float32
        for (n, crops), *packed in zip(runs, q.split(rows), k.split(rows), v.split(rows)):
            batched = [x.unflatten(0, (crops, n)).transpose(1, 2) for x in packed]  # (crops, h, n, d)
            outputs.append(F.scaled_dot_product_attention(*batched).transpose(1, 2).flatten(0, 1))
    return (outputs[0] if len(outputs) == 1 else torch.cat([v[:0], *outputs])).to(dtype)


def attention_triton(
    q: Float[Tensor, "T h d"], k: Float[Tensor, "T h d"], v: Float[Tensor, "T h d"], seqlens: list[int]
) -> Float[Tensor, "T h d"]:
    """Same answer as `attention_reference`, one launch for all crops of a kind; see `minidino.kernels.attention`."""
    from minidino.kernels.attention import packed_attention

    return packed_attention(q, k, v, seqlens)


IMPLEMENTATIONS = {"reference": attention_reference, "sdpa": attention_sdpa, "triton": attention_triton}
LONGEST = 320  # tokens of a crop for which "auto" takes Triton: data/results/attention.json has 257 and 1,370


def resolve(impl: str, device: torch.device | str) -> str:
    """Name the implementation that will run on this device.

    Args:
        impl: "auto", "reference", "sdpa" or "triton".
        device: where the tensors will live; only its type matters.
    Returns:
        A key of IMPLEMENTATIONS. For "auto" on a GPU it is "triton", where that is installed; packs that it was not
        measured to be faster for go to "sdpa" even so, see `suits_triton`.
    Raises:
        ValueError: the name is unknown.
        NotImplementedError: the implementation exists by name but cannot run here.
    """
    kind = torch.device(device).type
    if impl == "auto":
        return "triton" if kind == "cuda" and not no_triton(kind) else "sdpa"
    if impl == "triton" and (reason := no_triton(kind)):
        raise NotImplementedError(f"attention 'triton' {reason}; choose 'sdpa', which runs everywhere")
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"unknown attention {impl!r}: expected 'auto', " + ", ".join(map(repr, IMPLEMENTATIONS)))
    return impl


def attention(
    q: Float[Tensor, "T h d"],
    k: Float[Tensor, "T h d"],
    v: Float[Tensor, "T h d"],
    seqlens: list[int],
    impl: str = "auto",
) -> Float[Tensor, "T h d"]:
    """Let every token gather from the tokens of its own crop.

        out_i = sum_j softmax_j( q_i . k_j / sqrt(d) ) v_j        (i, j tokens of the same crop, each head alone)

    Args:
        q, k, v: crops packed end to end.
        seqlens: tokens of each crop, in order; they sum to T.
        impl: "reference", "sdpa", "triton", or "auto" for the choice of `resolve` and `suits_triton`.
    Returns:
        (T, h, d), packed as q and in its dtype.
    Raises:
        ValueError: the lengths do not sum to T, or the name is unknown.
    Source: official dinov2/layers/attention.py (b8931f7), MemEffAttention.
    Differs: needs no xFormers.
    """
    name = resolve(impl, q.device)
    if impl == "auto" and name == "triton" and not suits_triton(q, seqlens):
        name = "sdpa"
    return IMPLEMENTATIONS[name](q, k, v, seqlens)


def suits_triton(q: Float[Tensor, "T h d"], seqlens: list[int]) -> bool:
    """Is the kernel the faster one for this pack? On an H200: 1.8 times as fast as cuDNN at 257 tokens, 0.8 at 1,370.

    Float32 stays with SDPA, which multiplies it exactly where the kernel would take tf32 or be slow.
    """
    half = q.dtype in (torch.float16, torch.bfloat16)
    return half and q.shape[2] in (32, 64, 128) and max(seqlens, default=0) <= LONGEST


def no_triton(kind: str) -> str:
    """Why Triton cannot run on this type of device; empty where it can."""
    try:
        import minidino.kernels.attention  # noqa: F401  # here, since Triton exists on Linux alone
    except ImportError:
        return "needs Triton, which is not installed here"
    if kind != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"needs a GPU, got {kind} (or TRITON_INTERPRET=1 before Python starts, to try it slowly on a CPU)"
    return ""


def _check_lengths(q: Tensor, seqlens: list[int]) -> None:
    """The crops must fill the packed tensor exactly."""
    if sum(seqlens) != len(q) or min(seqlens, default=1) < 1:
        raise ValueError(f"expected positive seqlens that sum to {len(q)} packed tokens, got {sum(seqlens)}: {seqlens}")


def autocast_off(x: Tensor) -> AbstractContextManager:
    """A region where nothing is cast behind our back, on the device of x; the meta device knows no autocast."""
    return nullcontext() if x.device.type == "meta" else torch.autocast(x.device.type, enabled=False)
