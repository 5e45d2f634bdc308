"""Any pile of pictures in, uint8 pixels out: folders, archives, tar shards, torchvision's sets.

    open_images(path)  -> ImageSet    where every file lies, its label, its split; nothing is unpacked
    check_images(set)  -> dict        which files decode, and the reason for each that does not
    load_pixels(set)   -> Pixels      every picture decoded once, shrunk, in memory or in one memory-mapped file

Every regular file is a candidate, whatever its name. A file that is no picture is never dropped in silence and never
stops a run: it is listed in `quarantine.csv` with its reason.
"""

import csv
import gzip
import hashlib
import io
import json
import os
import re
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from minidino.images.decode import BadImage, decode, shrink, square

ARCHIVE_SUFFIXES = (".zip", ".tar", ".tgz", ".tar.gz")
IMAGE_SUFFIXES = tuple(".jpg .jpeg .jpe .png .gif .webp .bmp .tif .tiff .jp2 .ppm .pgm .avif .ico .qoi".split())
SIDE_SUFFIXES = tuple(".txt .md .csv .tsv .json .jsonl .yaml .yml .xml .html .cls .pdf .log".split())
SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "val"}
UNLABELLED = {"unlabeled", "unlabelled"}  # such a folder beside train/ is training data without labels (STL-10)
LARGEST_FILE = 1 << 29  # bytes; what is longer is no picture
WORKERS = min(8, os.cpu_count() or 1)  # threads: Pillow and zlib release the lock
FORMAT_VERSION = 1  # of the index and of pixels.json; raise it when their meaning changes


class Place(NamedTuple):
    """Where the bytes of one file lie. Each read opens the source anew: no handle is shared by threads or forks."""

    source: str  # the file itself, or the archive
    kind: str  # "file", "tar", "zip" (stored), "deflate" (zip, compressed) or "bad": cannot be read
    size: int  # bytes once unpacked
    offset: int = 0  # of the data in a tar, of the local header in a zip
    packed: int = 0  # bytes in the zip
    crc: int = 0  # zip only
    reason: str = ""  # why it is bad


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
        return _read(self.places[index])

    def image(self, index: int) -> Image.Image:
        """One upright RGB picture. Raises BadImage with the reason."""
        return decode(self.read(index))

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


# ---------------------------------------------------------------------------------------------- opening


def open_images(path: str | Path, cache_dir: str | Path | None = None, data_root: str | Path | None = None) -> ImageSet:
    """List every file of a folder, archive or named set, and read labels and splits off its layout.

    Recognised by looking: a folder of files (nested or not); a folder per class, also under train/ and val/; a zip or
    tar(.gz) of either; a folder that holds only archives, opened as one set; webdataset shards
    (`000000.tar` with `key.jpg` and `key.cls` or `key.json`). The rule for labels is `folder_labels`.

    Args:
        path: file or folder, or one of `dataset_names()`, which is downloaded first.
        cache_dir: where the index is kept (default ~/.cache/minidino). It is rebuilt when a path, a size or a
            modification time changes. A compressed tar is unpacked there to a plain one, once.
        data_root: where named sets are downloaded to; default cache_dir/data.
    Raises:
        FileNotFoundError: nothing at that path, or an empty folder.
        ValueError: the archive cannot be read at all.
    """
    cache = Path(cache_dir).expanduser() if cache_dir else Path.home() / ".cache" / "minidino"
    root = Path(path).expanduser()
    if not root.exists() and str(path) in dataset_names():
        root = download(str(path), data_root or cache / "data")
    if not root.exists():
        raise FileNotFoundError(f"no file or folder {root}; give a path, or one of {dataset_names()}")
    root = root.resolve()
    found = _walk(root)
    if not found:
        raise FileNotFoundError(f"no files in {root}")
    key = hashlib.sha256(repr([FORMAT_VERSION, str(root), found]).encode()).hexdigest()
    index = cache / f"index-{hashlib.sha256(os.fsencode(root)).hexdigest()[:16]}.jsonl"
    stored = _read_index(index, key)
    rows, classes = stored or _build_index(root, found, cache)
    if not stored:
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
    parents: dict[str, set[tuple[str, ...]]] = {}
    for i in voters if levels else []:
        kept = [inner[i][k] for k in levels]
        parents.setdefault(kept[-1], set()).add(tuple(kept[:-1]))
    if any(len(above) > 1 for above in parents.values()):
        return {}
    found = {i: inner[i][levels[-1]] for i in inner if levels and len(inner[i]) == depth}
    return {i: label for i, label in found.items() if label in parents}


