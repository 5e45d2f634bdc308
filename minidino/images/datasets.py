"""Any pile of pictures becomes a list of files with labels: folders, archives, tar shards, torchvision's sets.

    open_images(path)  -> ImageSet    where every file lies, its label, its split; nothing is unpacked
    check_images(set)  -> dict        which files decode, and the reason for each that does not

Every regular file is a candidate, whatever its name. A file that is no picture is never dropped in silence and never
stops a run: it is listed in `quarantine.csv` with its reason.
"""

import csv
import hashlib
import io
import json
import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from tqdm import tqdm

from minidino.engine import LOCAL, Engine, spans
from minidino.images.archives import ARCHIVE_SUFFIXES, NOT_NOW, Place, archive_members, folder_files, read_place
from minidino.images.decode import BadImage, decode, decode_channels
from minidino.images.named import dataset_names, download
from minidino.runs import atomic_path, expanded, home_cache, write_atomically

IMAGE_SUFFIXES = tuple(".jpg .jpeg .jpe .png .gif .webp .bmp .tif .tiff .jp2 .ppm .pgm .avif .ico .qoi".split())
READABLE_SUFFIXES = (*IMAGE_SUFFIXES, ".npy")
SIDE_SUFFIXES = tuple(".txt .md .csv .tsv .json .jsonl .yaml .yml .xml .html .cls .pdf .log".split())
SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "val"}
UNLABELLED = {"unlabeled", "unlabelled"}  # such a folder beside train/ is training data without labels (STL-10)
FORMAT_VERSION = 3  # of the index and of pixels.json; raise it when their meaning changes


@dataclass(frozen=True, eq=False)
class ImageSet:
    """A list of files that may be pictures, with labels where the layout tells them; safe across threads and forks.

    files: names, sorted; relative to the folder, or as written in the archive.
    labels: (n,) int64, an index into `classes`; -1 = unknown.
    splits: (n,) str: "train", "val" or "".
    """

    name: str
    files: list[str]
    places: list[Place]
    labels: np.ndarray
    classes: list[str]
    splits: np.ndarray

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> bytes:
        """The bytes of one file. Raises BadImage where they cannot be had (damaged archive, no permission)."""
        return read_place(self.places[index])

    def image(self, index: int) -> Image.Image:
        """One upright RGB picture. Raises BadImage with the reason."""
        return decode(self.read(index))

    def array(self, index: int, channels: int) -> UInt8[np.ndarray, "H W C"]:
        """One picture of another number of channels; see `decode_channels`. Raises BadImage with the reason."""
        return decode_channels(self.read(index), channels)

    def select(self, indices: Sequence[int] | np.ndarray) -> "ImageSet":
        """The same set with these files only, in this order."""
        rows = np.arange(len(self))[indices]
        return replace(
            self,
            files=[self.files[i] for i in rows],
            places=[self.places[i] for i in rows],
            labels=self.labels[rows],
            splits=self.splits[rows],
        )

    def split(self, name: str) -> "ImageSet":
        """The files of one split, "train" or "val" (test folders count as "val")."""
        rows = np.flatnonzero(self.splits == name)
        if not len(rows):
            known = sorted(set(self.splits.tolist()) - {""}) or "none"
            raise ValueError(f"{self.name} has no split {name!r}; splits found: {known}")
        return self.select(rows)


