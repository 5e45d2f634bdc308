"""Files become uint8 pixels, once: shrunk, end to end in memory or in one memory-mapped file.

    load_pixels(set)   -> Pixels      every picture decoded; the others in quarantine.csv with their reasons
"""

import hashlib
import io
import json
import math
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from PIL import Image
from torch import Tensor

from minidino.engine import LOCAL, Engine
from minidino.images.datasets import (
    FORMAT_VERSION,
    SIDE_SUFFIXES,
    ImageSet,
    decode_each,
    read_quarantine,
    write_quarantine,
)
from minidino.images.decode import BadImage, shrink, square
from minidino.runs import atomic_path, remove_litter, write_atomically

NO_BAR = 6.0  # mean difference from the colour of the outermost lines, in grey levels of 255, above which a line is none


@dataclass(frozen=True, eq=False)
class Pixels:
    """Decoded pictures of any size in one flat uint8 array, in memory or memory-mapped.

    Picture i is data[offsets[i] : offsets[i] + C H W] as (C, H, W), with (H, W) = sizes[i] and C = channels.
    originals: (n, 2) height and width before it was shrunk. labels: (n,) int64, -1 = unknown. files: n names.
    """

    data: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    originals: np.ndarray
    labels: np.ndarray
    classes: list[str]
    files: list[str]
    channels: int = 3

    @classmethod
    def from_array(cls, images: np.ndarray, labels: Sequence[int] | np.ndarray, classes: Sequence[str]) -> "Pixels":
        """Copy pictures of one size, (n, H, W, C) uint8, and the number of the class of each, below 0 where unknown.

        Raises:
            ValueError: pictures of another kind, such as a tensor; labels that are no whole numbers, or not n.
        """
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] == 0:
            got = f"{type(images).__name__} of {tuple(images.shape)} {images.dtype}"
            raise ValueError(f"expected a numpy array (n, H, W, C) uint8, got {got}")
        labels = np.asarray(labels)
        if len(labels) != len(images):
            raise ValueError(f"{len(images)} images but {len(labels)} labels")
        if labels.ndim != 1 or labels.dtype.kind not in "biuf" or (labels % 1 != 0).any():  # NaN and infinity, too
            few = labels[:3].tolist()
            raise ValueError(f"expected labels (n,) as the numbers of classes, below 0 where unknown, got {few}")
        n, height, width, channels = images.shape
        return cls(
            data=np.array(images.transpose(0, 3, 1, 2), order="C").reshape(-1),
            offsets=np.arange(n, dtype=np.int64) * (channels * height * width),
            sizes=np.full((n, 2), (height, width), dtype=np.int64),
            originals=np.full((n, 2), (height, width), dtype=np.int64),
            labels=labels.astype(np.int64),
            classes=list(classes),
            files=[f"{i:06d}" for i in range(n)],
            channels=channels,
        )

    def __len__(self) -> int:
        return len(self.offsets)

    def image(self, index: int) -> UInt8[np.ndarray, "C H W"]:
        """One picture, a view of the stored bytes."""
        shape = (self.channels, *self.sizes[index].tolist())
        start = int(self.offsets[index])
        return self.data[start : start + math.prod(shape)].reshape(shape)

    def fingerprint(self) -> str:
        """A hash of names, sizes and every pixel: equal fingerprints, equal pictures."""
        digest = hashlib.sha256(repr(self.files).encode("utf-8", "surrogateescape"))
        digest.update(self.sizes.tobytes())
        for i in range(len(self)):
            digest.update(self.image(i))
        return digest.hexdigest()

    def batch(self, indices: Sequence[int] | np.ndarray) -> tuple[UInt8[Tensor, "B C H W"], Int64[Tensor, "B 2"]]:
        """Stack pictures of unequal size: zeros below and to the right; second, the height and width of each."""
        indices = np.asarray(indices)
        indices = np.flatnonzero(indices) if indices.dtype == bool else indices.astype(np.int64)
        sizes = self.sizes[indices].reshape(-1, 2)
        height, width = sizes.max(axis=0).tolist() if len(sizes) else (0, 0)
        images = np.zeros((len(indices), self.channels, height, width), dtype=np.uint8)
        for row, i, (h, w) in zip(images, indices, sizes, strict=True):
            row[:, :h, :w] = self.image(i)
        return torch.from_numpy(images), torch.from_numpy(sizes)

    def select(self, indices: Sequence[int] | np.ndarray) -> "Pixels":
        """The same storage with these pictures only, in this order."""
        rows = np.arange(len(self))[indices]
        return replace(
            self,
            offsets=self.offsets[rows],
            sizes=self.sizes[rows],
            originals=self.originals[rows],
            labels=self.labels[rows],
            files=[self.files[i] for i in rows],
        )

    def labelled(self) -> "Pixels":
        """Those whose label is known."""
        return self.select(np.flatnonzero(self.labels >= 0))

    def squares(self, size: int) -> UInt8[Tensor, "n C size size"]:
        """What evaluation sees: the shorter side brought to `size` px (bicubic, antialiased; also upwards), the
        centre cut out.

        Differs: official k-NN and linear evaluation bring it to 256 px and keep the 224 px in the centre; logistic
            regression has 224 px for both, as here, but rounds otherwise: the square may lie a pixel beside ours.
        """
        result = np.empty((len(self), self.channels, size, size), dtype=np.uint8)
        for i, row in enumerate(result):
            image = self.image(i)
            row[:] = image if image.shape == row.shape else by_pillow(image, partial(square, size=size))
        return torch.from_numpy(result)

    def whole(self, size: int, boxes: Int64[np.ndarray, "n 4"] | None = None) -> UInt8[Tensor, "n C size size"]:
        """Every picture squeezed into a square of `size` px, with nothing cut off (bicubic, antialiased).

        Args:
            boxes: left, top, right, bottom in px; given, only this part of each picture.
        """
        result = np.empty((len(self), self.channels, size, size), dtype=np.uint8)
        for i, row in enumerate(result):
            image = self.image(i)
            if boxes is not None:
                left, top, right, bottom = boxes[i].tolist()
                image = image[:, top:bottom, left:right]
            row[:] = by_pillow(image, lambda picture: picture.resize((size, size), Image.Resampling.BICUBIC))
        return torch.from_numpy(result)