def _walk(root: Path) -> list[tuple[str, int, int]]:
    """(relative name, bytes, modification time in ns) of every regular file below root; links are followed once."""
    if not root.is_dir():
        return [("", root.stat().st_size, root.stat().st_mtime_ns)]
    found, seen, todo = [], {_identity(root.stat())}, [""]
    while todo:
        folder = todo.pop()
        try:
            entries = sorted(os.scandir(root / folder), key=lambda entry: entry.name)
        except PermissionError:  # listed like a file, so that reading it gives the reason
            found.append((folder, 0, 0))
            continue
        for entry in entries:
            name = f"{folder}/{entry.name}" if folder else entry.name
            try:
                status = entry.stat()
            except OSError:  # a dangling link, likewise
                found.append((name, 0, 0))
                continue
            if stat.S_ISREG(status.st_mode):
                found.append((name, status.st_size, status.st_mtime_ns))
            elif stat.S_ISDIR(status.st_mode) and _identity(status) not in seen:
                seen.add(_identity(status))
                todo.append(name)
    return sorted(found)


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


Row = tuple[str, Place, str | None, str]  # file, place, label, split


def _build_index(root: Path, found: list[tuple[str, int, int]], cache: Path) -> tuple[list[Row], list[str]]:
    """One pass over folder and archives."""
    names = [name for name, _, _ in found]
    archives = [n for n in names if n.lower().endswith(ARCHIVE_SUFFIXES)] if root.is_dir() else names
    others = [n for n in names if n not in archives and not n.lower().endswith(SIDE_SUFFIXES)]
    if root.is_dir() and (others or any("/" in n for n in names)):
        archives = []  # an archive among pictures is just a file that is no picture
    files, places, owners = [], [], []
    for name, size, _ in found:
        source = root / name if name else root
        members = list(_members(source, cache)) if name in archives else [(name, Place(str(source), "file", size))]
        files += [member for member, _ in members]
        places += [place for _, place in members]
        owners += [name if name in archives else ""] * len(members)
    if not root.is_dir() and all(place.kind == "bad" for place in places):
        raise ValueError(f"{root} cannot be opened: {places[0].reason if places else 'the archive is empty'}")
    labels, splits = folder_labels(files)
    for i, value in _shard_labels(files, places).items():
        labels[i] = value
    for i, owner in enumerate(owners):
        hints = [SPLITS[word] for word in re.split(r"[^a-z]+", owner.lower()) if word in SPLITS]
        splits[i] = splits[i] or (hints[-1] if hints else "")
    if len(set(files)) < len(files):  # equal names in several archives: the archive's name tells them apart
        files = [f"{owner}/{name}" if owner else name for owner, name in zip(owners, files, strict=True)]
    rows = sorted(zip(files, places, labels, splits, strict=True), key=lambda row: row[0])
    known = {label for label in labels if label is not None}
    return rows, sorted(known, key=lambda label: (0, int(label), label) if label.isdecimal() else (1, 0, label))


def _members(path: Path, cache: Path) -> Iterator[tuple[str, Place]]:
    """Name and place of every regular file of an archive; damage becomes one more entry, of kind "bad"."""
    try:
        with open(path, "rb") as file:
            magic = file.read(2)
        if magic == b"PK":
            yield from _zip_members(path)
            return
        plain = _plain_tar(path, cache) if magic == b"\x1f\x8b" else path
        with tarfile.open(plain, "r:") as archive:
            for member in archive:
                if member.isreg():
                    yield member.name, Place(str(plain), "tar", member.size, member.offset_data)
    except Exception as error:  # hostile archives make the standard library raise anything
        yield path.name, Place(str(path), "bad", 0, reason=f"not a readable archive: {error}")


def _zip_members(path: Path) -> Iterator[tuple[str, Place]]:
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if member.is_dir():
                continue
            kind = {zipfile.ZIP_STORED: "zip", zipfile.ZIP_DEFLATED: "deflate"}.get(member.compress_type, "bad")
            reason = f"zip method {member.compress_type} is not supported; pack with store or deflate"
            if member.flag_bits & 1:
                kind, reason = "bad", "encrypted inside the zip"
            where = (member.file_size, member.header_offset, member.compress_size, member.CRC)
            yield member.filename, Place(str(path), kind, *where, reason if kind == "bad" else "")


