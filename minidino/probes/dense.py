"""Frozen features as maps, and the way from a map to the pixels of a picture and back.

    feature_maps(vit, images)          -> (n, C, Hp, Wp)      one look, several blocks side by side
    upsample(maps, size, patch_size)   -> (n, C, H, W)        a value for each pixel
    at_pixels(maps, pixels, ...)       -> (n, C, p)           the same values, only where they are asked for
    patch_shares(labels, grid, ...)    -> (n, K, Hp, Wp)      what each patch holds

Pictures whose sides are no multiples of the patch get a border of zeros on all four sides, as official; the maps then
span the picture and its border, and `patch_size` tells these functions so. Without it maps span the picture exactly.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from tqdm import tqdm

from minidino.probes.features import as_seen, expect_pixels, frozen
from minidino.probes.knn import Rows, as_tensor


def borders(size: Sequence[int], patch_size: int) -> tuple[int, int, int, int]:
    """Zeros to add at left, right, top, bottom (px) so that both sides are multiples of the patch; odd ones at the end.

    Source: official dinov2/hub/utils.py, CenterPadding.
    """
    missing = [-n % patch_size for n in size]
    (top, bottom), (left, right) = ((n // 2, n - n // 2) for n in missing)
    return left, right, top, bottom


def feature_maps(
    vit: nn.Module,
    images: UInt8[Tensor, "n C H W"],
    blocks: int | Sequence[int] = 1,
    norm: bool = True,
    class_token: bool = False,
    batch_size: int = 32,
    dtype: torch.dtype = torch.float32,
    progress: bool = True,
) -> Float[Tensor, "n C Hp Wp"]:
    """Look at every picture once with a frozen network and keep the patch tokens of some blocks as one map.

    Args:
        vit: a VisionTransformer; its training flags are restored afterwards.
        images: pixels, 0 to 255; normalised here, then padded with zeros to a multiple of the patch.
        blocks: the last so many, or indices, negative ones from the end; concatenated in ascending order.
        norm: apply the final norm to each of them (segmentation yes, depth no, as published).
        class_token: behind the patch tokens of each block, its class token at every place: 2D channels a block.
        batch_size: images at a time on the device of vit; the answer does not depend on it.
        dtype: of the result; float16 halves the memory.
        progress: a bar with images per second.
    Returns:
        On the CPU; C = len(blocks) * D, or twice that with class_token.
    Raises:
        ValueError: not uint8 pixels, a block that does not exist, features that are not finite (in this dtype).
    Source: DINOv2 paper, section 7.4; official dinov2/hub/depthers.py, eval/depth/models/decode_heads/linear_head.py.
    """
    expect_pixels(images)
    depth = len(vit.blocks)
    taps = blocks if isinstance(blocks, int) else sorted({i + depth if i < 0 else i for i in blocks})
    border = borders(images.shape[2:], vit.patch_size)
    found = []
    with frozen(vit), tqdm(total=len(images), unit="images", disable=not progress, leave=False) as bar:
        for batch in images.split(batch_size):
            batch = F.pad(as_seen(vit, batch), border)
            layers = vit.get_intermediate_layers(batch, taps, reshape=True, return_class_token=True, norm=norm)
            parts = [(p, c[:, :, None, None].expand_as(p)) if class_token else (p,) for p, c in layers]
            found.append(torch.cat([x for part in parts for x in part], 1).to("cpu", dtype))
            bar.update(len(batch))
    maps = torch.cat(found)
    expect_finite(maps, "the features")
    return maps


def expect_finite(x: Tensor, name: str) -> None:
    """Raises ValueError where a value is NaN or infinity."""
    if not all(torch.isfinite(part).all() for part in x.split(64)):
        raise ValueError(f"{name} hold NaN or infinity: a broken network, or values too large for {x.dtype}")


def spans(grid: Sequence[int], size: Sequence[int], patch_size: int | None) -> tuple[int, int, int, int]:
    """Where a picture lies in what its map spans: top, left, height and width of the whole (px of the picture).

    Raises:
        ValueError: a map of this grid with patches of this side has another picture.
    """
    if patch_size is None:
        return 0, 0, *size
    expected = tuple(-(-n // patch_size) for n in size)
    if tuple(grid) != expected:
        raise ValueError(
            f"pictures of {tuple(size)} px with patches of {patch_size} px have a map of {expected}, got {tuple(grid)}; "
            "give patch_size=None for maps that span their targets exactly, at whatever size"
        )
    left, _, top, _ = borders(size, patch_size)
    return top, left, grid[0] * patch_size, grid[1] * patch_size


def upsample(
    maps: Float[Tensor, "n C h w"],
    size: Sequence[int],
    patch_size: int | None = None,
    grid: Sequence[int] | None = None,
) -> Float[Tensor, "n C H W"]:
    """Give every pixel of a picture its value of the map, bilinear; the border is cut off again.

    Args:
        size: height and width of the picture, px.
        patch_size: side of a patch in px where pictures were padded; None: the map spans the picture.
        grid: patches down and across, where the map is finer than them; None: a value for each patch.
    Differs: official models of depth and of segmentation let the map of the padded picture span the picture, up to half a
        patch beside it; so does patch_size=None here.
    """
    top, left, height, width = spans(grid or maps.shape[2:], size, patch_size)
    whole = F.interpolate(maps, (height, width), mode="bilinear", align_corners=False)
    return whole[..., top : top + size[0], left : left + size[1]]


def at_pixels(
    maps: Float[Tensor, "n C Hp Wp"], pixels: Int[Tensor, "n p"], size: Sequence[int], patch_size: int | None = None
) -> Float[Tensor, "n C p"]:
    """The values of `upsample` at some pixels of each picture, without computing the others.

    Args:
        pixels: numbers of pixels, row by row: y * W + x.
        size, patch_size: as for `upsample`.
    """
    top, left, height, width = spans(maps.shape[2:], size, patch_size)
    x = (pixels % size[1] + left + 0.5) * (2 / width) - 1
    y = (pixels // size[1] + top + 0.5) * (2 / height) - 1
    where = torch.stack([x, y], -1)[:, None].to(maps.dtype)  # (n, 1, p, 2)
    return F.grid_sample(maps, where, mode="bilinear", padding_mode="border", align_corners=False)[:, :, 0]


def patch_shares(
    labels: Int[Tensor, "n H W"], grid: Sequence[int], n_classes: int, patch_size: int | None = None
) -> Float[Tensor, "n K Hp Wp"]:
    """What each patch holds: the share of every class among its pixels that have a label; all 0 where none has."""
    top, left, height, width = spans(grid, labels.shape[1:], patch_size)
    rows = ((torch.arange(labels.shape[1]) + top + 0.5) * grid[0] / height).long()
    columns = ((torch.arange(labels.shape[2]) + left + 0.5) * grid[1] / width).long()
    patch = rows[:, None] * grid[1] + columns  # (H, W)
    shares = []
    for label in labels:
        known = label >= 0
        counts = torch.bincount(patch[known] * n_classes + label[known], minlength=grid[0] * grid[1] * n_classes)
        shares.append(counts.view(grid[0], grid[1], n_classes).permute(2, 0, 1).float())
    shares = torch.stack(shares)
    return shares / shares.sum(1, keepdim=True).clamp_min(1)


def checked(maps: Rows, targets: Rows, name: str) -> tuple[Float[Tensor, "n C Hp Wp"], Float[Tensor, "n H W"]]:
    """Maps and targets as tensors on the CPU. Raises ValueError where they do not fit each other or are not finite."""
    maps, targets = as_tensor(maps), as_tensor(targets)
    if maps.ndim != 4 or targets.ndim != 3 or len(maps) != len(targets) or len(maps) == 0:
        raise ValueError(
            f"expected {name} maps (n, C, Hp, Wp) and as many targets (n, H, W), got {tuple(maps.shape)} and "
            f"{tuple(targets.shape)}"
        )
    expect_finite(maps, f"the {name} maps")
    return maps, targets
