"""Pictures damaged the way of ImageNet-C, computed here: eleven of its corruptions, five severities.

    corrupt(images, "shot_noise", severity=3, seed=0) -> images of the same shape

Nine belong to its fifteen (noise, blur, weather, digital), two, gaussian_blur and saturate, to its extra set. Left out
are those that need other pictures or a plasma (frost, snow, fog), glass, zoom and elastic.

The constants are the published ones, made for 224 px. What is a length (radius of a blur, path of a motion) scales with
the shorter side, so that a small picture of a scene loses as much of the scene; what is a value of a pixel, a share of
the side (pixelate) or a quality does not.
"""

import io
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from minidino.images.crops import crop_seed

PUBLISHED_SIDE = 224  # px
Images = Float[Tensor, "n 3 H W"]
Generators = Sequence[torch.Generator]


def corrupt(
    images: UInt8[Tensor, "n 3 H W"], name: str, severity: int, seed: int = 0, first: int = 0
) -> UInt8[Tensor, "n 3 H W"]:
    """Damage a batch.

    Args:
        images: pixels, 0 to 255, on the CPU.
        name: a key of CORRUPTIONS.
        severity: 1 to 5.
        seed: what chance does to picture i depends on seed and on first + i alone.
        first: number of the first picture in the whole set, so that batches give what the whole gives.
    Returns:
        Pixels, 0 to 255.
    Raises:
        ValueError: no such corruption or severity; not uint8 of that shape.
    Source: Hendrycks and Dietterich 2019; hendrycks/robustness ImageNet-C/imagenet_c/corruptions.py (20caed9).
    Differs: values are rounded, not cut off, to 8 bits; lengths scale with the picture; chance is drawn by torch. A pixel
        on the rim of the disk of `defocus_blur` counts by its area inside, where the official one is in or out; the
        official weights add up to 1.013 and 1.011 at severities 4 and 5, which brightens, ours to 1.
    """
    if name not in CORRUPTIONS:
        raise ValueError(f"unknown corruption {name!r}: expected one of {', '.join(CORRUPTIONS)}")
    if severity not in (1, 2, 3, 4, 5):
        raise ValueError(f"expected severity 1 to 5, got {severity!r}")
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"expected uint8 pixels (n, 3, H, W), got {images.dtype} of shape {tuple(images.shape)}")
    if images.numel() == 0:
        return images.clone()
    generators = [torch.Generator().manual_seed(crop_seed(seed, 0, first + i)) for i in range(len(images))]
    damaged = CORRUPTIONS[name](images.float() / 255, severity, generators)
    return (damaged.clamp(0, 1) * 255).round().to(torch.uint8)


def mean_corruption_error(errors: Mapping[str, Sequence[float]], baseline: Mapping[str, Sequence[float]]) -> dict:
    """Sum up errors on damaged pictures as ImageNet-C does, relative to those of a baseline.

        CE_c = sum_s error[c][s] / sum_s baseline[c][s],     mCE = mean of CE_c over the corruptions c

    Args:
        errors: {corruption: top-1 error, in [0, 1], at each severity}.
        baseline: the same of a baseline, with the same corruptions; AlexNet in the literature.
    Returns:
        "mce" (1 = as bad as the baseline), "ce" {corruption: CE_c}.
    Raises:
        ValueError: other corruptions or severities in the two, or a baseline that makes no error.
    Source: Hendrycks and Dietterich 2019, section 4.2.
    """
    if set(errors) != set(baseline) or not errors or any(len(errors[c]) != len(baseline[c]) for c in errors):
        raise ValueError(f"expected the same corruptions and severities, got {sorted(errors)} and {sorted(baseline)}")
    below = {c: float(np.sum(baseline[c])) for c in errors}
    if min(below.values()) <= 0:
        raise ValueError(f"the baseline makes no error to compare with: {below}")
    ce = {c: float(np.sum(errors[c])) / below[c] for c in errors}
    return {"mce": float(np.mean(list(ce.values()))), "ce": ce}


# ---------------------------------------------------------------- noise: (images in [0, 1], severity, generators)


def gaussian_noise(images: Images, severity: int, generators: Generators) -> Images:
    """Add normal noise to every value."""
    return images + (0.08, 0.12, 0.18, 0.26, 0.38)[severity - 1] * _drawn(torch.randn, images, generators)


def shot_noise(images: Images, severity: int, generators: Generators) -> Images:
    """Count photons: Poisson with a mean of `photons` where the value is 1."""
    photons = (60, 25, 12, 5, 3)[severity - 1]
    return torch.stack([torch.poisson(x * photons, generator=g) for x, g in zip(images, generators)]) / photons


def impulse_noise(images: Images, severity: int, generators: Generators) -> Images:
    """Set a share of the values to 0 or 1, with equal chance; each channel alone."""
    share = (0.03, 0.06, 0.09, 0.17, 0.27)[severity - 1]
    chance = _drawn(torch.rand, images, generators)
    return torch.where(chance < share, (chance < share / 2).float(), images)


def _drawn(law: Callable[..., Tensor], images: Images, generators: Generators) -> Images:
    return torch.stack([law(images.shape[1:], generator=g) for g in generators])


# ---------------------------------------------------------------- blur; edges are repeated, by defocus_blur mirrored


