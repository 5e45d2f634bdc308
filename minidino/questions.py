"""What is asked about: pictures with labels, groups, queries, or a truth for every pixel, opened and described once.

    open_question("labelled" | "grouped" | "segmentation" | "depth", ...) -> the pictures, and what to say of them
"""

import csv
import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minidino.config import CropConfig, RunConfig
from minidino.images.archives import short_hash
from minidino.images.datasets import READABLE_SUFFIXES, ImageSet, open_images
from minidino.images.pairs import Loaded, Pairs, load_pairs, open_pairs
from minidino.images.pixels import Pixels, load_pixels
from minidino.probes.retrieval import Query, query_pictures, read_ground_truth
from minidino.stages import open_world
from minidino.subjects import Cache, Subject, fingerprint

Answers = dict[str, dict[str, Any]]  # {subject: what was found}
Size = int | tuple[int, int]  # px: of a square, or height and width
MOST_SCENES = 2000  # drawn scenes whose pixels are learned from


# ---------------------------------------------------------------- whole pictures


@dataclass(frozen=True, kw_only=True)
class Described:
    """Pictures that each subject describes once; `name` tells them from all others, together with their pixels.

    whole: squeezed into the square, so that nothing at a border is lost, instead of cut to it.
    """

    name: str
    pixels: Pixels
    size: int
    cache: Cache
    whole: bool = False

    @cached_property
    def key(self) -> str:
        return f"{self.name} {self.pixels.fingerprint()}" + (" whole" if self.whole else "")

    def features(self, subject: Subject) -> dict[str, Tensor]:
        """Descriptions of all pictures, (n, ...) each, from the cache or computed now."""
        squares = self.pixels.whole if self.whole else self.pixels.squares
        found = self.cache.whole(subject, self.key, self.size, lambda: squares(self.size))
        return {name: torch.from_numpy(np.array(x)) for name, x in found.items()}

    def tokens(self, subject: Subject) -> Tensor:
        """Class tokens of the last block."""
        return self.features(subject)["cls_blocks"][:, -1]


@dataclass(frozen=True)
class Labelled:
    """Labelled pictures for learning and for judging.

    slices: {column of a table: what it says of each held-out picture, "" = nothing}. shifted: pictures of the same
    classes from elsewhere, by name; their labels count these classes.
    """

    train: Described
    test: Described
    slices: dict[str, list[str]] = field(default_factory=dict)
    shifted: dict[str, Described] = field(default_factory=dict)

    def rows(self, subject: Subject) -> tuple[Tensor, np.ndarray, Tensor, np.ndarray]:
        """Last class tokens and labels, for learning and for judging."""
        train, test = self.train, self.test
        return train.tokens(subject), train.pixels.labels, test.tokens(subject), test.pixels.labels


def read_slices(path: str | Path, files: list[str]) -> dict[str, list[str]]:
    """What a table says of each picture.

    Args:
        path: CSV in UTF-8, columns file and one or more others, such as region and income; a file is named as in the set,
            without suffix, or without folder as well.
        files: names of the pictures.
    Returns:
        {column: the value of each picture, "" where the table does not name it}.
    Raises:
        FileNotFoundError: no such table.
        ValueError: none of the pictures in it, a name that several have, or a picture with two values.
    """
    try:
        rows = list(csv.DictReader(io.StringIO(Path(path).read_text(encoding="utf-8-sig")), restval=""))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected text in UTF-8, got {error}") from error
    columns = [name for name in rows[0] if name and name != "file"] if rows else []
    if not columns or "file" not in rows[0]:
        raise ValueError(f"{path}: expected a column file and at least one other, such as region")
    place = _rows_of([row["file"] for row in rows], files)
    if not place:
        raise ValueError(f"{path} names none of the {len(files)} held-out pictures, such as {files[0]}")
    found = {name: [""] * len(files) for name in columns}
    for row in rows:
        for name in columns if row["file"] in place else ():
            i, value = place[row["file"]], row[name].strip()
            if found[name][i] not in ("", value):
                raise ValueError(f"{path}: {row['file']} has two values of {name}, {found[name][i]} and {value}")
            found[name][i] = value
    return found


def _open_shifted(path: str, classes: list[str], size: int, short_side: int, cache: Cache, channels: int) -> Described:
    """Pictures from elsewhere, of the classes that have the same names."""
    images = open_images(path)
    pixels = load_pixels(images, short_side, cache.folder / f"pixels-{short_hash(path)}-{short_side}", channels=channels)
    number = {name: k for k, name in enumerate(classes)}
    known = np.array([number.get(name, -1) for name in pixels.classes] + [-1])  # the last for -1
    labels = known[pixels.labels]
    if not (labels >= 0).any():
        raise ValueError(f"{path} has no pictures in folders of the classes {', '.join(classes[:5])}{' ...' * (len(classes) > 5)}")
    if (labels < 0).any():
        warnings.warn(f"{(labels < 0).sum()} of {len(labels)} pictures of {path} are of no known class", stacklevel=2)
    return Described(name=images.name, pixels=replace(pixels, labels=labels, classes=classes), size=size, cache=cache)


