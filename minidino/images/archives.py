"""Where the bytes of one file lie, in a folder, a zip or a tar, and how to get them: nothing is unpacked.

    folder_files(root)           -> (name, bytes, time), ...   every regular file below a folder
    archive_members(path, cache) -> (name, Place), ...     every regular file of an archive
    read_place(place)            -> bytes                  checked against the archive's own checksum

A compressed tar is the exception: it cannot be read at random and gets an unpacked twin in the cache.
"""

import gzip
import hashlib
import io
import os
import posixpath
import re
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from minidino.images.decode import BadImage
from minidino.runs import atomic_path, write_atomically

ARCHIVE_SUFFIXES = (".zip", ".tar", ".tgz", ".tar.gz")
LARGEST_FILE = 1 << 29  # bytes; what is longer is no picture
UNSEEKABLE = {b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}  # how files packed with it begin
MARK = ".minidino"  # an empty file that tells the folder of a curation, however far it has come, or of features
OWN = (  # files that tell a folder of a run, a curation, stored pixels or a probe
    {"config.json", "environment.json"}, {MARK}, {"curation.json", "manifest.csv"}, {"pixels.u8"},
    {"results.json", "report.html"},
)  # fmt: skip
UNFINISHED = re.compile(r"\..+\.\d+\.tmp")  # what `atomic_path` writes to
NOT_NOW = "cannot be opened now"  # how the reason begins where it lies with the system, not with the archive


class Place(NamedTuple):
    """Where the bytes of one file lie. Each read opens the source anew: no handle is shared by threads or forks."""

    source: str  # the file itself, or the archive
    kind: str  # "file", "tar", "zip" (stored), "deflate" (zip, compressed) or "bad": cannot be read
    size: int  # bytes once unpacked
    offset: int = 0  # of the data in a tar, of the local header in a zip
    packed: int = 0  # bytes in the zip
    crc: int = 0  # zip only
    reason: str = ""  # why it is bad


def short_hash(path: str | Path) -> str:
    """Eight letters that tell this place from others whose last names are the same."""
    return hashlib.sha256(os.fsencode(Path(path).resolve())).hexdigest()[:8]


def folder_files(root: Path) -> list[tuple[str, int, int]]:
    """(relative name, bytes, modification time in ns) of every regular file below root; links are followed once.

    What this package wrote below root, such as runs/ of a tour of the folder one is in, is left out.
    """
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
        if folder and any(marks <= {entry.name for entry in entries} for marks in OWN):
            continue
        for entry in entries:
            name = f"{folder}/{entry.name}" if folder else entry.name
            try:
                status = entry.stat()
            except OSError:  # a dangling link, likewise
                found.append((name, 0, 0))
                continue
            if stat.S_ISREG(status.st_mode) and not UNFINISHED.fullmatch(entry.name):
                found.append((name, status.st_size, status.st_mtime_ns))
            elif stat.S_ISDIR(status.st_mode) and _identity(status) not in seen:
                seen.add(_identity(status))
                todo.append(name)
    return sorted(found)


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def archive_members(path: Path, cache: Path) -> Iterator[tuple[str, Place]]:
    """Name and place of every regular file of an archive; damage becomes one more entry, of kind "bad"."""
    found = False
    try:
        for member in _members(path, cache):
            found = True
            yield member
    except Exception as error:  # hostile archives make the standard library raise anything
        words = "damaged archive" if found else "not a readable archive"
        if isinstance(error, OSError) and error.errno:
            words = NOT_NOW
        yield path.name, Place(str(path), "bad", 0, reason=f"{words}: {error}")


def _members(path: Path, cache: Path) -> Iterator[tuple[str, Place]]:
    with open(path, "rb") as file:
        magic = file.read(6)
    if magic.startswith(b"PK"):
        yield from _zip_members(path)
    elif magic.startswith(b"\x1f\x8b"):
        plain, damage = _plain_tar(path, cache)
        yield from _tar_members(plain)
        if damage:
            raise gzip.BadGzipFile(damage)
    elif packer := next((UNSEEKABLE[start] for start in UNSEEKABLE if magic.startswith(start)), None):
        raise tarfile.ReadError(f"packed with {packer}; pack it anew as .tar or .tar.gz")
    else:
        yield from _tar_members(path)


