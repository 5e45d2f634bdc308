"""The sets that torchvision knows by name, brought into the one form that others have: a zip of class folders."""

import io
import shutil
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from minidino.runs import alone_in, atomic_path, expanded

DOWNLOADS = {  # what must lie under data_root if there is no internet
    "cifar10": ["cifar-10-python.tar.gz"],
    "stl10": ["stl10_binary.tar.gz"],
    "imagenette": ["imagenette2-160.tgz"],
    "pets": ["oxford-iiit-pet/images.tar.gz", "oxford-iiit-pet/annotations.tar.gz"],
}
UNPACKED = {  # the last folder that torchvision makes of them; it takes most of these for the whole if they are there
    "cifar10": "cifar-10-batches-py", "stl10": "stl10_binary", "imagenette": "imagenette2-160",
    "pets": "oxford-iiit-pet/annotations",
}  # fmt: skip
PETS_SPLITS = {"train": "trainval", "val": "test"}
IMAGENETTE = {"train": 9469, "val": 3925}  # pictures


def dataset_names() -> list[str]:
    """The names that open_images and download understand."""
    return list(DOWNLOADS)


def download(name: str, root: str | Path) -> Path:
    """Fetch a named set through torchvision, once, into root/<name>.zip (train/<class>/..., val/<class>/...).

    Pictures that come as files keep their bytes; CIFAR-10 and STL-10 come as arrays and are stored as PNG.
    Imagenette is the 160 px edition. STL-10 brings its 100,000 unlabelled pictures.

    Raises:
        ValueError: unknown name; a folder that somebody has unpacked in part.
        BlockingIOError: another process is fetching sets there.
        ConnectionError: the download failed; says which file to put where.
    """
    if name not in DOWNLOADS:
        raise ValueError(f"no set called {name!r}; known: {dataset_names()}")
    root = expanded(root)
    target = root / f"{name}.zip"
    if target.exists():
        return target
    root.mkdir(parents=True, exist_ok=True)
    with alone_in(root):
        parts = _complete_parts(name, root)
        with atomic_path(target) as beside, zipfile.ZipFile(beside, "w", zipfile.ZIP_STORED) as archive:
            for split, pictures, labels, classes in parts:
                for i, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
                    where = f"{split}/{classes[label]}" if split != "unlabeled" else split
                    is_file = isinstance(picture, str | Path)
                    member = Path(picture).name if is_file else f"{i:06d}.png"
                    data = Path(picture).read_bytes() if is_file else _png(picture)
                    archive.writestr(f"{name}/{where}/{member}", data)
    return target


def _complete_parts(name: str, root: Path) -> list[tuple[str, Sequence[Any], Sequence[int], list[str]]]:
    """What `_torchvision_parts` gives, where all of it is there."""
    folder = root / UNPACKED[name]
    try:
        with _unpacking(folder):
            parts = _torchvision_parts(name, root)
    except Exception as error:  # torchvision raises whatever urllib, ssl, tarfile and its checksums raise
        if folder.exists():
            raise ValueError(f"{name} cannot be read ({error}); delete {folder} and run again") from error
        wanted = " and ".join(str(root / file) for file in DOWNLOADS[name])
        message = f"{name} could not be downloaded ({error}); put {wanted} there by hand and run again"
        raise ConnectionError(message) from error
    found = {split: len(pictures) for split, pictures, _, _ in parts}
    if name == "imagenette" and found != IMAGENETTE:  # unpacked by somebody else, who was killed
        raise ValueError(f"{folder}: expected {IMAGENETTE} pictures, got {found}; delete this folder and run again")
    return parts


@contextmanager
def _unpacking(folder: Path) -> Iterator[None]:
    """Remove what is unpacked in the block if that fails, and the next time if it is killed."""
    mark = folder.with_name(f".{folder.name}.unpacking")
    if mark.exists():
        shutil.rmtree(folder, ignore_errors=True)
    elif folder.exists():  # it was there before
        yield
        return
    mark.parent.mkdir(parents=True, exist_ok=True)
    mark.touch()
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        mark.unlink()


def _torchvision_parts(name: str, root: Path) -> list[tuple[str, Sequence[Any], Sequence[int], list[str]]]:
    """(split, pictures as arrays or paths, labels, class names) of each part of a named set; downloads what lacks."""
    from torchvision import datasets  # heavy, and needed for named sets only

    where = {"root": str(root), "download": True}
    if name == "cifar10":
        sets = {split: datasets.CIFAR10(train=split == "train", **where) for split in ("train", "val")}
        return [(split, s.data, s.targets, s.classes) for split, s in sets.items()]
    if name == "stl10":
        sets = {split: datasets.STL10(split=split, **where) for split in ("train", "test", "unlabeled")}
        return [(split, s.data.transpose(0, 2, 3, 1), s.labels.tolist(), s.classes) for split, s in sets.items()]
    if name == "pets":
        sets = {split: datasets.OxfordIIITPet(split=part, **where) for split, part in PETS_SPLITS.items()}
        return [(split, s._images, s._labels, s.classes) for split, s in sets.items()]
    sets = {split: datasets.Imagenette(split=split, size="160px", **where) for split in ("train", "val")}
    return [(split, *zip(*s._samples, strict=True), s.wnids) for split, s in sets.items()]


def _png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()