# ---------------------------------------------------------------- things and places


@dataclass(frozen=True, kw_only=True)
class Grouped(Described):
    """Pictures of things and places; those with the same name show the same, and "" shows something else."""

    groups: list[str]


@dataclass(frozen=True)
class Landmarks:
    """A database of pictures, queries, whole and cut out, and what is to be found: the format of Oxford and Paris."""

    database: Described
    queries: dict[str, Described]
    truth: list[Query]


def open_landmarks(path: str, truth: str, size: int, cache: Cache, channels: int = 3) -> Landmarks:
    """The pictures that a ground-truth file names, as in the folder, without suffix, or without folder as well.

    Raises:
        ValueError: a picture that is not there or cannot be read, or a name that several have.
    """
    images, known = open_images(path), read_ground_truth(truth)
    number = _rows_of(known.files + known.query_files, images.files)
    absent = [name for name in known.files + known.query_files if name not in number]
    if absent:
        raise ValueError(f"{images.name} lacks {len(absent)} pictures of {truth}, such as {absent[0]}")
    loaded = []
    for names, side in ((known.files, 2), (known.query_files, 2), (known.query_files, 4)):  # boxes are cut from the last
        pixels = load_pixels(images.select([number[name] for name in names]), side * size, channels=channels)
        if len(pixels) < len(names):
            raise ValueError(f"{len(names) - len(pixels)} of {len(names)} pictures of {truth} cannot be read")
        loaded.append(pixels)
    about = {"name": images.name, "size": size, "cache": cache, "whole": True}
    cut = {"cropped": query_pictures(loaded[2], known.queries), "whole": loaded[1]}
    queries = {how: Described(pixels=pixels, **about) for how, pixels in cut.items()}
    return Landmarks(Described(pixels=loaded[0], **about), queries, known.queries)


def _rows_of(names: list[str], files: list[str]) -> dict[str, int]:
    """Which file each name means: the one called so, or so but for the suffix, or so but for suffix and folder."""
    ways = str, _without_suffix, lambda name: Path(_without_suffix(name)).name
    called: list[dict[str, list[int]]] = [{} for _ in ways]
    for i, file in enumerate(files):
        for way, rows in zip(ways, called, strict=True):
            rows.setdefault(way(file), []).append(i)
    found = {}
    for name in names:
        fitting = next((rows[way(name)] for way, rows in zip(ways, called, strict=True) if way(name) in rows), [])
        if len(fitting) > 1:
            raise ValueError(f"{name} may be {' or '.join(files[i] for i in fitting[:2])}: name it with its folder")
        found |= {name: i for i in fitting}
    return found


def _without_suffix(name: str) -> str:
    """A name without the suffix of a picture; what else stands behind a dot belongs to it."""
    return str(Path(name).with_suffix("")) if name.lower().endswith(READABLE_SUFFIXES) else name


def open_groups(path: str, size: int, cache: Cache, channels: int = 3) -> Grouped:
    """Pictures with a groups.csv (columns file and group) among them, or several, or a folder for each thing.

    Raises:
        ValueError: neither; a groups.csv that is no text or lacks these columns, or that names pictures which are not
            there; two of them that put one picture into two groups.
    """
    images = open_images(path)
    listed = [i for i, name in enumerate(images.files) if name.rsplit("/", 1)[-1] == "groups.csv"]
    if listed:
        groups: dict[str, str] = {}
        for i in listed:
            more = _read_groups(images, i)
            split = [name for name in groups.keys() & more.keys() if groups[name] != more[name]]
            if split:
                raise ValueError(f"{images.files[i]}: {min(split)} has another group in another groups.csv")
            groups |= more
        images = images.select([i for i, name in enumerate(images.files) if name in groups])
    elif (images.labels >= 0).any():
        groups = {f: images.classes[k] if k >= 0 else "" for f, k in zip(images.files, images.labels, strict=True)}
    else:
        raise ValueError(f"{images.name} has no groups.csv (columns file, group) and no folder for each thing")
    pixels = load_pixels(images, size, channels=channels)
    groups = [groups[name] for name in pixels.files]
    return Grouped(name=images.name, pixels=pixels, size=size, cache=cache, whole=True, groups=groups)


def _read_groups(images: ImageSet, index: int) -> dict[str, str]:
    folder = images.files[index].removesuffix("groups.csv")
    try:
        rows = list(csv.DictReader(io.StringIO(images.read(index).decode("utf-8-sig"))))
    except UnicodeDecodeError as error:
        raise ValueError(f"{images.files[index]}: expected text in UTF-8, got {error}") from error
    if not rows or not {"file", "group"} <= rows[0].keys():
        raise ValueError(f"{images.files[index]}: expected columns file and group")
    groups = {folder + row["file"]: row["group"] for row in rows}
    absent = sorted(groups.keys() - set(images.files))
    if absent:
        raise ValueError(f"{images.files[index]} names {len(absent)} pictures that are not there, such as {absent[0]}")
    return groups


