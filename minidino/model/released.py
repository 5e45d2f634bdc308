"""The eight official backbones by name: their sizes, where they lie, and a copy at home, checked at every use."""

import hashlib
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path
from urllib.request import urlopen

from tqdm import tqdm

from minidino.runs import atomic_path, expanded, home_cache, write_atomically

BASE_URL = "https://dl.fbaipublicfiles.com/dinov2"
TIMEOUT_S = 30  # without a byte
STARTS = (b"PK", b"\x80")  # of what torch.save writes; the login page of a hotel begins with neither

SIZES = {"vits14": "vit_small", "vitb14": "vit_base", "vitl14": "vit_large", "vitg14": "vit_giant2"}
RELEASED = {  # name: arguments of build_vit
    f"dinov2_{short}{'_reg' if registers else ''}": {
        "name": long,
        "patch_size": 14,
        "img_size": 518,
        "num_register_tokens": registers,
        "interpolate_offset": 0.0 if registers else 0.1,
        "interpolate_antialias": bool(registers),
    }
    for registers in (0, 4)
    for short, long in SIZES.items()
}


def fetch(name: str, cache: str | Path | None = None, base_url: str = BASE_URL) -> Path:
    """The official weights of a name as a file: downloaded at the first call, checked at every later one.

    Upstream publishes no checksums. So the SHA-256 of the first download is written beside it, in the format of
    `sha256sum`, and a file that has changed since is refused. A file that was put there by hand is taken as it is, and
    its SHA-256 recorded.

    Args:
        name: a key of RELEASED, such as "dinov2_vits14" or "dinov2_vitb14_reg".
        cache: the folder of the copies; None is $XDG_CACHE_HOME/minidino/weights, or else ~/.cache/minidino/weights.
        base_url: a mirror of the official server.
    Raises:
        ValueError: an unknown name; or the file is not the one that was recorded.
        OSError: it cannot be downloaded; says from where it should have come and where to put it by hand.
    Source: official dinov2/hub/backbones.py (b8931f7).
    """
    if name not in RELEASED:
        raise ValueError(f"no released weights {name!r}: expected one of {', '.join(RELEASED)}")
    stem = name.removesuffix("_reg")
    file = f"{stem}{'_reg4' if name.endswith('_reg') else ''}_pretrain.pth"
    folder = home_cache() / "weights" if cache is None else expanded(cache)
    if not (folder / file).exists():
        _download(f"{base_url}/{stem}/{file}", folder / file)
    _check(folder / file)
    return folder / file


def _download(url: str, path: Path) -> None:
    """A whole file or none."""
    try:
        with atomic_path(path) as beside, open(beside, "wb") as file:
            file.writelines(_pieces(url, path.name))
    except (OSError, HTTPException) as error:
        raise OSError(f"cannot download {url}: {error}; get that file some other way and put it at {path}") from error


def _pieces(url: str, name: str) -> Iterator[bytes]:
    """What the server sends, with a bar; HTTPException when that is not all, or not a file of torch.save."""
    try:
        with urlopen(url, timeout=TIMEOUT_S) as answer:
            total = int(answer.headers.get("Content-Length") or 0)
            with tqdm(total=total or None, unit="B", unit_scale=True, unit_divisor=1024, desc=name) as bar:
                while chunk := answer.read(1 << 20):
                    if not bar.n and not chunk.startswith(STARTS):
                        raise HTTPException(f"what came is no file of torch.save: {chunk[:20]!r}")
                    yield chunk
                    bar.update(len(chunk))
                if not bar.n or bar.n < total:
                    raise HTTPException(f"the connection ended after {bar.n} of {total} bytes")
    except OSError as error:
        raise HTTPException(str(error)) from error  # an OSError would be given the name of the file that is written


def _check(path: Path) -> None:
    """Compare with the SHA-256 beside the file, or write it there."""
    record = path.with_name(f"{path.name}.sha256")
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if not record.exists():
        write_atomically(record, f"{found}  {path.name}\n".encode())
    expected = record.read_text().partition(" ")[0]
    if found != expected:
        raise ValueError(
            f"{path} has changed: expected SHA-256 {expected} as when it came, got {found}; delete the file to "
            f"download it again, or {record.name} if the change was meant"
        )
