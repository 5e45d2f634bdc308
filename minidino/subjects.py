"""Who is judged: a frozen backbone, the same network before its first step, and what nobody trained.

A subject describes whole pictures and patches. Each description is computed once and kept on disk under a key that says
what made it, so that all tasks on the same pictures share it.
"""

import copy
import hashlib
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from minidino.config import RunConfig
from minidino.images.archives import MARK
from minidino.judge import CHUNK, is_run, random_backbone, trained_backbone
from minidino.model.vit import VisionTransformer
from minidino.model.weights import backbone_of
from minidino.probes import features
from minidino.probes.dense import borders, feature_maps
from minidino.probes.depth import taps
from minidino.runs import Run, home_cache, pick_device

THUMBNAIL = 16  # px: raw pixels of a whole picture are those of a thumbnail
WAVES = 8  # cosines along each side of a picture that tell where a patch lies
BLOCKS = 4  # last blocks whose class tokens are kept

Described = dict[str, Tensor | np.ndarray]


@dataclass(frozen=True)
class Subject:
    """Something that turns pictures into features.

    name: as in tables. made_by: all that its features depend on. whole: (n, 3, S, S) uint8 -> {"cls_blocks": (n, b, D),
    and of a network "mean_patch": (n, D)}. maps: (n, 3, H, W) uint8 and a reading, "last" or "last4" blocks for classes,
    "lin1" or "lin4" for distances -> (n, C, Hp, Wp); None: it cannot.
    vit: the network, where there is one. base: the subject that this one is, told where each patch lies.
    """

    name: str
    made_by: str
    whole: Callable[[Tensor], Described] | None = None
    maps: Callable[[Tensor, str], Tensor] | None = None
    vit: VisionTransformer | None = None
    base: "Subject | None" = None


def network(name: str, vit: VisionTransformer, progress: bool = True) -> Subject:
    """A frozen backbone."""

    def whole(images: UInt8[Tensor, "n channels S S"]) -> Described:
        found = features.extract(vit, images, progress=progress, blocks=min(BLOCKS, vit.depth))
        return {"cls_blocks": found.get("cls_blocks", found["cls"][:, None]), "mean_patch": found["mean_patch"]}

    def maps(images: UInt8[Tensor, "n channels H W"], reading: str) -> Float[Tensor, "n C Hp Wp"]:
        if reading in ("last", "last4"):
            blocks, how = 1 if reading == "last" else min(BLOCKS, vit.depth), {}
        else:
            blocks, how = taps(vit.depth, reading), {"norm": False, "class_token": True}
        return feature_maps(vit, images, blocks, dtype=torch.float16, progress=progress, **how)

    untold = f"{vit.heads} heads, positions {vit.interpolate_offset} {vit.interpolate_antialias}"  # by any tensor
    return Subject(name, f"{features.state_hash(vit)}, {untold}", whole, maps, vit)


def placed(subject: Subject) -> Subject:
    """The same patches, told where they lie: a position is not what a network has to know by itself."""

    def maps(images: UInt8[Tensor, "n channels H W"], reading: str) -> Float[Tensor, "n C Hp Wp"]:
        return torch.cat([subject.maps(images, reading), positions(images, subject.vit.patch_size)], 1)

    return replace(subject, name=f"{subject.name} + position", whole=None, maps=maps, base=subject)


def untrained(patch_size: int, dense: bool, channels: int = 3) -> list[Subject]:
    """What needs no network: colours of places and colours alone, or for patches where they lie and what is in them."""
    if dense:
        return [
            Subject("position", f"position {WAVES} {patch_size}", maps=lambda x, _: positions(x, patch_size)),
            Subject("pixels + position", f"pixels {WAVES} {patch_size}", maps=lambda x, _: patch_pixels(x, patch_size)),
        ]
    places = Subject("pixels", f"thumbnail {THUMBNAIL}", lambda x: {"cls_blocks": _chunks(thumbnail, x)[:, None]})
    colours = Subject("colours", "histogram", lambda x: {"cls_blocks": _chunks(features.color_histogram, x)[:, None]})
    return [places, colours] if channels == 3 else [places]


def thumbnail(images: UInt8[Tensor, "n channels S S"]) -> Float[Tensor, "n F"]:
    """The colours of 16 x 16 places, in [0, 1]."""
    return F.adaptive_avg_pool2d(images.float() / 255, THUMBNAIL).flatten(1)