# ---------------------------------------------------------------- pixels


@dataclass(frozen=True)
class Dense:
    """Pictures with a truth for every pixel."""

    pairs: Pairs
    train: Loaded
    test: Loaded
    cache: Cache

    @cached_property
    def keys(self) -> tuple[str, str]:
        parts = {"train": self.train, "test": self.test}
        return tuple(f"{self.pairs.name} {name} {fingerprint(part.images)}" for name, part in parts.items())

    def maps(self, subject: Subject, reading: str) -> tuple[Tensor, Tensor]:
        """Maps (n, C, Hp, Wp) of the training and of the held-out pictures, from the cache or computed now."""
        parts = zip(self.keys, (self.train, self.test), strict=True)
        return tuple(self.cache.maps(subject, key, part.images, reading) for key, part in parts)


def _open_dense(
    kind: str, data: str, size: Size | None, config: RunConfig | None, cache: Cache, depth_unit: float | None
) -> tuple[Dense, dict[str, Any]]:
    drawn = config.data if config else RunConfig().data
    few = min(drawn.n_scenes, MOST_SCENES), min(drawn.n_test_scenes, MOST_SCENES // 4)
    pairs = open_pairs(data, kind, depth_unit_m=depth_unit, n_scenes=few, seed=drawn.scene_seed)
    if pairs.layout == "scenes" and size is None and config:
        size = config.crops.global_size
    size = (size, size) if isinstance(size, int) else size
    train, test = (load_pairs(pairs, split, size) for split in ("train", pairs.held_out))
    left_out = train.left_out + test.left_out
    about = {"data": pairs.name, "n_train": len(train.names), "n_test": len(test.names),
             "size_px": list(train.images.shape[2:]), "left_out": left_out}  # fmt: skip
    return Dense(pairs, train, test, cache), about


# ---------------------------------------------------------------- any of them


def open_question(
    kind: str,
    data: str | None,
    size: Size | None,
    truth: str | None,
    config: RunConfig | None,
    cache: Cache,
    channels: int = 3,
    depth_unit: float | None = None,
    slices: str | None = None,
    shifted: Sequence[str] = (),
) -> tuple[Labelled | Grouped | Landmarks | Dense, dict[str, Any]]:
    """Open the pictures for one kind of question.

    Args:
        kind: "labelled", "grouped", "segmentation" or "depth".
        data, size, truth, depth_unit, slices, shifted: as for `minidino.evaluate.evaluate`.
        config: of the run that is asked; None: there is only a weights file.
        channels: of the pictures.
    Returns:
        The pictures, and what to say about them: names, counts, size.
    """
    data = data or config.data.source
    if size is not None and min(size if isinstance(size, tuple) else (size,)) < 1:
        raise ValueError(f"expected a size of at least 1 px, got {size}")
    if kind in ("segmentation", "depth"):
        return _open_dense(kind, data, size, config, cache, depth_unit)
    if isinstance(size, tuple):
        raise ValueError(f"whole pictures are looked at in squares: expected one number of px, got {size}")
    size = size or (config.crops.global_size if config else 224)
    if kind == "grouped":
        how = size, cache, channels
        found = open_landmarks(data, truth, *how) if truth else open_groups(data, *how)
        judged = found.database if truth else found
        return found, {"data": judged.name, "n_test": len(judged.pixels), "size_px": size}
    config = config or RunConfig(crops=CropConfig(saturation=0.0, hue=0.0, grayscale_probability=0.0))  # of no use here
    short_side = max(size, config.data.short_side)
    source = replace(config.data, source=data, pool="", short_side=short_side, channels=channels)
    store = cache.folder / f"pixels-{Path(data).stem}-{short_hash(data)}-{source.short_side}"
    world = open_world(replace(config, data=source), store)
    if world.test is None:
        raise ValueError(f"{world.name} has no labels: a folder per class is expected")
    about = {"data": world.name, "n_train": len(world.train), "n_test": len(world.test), "size_px": size}
    parts = (Described(name=f"{world.name} {part}", pixels=getattr(world, part), size=size, cache=cache)
             for part in ("train", "test"))  # fmt: skip
    tables = read_slices(slices, world.test.files) if slices else {}
    elsewhere = [_open_shifted(path, world.test.classes, size, short_side, cache, channels) for path in shifted]
    names = [other.name for other in elsewhere]
    names = [name if names.count(name) == 1 else path for name, path in zip(names, shifted, strict=True)]
    return Labelled(*parts, tables, dict(zip(names, elsewhere, strict=True))), about
