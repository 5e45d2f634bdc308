"""The sets that torchvision knows by name, brought into the one form that others have: a zip of class folders."""

import io
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from minidino.runs import atomic_path, expanded

DOWNLOADS = {  # what must lie under data_root if there is no internet
    "cifar10": ["cifar-10-python.tar.gz"],
    "stl10": ["stl10_binary.tar.gz"],
    "imagenette": ["imagenette2-160.tgz"],
    "pets": ["oxford-iiit-pet/images.tar.gz", "oxford-iiit-pet/annotations.tar.gz"],
}
PETS_SPLITS = {"train": "trainval", "val": "test"}
IMAGENETTE = {"train": 9469, "val": 3925}  # pictures; torchvision takes any folder of that name for the whole


def dataset_names() -> list[str]:
    """The names that open_images and download understand."""
    return list(DOWNLOADS)


def download(name: str, root: str | Path) -> Path:
    """Fetch a named set through torchvision, once, into root/<name>.zip (train/<class>/..., val/<class>/...).

    Pictures that come as files keep their bytes; CIFAR-10 and STL-10 come as arrays and are stored as PNG.
    Imagenette is the 160 px edition. STL-10 brings its 100,000 unlabelled pictures.

    Raises:
        ValueError: unknown name; a folder of Imagenette that was unpacked in part.
        ConnectionError: the download failed; says which file to put where.
    """
    if name not in DOWNLOADS:
        raise ValueError(f"no set called {name!r}; known: {dataset_names()}")
    root = expanded(root)
    target = root / f"{name}.zip"
    if target.exists():
        return target
    root.mkdir(parents=True, exist_ok=True)
    try:
        parts = _torchvision_parts(name, root)
    except Exception as error:  # torchvision raises whatever urllib, ssl, tarfile and its checksums raise
        wanted = " and ".join(str(root / file) for file in DOWNLOADS[name])
        message = f"{name} could not be downloaded ({error}); put {wanted} there by hand and run again"
        raise ConnectionError(message) from error
    found = {split: len(pictures) for split, pictures, _, _ in parts}
    if name == "imagenette" and found != IMAGENETTE:  # an unpacking was killed
        folder = root / Path(DOWNLOADS[name][0]).stem
        raise ValueError(f"{folder}: expected {IMAGENETTE} pictures, got {found}; delete this folder and run again")
    with atomic_path(target) as beside, zipfile.ZipFile(beside, "w", zipfile.ZIP_STORED) as archive:
        for split, pictures, labels, classes in parts:
            for i, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
                where = f"{split}/{classes[label]}" if split != "unlabeled" else split
                is_file = isinstance(picture, str | Path)
                member = Path(picture).name if is_file else f"{i:06d}.png"
                data = Path(picture).read_bytes() if is_file else _png(picture)
                archive.writestr(f"{name}/{where}/{member}", data)
    return target


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
