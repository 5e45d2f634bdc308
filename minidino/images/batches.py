"""Batches: which images, how they are cut and what is hidden, for ever, as a function of (seed, step) alone.

    step -> indices (B,) -> pixels (B, C, H, W) -> crops (G, B, C, s, s), (L, B, C, t, t) -> masks (G, B, N)

Nothing is remembered between steps, so a run that goes on at step s sees exactly what it would have seen.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from minidino.config import CropConfig, MaskConfig, RunConfig
from minidino.distributed import my_rows, n_processes
from minidino.images.crops import CropLaw, crop_seed, multi_crop, released_laws
from minidino.images.masks import batch_masks
from minidino.images.pixels import Pixels

ORDER, MASKS = -1, -2  # stand in for an image index where a seed is wanted for the whole batch


class Batch(NamedTuple):
    """What one step sees."""

    crops_global: Float[Tensor, "G B C H W"]  # normalised
    crops_local: Float[Tensor, "L B C h w"]
    masks: Bool[Tensor, "G B N"]  # True = iBOT asks for it: hidden from the student, but not in distillation
    mask_weights: Float[Tensor, "M"]  # 1 / number masked in that crop, in the row-major order of masks
    index: Int[Tensor, "B"]  # which image each row is

    def rows(self, part: slice) -> "Batch":
        """The batch of some of its images."""
        return collate(self.crops_global[:, part], self.crops_local[:, part], self.masks[:, part], self.index[part])


def collate(crops_global: Tensor, crops_local: Tensor, masks: Tensor, index: Tensor) -> Batch:
    """Put a batch together; the weight of a masked patch is 1 / number masked in its crop.

    Raises:
        ValueError: masks that are not (G, B, N) of bool.
    """
    if masks.dtype != torch.bool or masks.ndim != 3:
        raise ValueError(f"expected masks (G, B, N) of bool, got {tuple(masks.shape)} of {masks.dtype}")
    counts = masks.sum(-1, keepdim=True).clamp(min=1)
    weights = (1.0 / counts).expand(masks.shape)[masks]
    return Batch(crops_global, crops_local, masks, weights, index)


def batch_indices(n_images: int, batch_size: int, step: int, seed: int) -> Int[Tensor, "B"]:
    """The images of one step: each pass over the data is a fresh permutation, and passes follow without a gap.

    Raises:
        ValueError: no images.
    Source: official dinov2/data/samplers.py (b8931f7).
    Differs: the official training deals all images out to the processes once, and each shuffles its share anew in every
        pass; what equal shares leave over never comes.
    """
    if n_images < 1:
        raise ValueError("expected at least one image, got none; is the whole data set in quarantine?")
    first, rows = step * batch_size, []
    while len(rows) < batch_size:
        epoch, position = divmod(first + len(rows), n_images)
        rows += _permutation(n_images, seed, epoch)[position : position + batch_size - len(rows)].tolist()
    return torch.tensor(rows)


@lru_cache(maxsize=2)  # a million images are shuffled once a pass, not once a step
def _permutation(n_images: int, seed: int, epoch: int) -> Int[Tensor, "n"]:
    generator = torch.Generator().manual_seed(crop_seed(seed, epoch, ORDER))
    return torch.randperm(n_images, generator=generator)


def crop_laws(crops: CropConfig) -> tuple[CropLaw, CropLaw, CropLaw]:
    """First global, second global and local law of a config."""
    first, second, local = released_laws(crops.global_size, crops.local_size, crops.blur)
    shared = {
        "jitter_p": crops.jitter_probability, "brightness": crops.brightness, "contrast": crops.contrast,
        "saturation": crops.saturation, "hue": crops.hue, "gray_p": crops.grayscale_probability,
    }  # fmt: skip
    return (
        replace(first, scale=crops.global_scale, **shared),
        replace(second, scale=crops.global_scale, solarize_p=crops.solarize_probability, **shared),
        replace(local, scale=crops.local_scale, **shared),
    )


def largest_block(masks: MaskConfig, side: int, patch_size: int) -> float:
    """Largest number of patches in one block: half the grid, or the released expression, evaluated left to right."""
    if masks.max_patches == "released":
        return 0.5 * side // patch_size * side // patch_size
    return 0.5 * (side // patch_size) ** 2


class _Steps(Dataset):
    """Step -> padded pixels, sizes, indices, repeats of some rows of the batch: what a worker process prepares."""

    def __init__(self, pixels: Pixels, batch_size: int, seed: int, start_step: int, n_steps: int, rows: Tensor):
        self.pixels, self.batch_size, self.seed = pixels, batch_size, seed
        self.start_step, self.n_steps, self.rows = start_step, n_steps, rows

    def __len__(self) -> int:
        return self.n_steps

    def __getitem__(self, i: int) -> tuple[int, Tensor, Tensor, Tensor, Tensor]:
        step = self.start_step + i
        whole = batch_indices(len(self.pixels), self.batch_size, step, self.seed)
        index = whole[self.rows]
        prepared = *self.pixels.batch(index), index, repeats(whole)[self.rows]
        if get_worker_info():  # here, as it is too late for words where torch does it: who waits would wait for ever
            prepared = tuple(tensor.share_memory_() for tensor in prepared)
        return step, *prepared


def batches(config: RunConfig, pixels: Pixels, device: torch.device, start_step: int = 0) -> Iterator[Batch]:
    """Yield this process's rows of the batches of steps start_step, start_step + 1, ... up to the run's last.

    Args:
        config: sizes, laws, seed and number of steps.
        pixels: decoded images.
        device: crops are cut there.
        start_step: a run resumed at this step.
    Raises:
        ValueError: pictures of other channels than those of the config; a batch that cannot be shared out; fewer steps
            than are done.
        OSError: a process that prepares batches has failed, as for want of shared memory.
    """
    if pixels.channels != config.data.channels:
        raise ValueError(f"data.channels: expected {pixels.channels}, as the pictures have, got {config.data.channels}")
    n_steps, settings = config.run.steps - start_step, config.run
    if n_steps < 0:
        raise ValueError(f"run.steps: expected at least the {start_step} that are done, got {settings.steps}")
    rows = my_rows(config.optim.batch_size, config.optim.accumulate)
    steps = _Steps(pixels, config.optim.batch_size, settings.seed, start_step, n_steps, rows)
    for step, images, sizes, index, repeat in _prepared(steps, settings.workers):
        yield make_batch(config, step, images.to(device, non_blocking=True), sizes, index, repeat)


def _prepared(steps: _Steps, workers: int) -> Iterator[tuple[int, Tensor, Tensor, Tensor, Tensor]]:
    """What steps ask for, in order; worker processes hand it over in shared memory, of which containers have little."""
    try:
        yield from DataLoader(steps, batch_size=None, num_workers=workers)
    except RuntimeError as error:
        if not workers:
            raise
        said = str(error).strip().splitlines()[-1]
        wanted = "ask for fewer or for 0, or for more shared memory (docker run --shm-size=8g), memory or open files"
        raise OSError(f"run.workers: one of {workers} that prepare batches has failed, {wanted}: {said}") from error


def repeats(index: Int[Tensor, "B"]) -> Int[Tensor, "B"]:
    """How often each image of a batch has come before in it."""
    seen, before = Counter(), []
    for image in index.tolist():
        before.append(seen[image])
        seen[image] += 1
    return torch.tensor(before)


def make_batch(
    config: RunConfig, step: int, images: Tensor, sizes: Tensor, index: Tensor, repeat: Tensor | None = None
) -> Batch:
    """Cut and mask this process's images of one step, on the device where they are.

    Args:
        repeat: of each of these in the whole batch, as from `repeats`; None: `index` is the whole batch.
    Differs: holes are shared out over the batch of all processes; in the official code each does so with its own.
    """
    *laws_global, law_local = crop_laws(config.crops)
    repeat = repeats(index) if repeat is None else repeat
    seeds = [crop_seed(config.run.seed, step, *each) for each in zip(index.tolist(), repeat.tolist(), strict=True)]
    crops_global, crops_local = multi_crop(images, sizes, laws_global, law_local, config.crops.n_local, seeds)
    n_images = len(index) * n_processes()  # holes are shared out over the whole batch
    n_crops, side, patch_size = len(laws_global) * n_images, config.crops.global_size, config.vit.patch_size
    if config.distill.teacher:  # every patch is compared, and none is hidden: see `objective.student_losses`
        masks = torch.ones(n_crops, (side // patch_size) ** 2, dtype=torch.bool)
    else:
        generator = torch.Generator().manual_seed(crop_seed(config.run.seed, step, MASKS))
        masks = batch_masks(n_crops, (side // patch_size, side // patch_size), generator, config.masks.probability,
                            config.masks.ratio, largest_block(config.masks, side, patch_size))  # fmt: skip
    masks = masks.view(len(laws_global), n_images, -1)[:, my_rows(n_images, config.optim.accumulate)]
    return collate(crops_global, crops_local, masks.to(images.device), index)
