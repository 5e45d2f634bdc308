"""Pictures with an answer for each pixel: a class or a distance.

    open_pairs(path, kind)          -> Pairs     which files belong together, their split, what the values mean
    load_pairs(pairs, split, size)  -> Loaded    pixels and targets of one size; what could not be read, and why

The layouts of folders and archives that are recognised are those of layouts.py; "scenes" are drawn. Labels become
0, 1, ... and -1 where a pixel does not count; distances become metres, and 0 where they are not known.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from minidino.engine import LOCAL
from minidino.images.archives import Place, read_place
from minidino.images.datasets import open_images
from minidino.images.decode import BadImage, decode, decode_values
from minidino.images.layouts import LAYOUTS, find_pairs
from minidino.images.scenes import MASK_CLASSES, TEST_WORLD, draw_scenes

KINDS = ("segmentation", "depth")
NEAREST_M, FARTHEST_M = 0.05, 100.0  # a median depth outside of this is in another unit than assumed
MILLIMETRE = 0.001
MOST_CLASSES = 1 << 16  # that may go without names
ASPECT_SLACK = 0.02  # share by which the aspects of a picture and its target may differ


@dataclass(frozen=True, eq=False)
class Pairs:
    """Which picture belongs to which target; nothing is decoded yet.

    names: of the pictures, as in folder or archive. splits: (n,) str, "train", "val" or "test".
    classes: names of the classes 0, 1, ...; empty for depth. values: {value in the files: class}; others are errors.
    ignored: values in the files that become -1. unit_m: metres per unit of the files, None = told by their type.
    """

    name: str
    kind: str
    layout: str
    names: list[str] = field(repr=False)
    splits: np.ndarray = field(repr=False)
    images: list[Place] = field(repr=False)
    targets: list[Place] = field(repr=False)
    classes: list[str]
    values: dict[int, int] = field(repr=False)
    ignored: tuple[int, ...]
    unit_m: float | None
    seed: int = 0  # of drawn scenes

    def __len__(self) -> int:
        return len(self.names)

    @property
    def held_out(self) -> str:
        """The split to judge on: "test" where there is one, else "val"."""
        return "test" if "test" in self.splits else "val"

    def select(self, indices: Sequence[int] | np.ndarray) -> "Pairs":
        """The same set with these pairs only, in this order."""
        rows = np.arange(len(self))[indices]
        parts = {name: [getattr(self, name)[i] for i in rows] for name in ("names", "images", "targets")}
        return replace(self, splits=self.splits[rows], **parts)


class Loaded(NamedTuple):
    """images (n, 3, H, W) uint8; targets (n, H, W): classes as int64 with -1 = ignored, or metres as float32 with
    0 = unknown; names: n; left_out: {"file", "reason"} of every pair that could not be read."""

    images: UInt8[Tensor, "n 3 H W"]
    targets: Tensor
    names: list[str]
    left_out: list[dict[str, str]]


def open_pairs(
    path: str | Path,
    kind: str = "segmentation",
    *,
    depth_unit_m: float | None = None,
    cache_dir: str | Path | None = None,
    n_scenes: tuple[int, int] = (2000, 500),
    seed: int = 0,
) -> Pairs:
    """Find the pictures that have a target for each pixel, and what the values of the targets mean.

    Args:
        path: a folder or an archive in one of the layouts above, or "scenes".
        kind: "segmentation" or "depth".
        depth_unit_m: metres per unit of the depth files; None takes millimetres for integers, metres for floats.
        cache_dir: where the list of files is kept, as in `open_images`.
        n_scenes: drawn scenes for training and for testing.
        seed: the world of drawn scenes.
    Raises:
        FileNotFoundError: nothing at that path.
        ValueError: no layout fits; pictures without a target or targets without a picture (the first are named);
            depth_unit_m is not above 0.
    """
    if kind not in KINDS:
        raise ValueError(f"expected kind to be one of {KINDS}, got {kind!r}")
    if depth_unit_m is not None and not 0 < depth_unit_m < float("inf"):
        raise ValueError(f"expected depth_unit_m above 0 metres, got {depth_unit_m}")
    if str(path) == "scenes" and not Path(path).exists():
        return _drawn(kind, n_scenes, seed)
    listed = open_images(path, cache_dir)
    files = dict(zip(listed.files, listed.places, strict=True))
    found = find_pairs(kind, files, lambda name: read_place(files[name]).decode("utf-8-sig", "replace"))
    if found is None:
        known = ["index.csv", *sorted({layout.name for layout in LAYOUTS if layout.kind == kind})]
        raise ValueError(
            f"no pairs for {kind} among the {len(files)} files of {path}; layouts that are recognised: {known}; the "
            f"simplest is images/ beside {'depth/' if kind == 'depth' else 'masks/'} with equal names inside"
        )
    names, targets, splits = (list(part) for part in zip(*found.pairs, strict=True))
    places = [files[target] for target in targets]
    classes, ignored = found.classes, found.ignored
    if kind == "segmentation" and not classes:
        classes, ignored = _seen_classes(places, ignored)
    images = [files[name] for name in names]
    values = {v: i for i, v in enumerate(classes)}
    return Pairs(listed.name, kind, found.layout, names, np.array(splits, dtype="<U5"), images, places,
                 list(classes.values()), values, ignored, depth_unit_m)  # fmt: skip


def _drawn(kind: str, n_scenes: tuple[int, int], seed: int) -> Pairs:
    if min(n_scenes) < 1 or seed < 0:
        raise ValueError(f"expected n_scenes of at least 1 and seed of at least 0, got {n_scenes} and {seed}")
    names = [f"{split} scene {i}" for split, n in zip(("train", "test"), n_scenes, strict=True) for i in range(n)]
    nowhere = [Place("", "bad", 0, reason="drawn")] * len(names)
    classes = list(MASK_CLASSES) if kind == "segmentation" else []
    splits = np.repeat(["train", "test"], n_scenes)
    values = {i: i for i in range(len(classes))}
    return Pairs("scenes", kind, "scenes", names, splits, nowhere, nowhere, classes, values, (), None, seed)


def _seen_classes(targets: list[Place], ignored: tuple[int, ...]) -> tuple[dict[int, str], tuple[int, ...]]:
    """Classes of a set that names none: 0 to the largest value in any mask; 0 and 255 alone are two classes."""

    def values(place: Place) -> set[int]:
        try:
            return set(np.unique(_values(read_place(place), "segmentation")).tolist())
        except BadImage:  # loading will list it
            return set()

    seen = set().union(*_on_threads(values, targets))
    if seen == {0, 255}:
        return {0: "background", 255: "foreground"}, ()
    largest = max(seen - set(ignored), default=-1)
    if largest >= MOST_CLASSES:
        raise ValueError(f"a mask holds {largest:,}: that many classes must be named in a classes.csv (index, name)")
    return {v: f"class {v}" for v in range(largest + 1)}, ignored


def _on_threads(work: Callable, items: Sequence) -> list:
    with ThreadPoolExecutor(LOCAL.threads) as pool:
        return list(pool.map(work, items))


# ---------------------------------------------------------------- pixels and targets


def load_pairs(pairs: Pairs, split: str, size: tuple[int, int] | None = None) -> Loaded:
    """Decode one split: every picture squeezed whole to one size (bicubic), every target likewise (nearest pixel).

    Args:
        split: "train", "val" or "test".
        size: height and width in px; None keeps the pictures as they are, if all have one size. Drawn scenes: square.
    Returns:
        images, targets, names, left_out (`Loaded`). Damaged files, and targets that are no single-channel picture,
        are left out and listed with their reason; the rest is loaded.
    Raises:
        ValueError: no such split; not one pair could be read; a target has another aspect than its picture (another
            size of the same aspect is fine); a label that is no class of the set; a depth that is in no plausible
            unit (median below 0.05 m or above 100 m); pictures of several sizes without `size`.
    Differs: sets are usually judged at the size of each label map; here all are brought to one size first.
    """
    rows = np.flatnonzero(pairs.splits == split)
    if not len(rows):
        raise ValueError(f"{pairs.name} has no split {split!r}; splits found: {sorted(set(pairs.splits.tolist()))}")
    if size is not None and (len(size) != 2 or min(size) < 1):
        raise ValueError(f"expected size as (height, width) in px, got {size}")
    if pairs.layout == "scenes":
        return _draw(pairs, rows, split, size)

    def one(i: int) -> tuple[np.ndarray, np.ndarray] | BadImage:
        try:
            return _load(pairs, i, size)
        except BadImage as reason:
            return reason

    results = dict(zip(rows.tolist(), _on_threads(one, rows), strict=True))
    bad = {i: result for i, result in results.items() if isinstance(result, BadImage)}
    left_out = [{"file": pairs.names[i], "reason": str(reason)} for i, reason in bad.items()]
    kept = [i for i in results if i not in bad]
    if not kept:
        raise ValueError(f"none of {len(bad)} pairs could be read; {left_out[0]['file']}: {left_out[0]['reason']}")
    sizes = {results[i][1].shape for i in kept}
    if len(sizes) > 1:
        raise ValueError(f"the pictures have {len(sizes)} sizes, such as {sorted(sizes)[:2]}: say size=(height, width)")
    images = np.stack([results[i][0] for i in kept]).transpose(0, 3, 1, 2)
    targets = torch.from_numpy(np.stack([results[i][1] for i in kept]))
    if pairs.kind == "depth":
        _refuse_unit(targets, pairs.unit_m)
    images = torch.from_numpy(np.ascontiguousarray(images))
    return Loaded(images, targets, [pairs.names[i] for i in kept], left_out)


def _draw(pairs: Pairs, rows: np.ndarray, split: str, size: tuple[int, int] | None) -> Loaded:
    height, width = size or (64, 64)
    if height != width:
        raise ValueError(f"drawn scenes are square, got size {size}; say size=({height}, {height})")
    number = [int(pairs.names[i].rsplit(" ", 1)[1]) for i in rows]
    scenes = draw_scenes(max(number) + 1, height, pairs.seed + (TEST_WORLD if split == "test" else 0))
    targets = scenes.depth if pairs.kind == "depth" else scenes.masks.astype(np.int64)
    images = torch.from_numpy(np.ascontiguousarray(scenes.images[number].transpose(0, 3, 1, 2)))
    return Loaded(images, torch.from_numpy(targets[number]), [pairs.names[i] for i in rows], [])


def _load(pairs: Pairs, i: int, size: tuple[int, int] | None) -> tuple[np.ndarray, np.ndarray]:
    """One pair as (H, W, 3) uint8 and (H, W) int64 or float32."""
    picture = decode(read_place(pairs.images[i]))
    values = _values(read_place(pairs.targets[i]), pairs.kind)
    height, width = size or (picture.height, picture.width)
    if abs(values.shape[0] * picture.width / (values.shape[1] * picture.height) - 1) > ASPECT_SLACK:
        raise ValueError(
            f"{pairs.names[i]}: the picture has {picture.height} x {picture.width} px and its target {values.shape[0]} "
            f"x {values.shape[1]} px: they cannot lie upon each other; another size is fine, another aspect is not"
        )
    targets = _depth(values, pairs.unit_m) if pairs.kind == "depth" else _classes(values, pairs, i)
    down, right = (((np.arange(n) + 0.5) * m / n).astype(int) for n, m in zip((height, width), values.shape))
    if picture.size != (width, height):
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(picture), targets[down[:, None], right]


def _values(data: bytes, kind: str) -> np.ndarray:
    """The numbers in a target file (H, W), as they are: no palette, no scaling. Raises BadImage."""
    values = decode_values(data)
    if values.ndim != 2:
        raise BadImage(f"expected one value for each pixel, got shape {values.shape}")
    if kind == "segmentation" and values.dtype.kind == "f":
        raise BadImage(f"expected integers that stand for classes, got {values.dtype}")
    return values.astype(np.uint8) if values.dtype == bool else values


def _classes(values: np.ndarray, pairs: Pairs, i: int) -> np.ndarray:
    wanted = {**pairs.values, **{v: -1 for v in pairs.ignored}}
    seen, inverse = np.unique(values, return_inverse=True)
    strange = [v for v in seen.tolist() if v not in wanted]
    if strange:
        known = f"{min(pairs.values)} to {max(pairs.values)}" if pairs.values else "none"
        raise ValueError(
            f"{pairs.names[i]}: labels {strange[:5]} are out of range; the {len(pairs.classes)} classes of this set "
            f"have the values {known}, ignored: {list(pairs.ignored)}"
        )
    return np.array([wanted[v] for v in seen.tolist()], dtype=np.int64)[inverse].reshape(values.shape)


def _depth(values: np.ndarray, unit_m: float | None) -> np.ndarray:
    if values.dtype == np.uint8 and unit_m is None:
        raise BadImage("8 bits are too few for millimetres; say depth_unit_m= if the unit is another")
    unit_m = unit_m or (1.0 if values.dtype.kind == "f" else MILLIMETRE)
    depth = values.astype(np.float32) * np.float32(unit_m)
    return np.where((depth > 0) & np.isfinite(depth), depth, np.float32(0))


def _refuse_unit(depth: Tensor, unit_m: float | None) -> None:
    known = depth[depth > 0]
    median = known.median().item() if len(known) else None
    if median is not None and not NEAREST_M <= median <= FARTHEST_M:
        used = "millimetres for integers and metres for floats" if unit_m is None else f"{unit_m} m"
        raise ValueError(
            f"the median depth is {median:.3g} m with a unit of {used}: expected {NEAREST_M} m to {FARTHEST_M:.0f} m; "
            "pass depth_unit_m=, metres per unit of the files (0.001 for millimetres, 1/256 for KITTI)"
        )
