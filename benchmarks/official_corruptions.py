"""ImageNet-C's corruptions, run beside ours on the same photographs: a part of official_protocols.py."""

import runpy
import sys
from functools import partial
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import scipy.ndimage
import skimage.filters
import skimage.util
import torch
import torch.nn.functional as F
from official_data import drawn
from official_probes import TOLERANCE, Rows, compared
from PIL import Image
from released import stand_in
from skimage import data
from torch import Tensor

from minidino.images import corruptions

EXACT, SIDE, SEVERITIES = 1e-12, 224, (1, 2, 3, 4, 5)  # in float64; px


def script(path: Path, *arguments: str, name: str = "__main__") -> dict[str, Any]:
    """Run a script, quietly; all that it leaves behind by name."""
    with patch.object(sys, "argv", [path.name, *arguments]), patch("builtins.print"):
        return runpy.run_path(str(path), run_name=name)


def numbers(*parts: Any) -> Tensor:
    """In float64; -1 for a query without positives."""
    return torch.from_numpy(np.nan_to_num(np.concatenate([np.atleast_1d(x).ravel() for x in parts]).astype(float), nan=-1.0))


def damaged(name: str, images: Tensor, severity: int, seed: int = 0) -> Tensor:
    """Ours, of 255 and not yet rounded; (n, 3, H, W) uint8 -> (n, H, W, 3) float64."""
    draws = [torch.Generator().manual_seed(seed + i) for i in range(len(images))]
    found = corruptions.CORRUPTIONS[name](images.float() / 255, severity, draws)
    return 255 * found.clamp(0, 1).permute(0, 2, 3, 1).double()


def corrupted(folder: Path) -> Rows:
    """Eleven corruptions at five severities, of four photographs, by the draws of ours; the error by AugMix's AlexNet."""
    gaussian = skimage.filters.gaussian  # that of scikit-image 0.19 and earlier took `multichannel`
    stand_in({"scipy.ndimage.interpolation": {"map_coordinates": scipy.ndimage.map_coordinates}})
    sys.path.append(str(folder / "robustness" / "ImageNet-C" / "imagenet_c"))
    with patch("skimage.filters.gaussian", lambda x, sigma, multichannel: gaussian(x, sigma, channel_axis=-1)):
        code = import_module("imagenet_c.corruptions")
    photographs = data.astronaut(), data.chelsea(), data.coffee(), data.rocket()
    pictures = [Image.fromarray(x).resize((SIDE, SIDE)) for x in photographs]
    images = torch.stack([torch.from_numpy(np.array(x)).permute(2, 0, 1) for x in pictures])

    def both(name: str, words: str = "", less: float = 0.0, tolerance: float = TOLERANCE, part: str = "ImageNet-C") -> dict:
        theirs = [np.asarray(getattr(code, name)(x, s)) + less for s in SEVERITIES for x in pictures]
        ours = [damaged(name, images, s) for s in SEVERITIES]
        return compared(part, f"{name}{words}, of 255", list(map(torch.from_numpy, theirs)), list(torch.cat(ours)), tolerance)

    for name in ("gaussian_blur", "brightness", "contrast", "saturate", "pixelate", "jpeg_compression"):
        yield both(name)
    draws = [torch.Generator().manual_seed(i) for i in range(4)]
    normal = [torch.randn(3, SIDE, SIDE, generator=g).permute(1, 2, 0).numpy() for g in draws]
    angles = [90 * (torch.rand((), generator=g.manual_seed(i)).item() - 0.5) for i, g in enumerate(draws)]
    normal, angles = iter(5 * normal), iter(5 * angles)
    with patch("numpy.random.normal", lambda size, scale: scale * next(normal)):
        yield both("gaussian_noise", " of the same draws")
    with patch("numpy.random.uniform", lambda *_: next(angles)), patch("numpy.fromstring", np.frombuffer):
        cut = 0.5 + 1 / 257  # fractions of 8 bits are cut off, behind those of 16
        yield both("motion_blur", " at the same angles", 0.5, cut / 250, "motion in 8 bits")
    disks, (point,) = [], torch.zeros(1, 1, 3, SIDE, SIDE, dtype=torch.uint8)
    point[..., 100, 100] = 255
    for s, radius in zip(SEVERITIES, (3, 4, 6, 8, 10), strict=True):
        disks += 4 * [(damaged("defocus_blur", point, s)[0, 88:113, 88:113, 0] / 255).float().numpy()]
        official = code.disk(radius, 0.1 if s == 1 else 0.5)
        moved = np.abs(np.pad(official, (25 - len(official)) // 2) / official.sum() - disks[-1]).sum() / 2
        yield {"part": "choices", "what": f"defocus_blur, severity {s}: sum of the official disk, share of light elsewhere",
               "value": [float(official.sum()), float(moved)]}  # fmt: skip
    ordered = iter(disks)
    with patch.object(code, "disk", lambda **_: next(ordered)):
        yield both("defocus_blur", " with our disk in both")
    pad, mirrored = F.pad, torch.cat([damaged("defocus_blur", images, s) for s in SEVERITIES])
    with patch.object(corruptions.F, "pad", lambda x, border, mode: pad(x, border, "replicate")):
        repeated = torch.cat([damaged("defocus_blur", images, s) for s in SEVERITIES])
    yield {"part": "choices", "what": "defocus_blur, edges repeated or mirrored: largest difference, of 255",
           "value": (mirrored - repeated).abs().max().item()}  # fmt: skip
    with patch("skimage.util.random_noise", partial(skimage.util.random_noise, rng=np.random.default_rng(0))):
        yield from noise(code)
    sys.path.append(str(folder / "augmix"))
    code = script(folder / "augmix" / "imagenet.py", "-", "-", name="augmix_imagenet")
    accuracies = dict(zip(code["CORRUPTIONS"], np.random.default_rng(0).random((15, 5)), strict=True))
    alexnet = {name: [error] * 5 for name, error in zip(code["CORRUPTIONS"], code["ALEXNET_ERR"], strict=True)}
    ours = 100 * corruptions.mean_corruption_error({name: 1 - x for name, x in accuracies.items()}, alexnet)["mce"]
    found = numbers(code["compute_mce"](accuracies)), numbers(ours)
    yield compared("ImageNet-C", "mean corruption error by AlexNet's, percent", *found, EXACT)


def noise(code: Any) -> Rows:
    """Values of plain pictures of several greys; of impulses also in how many channels of a pixel they are."""
    np.random.seed(0)
    for s, grey, name in product(SEVERITIES, (10, 90, 200), ("shot_noise", "impulse_noise")):
        plain, words = np.full((SIDE, SIDE, 3), grey, np.uint8), f"{name}, severity {s}, grey {grey}"
        ours = damaged(name, torch.from_numpy(plain).permute(2, 0, 1)[None], s, seed=grey)[0].numpy()
        found = [x.round(2) for x in (ours, np.asarray(getattr(code, name)(Image.fromarray(plain), s)))]
        if name == "impulse_noise":
            found = [x.astype(np.int16) for x in found]
            hit = ((x != grey).sum(2).ravel().astype(np.int16) for x in found)
            yield drawn("ImageNet-C", f"{words}: channels hit", *hit)
        yield drawn("ImageNet-C", words, *(x.ravel() for x in found))
