"""Boxes of many images, cut out and resized at once: PIL's antialiased bicubic as weighted sums of rows and columns."""

from collections.abc import Iterator
from functools import lru_cache

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, UInt8
from torch import Tensor


def resize_boxes(
    lines: Float[Tensor, "B H C W"] | UInt8[Tensor, "B H C W"],
    box: Float[Tensor, "n 4"],
    flip: Bool[Tensor, "n"],
    size: int,
) -> Float[Tensor, "n C size size"]:
    """Cut boxes out and resize them by antialiased bicubic, exactly: a weighted sum of rows, then of columns.

    Args:
        lines: images with the rows outermost, floats in [0, 1] or bytes.
        box: top, left, height, width, whole px; n = V * B rows, view-major.
        flip: mirror left and right.
        size: of the crop, px.
    Returns:
        Crops in [0, 1].
    Differs: PIL on floats (mode F), clipped at the end, is meant; on 8 bits it also rounds and clips between the sums.
    """
    lines = lines.float() / 255 if lines.dtype == torch.uint8 else lines
    n_images, height, channels, width = lines.shape
    across = resize_weights(box[:, 1], box[:, 3], size, width, flip).unflatten(0, (-1, n_images))  # (V, B, s, W)
    down = resize_weights(box[:, 0], box[:, 2], size, height).unflatten(0, (-1, n_images))  # (V, B, s, H)
    narrow = lines.flatten(1, 2) @ across.permute(1, 3, 0, 2).flatten(2)  # (B, H * C, V * s)
    narrow = narrow.view(n_images, height, channels, -1, size).permute(3, 0, 1, 2, 4).flatten(3)  # (V, B, H, C * s)
    crops = (down @ narrow).view(-1, size, channels, size).transpose(1, 2)  # (V * B, C, s, s)
    return crops.contiguous().clamp_(0, 1)


def resize_each(
    lines: Float[Tensor, "B H C W"] | UInt8[Tensor, "B H C W"],
    box: Float[Tensor, "n 4"],
    flip: Bool[Tensor, "n"],
    size: int,
) -> Iterator[Float[Tensor, "1 C size size"]]:
    """The same, one crop after the other and only where weights are not 0: on a CPU a window stays in the cache.

    A crop lies in memory column by column, as the second sum leaves it; to turn it would cost as much as the sum.
    """
    (rows, down), (columns, across) = _taps(box[:, 2], size), _taps(box[:, 3], size, flip)
    down = down / 255 if lines.dtype == torch.uint8 else down
    for i, (top, left, height, width) in enumerate(box.int().tolist()):
        window = lines[i % len(lines), top : top + height, :, left : left + width].float()  # (h, C, w)
        low = mix_rows(window.flatten(1), rows[i], down[i]).view(size, -1, width)
        small = mix_rows(low.permute(2, 1, 0).flatten(1), columns[i], across[i])  # (w, C * s) -> (s, C * s)
        yield small.view(1, size, -1, size).clamp_(0, 1).permute(0, 2, 3, 1)


def mix_rows(rows: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums of a few rows each: (r, m), (k, taps), (k, taps) -> (k, m)."""
    offsets = _offsets(*index.shape, index.device)
    return F.embedding_bag(index.flatten(), rows, offsets, mode="sum", per_sample_weights=weights.flatten())


@lru_cache(maxsize=64)
def _offsets(n: int, taps: int, device: torch.device) -> Tensor:
    """Where each of n sums begins; to make it anew would cost a tenth of the sums."""
    return torch.arange(0, n * taps, taps, device=device)


def _taps(length: Tensor, n_out: int, flip: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Which input pixels of its box each output pixel takes, and how much of each: twice (n, n_out, taps)."""
    centre, spread = _centres(length, n_out, flip)  # (n, n_out), (n, 1)
    first = (centre - 2 * spread - 0.5).ceil()
    index = first[..., None] + torch.arange(int((4 * spread.max()).ceil()))
    weights = _keys((index + 0.5 - centre[..., None]) / spread[..., None])
    last = length[:, None, None] - 1
    weights *= (index >= 0) & (index <= last)
    return index.clamp_(min=0).minimum(last).long(), weights.div_(weights.sum(dim=2, keepdim=True))


def _centres(length: Tensor, n_out: int, flip: Tensor | None) -> tuple[Tensor, Tensor]:
    """Where output pixels lie in a box, and how far each of them reaches, in input pixels: (n, n_out), (n, 1)."""
    out = torch.arange(n_out, device=length.device, dtype=length.dtype)
    out = out if flip is None else torch.where(flip[:, None], n_out - 1 - out, out)
    step = length[:, None] / n_out  # input pixels for each output pixel
    return (out + 0.5) * step, step.clamp(min=1)


def resize_weights(
    start: Float[Tensor, "n"],
    length: Float[Tensor, "n"],
    n_out: int,
    n_in: int,
    flip: Bool[Tensor, "n"] | None = None,
) -> Float[Tensor, "n n_out n_in"]:
    """Weigh each input pixel for each output pixel: crop to [start, start + length), then resize along one axis.

    Weights outside the box are 0 and each output pixel's weights sum to 1: the law of PIL and of antialias=True.
    """
    centre, spread = _centres(length, n_out, flip)
    pixel = torch.arange(n_in, device=start.device, dtype=start.dtype) + 0.5
    weights = _keys((pixel / spread[..., None]).sub(((start[:, None] + centre) / spread)[..., None]))
    inside = (pixel > start[:, None]) & (pixel < (start + length)[:, None])
    weights *= inside[:, None]
    return weights.div_(weights.sum(dim=2, keepdim=True))


def _keys(t: Tensor) -> Tensor:
    """Keys' cubic with a = -0.5; t is the distance in output pixels when shrinking, in input pixels otherwise.

        w(t) = u^2 (u - 1) / 2 + v^2 (1 - 2 v),  u = max(0, 2 - |t|),  v = max(0, 1 - |t|)
    """
    t = t.abs_()
    u, v = (2 - t).clamp_(min=0), (1 - t).clamp_(min=0)
    return (u - 1).mul_(u).mul_(u).mul_(0.5).add_((1 - 2 * v).mul_(v).mul_(v))