def positions(images: UInt8[Tensor, "n channels H W"], patch_size: int) -> Float[Tensor, "n C Hp Wp"]:
    """Where each patch lies, as products of eight cosines down and eight across."""
    left, right, top, bottom = borders(images.shape[2:], patch_size)
    grid = (images.shape[2] + top + bottom) // patch_size, (images.shape[3] + left + right) // patch_size
    down, across = ((torch.outer(torch.arange(WAVES), (torch.arange(n) + 0.5) / n) * torch.pi).cos() for n in grid)
    waves = (down[:, None, :, None] * across[None, :, None, :]).flatten(0, 1)  # (64, Hp, Wp)
    return waves.half().expand(len(images), -1, -1, -1)


def patch_pixels(images: UInt8[Tensor, "n channels H W"], patch_size: int) -> Float[Tensor, "n C Hp Wp"]:
    """The pixels of each patch and where it lies."""
    inside = F.pad(images, borders(images.shape[2:], patch_size))
    colours = F.pixel_unshuffle(inside.half() / 255, patch_size)  # (n, channels P P, Hp, Wp)
    return torch.cat([colours, positions(images, patch_size)], 1)


def _chunks(describe: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    return torch.cat([describe(chunk) for chunk in images.split(CHUNK)])


def subjects_of(
    source: Path, baselines: Sequence[str] = (), dense: bool = False, progress: bool = True
) -> tuple[list[Subject], RunConfig | None]:
    """The backbone of a run folder or weights file, first, and what it is measured against.

    Args:
        source: a run folder, or weights in any layout or by any name that `load_weights` reads.
        baselines: of "random", the same network before its first step, and "pixels", what needs no network; for patches
            this is where they lie, which all are then told as well.
        dense: subjects for patches instead of whole pictures.
        progress: a bar while a network looks.
    Returns:
        The subjects, and the config of a run folder, or None for weights.
    Raises:
        ValueError: another baseline.
    """
    if set(baselines) - {"random", "pixels"}:
        raise ValueError(f"expected baselines random or pixels, got {list(baselines)}")
    run, device = Run(source), pick_device()
    config = run.config() if is_run(source) else None
    vit = backbone_of(source).to(device).eval() if config is None else trained_backbone(run, device)
    found = [network("trained", vit, progress)]
    if "random" in baselines:
        fresh = _fresh(vit) if config is None else random_backbone(config, device)
        found.append(network("random ViT", fresh, progress))
    if "pixels" in baselines:
        unlearned = untrained(vit.patch_size, dense, vit.patch_embed.proj.in_channels)
        found += unlearned + ([placed(subject) for subject in found] if dense else [])
    return found, config


def _fresh(vit: VisionTransformer) -> VisionTransformer:
    """The same network before its first step."""
    torch.manual_seed(0)
    fresh = copy.deepcopy(vit)
    for part in fresh.modules():
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()
        if hasattr(part, "gamma"):
            nn.init.ones_(part.gamma)
    fresh.init_weights()
    return fresh


@dataclass(frozen=True)
class Cache:
    """Descriptions on disk, one for each subject, set of pictures and reading."""

    folder: Path

    def whole(self, subject: Subject, name: str, size: int, images: Callable[[], Tensor]) -> Described:
        """Described pictures; `images` is asked only where nothing is stored. The name tells them from all others."""
        key = features.feature_key(subject.made_by, name, size, "whole")
        return self._get(key, lambda: subject.whole(images()))

    def maps(self, subject: Subject, name: str, images: UInt8[Tensor, "n channels H W"], reading: str) -> Tensor:
        """Maps of pictures; the name tells them from all others."""
        if subject.base is not None:
            where = positions(images, subject.vit.patch_size)
            return torch.cat([self.maps(subject.base, name, images, reading), where], 1)
        key = features.feature_key(subject.made_by, name, images.shape[3], reading)
        found = self._get(key, lambda: {"maps": subject.maps(images, reading)})
        return torch.from_numpy(np.array(found["maps"]))

    def _get(self, key: str, compute: Callable[[], Described]) -> Described:
        def marked() -> Described:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / MARK).touch()  # it may lie among pictures, and arrays are taken for some
            return compute()

        return features.FeatureStore(self.folder).get(key, marked)


def cache_in(folder: Path) -> Cache:
    """The cache in a folder; where nothing can be written there, one for all runs."""
    there = next(place for place in (folder, *folder.parents) if place.exists())
    if there.is_dir() and os.access(there, os.W_OK):
        return Cache(folder)
    instead = home_cache() / "features"
    warnings.warn(f"{folder} cannot be written, descriptions are kept in {instead}", stacklevel=2)
    return Cache(instead)


def fingerprint(images: Tensor) -> str:
    """A hash of the shape and every pixel."""
    return hashlib.sha256(repr(tuple(images.shape)).encode() + images.numpy().tobytes()).hexdigest()