def defocus_blur(images: Images, severity: int, generators: Generators) -> Images:
    """Spread every point over a disk, as a lens out of focus does."""
    radius = (3, 4, 6, 8, 10)[severity - 1] * _scale(images)
    reach, fine = int(np.ceil(radius)), 8  # sub-pixels of a side
    offset = (torch.arange((2 * reach + 1) * fine) + 0.5) / fine - reach - 0.5
    inside = (offset[:, None] ** 2 + offset**2 <= radius**2).float()
    disk = F.avg_pool2d(inside[None, None], fine)
    mode = "reflect" if min(images.shape[2:]) > reach else "replicate"  # as OpenCV; a side of 1 px has nothing to mirror
    padded = F.pad(images.flatten(0, 1)[:, None], [reach] * 4, mode=mode)
    return F.conv2d(padded, disk / disk.sum()).view_as(images)


def gaussian_blur(images: Images, severity: int, generators: Generators) -> Images:
    """Blur with a Gaussian, cut at four deviations."""
    sigma = (1, 2, 3, 4, 6)[severity - 1] * _scale(images)
    reach = max(1, round(4 * sigma))
    weights = (-0.5 * (torch.arange(-reach, reach + 1) / sigma) ** 2).softmax(0)
    rows = F.pad(images.flatten(0, 1)[:, None], [reach] * 4, mode="replicate")
    return F.conv2d(F.conv2d(rows, weights.view(1, 1, 1, -1)), weights.view(1, 1, -1, 1)).view_as(images)


def motion_blur(images: Images, severity: int, generators: Generators) -> Images:
    """Smear along a line of -45 to 45 degrees: half a Gaussian of 2 radius + 1 steps of a pixel, as ImageMagick."""
    radius, sigma = ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))[severity - 1]
    steps = torch.arange(2 * max(1, round(radius * _scale(images))) + 1)
    weights = (-0.5 * (steps / (sigma * _scale(images))) ** 2).softmax(0)
    height, width = images.shape[2:]
    reach = len(steps)
    padded = F.pad(images, [reach] * 4, mode="replicate")
    smeared = torch.zeros_like(images)
    for row, image, generator in zip(smeared, padded, generators):
        angle = (torch.rand((), generator=generator) - 0.5) * torch.pi / 2
        across, down = (steps * angle.cos()).round().int(), (steps * angle.sin()).round().int()
        for weight, dx, dy in zip(weights.tolist(), (reach + across).tolist(), (reach + down).tolist()):
            row += weight * image[:, dy : dy + height, dx : dx + width]
    return smeared


def _scale(images: Images) -> float:
    """By how much lengths differ from the published ones."""
    return min(images.shape[2:]) / PUBLISHED_SIDE


# ---------------------------------------------------------------- light and colour


def brightness(images: Images, severity: int, generators: Generators) -> Images:
    """Add to the value of HSV: the largest channel grows, hue and saturation stay."""
    value = images.amax(1, keepdim=True)
    brighter = (value + (0.1, 0.2, 0.3, 0.4, 0.5)[severity - 1]).clamp(max=1)
    return torch.where(value > 0, images * (brighter / value.clamp_min(1e-6)), brighter)


def contrast(images: Images, severity: int, generators: Generators) -> Images:
    """Draw every value towards the mean of its channel."""
    mean = images.mean((2, 3), keepdim=True)
    return mean + (0.4, 0.3, 0.2, 0.1, 0.05)[severity - 1] * (images - mean)


def saturate(images: Images, severity: int, generators: Generators) -> Images:
    """Change the saturation of HSV, down at severities 1 and 2 and up from 3; greys have the hue of red."""
    factor, shift = ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2))[severity - 1]
    value = images.amax(1, keepdim=True)
    chroma = value - images.amin(1, keepdim=True)
    saturation = chroma / value.clamp_min(1e-6)
    wanted = (saturation * factor + shift).clamp(0, 1)
    red = images.new_tensor([0.0, 1.0, 1.0]).view(3, 1, 1)
    below = torch.where(chroma > 0, (value - images) / chroma.clamp_min(1e-6), red)  # 0 to 1 below the largest channel
    return value - value * wanted * below


# ---------------------------------------------------------------- storage


def pixelate(images: Images, severity: int, generators: Generators) -> Images:
    """Shrink to a share of the side and enlarge again, averaging and repeating."""
    share = (0.6, 0.5, 0.4, 0.3, 0.25)[severity - 1]

    def coarse(picture: Image.Image) -> Image.Image:
        small = [max(1, int(side * share)) for side in picture.size]
        return picture.resize(small, Image.Resampling.BOX).resize(picture.size, Image.Resampling.BOX)

    return _each_picture(images, coarse)


def jpeg_compression(images: Images, severity: int, generators: Generators) -> Images:
    """Store as JPEG of low quality and read it again."""
    quality = (25, 18, 15, 10, 7)[severity - 1]

    def stored(picture: Image.Image) -> Image.Image:
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=quality)
        return Image.open(file)

    return _each_picture(images, stored)


def _each_picture(images: Images, change: Callable[[Image.Image], Image.Image]) -> Images:
    pictures = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
    changed = np.stack([np.asarray(change(Image.fromarray(picture))) for picture in pictures])
    return torch.from_numpy(changed).permute(0, 3, 1, 2).float() / 255


CORRUPTIONS: dict[str, Callable[[Images, int, Generators], Images]] = {
    damage.__name__: damage
    for damage in (gaussian_noise, shot_noise, impulse_noise, defocus_blur, gaussian_blur, motion_blur, brightness,
                   contrast, saturate, pixelate, jpeg_compression)
}  # fmt: skip