def _zip_members(path: Path) -> Iterator[tuple[str, Place]]:
    with _Named(io.FileIO(path)) as file, zipfile.ZipFile(file) as archive:
        for member in archive.infolist():
            if member.is_dir():
                continue
            kind = {zipfile.ZIP_STORED: "zip", zipfile.ZIP_DEFLATED: "deflate"}.get(member.compress_type, "bad")
            reason = f"zip method {member.compress_type} is not supported; pack with store or deflate"
            if member.flag_bits & 1:
                kind, reason = "bad", "encrypted inside the zip"
            where = (member.file_size, member.header_offset, member.compress_size, member.CRC)
            yield member.filename, Place(str(path), kind, *where, reason if kind == "bad" else "")


class _Named(io.BufferedReader):
    """A zip whose names are read as UTF-8 where they are, whatever it says of them, and else as those of old zips (cp437).

    macOS writes UTF-8 and does not say so; other programs say so of names that are none.
    """

    def read(self, size: int | None = -1) -> bytes:
        data, at = bytearray(super().read(size)), 0
        while data[at : at + 4] == b"PK\x01\x02" and at + 46 <= len(data):  # the central directory, read at once
            end = at + 46 + int.from_bytes(data[at + 28 : at + 30], "little")
            try:
                data[at + 46 : end].decode()
                data[at + 9] |= 0x08  # bit 11 of the flags: the name is UTF-8
            except UnicodeDecodeError:
                data[at + 9] &= ~0x08
            at = end + sum(struct.unpack_from("<HH", data, at + 30))  # the extra field and the comment
        return bytes(data)


def _tar_members(path: Path) -> Iterator[tuple[str, Place]]:
    """The files of a tar, and the links to them; a tar that does not end as tars do raises an error after its last."""
    placed: dict[str, Place] = {}
    links = []
    with tarfile.open(path, "r:") as archive:
        for member in archive:
            if member.isreg():
                place = Place(str(path), "tar", member.size, member.offset_data)
                placed[posixpath.normpath(member.name)] = place
                yield member.name, place
            elif member.islnk():  # a hard link: the bytes lie with an earlier member
                lost = Place(str(path), "bad", 0, reason=f"a link to {member.linkname!r}, which is not in the archive")
                yield member.name, placed.get(posixpath.normpath(member.linkname), lost)
            elif member.issym():  # perhaps to a later member
                links.append((member.name, posixpath.join(posixpath.dirname(member.name), member.linkname)))
        for name, target in links:  # one that leads to a folder, or out of the archive, names no file of it
            if place := placed.get(posixpath.normpath(target)):
                yield name, place
        archive.fileobj.seek(archive.offset)  # tarfile takes a damaged header for the end, which is zeros
        end = archive.fileobj.read(tarfile.RECORDSIZE + tarfile.BLOCKSIZE)
        if len(end) < tarfile.BLOCKSIZE or any(end):
            raise tarfile.ReadError(f"neither a file nor the end at byte {archive.offset:,}; what follows is lost")


def _plain_tar(path: Path, cache: Path) -> tuple[Path, str]:
    """The unpacked twin of a .tar.gz, in the cache: only that can be read at random. Second: damage met on the way."""
    status = path.stat()
    described = repr((str(path), status.st_size, status.st_mtime_ns))
    plain = cache / f"{hashlib.sha256(described.encode()).hexdigest()[:16]}.tar"
    damage = plain.with_suffix(".damage")
    if not plain.exists():
        with gzip.open(path) as packed:
            if not tarfile.is_tarfile(packed):
                raise tarfile.ReadError("what is compressed in it is not a tar")
            packed.seek(0)
            with atomic_path(plain) as beside, open(beside, "wb") as file:
                try:
                    while block := packed.read1(1 << 20):  # read() would drop what precedes the damage
                        file.write(block)
                except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                    write_atomically(damage, str(error).encode())
    return plain, damage.read_text() if damage.exists() else ""


def read_place(place: Place) -> bytes:
    """The bytes at a place, checked against the archive's own checksum where it has one.

    Raises:
        BadImage: damaged archive, no permission, longer than LARGEST_FILE.
    """
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