def open_images(path: str | Path, cache_dir: str | Path | None = None, data_root: str | Path | None = None) -> ImageSet:
    """List every file of a folder, archive or named set, and read labels and splits off its layout.

    Recognised by looking: a manifest.csv of `minidino curate`, of which the kept pictures are taken; a folder of files
    (nested or not); a folder per class, also under train/ and val/; a zip or tar(.gz) of either; a folder of archives
    (nested or not) without a picture beside them, opened as one set; webdataset shards (`000000.tar` with `key.jpg` and
    `key.cls` or `key.json`). Archives beside pictures stay closed, with a warning. The rule for labels is
    `folder_labels`.

    Args:
        path: file or folder, or one of `dataset_names()`, which is downloaded first.
        cache_dir: where the index is kept, if it can be written (default $XDG_CACHE_HOME/minidino, or else
            ~/.cache/minidino). It is rebuilt when a path, a size or a modification time changes. A compressed tar is
            unpacked there to a plain one, once.
        data_root: where named sets are downloaded to; default cache_dir/data.
    Raises:
        FileNotFoundError: nothing at that path, or an empty folder.
        ValueError: the archive cannot be read at all.
    """
    cache = expanded(cache_dir or home_cache())
    root = expanded(path)
    if not root.exists() and str(path) in dataset_names():
        root = download(str(path), data_root or cache / "data")
    if not root.exists():
        raise FileNotFoundError(f"no file or folder {root}; give a path, or one of {dataset_names()}")
    root = root.resolve()
    if root.suffix == ".csv" and root.is_file():
        return _open_manifest(root, cache_dir, data_root)
    found = folder_files(root)
    if not found:
        raise FileNotFoundError(f"no files in {root}")
    if closed := _closed(root, [name for name, _, _ in found]):
        told = f"archives beside pictures stay closed, {closed[0]!r} for one of {len(closed)}"
        warnings.warn(f"{told}: to see into them give one of them, or a folder of archives alone", stacklevel=2)
    key = hashlib.sha256(repr([FORMAT_VERSION, str(root), found]).encode()).hexdigest()
    index = cache / f"index-{hashlib.sha256(os.fsencode(root)).hexdigest()[:16]}.jsonl"
    stored = _read_index(index, key)
    rows, classes = stored or _build_index(root, found, cache)
    if not stored and not any(place.reason.startswith(NOT_NOW) for _, place, _, _ in rows):
        with suppress(OSError):  # it only saves time
            _write_index(index, key, rows, classes)
    number = {name: i for i, name in enumerate(classes)}
    return ImageSet(
        name=root.name,
        files=[row[0] for row in rows],
        places=[row[1] for row in rows],
        labels=np.array([number.get(row[2], -1) for row in rows], dtype=np.int64),
        classes=classes,
        splits=np.array([row[3] for row in rows], dtype="<U5"),
    )


def _open_manifest(path: Path, cache_dir: str | Path | None, data_root: str | Path | None) -> ImageSet:
    """The pictures that a curation kept, from the pool that curation.json beside the manifest names."""
    note = path.with_name("curation.json")
    if not note.exists():
        raise FileNotFoundError(f"no {note}: a manifest is read together with the curation.json written beside it")
    images = open_images(json.loads(note.read_bytes())["pool"], cache_dir, data_root)
    with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:  # Excel puts a mark first
        table = csv.DictReader(file)
        rows, columns = list(table), table.fieldnames
    if not {"file", "kept"} <= set(columns or ()):
        raise ValueError(f"{path} is no manifest: expected columns file and kept, got {columns}")
    number = {name: i for i, name in enumerate(images.files)}
    kept = [row["file"] for row in rows if row["kept"] == "1"]
    lost = [name for name in kept if name not in number]
    if lost:
        raise ValueError(f"{len(lost)} of {len(kept)} kept files are no longer in {images.name}, such as {lost[0]!r}")
    return images.select([number[name] for name in kept])


def folder_labels(files: Sequence[str]) -> tuple[list[str | None], list[str]]:
    """Read labels and splits off paths alone.

    1. Files with an image suffix decide (if there are none, all but text files); the others follow.
    2. Leading folders that all of them share are wrappers and are dropped.
    3. If the next folders are all called train, val, valid, test ..., or two different splits are among them, that
       level is the split; what lies in other folders beside them (annotations) stays without split and label.
    4. Within each split, folders are classes if all pictures lie equally deep, in at least two different folders, and
       no deepest name comes twice (2023/01 and 2024/01 are dates, not classes). Levels with one value, such as
       `images/` inside each class, do not count. The label is the deepest folder that counts.

    Returns: one label or None for each file, one of "train", "val", "" for each file.
    """
    folders = [tuple(name.split("/")[:-1]) for name in files]
    voters = _voters(files)
    depth = 0
    while len(level := {folders[i][depth : depth + 1] for i in voters}) == 1:
        (name,) = level
        if not name or name[0].lower() in SPLITS:
            break
        depth += 1
    names = {name[0].lower() for name in level if name}
    by_split = names <= SPLITS.keys() | UNLABELLED or len({SPLITS[n] for n in names if n in SPLITS}) == 2
    words = [f[depth].lower() if by_split and len(f) > depth else "" for f in folders]
    words = [word if word in SPLITS or word in UNLABELLED else "" for word in words]
    labels: list[str | None] = [None] * len(files)
    for word in set(words) - UNLABELLED - ({""} if by_split else set()):
        inner = {i: folders[i][depth + bool(word) :] for i, w in enumerate(words) if w == word}
        for i, label in _classes_of(inner, [i for i in voters if words[i] == word]).items():
            labels[i] = label
    return labels, [SPLITS.get(word, "train" if word in UNLABELLED else "") for word in words]