def some(n: int, at_most: int) -> np.ndarray:
    """Evenly spread rows, so that sorted classes are all there."""
    return np.unique(np.linspace(0, n - 1, min(n, at_most)).astype(int))


def by_pillow(
    image: UInt8[np.ndarray, "C H W"], change: Callable[[Image.Image], Image.Image]
) -> UInt8[np.ndarray, "C h w"]:
    """What Pillow makes of a picture; where it has not three channels, of each channel for itself."""
    if len(image) != 3:
        return np.stack([np.asarray(change(Image.fromarray(channel))) for channel in image])
    return np.asarray(change(Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0))))).transpose(2, 0, 1)


def inside_bars(image: UInt8[np.ndarray, "3 H W"]) -> Int64[np.ndarray, "4"]:
    """What opposite bars of one colour leave of a picture, as on a film that is shown on another screen.

    They are removed again and again until there are none, so that a picture between bars and the same picture without
    them are left alike, even where the picture's own plain background looks like bars.

    Returns:
        Left, top, right, bottom in px; all of the picture where nothing or little would be left.
    """
    height, width = image.shape[1:]
    left, right = _between_bars(image.transpose(2, 0, 1))
    top, bottom = _between_bars(image.transpose(1, 0, 2))
    if (bottom - top, right - left) == (height, width):
        return np.array([0, 0, width, height])
    return np.array([left, top, left, top]) + inside_bars(image[:, top:bottom, left:right])


def _between_bars(lines: UInt8[np.ndarray, "n 3 m"]) -> tuple[int, int]:
    """First line and end of those between two bars of one colour; all of them where there are no such bars."""
    colour = np.median(lines[[0, -1]], axis=(0, 2))[:, None]
    shown = np.flatnonzero(np.abs(lines - colour).mean(axis=(1, 2)) > NO_BAR)
    first, last = (int(shown[0]), int(shown[-1]) + 1) if len(shown) else (0, 0)
    barred = first > 0 and last < len(lines) and last - first > len(lines) / 4
    return (first, last) if barred else (0, len(lines))


def load_pixels(
    images: ImageSet,
    short_side: int,
    folder: str | Path | None = None,
    progress: bool = True,
    engine: Engine = LOCAL,
    channels: int = 3,
    warn: bool = True,
) -> Pixels:
    """Decode every picture once, shrunk to `short_side`; bad files go to the quarantine and the run goes on.

    Args:
        short_side: pixels; the shorter side is brought down to it (bicubic, antialiased), never up. The longer side
            follows, and is first cropped in the centre where it exceeds 4 times the shorter one.
        folder: where pixels.u8, pixels.json and quarantine.csv are written; the result is memory-mapped, and taken
            from there the next time, as long as files, their modification times and short_side agree. None: memory.
        engine: where files are decoded.
        channels: of a picture; other than 3: see `decode_channels`.
        warn: of pictures that are left out, when they are decoded; False where the caller tells of them.
    Raises:
        ValueError: no file at all, or none that decodes.
    Differs: the official code cuts crops from whole pictures, panoramas included; they are sharper where pictures are
        larger than short_side.
    """
    if not len(images) or short_side < 1:
        raise ValueError(f"nothing to load: {len(images)} files in {images.name}, short_side {short_side} px")
    how = short_side, progress, engine, channels, warn
    if folder is None:
        memory = io.BytesIO()
        kept, sizes, originals = _fill(memory, images, *how)
        data = np.frombuffer(memory.getbuffer(), dtype=np.uint8)
        return _laid_out(data, sizes, originals, images.select(kept), channels)
    folder = Path(folder)
    key = _pixels_key(images, short_side, channels)
    if stored := _open_pixels(folder, key, images, channels):
        return stored
    remove_litter(folder)
    with atomic_path(folder / "pixels.u8") as beside, open(beside, "wb") as file:
        kept, sizes, originals = _fill(file, images, *how, folder / "quarantine.csv")
        (folder / "pixels.json").unlink(missing_ok=True)  # else a crash here leaves it to describe the old pixels.u8
    note = {"key": key, "kept": kept, "sizes": sizes, "originals": originals}
    write_atomically(folder / "pixels.json", json.dumps(note).encode())
    data = np.memmap(folder / "pixels.u8", dtype=np.uint8, mode="r")  # another process may have removed the note again
    return _laid_out(data, sizes, originals, images.select(kept), channels)


