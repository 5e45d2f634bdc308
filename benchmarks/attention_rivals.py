"""Packs of crops as DINOv2 trains on them, and everything that one can pick for attention over them.

A rival is a function of a pack that prepares what depends on the crops' lengths alone (offsets, masks, compilers) and
returns q, k, v -> out, all (T, h, d). `benchmarks/attention.py` times what it returns.

Source: crops of a batch as in Oquab et al. 2023 (DINOv2, arXiv 2304.07193), appendix B: two global ones, eight local.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

from minidino.model.attention import attention, attention_reference, attention_sdpa

OURS = "triton"


class Shape(NamedTuple):
    """Crops of a training batch as they lie in one pack."""

    name: str
    heads: int
    crops: tuple[tuple[int, int], ...]  # how many, and tokens of each, in their order
    dtype: torch.dtype = torch.bfloat16
    width: int = 64  # of a head

    @property
    def seqlens(self) -> list[int]:
        return [n for count, n in self.crops for _ in range(count)]

    def toy(self) -> "Shape":
        """Small enough for an interpreter: two heads, two crops of each size, no crop over 65 tokens, float32."""
        return Shape(self.name, 2, tuple((2, min(n, 65)) for _, n in self.crops), torch.float32, self.width)


def multi_crop(images: int, global_tokens: int, local_tokens: int, n_local: int = 8) -> tuple[tuple[int, int], ...]:
    return (2 * images, global_tokens), (n_local * images, local_tokens)


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("S/16", 6, multi_crop(64, 197, 37)),
        Shape("B/14", 12, multi_crop(32, 257, 50)),
        Shape("L/14", 16, multi_crop(32, 257, 50)),
        Shape("g/14", 24, multi_crop(12, 257, 50)),
        Shape("518 px", 16, ((16, 1370),)),
        Shape("laptop", 3, multi_crop(32, 65, 17, n_local=6)),
        Shape("L/14 fp16", 16, multi_crop(32, 257, 50), torch.float16),
        Shape("L/14 fp32", 16, multi_crop(32, 257, 50), torch.float32),
    )
}


class Pack:
    """What a ViT hands to its attention, and the gradient that comes back."""

    def __init__(self, shape: Shape, device: torch.device):
        self.shape, self.device, self.seqlens = shape, device, shape.seqlens
        self.longest = max(self.seqlens)
        generator = torch.Generator(device).manual_seed(0)
        draw = partial(torch.randn, generator=generator, device=device)
        tokens = sum(self.seqlens)
        self.qkv = draw(tokens, 3, shape.heads, shape.width).to(shape.dtype).requires_grad_()
        self.grad = draw(tokens, shape.heads, shape.width).to(shape.dtype)
        self.lengths = torch.tensor(self.seqlens, device=device)
        self.offsets = F.pad(self.lengths.cumsum(0), (1, 0)).int()  # (crops + 1,)

    def truth(self) -> tuple[Tensor, Tensor]:
        """Output and gradient of the reference in float64, from the same rounded numbers."""
        qkv = self.qkv.detach().double().requires_grad_()
        out = attention_reference(*qkv.unbind(1), self.seqlens)
        return out.detach(), torch.autograd.grad(out, qkv, self.grad.double())[0]


# -- the rivals: each prepares what depends on the lengths alone, which is not timed -----------------------------------

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def by_name(impl: str, pack: Pack) -> Attend:
    return lambda q, k, v: attention(q, k, v, pack.seqlens, impl=impl)


def sdpa(pack: Pack) -> Attend:
    return lambda q, k, v: attention_sdpa(q, k, v, pack.seqlens)


def padded(pack: Pack) -> Attend:
    """Every crop as long as the longest, made a multiple of 8 so that the mask's rows stay aligned."""
    columns = torch.arange(-(-pack.longest // 8) * 8, device=pack.device)
    inside = columns < pack.lengths[:, None]  # (crops, longest)
    rows = inside.flatten().nonzero().squeeze(1)
    mask = torch.zeros(inside.shape, dtype=pack.shape.dtype, device=pack.device).masked_fill(~inside, -torch.inf)

    def pad(x: Tensor) -> Tensor:
        x = x.new_zeros(inside.numel(), *x.shape[1:]).index_copy_(0, rows, x)
        return x.unflatten(0, inside.shape).transpose(1, 2)  # (crops, h, longest, d)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = F.scaled_dot_product_attention(pad(q), pad(k), pad(v), attn_mask=mask[:, None, None])
        return out.transpose(1, 2).flatten(0, 1).index_select(0, rows)

    return attend


def nested(pack: Pack) -> Attend:
    """Jagged tensors; their shortest and longest length are told, so that nobody waits for the device to say."""
    offsets, lengths = pack.offsets.long(), {"min_seqlen": min(pack.seqlens), "max_seqlen": pack.longest}

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        jagged = [torch.nested.nested_tensor_from_jagged(x, offsets, **lengths).transpose(1, 2) for x in (q, k, v)]
        return F.scaled_dot_product_attention(*jagged).transpose(1, 2).values()

    return attend


def varlen(pack: Pack) -> Attend:
    from torch.nn.attention.varlen import varlen_attn  # torch >= 2.10

    return lambda q, k, v: varlen_attn(q, k, v, pack.offsets, pack.offsets, pack.longest, pack.longest)


def flex(pack: Pack) -> Attend:
    """FlexAttention, compiled for this shape alone: a token sees those of its own document."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch.compiler.reset()  # after eight shapes it would give up and run uncompiled
    document = torch.arange(len(pack.seqlens), device=pack.device).repeat_interleave(pack.lengths)
    tokens = len(document)

    def same_document(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return document[i] == document[j]

    block_mask = create_block_mask(same_document, None, None, tokens, tokens, device=pack.device)
    compiled = torch.compile(flex_attention, dynamic=False)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # (1, h, T, d)
        return compiled(q, k, v, block_mask=block_mask)[0].transpose(0, 1)

    return attend


def xformers(pack: Pack) -> Attend:
    from xformers.ops import memory_efficient_attention
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    bias = BlockDiagonalMask.from_seqlens(pack.seqlens)
    bias = bias.to(pack.device) if hasattr(bias, "to") else bias
    return lambda q, k, v: memory_efficient_attention(q[None], k[None], v[None], attn_bias=bias)[0]


def flash_attn(pack: Pack) -> Attend:
    from flash_attn import flash_attn_varlen_func

    return lambda q, k, v: flash_attn_varlen_func(q, k, v, pack.offsets, pack.offsets, pack.longest, pack.longest)


class Rival(NamedTuple):
    prepare: Callable[[Pack], Attend]
    regroups: bool  # needs crops of one size next to each other, or padding
    backend: SDPBackend | None = None  # of SDPA, where one is forced


RIVALS = {
    "reference": Rival(partial(by_name, "reference"), False),
    "sdpa": Rival(sdpa, True),
    "sdpa flash": Rival(sdpa, True, SDPBackend.FLASH_ATTENTION),
    "sdpa cudnn": Rival(sdpa, True, SDPBackend.CUDNN_ATTENTION),
    "sdpa efficient": Rival(sdpa, True, SDPBackend.EFFICIENT_ATTENTION),
    "sdpa padded": Rival(padded, True),
    "nested": Rival(nested, False),
    "varlen_attn": Rival(varlen, False),
    "flex": Rival(flex, False),
    "xformers": Rival(xformers, False),
    "flash-attn": Rival(flash_attn, False),
    OURS: Rival(partial(by_name, "triton"), False),  # the last: a kernel at fault takes the device with it
}
