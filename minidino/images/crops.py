"""Multi-crop augmentation, twice: `reference_crop` reads as the recipe, `multi_crop` does a whole batch at once.

The two follow the same law and agree in distribution. Every operation of `multi_crop` works on rows: (n, C, s, s) in
[0, 1], one parameter for each row, so it runs on any device; all chance is drawn before, on the CPU. A GPU takes all rows
of a batch at once, a CPU one after the other, each small enough for its cache.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Num, UInt8
from PIL import Image
from torch import Tensor

from minidino.images.resize import mix_rows, resize_boxes, resize_each

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
LUMINANCE = (0.2989, 0.587, 0.114)
SOLARIZE_THRESHOLD = 128 / 255
BLUR_KERNEL = 9  # pixels

N_ATTEMPTS = 10  # tries for one box
N_BOX = 2 * N_ATTEMPTS + 2  # uniforms for one box
N_DRAWS = N_BOX + 14  # uniforms for one view of one image


@dataclass(frozen=True, kw_only=True)
class CropLaw:
    """The chances of one kind of view. Defaults are what all DINOv2 views share."""

    size: int  # px
    scale: tuple[float, float]  # share of the image area
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width / height of the box
    flip_p: float = 0.5
    jitter_p: float = 0.8
    brightness: float = 0.4  # factor in 1 -+ this, also for contrast and saturation
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1  # shift in -+ this, turns
    gray_p: float = 0.2
    blur_p: float = 0.5
    blur_sigma: tuple[float, float] = (0.1, 2.0)  # px
    solarize_p: float = 0.0


def released_laws(global_size: int, local_size: int, blur: str = "released") -> tuple[CropLaw, CropLaw, CropLaw]:
    """Write down the three kinds of view of DINOv2: first global, second global, local.

    Args:
        global_size: side of a global crop, 224 px in the paper.
        local_size: side of a local crop, 96 or 98 px in the paper.
        blur: "released" blurs with p = 0, 0.9, 0.5, as the published weights were trained; "paper" with 1, 0.1, 0.5;
            "none" never.
    Raises:
        ValueError: another blur.
    Source: DINOv2 paper, appendix B; official dinov2/data/augmentations.py and transforms.py (b8931f7), where
        RandomApply gets 1 - p; confirmed by the authors in dinov3 issue 342.
    """
    chances = {"released": (0.0, 0.9, 0.5), "paper": (1.0, 0.1, 0.5), "none": (0.0, 0.0, 0.0)}
    if blur not in chances:
        raise ValueError(f"expected blur 'released', 'paper' or 'none', got {blur!r}")
    first, second, local = chances[blur]
    return (
        CropLaw(size=global_size, scale=(0.32, 1.0), blur_p=first),
        CropLaw(size=global_size, scale=(0.32, 1.0), blur_p=second, solarize_p=0.2),
        CropLaw(size=local_size, scale=(0.05, 0.32), blur_p=local),
    )


def normalise(images: Num[Tensor, "n C H W"]) -> Float[Tensor, "n C H W"]:
    """Bring pixels, 0 to 255 in numbers of any kind, to what a network was trained on, on their device: see `mean_and_std`."""
    mean, std = mean_and_std(images.shape[1], images.device)
    return (images.float() / 255).sub_(mean).div_(std)


def crop_seed(seed: int, step: int, index: int, repeat: int = 0) -> int:
    """Derive the seed of image `index` at `step`: workers, processes and batch mates have no say in it.

    A batch of few images may hold one twice: `repeat` counts those before, so that its crops are others.
    """
    text = f"{seed}/{step}/{index}{f'/{repeat}' if repeat else ''}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1  # 63 bits fit an int64


# ---------------------------------------------------------------- the readable reference


def reference_view(law: CropLaw) -> Callable[[Image.Image], Float[Tensor, "3 size size"]]:
    """The law in torchvision's own transforms on 8-bit PIL images; chance comes from torch's global generator.

    Source: official dinov2/data/augmentations.py (b8931f7).
    """
    from torchvision import transforms  # half of the start-up time of everything that never asks for it

    jitter = transforms.ColorJitter(law.brightness, law.contrast, law.saturation, law.hue)
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(
                law.size, law.scale, law.ratio, interpolation=transforms.InterpolationMode.BICUBIC
            ),
            transforms.RandomHorizontalFlip(law.flip_p),
            transforms.RandomApply([jitter], law.jitter_p),
            transforms.RandomGrayscale(law.gray_p),
            transforms.RandomApply([transforms.GaussianBlur(BLUR_KERNEL, law.blur_sigma)], law.blur_p),
            transforms.RandomSolarize(128, law.solarize_p),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )


def reference_crop(image: Image.Image, law: CropLaw, generator: torch.Generator) -> Float[Tensor, "3 size size"]:
    """Cut and distort one view of one image, by `reference_view`; normalised by ImageNet's mean and deviation."""
    view = reference_view(law)
    with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator: lend it ours
        torch.default_generator.set_state(generator.get_state())
        crop = view(image.convert("RGB"))
        generator.set_state(torch.default_generator.get_state())
    return crop


