"""What a Vision Transformer is stacked from: attention, feed-forwards, LayerScale, stochastic depth.

All work on crops packed end to end, (T, D). A *group* is a batch of crops of one size, written (crops, tokens per
crop); only attention and stochastic depth have to know where a crop ends.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from minidino.model.attention import attention

Groups = list[tuple[int, int]]  # (crops, tokens per crop), in packed order
Residual = Callable[[Tensor, Groups], Tensor]


def seqlens_of(groups: Groups) -> list[int]:
    """Tokens of each crop, in packed order."""
    return [n for crops, n in groups for _ in range(crops)]


class Attention(nn.Module):
    """Self-attention inside each crop of a packed sequence."""

    def __init__(self, width: int, heads: int, impl: str):
        super().__init__()
        self.heads, self.impl = heads, impl
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def split_heads(self, x: Float[Tensor, "T D"]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each (T, h, d)."""
        return self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(1)

    def forward(self, x: Float[Tensor, "T D"], groups: Groups) -> Float[Tensor, "T D"]:
        return self.proj(attention(*self.split_heads(x), seqlens_of(groups), self.impl).flatten(1))


class Mlp(nn.Module):
    """Feed-forward of width 4 D: fc2(gelu(fc1(x)))."""

    def __init__(self, width: int):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Float[Tensor, "*T D"]) -> Float[Tensor, "*T D"]:
        return self.fc2(F.gelu(self.fc1(x)))


class SwiGLU(nn.Module):
    """Gated feed-forward with as many parameters as the MLP: w3(silu(gate) * up), [gate | up] = w12(x)."""

    def __init__(self, width: int):
        super().__init__()
        hidden = swiglu_hidden(width)
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x: Float[Tensor, "*T D"]) -> Float[Tensor, "*T D"]:
        gate, up = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * up)


def swiglu_hidden(width: int) -> int:
    """Two thirds of 4 D, rounded up to a multiple of 8: 1024, 2048, 2736, 4096 for D = 384, 768, 1024, 1536."""
    return (int(4 * width * 2 / 3) + 7) // 8 * 8


class LayerScale(nn.Module):
    """One learned gain per channel, so that a residual can start near nothing."""

    def __init__(self, width: int, start: float):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), start))

    def forward(self, x: Float[Tensor, "*T D"]) -> Float[Tensor, "*T D"]:
        return x * self.gamma


def drop_path_scale(x: Float[Tensor, "T D"], residual: Residual, groups: Groups, rate: float) -> Float[Tensor, "T D"]:
    """Add a residual to the crops that win a coin toss, enlarged so that the mean is the plain sum; readable.

        x + keep / (1 - rate) * residual(x)        keep ~ Bernoulli(1 - rate), one toss per crop

    Args:
        x: crops packed end to end, as `groups` says.
        residual: (rows, their groups) -> rows; each crop must go its own way through it.
        rate: fraction dropped, in [0, 1). 0 draws nothing.
    Source: Huang et al. 2016; official dinov2/layers/drop_path.py (b8931f7).
    """
    if rate == 0:
        return x + residual(x, groups)
    keep = [torch.rand(crops, device=x.device).lt(1 - rate).repeat_interleave(n) for crops, n in groups]
    return x + residual(x, groups) * (torch.cat(keep).to(x.dtype) / (1 - rate))[:, None]


def drop_path_subset(x: Float[Tensor, "T D"], residual: Residual, groups: Groups, rate: float) -> Float[Tensor, "T D"]:
    """Add a residual to an exact number of randomly chosen crops, and compute it for those alone; fast.

        x[kept] += B / n_kept * residual(x[kept])        n_kept = max(int(B * (1 - rate)), 1), in each group alone

    Unbiased like `drop_path_scale`, whose arguments it takes, with less spread; a group of one crop is never dropped.

    Source: DINOv2 paper, section 5, efficient stochastic depth; official dinov2/layers/block.py (b8931f7).
    """
    if rate == 0:
        return x + residual(x, groups)
    kept_groups, rows, scales, start = [], [], [], 0
    for crops, n in groups:
        n_kept = max(int(crops * (1 - rate)), 1)
        kept = torch.randperm(crops, device=x.device)[:n_kept]
        rows.append((start + kept[:, None] * n + torch.arange(n, device=x.device)).flatten())  # (n_kept * n,)
        scales.append(x.new_full((n_kept * n, 1), crops / n_kept))
        kept_groups.append((n_kept, n))
        start += crops * n
    index = torch.cat(rows)
    return x.index_add(0, index, (residual(x.index_select(0, index), kept_groups) * torch.cat(scales)).to(x.dtype))


DROP_PATH = {"subset": drop_path_subset, "scale": drop_path_scale}


class Block(nn.Module):
    """Attention, then feed-forward; each is normed before, scaled after and added to the stream."""

    def __init__(self, width: int, heads: int, ffn: str, layerscale: float | None, rate: float, drop: str, impl: str):
        super().__init__()
        self.drop_path_rate, self.drop_path = rate, DROP_PATH[drop]
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads, impl)
        self.ls1 = LayerScale(width, layerscale) if layerscale else nn.Identity()
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = {"mlp": Mlp, "swiglu": SwiGLU}[ffn](width)
        self.ls2 = LayerScale(width, layerscale) if layerscale else nn.Identity()

    def attend(self, x: Float[Tensor, "T D"], groups: Groups) -> Float[Tensor, "T D"]:
        return self.ls1(self.attn(self.norm1(x), groups))

    def feed_forward(self, x: Float[Tensor, "T D"], groups: Groups) -> Float[Tensor, "T D"]:
        return self.ls2(self.mlp(self.norm2(x)))

    def forward(self, x: Float[Tensor, "T D"], groups: Groups) -> Float[Tensor, "T D"]:
        rate = self.drop_path_rate if self.training else 0.0
        x = self.drop_path(x, self.attend, groups, rate)  # the two residuals draw their crops independently
        return self.drop_path(x, self.feed_forward, groups, rate)
