"""What a kill, a full disk or a second process at once leaves behind is never taken for the whole."""

from PIL import Image

from minidino.images import pixels as pixels_module
from minidino.images.datasets import open_images
from minidino.images.pixels import load_pixels
from minidino.images.scenes import draw_scenes


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