def _voters(files: Sequence[str]) -> list[int]:
    """The files whose place decides what the folders mean (macOS resource forks have image names and are none)."""
    plain = [i for i, f in enumerate(files) if "__MACOSX" not in f and not f.rsplit("/", 1)[-1].startswith("._")]
    images = [i for i in plain if files[i].lower().endswith(IMAGE_SUFFIXES)]
    return images or [i for i in plain if not files[i].lower().endswith(SIDE_SUFFIXES + ARCHIVE_SUFFIXES)]


def _classes_of(inner: dict[int, tuple[str, ...]], voters: list[int]) -> dict[int, str]:
    """Step 4 of folder_labels: file number -> label, empty where the folders are not classes."""
    depths = {len(inner[i]) for i in voters}
    if len(depths) != 1:
        return {}
    (depth,) = depths
    levels = [k for k in range(depth) if len({inner[i][k] for i in voters}) > 1]
    if not levels:
        return {}
    parents: dict[str, set[tuple[str, ...]]] = {}
    for i in voters:
        kept = [inner[i][k] for k in levels]
        parents.setdefault(kept[-1], set()).add(tuple(kept[:-1]))
    if any(len(above) > 1 for above in parents.values()):
        return {}
    found = {i: names[levels[-1]] for i, names in inner.items() if len(names) == depth}
    return {i: label for i, label in found.items() if label in parents}


def _archives(names: Sequence[str]) -> list[str]:
    return [name for name in names if name.lower().endswith(ARCHIVE_SUFFIXES)]


def _closed(root: Path, names: Sequence[str]) -> list[str]:
    """The archives of a folder that also holds pictures: there they are but files that are no pictures."""
    pictures = any(name.lower().endswith(READABLE_SUFFIXES) for name in names)
    return _archives(names) if root.is_dir() and pictures else []


Row = tuple[str, Place, str | None, str]  # file, place, label, split


def _build_index(root: Path, found: list[tuple[str, int, int]], cache: Path) -> tuple[list[Row], list[str]]:
    """One pass over folder and archives."""
    names = [name for name, _, _ in found]
    archives = set() if _closed(root, names) else set(_archives(names) if root.is_dir() else names)
    files, places, owners = [], [], []
    for name, size, _ in found:
        source = root / name if name else root
        here = [(name, Place(str(source), "file", size))] if name not in archives else archive_members(source, cache)
        for member, place in here:
            files.append(member)
            places.append(place)
            owners.append(name if name in archives else "")
    if not root.is_dir() and all(place.kind == "bad" for place in places):
        wanted = "" if _archives([root.name]) else "expected a folder, a zip or tar archive, or a manifest.csv; "
        raise ValueError(f"{root} cannot be opened: {wanted}{places[0].reason if places else 'the archive is empty'}")
    labels, splits = folder_labels(files)
    for i, value in _shard_labels(files, places).items():
        labels[i] = value
    for i, owner in enumerate(owners):
        hints = [SPLITS[word] for word in re.split(r"[^a-z]+", owner.lower()) if word in SPLITS]
        splits[i] = splits[i] or (hints[-1] if hints else "")
    if len(set(files)) < len(files):  # equal names in several archives: the archive's name tells them apart
        files = [f"{owner}/{name}" if owner else name for owner, name in zip(owners, files, strict=True)]
    rows = sorted(zip(_told_apart(files), places, labels, splits, strict=True), key=lambda row: row[0])
    known = {label for label in labels if label is not None}
    return rows, sorted(known, key=lambda label: (0, int(label), label) if label.isdecimal() else (1, 0, label))


def _told_apart(names: list[str]) -> list[str]:
    """A name that one archive holds again gets a number: a.jpg, a#2.jpg, a#3.jpg."""
    taken, numbers, found = set(names), {}, []
    for name in names:
        if name in numbers:
            stem, suffix = os.path.splitext(name)
            free = (new for i in numbers[name] if (new := f"{stem}#{i}{suffix}") not in taken)
            found.append(next(free))
        else:
            numbers[name] = count(2)
            found.append(name)
    return found


