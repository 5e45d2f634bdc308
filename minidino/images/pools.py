"""A pool as the world gives it: much of the common, little of the rare, copies of pictures, and junk.

    draw_pool(n_scenes), make_pool(pictures, ...)  -> Pool -> write_pool(pool, "pool.zip")

What each file is stands beside it, so that a curation can be judged.
"""

import io
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageFont, ImageOps

from minidino.images.scenes import KINDS, draw_some, scene_kinds
from minidino.runs import atomic_path

Picture = Image.Image


class Pool(NamedTuple):
    """Files in an order that says nothing."""

    names: list[str]
    files: list[bytes]  # PNG or JPEG
    made: list[str]  # "own", "junk", or the change that made a copy
    original: Int[np.ndarray, "n"]  # row that a copy was made from; of all others their own
    labels: Int[np.ndarray, "n"]  # -1 = junk


def draw_pool(
    n_scenes: int, copies: float = 0.25, junk: float = 0.1, tail: float = 1.0, size: int = 64, seed: int = 0
) -> Pool:
    """Make a pool of drawn scenes of uneven kinds.

    Args:
        n_scenes: different scenes.
        copies, junk: as for `make_pool`.
        tail: as for `long_tail`.
        size: px.
        seed: of the world of scenes and of everything else.
    """
    counts = long_tail(n_scenes, len(KINDS), tail)
    looked_at = int(counts.max() * len(KINDS) * 1.2) + 100
    while True:
        kinds = scene_kinds(np.arange(looked_at), seed)
        found = [np.flatnonzero(kinds == kind)[:count] for kind, count in enumerate(counts)]
        if all(len(rows) == count for rows, count in zip(found, counts)):
            break
        looked_at *= 2
    scenes = draw_some(np.sort(np.concatenate(found)), size, seed)
    return make_pool(scenes.images, scenes.labels, copies, junk, seed)


def long_tail(n: int, n_kinds: int, tail: float) -> Int[np.ndarray, "n_kinds"]:
    """Share n between kinds so that kind k gets 1 / (1 + k)^tail of what the first gets; 0 gives all the same."""
    share = (1.0 + np.arange(n_kinds)) ** -tail
    return np.diff(np.round(n * np.cumsum(share) / share.sum()), prepend=0).astype(np.int64)


def make_pool(
    images: Sequence[UInt8[np.ndarray, "H W 3"]], labels: Sequence[int], copies: float, junk: float, seed: int = 0
) -> Pool:
    """Add copies of some pictures, each change as often as the others, and junk; mix them.

    Args:
        images: pictures of their own; junk has the height of the first.
        labels: one for each.
        copies, junk: how many there are for each picture.
        seed: of what is copied, how, and of the order.
    """
    rng = np.random.default_rng(seed)
    pictures = [Image.fromarray(image) for image in images]
    n, size = len(pictures), pictures[0].height
    files, made, original, labels = [_png(p) for p in pictures], ["own"] * n, list(range(n)), [int(k) for k in labels]
    for i, row in enumerate(rng.integers(n, size=int(copies * n)).tolist()):
        change = list(CHANGES)[i % len(CHANGES)]
        files.append(CHANGES[change](pictures[row], rng))
        made.append(change)
        original.append(row)
        labels.append(labels[row])
    for i in range(int(junk * n)):
        original.append(len(files))
        files.append(_png(JUNK[i % len(JUNK)](size, rng)))
        made.append("junk")
        labels.append(-1)
    order = rng.permutation(len(files))
    files, made = [files[row] for row in order], [made[row] for row in order]
    numbers = rng.choice(2**32, len(files), replace=False)
    names = [f"{number:08x}.{'jpg' if file[:2] == JPEG else 'png'}" for number, file in zip(numbers, files)]
    return Pool(names, files, made, np.argsort(order)[np.array(original)[order]], np.array(labels)[order])


def write_pool(pool: Pool, path: str | Path) -> Path:
    """Put the files into one zip archive, the names alone."""
    path = Path(path)
    with atomic_path(path) as beside, zipfile.ZipFile(beside, "w") as archive:
        for name, file in zip(pool.names, pool.files, strict=True):
            archive.writestr(zipfile.ZipInfo(name), file)  # a fixed date: the same pool, the same bytes
    return path