# ---------------------------------------------------------------- the batched tensor version


def multi_crop(
    images: UInt8[Tensor, "B C H W"],
    sizes: Int[Tensor, "B 2"],
    laws_global: Sequence[CropLaw],
    law_local: CropLaw,
    n_local: int,
    seeds: Sequence[int],
) -> tuple[Float[Tensor, "G B C s s"], Float[Tensor, "n_local B C t t"]]:
    """Cut all views of a batch, on the device of the images.

    Args:
        images: padded at the bottom and the right to a common size; the padding is never seen.
        sizes: height and width of each image without padding, px, on the CPU.
        laws_global: one law for each of the G global views; all of one size.
        law_local: the law of all local views.
        n_local: local views of each image, may be 0.
        seeds: one for each image, as from `crop_seed`; the views of an image depend on its own seed alone.
    Returns:
        Global and local crops, float32, normalised: see `mean_and_std`.
    Raises:
        ValueError: global laws of different sizes; not one seed and one size for each image.
    Differs: no rounding to 8 bits between the operations, as the PIL path of the official code has. That path cuts
        fractions off: its jittered crops are 1.2 of 255 darker on average; single numbers are up to 20 of 255 away.
    """
    if len({law.size for law in laws_global}) != 1:
        raise ValueError(f"expected global laws of one size, got sizes {[law.size for law in laws_global]} px")
    if not len(images) == len(sizes) == len(seeds):
        raise ValueError(f"expected one size and one seed per image, got {len(images)}, {len(sizes)}, {len(seeds)}")
    n_global, lines = len(laws_global), images.permute(0, 2, 1, 3)  # (B, H, C, W)
    shape, generators = (n_global + n_local, N_DRAWS), [torch.Generator().manual_seed(seed) for seed in seeds]
    uniforms = torch.stack([torch.rand(shape, generator=g, dtype=torch.float32) for g in generators], dim=1)  # (V, B, N_DRAWS)
    plans = [plan_view(u, *sizes.T, law) for u, law in zip(uniforms, laws_global)]
    plan_local = plan_view(uniforms[n_global:].flatten(0, 1), *sizes.repeat(n_local, 1).T, law_local)
    return (
        _cut_views(lines, ViewPlan(*map(torch.cat, zip(*plans))), laws_global[0].size),
        _cut_views(lines, plan_local, law_local.size),
    )


class ViewPlan(NamedTuple):
    """What chance has decided for n views: one row each, on the CPU."""

    box: Float[Tensor, "n 4"]  # top, left, height, width, px
    flip: Bool[Tensor, "n"]
    jitter: Bool[Tensor, "n"]
    factors: Float[Tensor, "n 4"]  # brightness, contrast, saturation, hue
    order: Int[Tensor, "n 4"]  # which of the four comes first, second, ...
    gray: Bool[Tensor, "n"]
    blur: Bool[Tensor, "n"]
    sigma: Float[Tensor, "n"]  # px
    solarize: Bool[Tensor, "n"]


