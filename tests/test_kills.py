"""What a kill, a full disk or a second process at once leaves behind is never taken for the whole."""

from pathlib import Path

import pytest
from PIL import Image

from minidino.curation.pipeline import Curation
from minidino.images import pixels as pixels_module
from minidino.images.datasets import open_images
from minidino.images.pixels import load_pixels
from minidino.images.scenes import draw_scenes


class Killed(BaseException):
    """Nothing after it runs, as after a kill."""


def dying_at(patch, owner, name, file):
    """Let a function of files be killed where its last path is called so."""
    real = getattr(owner, name)

    def until(*paths, **options):
        if Path(paths[-1]).name == file:
            raise Killed
        return real(*paths, **options)

    patch.setattr(owner, name, until)


def pool_of(folder, n=4, seed=0):
    folder.mkdir()
    for i, image in enumerate(draw_scenes(n, 24, seed).images):
        Image.fromarray(image).save(folder / f"{i}.png")
    return folder


# ---------------------------------------------------------------- pixels


def test_two_processes_decode_the_same_pictures_at_once(tmp_path, monkeypatch):
    images, write = open_images(pool_of(tmp_path / "pool")), pixels_module.write_atomically

    def meanwhile(path, data):
        write(path, data)
        if path.name == "pixels.json":  # the other one is about to put its pixels.u8 in place
            path.unlink()

    monkeypatch.setattr(pixels_module, "write_atomically", meanwhile)
    found = load_pixels(images, 16, tmp_path / "pixels", progress=False)
    assert found.fingerprint() == load_pixels(images, 16, progress=False).fingerprint()


def test_a_quarantine_of_other_files_is_not_taken_for_that_of_these(tmp_path, monkeypatch):
    pool, out, quiet = pool_of(tmp_path / "pool"), tmp_path / "out", {"progress": False, "say": lambda words: None}
    (pool / "bad.jpg").write_bytes(b"no picture")
    Curation(pool, out, 16, **quiet)
    (pool / "bad.jpg").rename(tmp_path / "aside")
    (pool / "worse.jpg").write_bytes(b"no picture either")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        dying_at(patch, Path, "unlink", "pixels.json")
        Curation(pool, out, 16, **quiet)
    (tmp_path / "aside").rename(pool / "bad.jpg")
    (pool / "worse.jpg").unlink()
    assert "bad.jpg,0,quarantined" in Curation(pool, out, 16, **quiet).write().read_text()