def _plain_tar(path: Path, cache: Path) -> Path:
    """The unpacked twin of a .tar.gz, in the cache: only that can be read at random."""
    status = path.stat()
    described = repr((str(path), status.st_size, status.st_mtime_ns))
    plain = cache / f"{hashlib.sha256(described.encode()).hexdigest()[:16]}.tar"
    if not plain.exists():
        with gzip.open(path) as packed:
            if not tarfile.is_tarfile(packed):
                raise tarfile.ReadError("what is compressed in it is not a tar")
            packed.seek(0)
            with _written_whole(plain) as file, suppress(EOFError, zlib.error):  # reading the tar will report a cut
                while block := packed.read1(1 << 20):  # read() would drop what precedes the cut
                    file.write(block)
    return plain


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
                if files[i].endswith(suffix) and (label := _label_in(_read(places[i]), suffix)):
                    told[key(i)] = label
    return {i: told[key(i)] for i in in_tar if told and not files[i].endswith(SIDE_SUFFIXES) and key(i) in told}


def _label_in(data: bytes, suffix: str) -> str:
    """The label written in a .cls or .json file of a shard, "" if there is none."""
    text = data[:1_000_000].decode("utf-8", "replace").strip()
    if suffix == ".cls":
        return text
    try:
        record = json.loads(text)
    except ValueError:
        return ""
    values = [record[name] for name in ("label", "cls", "class") if name in record] if isinstance(record, dict) else []
    return str(values[0]) if values and isinstance(values[0], int | str) else ""


def _read(place: Place) -> bytes:
    """The bytes at a place, checked against the archive's own checksum where it has one."""
    if place.kind == "bad":
        raise BadImage(place.reason)
    if place.size > LARGEST_FILE:
        raise BadImage(f"{place.size:,} bytes, more than the limit of {LARGEST_FILE:,}")
    try:
        with open(place.source, "rb") as file:
            if place.kind == "file":
                return file.read(LARGEST_FILE)
            file.seek(place.offset)
            if place.kind == "tar":
                data = file.read(place.size)
            else:
                header = file.read(30)
                file.seek(sum(struct.unpack("<HH", header[26:30])), os.SEEK_CUR)  # the name and the extra field
                data = file.read(place.packed)
        if place.kind == "deflate":
            data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, place.size + 1)
    except (OSError, ValueError, struct.error, zlib.error) as error:
        raise BadImage(f"cannot be read: {error}") from None
    if len(data) != place.size:
        raise BadImage(f"the archive holds {len(data):,} of its {place.size:,} bytes")
    if place.kind != "tar" and zlib.crc32(data) != place.crc:
        raise BadImage("damaged inside the archive: the checksum does not agree")
    return data


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
    with _written_whole(path) as file:
        file.write(json.dumps({"key": key, "n": len(rows), "classes": classes}).encode() + b"\n")
        for name, place, label, split in rows:
            row = {"file": name, "place": place, "label": label, "split": split}
            file.write(json.dumps(row).encode() + b"\n")