def plan_view(
    uniforms: Float[Tensor, "n draws"], height: Int[Tensor, "n"], width: Int[Tensor, "n"], law: CropLaw
) -> ViewPlan:
    """Turn uniform numbers into the decisions of `law`, one row for each image. The layout of a row is fixed here."""
    chances, factors, order, sigma = uniforms[:, N_BOX:].split([5, 4, 4, 1], dim=1)
    flip, jitter, gray, blur, solarize = chances.unbind(1)
    strengths = torch.tensor([law.brightness, law.contrast, law.saturation, law.hue], dtype=torch.float32)
    low = torch.cat([(1 - strengths[:3]).clamp(min=0), -strengths[3:]])
    high = torch.cat([1 + strengths[:3], strengths[3:]])
    return ViewPlan(
        box=_boxes(uniforms[:, :N_BOX], height, width, law.scale, law.ratio),
        flip=flip < law.flip_p,
        jitter=jitter < law.jitter_p,
        factors=low + (high - low) * factors,
        order=order.argsort(dim=1),  # the ranks of four uniforms are a uniform permutation
        gray=gray < law.gray_p,
        blur=blur < law.blur_p,
        sigma=law.blur_sigma[0] + (law.blur_sigma[1] - law.blur_sigma[0]) * sigma[:, 0],
        solarize=solarize < law.solarize_p,
    )


