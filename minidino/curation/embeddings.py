"""Pictures become descriptors: one row each in a memory-mapped file, of a kind that says what they are good for.

    hash       a thumbnail                          the same picture in other bytes
    copy       a copy-detection network             copies: cropped, recoloured, written upon
    semantic   any network that knows what it sees  pictures of the same thing

The kinds are not interchangeable. Two photographs of one dog are near for a semantic network, and would be deleted as
copies; a copy and its original may be far apart for it.
"""

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from tqdm import tqdm

from minidino.engine import LOCAL, Engine, spans
from minidino.images.crops import normalise
from minidino.images.pixels import Pixels, inside_bars
from minidino.runs import named_errors, write_atomically

KINDS = ("hash", "copy", "semantic")
Part = tuple[float, float, float, float]  # left, top, right, bottom as shares of the sides
WHOLE: Part = (0.0, 0.0, 1.0, 1.0)
PARTS: tuple[Part, ...] = (  # what a copy may have been cut out of: all of it, three quarters of the sides, anywhere
    WHOLE, (0.0, 0.0, 0.75, 0.75), (0.25, 0.0, 1.0, 0.75), (0.0, 0.25, 0.75, 1.0), (0.25, 0.25, 1.0, 1.0),
    (0.125, 0.125, 0.875, 0.875),
)  # fmt: skip
Describe = Callable[[UInt8[Tensor, "n 3 S S"]], Float[Tensor, "n D"]]


class Descriptors(NamedTuple):
    """Rows of one kind, made by one describer."""

    rows: np.ndarray  # (N, D), memory-mapped
    kind: str
    made_by: str

    def expect(self, kind: str) -> np.ndarray:
        """The rows, where they are of the kind that a step needs.

        Raises:
            ValueError: they are of another kind.
        """
        if self.kind != kind:
            raise ValueError(
                f"expected {kind!r} descriptors, got {self.kind!r} ones made by {self.made_by}: semantic ones would "
                "delete different pictures of one thing, copy ones do not know what is alike"
            )
        return self.rows


def embed(
    pixels: Pixels,
    describe: Describe,
    size: int,
    path: str | Path,
    kind: str,
    made_by: str,
    dtype: str = "float16",
    chunk: int = 256,
    progress: bool = True,
    part: Part = WHOLE,
    engine: Engine = LOCAL,
) -> Descriptors:
    """Describe every picture once; a run that was stopped goes on where it was.

    Args:
        pixels: decoded pictures.
        describe: (n, 3, size, size) uint8 -> (n, D) float, row by row: the answer for a picture does not depend on
            the others.
        size: px, of what `seen` shows.
        path: of the .npy file; how far it has come stands beside it in a .json.
        kind: "hash", "copy" or "semantic".
        made_by: what fixes the describer, such as the hash of its weights.
        dtype: of the file, "float16", "float32" or "uint8".
        chunk: pictures at a time.
        part: of each picture, where copies are described.
        engine: where chunks are described.
    Raises:
        ValueError: another kind, or a descriptor that is not finite.
    """
    if kind not in KINDS:
        raise ValueError(f"expected a kind of {KINDS}, got {kind!r}")
    path, note = Path(path), Path(path).with_suffix(".json")
    key = repr((pixels.fingerprint(), size, kind, made_by, dtype, part))
    done, n_bytes = _done(path, note, key)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not done:
        note.unlink(missing_ok=True)  # else a crash here leaves it to describe the new rows
    with tqdm(total=len(pixels), initial=done, unit="images", desc=kind, disable=not progress, leave=False) as bar:
        describing = partial(_describe_span, pixels, describe, size, kind, part, dtype)
        chunks = spans(len(pixels), chunk, done)
        for (start, stop), found in zip(chunks, engine.map(describing, chunks, gpu=kind != "hash"), strict=True):
            if not np.isfinite(found).all():
                raise ValueError(f"{made_by} gives NaN or infinity for a picture of {pixels.files[start]!r} and after")
            n_bytes = _append(path, found, n_bytes, len(pixels))
            told = {"key": key, "kind": kind, "done": stop, "bytes": n_bytes}
            write_atomically(note, json.dumps(told).encode())
            bar.update(stop - start)
    return Descriptors(np.load(path, mmap_mode="r"), kind, made_by)


def _describe_span(
    pixels: Pixels, describe: Describe, size: int, kind: str, part: Part, dtype: str, start: int, stop: int
) -> np.ndarray:
    shown = seen(pixels.select(np.arange(start, stop)), size, kind, part)
    return describe(shown).numpy().astype(dtype)


def seen(pixels: Pixels, size: int, kind: str, part: Part = WHOLE) -> UInt8[Tensor, "n 3 size size"]:
    """Pictures as a describer of this kind is shown them: whole and squeezed, since a copy may have lost any side.

    Copies are looked for inside of plain bars, which say nothing about where a picture came from.
    """
    if kind != "copy":
        return pixels.whole(size)
    boxes = np.array([inside_bars(pixels.image(i)) for i in range(len(pixels))]).reshape(-1, 4)
    corner, sides = boxes[:, :2], boxes[:, 2:] - boxes[:, :2]
    cut = np.floor(corner + part[:2] * sides), np.ceil(corner + part[2:] * sides)
    return pixels.whole(size, np.concatenate(cut, axis=1).astype(np.int64))


def thumbnails(images: UInt8[Tensor, "n 3 S S"]) -> UInt8[Tensor, "n F"]:
    """Describe a small picture by its pixels: what `pca_hash` takes."""
    return images.flatten(1)


def network(module: nn.Module, batch_size: int = 64) -> Describe:
    """Describe pictures by what a network makes of them; a backbone gives its class token."""

    def describe(images: Tensor) -> Tensor:
        device = next(module.parameters()).device
        with torch.no_grad():
            return torch.cat([module(normalise(part.to(device))).float().cpu() for part in images.split(batch_size)])

    return describe


def _append(path: Path, found: np.ndarray, n_bytes: int, n_rows: int) -> int:
    """Write rows behind the first bytes of the file and say how many bytes it has now.

    A file, not a memory map: on a full disk that one kills the process instead of raising an error.
    """
    with named_errors(path), open(path, "r+b" if n_bytes else "wb") as file:
        file.truncate(n_bytes)
        file.seek(n_bytes)
        if not n_bytes:
            header = {"descr": found.dtype.str, "fortran_order": False, "shape": (n_rows, found.shape[1])}
            np.lib.format.write_array_header_1_0(file, header)
        file.write(np.ascontiguousarray(found).data)
        file.flush()
        os.fsync(file.fileno())
        return file.tell()


def _done(path: Path, note: Path, key: str) -> tuple[int, int]:
    """Rows and bytes that are safely in the file and belong to this key."""
    try:
        told = json.loads(note.read_bytes())
        whole = told["key"] == key and path.stat().st_size >= told["bytes"]
        return (told["done"], told["bytes"]) if whole else (0, 0)
    except (OSError, ValueError, KeyError, TypeError):
        return 0, 0