# -- copies ------------------------------------------------------------------------------------------------------------

JPEG = b"\xff\xd8"  # what such files begin with


def _png(picture: Picture, compress_level: int = 6) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=compress_level)
    return buffer.getvalue()


def _jpeg(picture: Picture, quality: int) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def _resized(picture: Picture, rng: np.random.Generator) -> Picture:
    side = int(picture.width * rng.uniform(0.5, 0.9))
    return picture.resize((side, side), Image.Resampling.BICUBIC)


def _cropped(picture: Picture, rng: np.random.Generator) -> Picture:
    side = int(picture.width * rng.uniform(0.75, 0.9))
    left, top = rng.integers(picture.width - side + 1, size=2).tolist()
    return picture.crop((left, top, left + side, top + side))


def _recolored(picture: Picture, rng: np.random.Generator) -> Picture:
    for enhance in (ImageEnhance.Color, ImageEnhance.Brightness, ImageEnhance.Contrast):
        picture = enhance(picture).enhance(rng.uniform(0.6, 1.5))
    return picture


def _written(picture: Picture, rng: np.random.Generator) -> Picture:
    picture = picture.copy()
    font = ImageFont.load_default(picture.width // 5)
    corner = (int(rng.integers(picture.width // 3)), int(rng.integers(picture.width * 3 // 4)))
    ImageDraw.Draw(picture).text(corner, "minidino", _color(rng), font)
    return picture


CHANGES: dict[str, Callable[[Picture, np.random.Generator], bytes]] = {
    "exact": lambda picture, rng: _png(picture),
    "other bytes": lambda picture, rng: _png(picture, 1),
    "jpeg": lambda picture, rng: _jpeg(picture, int(rng.integers(25, 70))),
    "resized": lambda picture, rng: _png(_resized(picture, rng)),
    "cropped": lambda picture, rng: _png(_cropped(picture, rng)),
    "mirrored": lambda picture, rng: _png(ImageOps.mirror(picture)),
    "blurred": lambda picture, rng: _png(picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.5, 1.5)))),
    "recolored": lambda picture, rng: _png(_recolored(picture, rng)),
    "written": lambda picture, rng: _png(_written(picture, rng)),
    "framed": lambda picture, rng: _png(ImageOps.expand(picture, int(rng.integers(3, 10)), _color(rng))),
}


# -- junk --------------------------------------------------------------------------------------------------------------


def _color(rng: np.random.Generator) -> tuple[int, ...]:
    return tuple(rng.integers(256, size=3).tolist())


def _flat(size: int, rng: np.random.Generator) -> Picture:
    return Image.new("RGB", (size, size), _color(rng))


def _gradient(size: int, rng: np.random.Generator) -> Picture:
    ramp = np.linspace(0, 1, size)[:, None, None] * rng.integers(256, size=3) + np.zeros((size, size, 3))
    return Image.fromarray(ramp.astype(np.uint8)).rotate(90 * int(rng.integers(4)))


def _static(size: int, rng: np.random.Generator) -> Picture:
    return Image.fromarray(rng.integers(256, size=(size, size, 3), dtype=np.uint8))


def _page(size: int, rng: np.random.Generator) -> Picture:
    picture = Image.new("RGB", (size, size), "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(max(size // 8, 6))
    for top in range(int(rng.integers(size // 8)), size, size // 6):
        pen.text((2, top), "".join(chr(c) for c in rng.integers(97, 123, size=12)), "black", font)
    return picture


def _plot(size: int, rng: np.random.Generator) -> Picture:
    picture = Image.new("RGB", (size, size), "white")
    pen = ImageDraw.Draw(picture)
    pen.line([(size // 8, size // 8), (size // 8, size - size // 8), (size - size // 8, size - size // 8)], "black")
    heights = np.cumsum(rng.normal(size=size // 4))
    heights = (heights - heights.min()) / max(np.ptp(heights), 1e-9) * size * 0.7 + size * 0.12
    pen.line(list(zip(np.linspace(size // 8, size * 7 // 8, size // 4).tolist(), heights.tolist())), _color(rng))
    return picture


JUNK = (_flat, _gradient, _static, _page, _plot)