def crop_boxes(
    n: int,
    height: int,
    width: int,
    scale: tuple[float, float],
    generator: torch.Generator,
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Float[Tensor, "n 4"]:
    """Draw n boxes inside one image by torchvision's RandomResizedCrop law.

        area ~ U(scale) * height * width;  aspect ~ log-uniform in ratio;  sides rounded to whole pixels;
        the first of 10 attempts that fits, at a uniform place; else the largest centred box of allowed aspect

    Args:
        height, width: of the image, px.
        scale: share of the image area, smallest and largest.
        generator: a CPU generator; the only source of randomness.
        ratio: width / height, smallest and largest.
    Returns:
        Top, left, height, width in pixels: whole numbers, as float.
    Source: torchvision RandomResizedCrop.get_params.
    """
    height, width = torch.tensor([[height], [width]]).expand(2, n)
    return _boxes(torch.rand(n, N_BOX, generator=generator, dtype=torch.float32), height, width, scale, ratio)


def _boxes(
    uniforms: Tensor, height: Tensor, width: Tensor, scale: tuple[float, float], ratio: tuple[float, float]
) -> Tensor:
    """Boxes from N_BOX uniforms a row: areas, aspects, place. (n, N_BOX), (n,), (n,) -> (n, 4)"""
    u_area, u_aspect, u_place = uniforms.split([N_ATTEMPTS, N_ATTEMPTS, 2], dim=1)
    sides = torch.stack([height, width], dim=1).float()  # (n, 2)
    area = sides.prod(dim=1, keepdim=True) * (scale[0] + (scale[1] - scale[0]) * u_area)
    log_low, log_high = math.log(ratio[0]), math.log(ratio[1])
    aspect = (log_low + (log_high - log_low) * u_aspect).exp()
    tries = torch.stack([(area / aspect).sqrt(), (area * aspect).sqrt()], dim=2).round()  # (n, attempts, 2)
    fits = ((tries > 0) & (tries <= sides[:, None])).all(dim=2)
    first = fits.int().argmax(dim=1)  # of equal values argmax takes the first
    drawn = tries[torch.arange(len(tries)), first]
    place = (u_place * (sides - drawn + 1)).floor()
    # the fallback keeps the shorter side and cuts the longer one down to the allowed aspect
    whole = torch.stack([sides[:, 0].minimum((sides[:, 1] / ratio[0]).round()),
                         sides[:, 1].minimum((sides[:, 0] * ratio[1]).round())], dim=1)  # fmt: skip
    centred = ((sides - whole) / 2).floor()
    found = fits.any(dim=1, keepdim=True)
    return torch.cat([torch.where(found, place, centred), torch.where(found, drawn, whole)], dim=1)


def _cut_views(lines: Tensor, plan: ViewPlan, size: int) -> Tensor:
    """Crop, resize, distort and normalise: (B, H, C, W), a view-major plan of V * B -> (V, B, C, size, size)."""
    channels = lines.shape[2]
    if not len(plan.box):
        return torch.zeros(0, len(lines), channels, size, size, device=lines.device, dtype=torch.float32)
    views = torch.empty(len(plan.box), channels, size, size, device=lines.device, dtype=torch.float32)
    mean, std = mean_and_std(channels, lines.device)
    box, flip = plan.box.to(lines.device), plan.flip.to(lines.device)
    if lines.device.type == "cpu":  # one after the other, from the picture to the last change in the cache
        with torch.inference_mode():  # what is left inside spares each small operation a fifth of its time
            for view, crop in zip(views.split(1), distort_each(resize_each(lines, box, flip, size), plan)):
                torch.sub(crop, mean, out=view).div_(std)
    else:
        crops = resize_boxes(lines, box, flip, size)
        distort(crops, plan)
        torch.sub(crops, mean, out=views).div_(std)
    return views.unflatten(0, (-1, len(lines)))


@lru_cache(maxsize=8)
def mean_and_std(channels: int, device: torch.device | str) -> tuple[Float[Tensor, "C 1 1"], Float[Tensor, "C 1 1"]]:
    """What pictures in [0, 1] are normalised by: ImageNet's, or a half and a quarter where channels are not its three."""
    law = (IMAGENET_MEAN, IMAGENET_STD) if channels == 3 else ((0.5,) * channels, (0.25,) * channels)
    return tuple(torch.tensor(values, device=device, dtype=torch.float32)[:, None, None] for values in law)


# ---------------------------------------------------------------- colour and focus: rows in, rows out

Factor = float | Float[Tensor, "n"]  # of one row, or of each
Change = tuple[Tensor, Callable[[Tensor, Any], Tensor], Tensor]  # rows it is for, (rows, parameters) -> rows, theirs


def distort(crops: Float[Tensor, "n C s s"], plan: ViewPlan) -> None:
    """Jitter, grey, blur and solarize the rows the plan says, in place and in that order."""
    for chosen, change, parameters in _changes(plan):
        rows = chosen.nonzero()[:, 0]
        if len(rows):
            parameters, rows = parameters[rows].to(crops.device), rows.to(crops.device)
            crops.index_copy_(0, rows, change(crops.index_select(0, rows), parameters))


def distort_each(crops: Iterable[Float[Tensor, "1 C s s"]], plan: ViewPlan) -> Iterator[Float[Tensor, "1 C s s"]]:
    """The same, one row after the other, and not in place: on a CPU a row stays in the cache."""
    chances, changes, parameters = zip(*_changes(plan))
    todo = torch.stack(chances, dim=1).tolist()
    values = zip(*(each.tolist() if each.dim() == 1 else each.split(1) for each in parameters))
    for crop, chosen, given in zip(crops, todo, values):
        for change, value in ((c, v) for yes, c, v in zip(chosen, changes, given) if yes):
            crop = change(crop, value)
        yield crop


def _changes(plan: ViewPlan) -> list[Change]:
    """What the plan says, in the order of its doing; all on the CPU."""
    jitter = [
        (plan.jitter & (plan.order[:, position] == kind), change, plan.factors[:, kind])
        for position in range(4)
        for kind, change in enumerate((brightness, contrast, saturation, hue))
    ]
    return [
        *jitter,
        (plan.gray, lambda x, _: luminance(x).expand_as(x), plan.sigma),
        (plan.blur, blur, gaussian_kernel(plan.sigma)),
        (plan.solarize, lambda x, _: solarize(x), plan.sigma),
    ]


def luminance(x: Float[Tensor, "n C h w"]) -> Float[Tensor, "n 1 h w"]:
    """Weigh the three channels to one grey; of another number take the mean."""
    if x.shape[1] != 3:
        return x.mean(dim=1, keepdim=True)
    red, green, blue = x.split(1, dim=1)
    return (LUMINANCE[0] * red).add_(green, alpha=LUMINANCE[1]).add_(blue, alpha=LUMINANCE[2])


def brightness(x: Float[Tensor, "n C s s"], factor: Factor) -> Float[Tensor, "n C s s"]:
    """Scale towards or away from black."""
    return _clamp(x * _beside(factor), factor)


def contrast(x: Float[Tensor, "n C s s"], factor: Factor) -> Float[Tensor, "n C s s"]:
    """Scale towards or away from the mean grey of the crop."""
    mean = luminance(x.mean(dim=(2, 3), keepdim=True))
    return _clamp(mean.lerp(x, _beside(factor)), factor)


def saturation(x: Float[Tensor, "n C s s"], factor: Factor) -> Float[Tensor, "n C s s"]:
    """Scale towards or away from each pixel's own grey."""
    return _clamp(luminance(x).lerp(x, _beside(factor)), factor)


def _beside(factor: Factor) -> float | Float[Tensor, "n 1 1 1"]:
    return factor if isinstance(factor, float) else factor[:, None, None, None]


def _clamp(x: Tensor, factor: Factor) -> Tensor:
    """Back into [0, 1], which a factor of at most 1 does not leave."""
    return x if isinstance(factor, float) and factor <= 1 else x.clamp_(0, 1)


def hue(x: Float[Tensor, "n C s s"], shift: Factor) -> Float[Tensor, "n C s s"]:
    """Turn the colour circle by `shift` turns, keeping HSV value and saturation.

        red' = clamp(2 red - middle - 6 shift chroma sign(green - blue), low, high)        green', blue' in a circle

    low, middle and high are the channels in order, chroma is high - low; that is so up to a sixth of a turn.
    """
    largest = abs(shift) if isinstance(shift, float) else shift.abs().max().item()
    n_turns = math.ceil(6 * largest - 1e-6)
    for _ in range(n_turns):
        x = _turn_hue(x, 6 / n_turns * _beside(shift))
    return x


def _turn_hue(x: Tensor, sectors: float | Tensor) -> Tensor:
    """Turn by at most one of six sectors; the formula follows from HSV's, where a channel is linear in hue."""
    red, green, blue = x.split(1, dim=1)
    low, high = torch.minimum(red, green), torch.maximum(red, green)
    middle = torch.minimum(high, blue).maximum(low)
    torch.minimum(low, blue, out=low)
    torch.maximum(high, blue, out=high)
    out = torch.empty_like(x)
    for channel, one, other in zip(out.split(1, dim=1), (green, blue, red), (blue, red, green)):
        torch.sub(one, other, out=channel)
    out.sign_().mul_((low - high) * sectors)
    out.add_(x, alpha=2).sub_(middle)
    return torch.clamp(out, low, high, out=out)


def gaussian_kernel(sigma: Float[Tensor, "n"]) -> Float[Tensor, "n 9"]:
    """Weigh the pixels around one by a Gaussian of `sigma` px; each row sums to 1."""
    offset = torch.arange(-(BLUR_KERNEL // 2), BLUR_KERNEL // 2 + 1, device=sigma.device)
    return (-0.5 * (offset / sigma[:, None]) ** 2).softmax(dim=1)


def blur(x: Float[Tensor, "n C s s"], kernel: Float[Tensor, "n 9"]) -> Float[Tensor, "n C s s"]:
    """Blur with one kernel of 9 px for each row, edges mirrored: across, then down."""
    weights = kernel[:, None].expand(-1, x.shape[-1], -1).reshape(-1, BLUR_KERNEL)  # (n * s, 9)
    index = _mirrored(len(x), x.shape[-1], x.device)
    for axis in (3, 2):
        lines = x.movedim(axis, 1)  # (n, s, C, s)
        x = mix_rows(lines.flatten(0, 1).flatten(1), index, weights).view(lines.shape).movedim(1, axis)
    return x


@lru_cache(maxsize=8)
def _mirrored(n: int, size: int, device: torch.device) -> Int[Tensor, "lines 9"]:
    """Of n crops below each other, the nine lines around each, mirrored at the ends of its crop, at need again."""
    period = max(2 * (size - 1), 1)  # there and back
    source = (torch.arange(size)[:, None] + torch.arange(BLUR_KERNEL) - BLUR_KERNEL // 2) % period
    return (torch.arange(0, n * size, size)[:, None, None] + source.minimum(period - source)).flatten(0, 1).to(device)


def solarize(x: Float[Tensor, "n C s s"]) -> Float[Tensor, "n C s s"]:
    """Invert every value from 128/255 up."""
    # torch.where mispredicts a branch for each pixel on a CPU, and takes four times as long
    return torch.lerp(x, 1 - x, (x >= SOLARIZE_THRESHOLD).to(x.dtype))