def _fill(
    file: IO[bytes],
    images: ImageSet,
    short_side: int,
    progress: bool,
    engine: Engine,
    channels: int,
    warn: bool,
    quarantine: Path | None = None,
) -> tuple[list[int], list[tuple[int, int]], list[tuple[int, int]]]:
    """Append each decoded picture to the file, list the others in the quarantine.

    Returns: numbers of the decoded, their stored and their original (height, width).
    """
    kept, sizes, originals, bad = [], [], [], []
    for i, result in decode_each(images, partial(_small, short_side), progress, engine, channels):
        if isinstance(result, BadImage):
            bad.append({"file": images.files[i], "reason": str(result)})
            continue
        pixels, original = result
        file.write(pixels.data)
        kept.append(i)
        sizes.append(pixels.shape[1:])
        originals.append(original)
    if quarantine:
        write_quarantine(quarantine, bad)
    if not kept:
        first = f"{bad[0]['file']!r}: {bad[0]['reason']}"
        raise ValueError(f"none of the {len(bad)} files of {images.name} could be decoded; the first, {first}")
    lost = [f"{row['file']!r}: {row['reason']}" for row in bad if not row["file"].lower().endswith(SIDE_SUFFIXES)]
    if lost and warn:
        told = f"; all stand in {quarantine}" if quarantine else ""
        warnings.warn(f"{len(lost):,} of {len(images):,} files of {images.name} are left out, {lost[0]}{told}", stacklevel=3)
    return kept, sizes, originals


def _small(
    short_side: int, picture: Image.Image | UInt8[np.ndarray, "H W C"]
) -> tuple[UInt8[np.ndarray, "C H W"], tuple[int, int]]:
    """Pixels as they are stored, and the height and width before."""
    if isinstance(picture, np.ndarray):
        return by_pillow(picture.transpose(2, 0, 1), partial(shrink, short_side=short_side)), picture.shape[:2]
    pixels = np.ascontiguousarray(np.asarray(shrink(picture, short_side)).transpose(2, 0, 1))
    return pixels, (picture.height, picture.width)


def _laid_out(
    data: np.ndarray,
    sizes: Sequence[Sequence[int]],
    originals: Sequence[Sequence[int]],
    images: ImageSet,
    channels: int,
) -> Pixels:
    """Pixels of a flat array that holds the pictures end to end."""
    shapes = np.array(sizes, dtype=np.int64)
    n_bytes = channels * shapes.prod(axis=1)
    if n_bytes.sum() != data.size:
        raise ValueError(f"expected {n_bytes.sum():,} bytes of pixels, got {data.size:,}")
    before = np.array(originals, dtype=np.int64)
    offsets = np.cumsum(n_bytes) - n_bytes
    return Pixels(data, offsets, shapes, before, images.labels, images.classes, images.files, channels)


def _pixels_key(images: ImageSet, short_side: int, channels: int) -> str:
    """A fingerprint of everything the stored pixels depend on."""
    digest = hashlib.sha256(repr((FORMAT_VERSION, short_side, images.classes)).encode())
    digest.update(f"{channels} channels".encode() if channels != 3 else b"")
    changed: dict[str, tuple[int, bool]] = {}
    for name, place, label in zip(images.files, images.places, images.labels.tolist(), strict=True):
        if place.source not in changed:
            time = os.stat(place.source).st_mtime_ns if os.path.exists(place.source) else 0
            changed[place.source] = time, os.access(place.source, os.R_OK)
        digest.update(repr((name, tuple(place), label, changed[place.source])).encode())
    return digest.hexdigest()


def _open_pixels(folder: Path, key: str, images: ImageSet, channels: int) -> Pixels | None:
    """What an earlier run stored, if it is whole and the key agrees."""
    try:
        record = json.loads((folder / "pixels.json").read_bytes())
        if record["key"] != key:
            return None
        bad = {row["file"] for row in read_quarantine(folder / "quarantine.csv")}
        if bad != set(images.files).difference(images.files[i] for i in record["kept"]):  # a kill, before the new note
            return None
        data = np.memmap(folder / "pixels.u8", dtype=np.uint8, mode="r")
        return _laid_out(data, record["sizes"], record["originals"], images.select(record["kept"]), channels)
    except (OSError, ValueError, KeyError):
        return None
