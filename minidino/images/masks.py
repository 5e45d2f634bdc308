"""iBOT block masks: which patches of the global crops are hidden from the student."""

import math

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

N_ATTEMPTS = 10  # tries for one block


def block_mask(
    grid: tuple[int, int],
    n_masked: int,
    generator: torch.Generator,
    min_patches: int = 4,
    max_patches: int | float | None = None,
    min_aspect: float = 0.3,
) -> Bool[Tensor, "Hp Wp"]:
    """Hide about n_masked patches of one crop in rectangular blocks.

        area ~ U(min_patches, min(still to hide, max_patches));  aspect ~ log-uniform in [min_aspect, 1 / min_aspect]
        height = round(sqrt(area * aspect));  width = round(sqrt(area / aspect))

    A block is tried up to 10 times. It counts when it is smaller than the grid on both axes and hides at least one
    new patch and not too many. Blocks are added until the target is met, or 10 tries in a row found none.

    Args:
        grid: (Hp, Wp), patches.
        n_masked: an upper bound: never passed, met exactly in 84 to 97 % of draws, missed by 0.2 patches on average.
        generator: a CPU generator; the only source of randomness.
        min_patches: smallest area asked for, patches; less only where less is left to hide.
        max_patches: largest number of new patches from one block; None is half the grid.
        min_aspect: flattest block, height / width.
    Returns:
        True where hidden, row-major like the patches of the ViT.
    Source: Bao et al. 2022 (BEiT); official dinov2/data/masking.py (b8931f7).
    Differs: max_patches=None works (the official class compares None with a number).
    """
    mask = np.zeros(grid, dtype=bool)
    max_patches = mask.size / 2 if max_patches is None else max_patches
    hidden = 0
    while hidden < n_masked:
        room = min(n_masked - hidden, max_patches)
        new = _add_block(mask, room, generator, min_patches, math.log(min_aspect))
        if new == 0:
            break
        hidden += new
    return torch.from_numpy(mask)


def batch_masks(
    n_crops: int,
    grid: tuple[int, int],
    generator: torch.Generator,
    mask_probability: float = 0.5,
    ratio: tuple[float, float] = (0.1, 0.5),
    max_patches: int | float | None = None,
) -> Bool[Tensor, "n_crops N"]:
    """Choose which global crops of a batch are masked, and how much of each.

    Exactly int(n_crops * mask_probability) crops are masked. The interval `ratio` is cut into as many equal strata,
    each masked crop draws its share of patches from one, and the masks are shuffled over the batch; the mean share
    is then close to the middle of `ratio` in every batch (0.30 of a masked crop in the published recipes).

    Args:
        n_crops: all global crops of the batch, G * B.
        grid: (Hp, Wp), patches.
        generator: a CPU generator; the only source of randomness.
        mask_probability: share of the crops that are masked.
        ratio: smallest and largest share of masked patches.
        max_patches: as in `block_mask`.
    Returns:
        True where hidden; all False for unmasked crops.
    Raises:
        ValueError: shares that are not within 0 and 1, or fall.
    Source: official dinov2/data/collate.py (b8931f7).
    """
    if not 0 <= mask_probability <= 1 or not 0 <= ratio[0] <= ratio[1] <= 1:
        raise ValueError(f"expected shares from 0 to 1, got mask_probability {mask_probability} and ratio {ratio}")
    n_patches = grid[0] * grid[1]
    n_masked = int(n_crops * mask_probability)
    masks = torch.zeros(n_crops, n_patches, dtype=torch.bool)
    draws = torch.rand(n_masked, generator=generator, dtype=torch.float32).tolist()
    places = torch.randperm(n_crops, generator=generator).tolist()
    low, high = ratio
    for i, (place, draw) in enumerate(zip(places, draws)):
        share = low + (high - low) * (i + draw) / n_masked
        masks[place] = block_mask(grid, int(n_patches * share), generator, max_patches=max_patches).flatten()
    return masks


def _add_block(mask: np.ndarray, room: int | float, generator: torch.Generator, min_patches: int, low: float) -> int:
    """Hide one more block in place, at most `room` new patches; answer how many, 0 when no attempt fitted."""
    height, width = mask.shape
    attempts = torch.rand(N_ATTEMPTS, 4, generator=generator, dtype=torch.float32)
    for u_area, u_aspect, u_top, u_left in attempts.tolist():
        area = min_patches + (room - min_patches) * u_area
        aspect = math.exp(low * (1 - 2 * u_aspect))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if h >= height or w >= width:
            continue
        top, left = int(u_top * (height - h + 1)), int(u_left * (width - w + 1))
        block = mask[top : top + h, left : left + w]
        new = block.size - int(np.count_nonzero(block))
        if 0 < new <= room:
            block[:] = True
            return new
    return 0
