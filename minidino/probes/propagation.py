"""Labels that travel from patch to patch by the likeness of frozen features alone; nothing is trained.

    knn_segmentation(train_maps, train_masks, test_maps, test_masks, n_classes)  from many labelled pictures; scores
    propagate_labels(reference_maps, reference_masks, maps, n_classes)           from one labelled picture to others
"""

from collections.abc import Iterable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from minidino.probes.dense import checked, patch_shares, upsample
from minidino.probes.knn import Rows, as_tensor, class_numbers, neighbours
from minidino.probes.segmentation import expect_classes, judged


def _transfer(
    bank: Float[Tensor, "m D"],
    shares: Float[Tensor, "m K"],
    maps: Float[Tensor, "n D Hp Wp"],
    k: int,
    temperature: float,
) -> Float[Tensor, "n K Hp Wp"]:
    """What the k most similar patches of the bank hold, weighted by softmax(cosine / temperature)."""
    if temperature <= 0:
        raise ValueError(f"expected a temperature above 0, got {temperature}")
    queries = maps.permute(0, 2, 3, 1).flatten(0, 2)
    similarity, index = neighbours(bank, queries, min(k, len(bank)))
    weights = torch.softmax(similarity / temperature, 1)
    held = torch.stack([(weights * shares[:, c][index]).sum(1) for c in range(shares.shape[1])], 1)  # class by class
    return held.view(len(maps), *maps.shape[2:], -1).permute(0, 3, 1, 2)


def _bank(
    maps: Rows, masks: Rows, n_classes: int, patch_size: int | None, n_patches: int, seed: int
) -> tuple[Float[Tensor, "m D"], Float[Tensor, "m K"]]:
    """Labelled patches of all pictures, at most n_patches of them, and what each holds."""
    maps, masks = checked(maps, masks, "training")
    masks = class_numbers(masks)
    expect_classes(masks, n_classes)
    shares = patch_shares(masks, maps.shape[2:], n_classes, patch_size).permute(0, 2, 3, 1).flatten(0, 2)
    labelled = shares.sum(1).nonzero()[:, 0]
    if not len(labelled):
        raise ValueError("every training pixel is ignored (-1): no patch to compare with")
    if len(labelled) > n_patches:
        labelled = labelled[torch.randperm(len(labelled), generator=torch.Generator().manual_seed(seed))[:n_patches]]
    return maps.permute(0, 2, 3, 1).flatten(0, 2)[labelled].float(), shares[labelled]


def knn_segmentation(
    train_maps: Rows,
    train_masks: Rows,
    test_maps: Rows,
    test_masks: Rows,
    n_classes: int,
    k: int = 30,
    temperature: float = 0.07,
    n_patches: int = 20_000,
    patch_size: int | None = None,
    seed: int = 0,
) -> dict:
    """Name every pixel by the labels of the training patches that are most like its own patch; nothing is trained.

        what patch q holds = sum over its k neighbours i of softmax_i(cosine / temperature) * shares of classes in i

    Args:
        k, temperature: voters per patch and how much nearer ones count more.
        n_patches: size of the bank, drawn at random from the labelled training patches.
        others: as for `linear_segmentation`.
    Returns:
        What `mean_iou` returns; shares are upsampled bilinearly, and the largest names the pixel.
    Raises:
        ValueError: shapes that do not fit, labels out of range, nothing labelled, features that are not finite, k below
            1, or a temperature that is not above 0.
    Source: after DINOv2's k-NN on images (section 7) and the label propagation of Caron et al. 2021.
    """
    bank, shares = _bank(train_maps, train_masks, n_classes, patch_size, n_patches, seed)
    test_maps, test_masks = checked(test_maps, test_masks, "test")

    def predictions() -> Iterable[Tensor]:
        for part in test_maps.split(8):
            held = _transfer(bank, shares, part.float(), k, temperature)
            yield upsample(held, test_masks.shape[1:], patch_size).argmax(1)

    return judged(predictions(), test_masks, n_classes)


def propagate_labels(
    reference_maps: Rows,
    reference_masks: Rows,
    maps: Rows,
    n_classes: int,
    k: int = 5,
    temperature: float = 0.1,
    patch_size: int | None = None,
) -> Int[Tensor, "n H W"]:
    """Carry the labels of one or a few pictures over to others, patch by patch, by similarity alone.

    Args:
        reference_maps, reference_masks: (m, C, Hp, Wp), (m, H, W); -1 = no label.
        maps: (n, C, Hp, Wp), of pictures as large as the references.
    Returns:
        A class for every pixel.
    Raises:
        ValueError: as `knn_segmentation`.
    Source: Caron et al. 2021 (DINO), video segmentation: 5 neighbours, temperature 0.1.
    Differs: no frame before the last one and no limit to a neighbourhood: pictures need not come from a video. A patch of
        the reference holds shares of classes, not the class of one of its pixels; and no class is stretched to values
        from 0 to 1 before the largest is taken, which gives a class that is not there its one pixel or more.
    """
    bank, shares = _bank(reference_maps, reference_masks, n_classes, patch_size, 2**31, 0)
    held = _transfer(bank, shares, as_tensor(maps).float(), k, temperature)
    return upsample(held, reference_masks.shape[1:], patch_size).argmax(1)