def _shard_labels(files: list[str], places: list[Place]) -> dict[int, str]:
    """Webdataset labels, for files of tars only: `key.cls`, else "label", "cls" or "class" in `key.json`."""

    def key(i: int) -> tuple[str, str]:
        folder, _, base = files[i].rpartition("/")
        return places[i].source, f"{folder}/{base.split('.', 1)[0]}"

    in_tar = [i for i, place in enumerate(places) if place.kind == "tar"]
    told: dict[tuple[str, str], str] = {}
    for suffix in (".json", ".cls"):  # .cls comes last and wins
        for i in in_tar:
            with suppress(BadImage):  # cut short: the quarantine will list it
                if files[i].endswith(suffix) and (label := _label_in(read_place(places[i]), suffix)):
                    told[key(i)] = label
    return {i: told[key(i)] for i in in_tar if told and not files[i].endswith(SIDE_SUFFIXES) and key(i) in told}


def _label_in(data: bytes, suffix: str) -> str:
    """The label written in a .cls or .json file of a shard, "" if there is none."""
    text = data[:1_000_000].decode("utf-8", "replace").strip()
    if suffix == ".cls":
        return text
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        return ""
    values = [record[name] for name in ("label", "cls", "class") if name in record] if isinstance(record, dict) else []
    return str(values[0]) if values and isinstance(values[0], int | str) else ""


def _read_index(path: Path, key: str) -> tuple[list[Row], list[str]] | None:
    """The stored index, or None when there is none or it describes something else."""
    try:
        with open(path, encoding="ascii") as lines:
            head = json.loads(next(lines))
            if head["key"] != key:
                return None
            rows = [json.loads(line) for line in lines]
        places = [Place(*row["place"]) for row in rows]
        tars = {place.source for place in places if place.kind == "tar"}  # unpacked ones may be gone from the cache
        if len(rows) != head["n"] or not all(map(os.path.exists, tars)):
            return None
        listed = zip(rows, places, strict=True)
        return [(row["file"], place, row["label"], row["split"]) for row, place in listed], head["classes"]
    except (OSError, ValueError, KeyError, TypeError, StopIteration):
        return None


def _write_index(path: Path, key: str, rows: list[Row], classes: list[str]) -> None:
    with atomic_path(path) as beside, open(beside, "wb") as file:
        file.write(json.dumps({"key": key, "n": len(rows), "classes": classes}).encode() + b"\n")
        for name, place, label, split in rows:
            row = {"file": name, "place": place, "label": label, "split": split}
            file.write(json.dumps(row).encode() + b"\n")


def check_images(images: ImageSet, progress: bool = True, channels: int = 3) -> dict[str, Any]:
    """Decode every file once and say which fail, and why.

    Returns:
        {"decoded": count, "quarantined": [{"file", "reason"}, ...]}; the count and the list add up to len(images).
    Raises:
        ValueError: fewer channels than one.
    """
    if channels < 1:
        raise ValueError(f"channels: expected at least 1, got {channels}")
    decoded = decode_each(images, lambda picture: True, progress, channels=channels)
    rows = [{"file": images.files[i], "reason": str(bad)} for i, bad in decoded if isinstance(bad, BadImage)]
    return {"decoded": len(images) - len(rows), "quarantined": rows}


def write_quarantine(path: str | Path, rows: list[dict[str, str]]) -> None:
    """Write quarantine.csv: columns file, reason. Names with line feeds, quotes or undecodable bytes survive."""
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, ["file", "reason"])
    table.writeheader()
    table.writerows(rows)
    write_atomically(Path(path), text.getvalue().encode("utf-8", "surrogateescape"))


def read_quarantine(path: str | Path) -> list[dict[str, str]]:
    """What `write_quarantine` wrote."""
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


def decode_each(
    images: ImageSet, work: Callable[[Any], Any], progress: bool, engine: Engine = LOCAL, channels: int = 3
) -> Iterator[tuple[int, Any]]:
    """Decode on threads; yield, in order, the number of each file and work(picture), or the BadImage it raised.

    Pictures are those of Pillow, and arrays (H, W, C) where C is not 3.
    """
    decoding = partial(_decode_span, images, work, engine.threads, channels)
    chunks = spans(len(images), 64 * engine.threads)  # bounds what is decoded ahead of its consumer
    with tqdm(total=len(images), unit=" images", disable=not progress) as bar:
        for (start, _), results in zip(chunks, engine.map(decoding, chunks), strict=True):
            for i, result in enumerate(results, start):
                yield i, result
                bar.update()


def _decode_span(
    images: ImageSet, work: Callable[[Any], Any], threads: int, channels: int, start: int, stop: int
) -> list[Any]:
    def one(i: int) -> Any:
        try:
            return work(images.image(i) if channels == 3 else images.array(i, channels))
        except BadImage as reason:
            return reason

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(one, range(start, stop)))