@contextmanager
def _written_whole(path: Path) -> Iterator[IO[bytes]]:
    """Write beside the path and rename at the end: a reader never sees half a file, whoever dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(unfinished, "wb") as file:
            yield file
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------- quarantine


def check_images(images: ImageSet, progress: bool = True) -> dict[str, Any]:
    """Decode every file once and say which fail, and why.

    Returns:
        {"decoded": count, "quarantined": [{"file", "reason"}, ...]}; the count and the list add up to len(images).
    """
    results = [(i, r) for i, r in _for_each(images, lambda picture: True, progress) if isinstance(r, BadImage)]
    rows = [{"file": images.files[i], "reason": str(reason)} for i, reason in results]
    return {"decoded": len(images) - len(rows), "quarantined": rows}


def write_quarantine(path: str | Path, rows: list[dict[str, str]]) -> None:
    """Write quarantine.csv: columns file, reason. Names with line feeds, quotes or undecodable bytes survive."""
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, ["file", "reason"])
    table.writeheader()
    table.writerows(rows)
    with _written_whole(Path(path)) as file:
        file.write(text.getvalue().encode("utf-8", "surrogateescape"))


def _for_each(images: ImageSet, work: Callable[[Image.Image], Any], progress: bool) -> Iterator[tuple[int, Any]]:
    """Decode on threads; yield, in order, the number of each file and work(picture), or the BadImage it raised."""

    def one(i: int) -> Any:
        try:
            return work(images.image(i))
        except BadImage as reason:
            return reason

    chunk = 64 * WORKERS  # bounds what is decoded ahead of its consumer
    with ThreadPoolExecutor(WORKERS) as pool, tqdm(total=len(images), unit=" images", disable=not progress) as bar:
        for start in range(0, len(images), chunk):
            for i, result in enumerate(pool.map(one, range(start, min(start + chunk, len(images)))), start):
                yield i, result
                bar.update()


# ---------------------------------------------------------------------------------------------- pixels


@dataclass(frozen=True, eq=False)
class Pixels:
    """Decoded pictures of any size in one flat uint8 array, in memory or memory-mapped.

    Picture i is data[offsets[i] : offsets[i] + 3 H W] as (3, H, W), with (H, W) = sizes[i].
    labels: (n,) int64, -1 = unknown. files: n names.
    """

    data: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray
    classes: list[str]
    files: list[str]

    @classmethod
    def from_array(cls, images: np.ndarray, labels: Sequence[int] | np.ndarray, classes: Sequence[str]) -> "Pixels":
        """Take pictures of one size, (n, H, W, 3) uint8."""
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
            raise ValueError(f"expected (n, H, W, 3) uint8, got {images.shape} {images.dtype}")
        if len(labels) != len(images):
            raise ValueError(f"{len(images)} images but {len(labels)} labels")
        n, height, width, _ = images.shape
        return cls(
            data=np.ascontiguousarray(images.transpose(0, 3, 1, 2)).reshape(-1),
            offsets=np.arange(n, dtype=np.int64) * (3 * height * width),
            sizes=np.full((n, 2), (height, width), dtype=np.int64),
            labels=np.asarray(labels, dtype=np.int64),
            classes=list(classes),
            files=[f"{i:06d}" for i in range(n)],
        )

    def __len__(self) -> int:
        return len(self.offsets)

    def image(self, index: int) -> UInt8[np.ndarray, "3 H W"]:
        """One picture, a view of the stored bytes."""
        height, width = self.sizes[index].tolist()
        start = int(self.offsets[index])
        return self.data[start : start + 3 * height * width].reshape(3, height, width)

    def batch(self, indices: Sequence[int] | np.ndarray) -> tuple[UInt8[Tensor, "B 3 H W"], Int64[Tensor, "B 2"]]:
        """Stack pictures of unequal size: zeros below and to the right; second, the height and width of each."""
        indices = np.asarray(indices, dtype=np.int64)
        sizes = self.sizes[indices].reshape(-1, 2)
        height, width = sizes.max(axis=0).tolist() if len(sizes) else (0, 0)
        images = np.zeros((len(indices), 3, height, width), dtype=np.uint8)
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
            labels=self.labels[rows],
            files=[self.files[i] for i in rows],
        )

    def squares(self, size: int) -> UInt8[Tensor, "n 3 size size"]:
        """What evaluation sees: the shorter side brought to `size` px (bicubic, antialiased; also upwards), the
        centre cut out."""
        result = np.empty((len(self), 3, size, size), dtype=np.uint8)
        for row, i in zip(result, range(len(self)), strict=True):
            image = self.image(i)
            if image.shape != row.shape:
                picture = square(Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0))), size)
                image = np.asarray(picture).transpose(2, 0, 1)
            row[:] = image
        return torch.from_numpy(result)


def load_pixels(images: ImageSet, short_side: int, folder: str | Path | None = None, progress: bool = True) -> Pixels:
    """Decode every picture once, shrunk to `short_side`; bad files go to the quarantine and the run goes on.

    Args:
        short_side: pixels; the shorter side is brought down to it (bicubic, antialiased), never up. The longer side
            follows, and is first cropped in the centre where it exceeds 4 times the shorter one.
        folder: where pixels.u8, pixels.json and quarantine.csv are written; the result is memory-mapped, and taken
            from there the next time, as long as files, their modification times and short_side agree. None: memory.
    Raises:
        ValueError: no file at all, or none that decodes.
    """
    if not len(images) or short_side < 1:
        raise ValueError(f"nothing to load: {len(images)} files in {images.name}, short_side {short_side} px")
    folder = Path(folder) if folder is not None else None
    if folder is None:
        memory = io.BytesIO()
        kept, sizes = _fill(memory, images, short_side, progress)
        return _laid_out(np.frombuffer(memory.getbuffer(), dtype=np.uint8), sizes, images.select(kept))
    folder = Path(folder)
    key = _pixels_key(images, short_side)
    if stored := _open_pixels(folder, key, images):
        return stored
    with _written_whole(folder / "pixels.u8") as file:
        kept, sizes = _fill(file, images, short_side, progress, folder / "quarantine.csv")
        (folder / "pixels.json").unlink(missing_ok=True)  # else a crash here leaves it to describe the old pixels.u8
    with _written_whole(folder / "pixels.json") as file:
        file.write(json.dumps({"key": key, "kept": kept, "sizes": sizes}).encode())
    return _open_pixels(folder, key, images)


def _fill(
    file: IO[bytes], images: ImageSet, short_side: int, progress: bool, quarantine: Path | None = None
) -> tuple[list[int], list[tuple[int, int]]]:
    """Append each decoded picture to the file, list the others in the quarantine; numbers and sizes of the decoded."""

    def small(picture: Image.Image) -> np.ndarray:
        return np.ascontiguousarray(np.asarray(shrink(picture, short_side)).transpose(2, 0, 1))

    kept, sizes, bad = [], [], []
    for i, result in _for_each(images, small, progress):
        if isinstance(result, BadImage):
            bad.append({"file": images.files[i], "reason": str(result)})
            continue
        file.write(result.data)
        kept.append(i)
        sizes.append(result.shape[1:])
    if quarantine:
        write_quarantine(quarantine, bad)
    if not kept:
        first = f"{bad[0]['file']!r}: {bad[0]['reason']}"
        raise ValueError(f"none of the {len(bad)} files of {images.name} could be decoded; the first, {first}")
    return kept, sizes


def _laid_out(data: np.ndarray, sizes: Sequence[Sequence[int]], images: ImageSet) -> Pixels:
    """Pixels of a flat array that holds the pictures end to end."""
    shapes = np.array(sizes, dtype=np.int64)
    n_bytes = 3 * shapes.prod(axis=1)
    if n_bytes.sum() != data.size:
        raise ValueError(f"expected {n_bytes.sum():,} bytes of pixels, got {data.size:,}")
    return Pixels(data, np.cumsum(n_bytes) - n_bytes, shapes, images.labels, images.classes, images.files)


def _pixels_key(images: ImageSet, short_side: int) -> str:
    """A fingerprint of everything the stored pixels depend on."""
    digest = hashlib.sha256(repr((FORMAT_VERSION, short_side, images.classes)).encode())
    changed: dict[str, int] = {}
    for name, place, label in zip(images.files, images.places, images.labels.tolist(), strict=True):
        if place.source not in changed:
            changed[place.source] = os.stat(place.source).st_mtime_ns if os.path.exists(place.source) else 0
        digest.update(repr((name, tuple(place), label, changed[place.source])).encode())
    return digest.hexdigest()


def _open_pixels(folder: Path, key: str, images: ImageSet) -> Pixels | None:
    """What an earlier run stored, if it is whole and the key agrees."""
    try:
        record = json.loads((folder / "pixels.json").read_bytes())
        if record["key"] != key:
            return None
        data = np.memmap(folder / "pixels.u8", dtype=np.uint8, mode="r")
        return _laid_out(data, record["sizes"], images.select(record["kept"]))
    except (OSError, ValueError, KeyError):
        return None


# ---------------------------------------------------------------------------------------------- named sets

DOWNLOADS = {  # what must lie under data_root if there is no internet
    "cifar10": ["cifar-10-python.tar.gz"],
    "stl10": ["stl10_binary.tar.gz"],
    "imagenette": ["imagenette2-160.tgz"],
    "pets": ["oxford-iiit-pet/images.tar.gz", "oxford-iiit-pet/annotations.tar.gz"],
}
PETS_SPLITS = {"train": "trainval", "val": "test"}


def dataset_names() -> list[str]:
    """The names that open_images and download understand."""
    return list(DOWNLOADS)


def download(name: str, root: str | Path) -> Path:
    """Fetch a named set through torchvision, once, into root/<name>.zip (train/<class>/..., val/<class>/...).

    Pictures that come as files keep their bytes; CIFAR-10 and STL-10 come as arrays and are stored as PNG.
    Imagenette is the 160 px edition. STL-10 brings its 100,000 unlabelled pictures.

    Raises:
        ValueError: unknown name.
        ConnectionError: the download failed; says which file to put where.
    """
    if name not in DOWNLOADS:
        raise ValueError(f"no set called {name!r}; known: {dataset_names()}")
    root = Path(root).expanduser()
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
    with _written_whole(target) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
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
