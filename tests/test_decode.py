"""Any bytes become an upright RGB picture or a reason in plain words, within bounded memory."""

import csv
import io
import json
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from minidino.images.datasets import open_images
from minidino.images.decode import BadImage, decode, shrink, square
from minidino.images.pixels import load_pixels

NASTY = Path(__file__).resolve().parents[2] / "shared" / "data" / "nasty" / "files"
needs_data = pytest.mark.skipif(not NASTY.exists(), reason="shared/data/nasty is not here")

REFUSED = {  # every nasty file that must not become a picture, and a word of its reason
    "photo.heif": "HEIF", "gray_alpha.jp2": "damaged JPEG2000", "truncated_pillow.jpg": "truncated",
    "truncated_pillow.png": "ends after", "broken_data_stream.png": "damaged PNG",
    "truncated_end_chunk.png": "damaged PNG", "broken.png": "damaged PNG", "short.bmp": "truncated",
    "bad_width.bmp": "274,877,898,816 pixels", "claims_huge.bmp": "6,000,000,000,000 pixels",
    "claims_huge.gif": "4,364,696,535 pixels",
    "claims_huge.ico": "4,294,836,225 pixels", "ultrahdr.jpg": "truncated", "zero_width.gif": "damaged GIF",
    "text_chunk_bomb.png": "too large", "seek_too_large.tif": "damaged", "corrupt_ukbench.jpg": "unknown",
    "zero_bytes.jpg": "empty file", "one_byte.jpg": "not an image", "html_named.jpg": "HTML", "json_named.png": "text",
    "random_bytes.jpg": "unknown", "gzip_named.jpg": "gzip", "cut_header.jpg": "damaged", "cut_half.jpg": "truncated",
    "cut_last_byte.jpg": "truncated", "progressive_cut.jpg": "truncated", "flat_10000.png": "10000 x 10000",
    "flat_20000.png": "400,000,000 pixels", "flat_rgb_9000.png": "81,000,000 pixels, more than the limit of 64,000,000",
    "idat_missing.png": "ends after", "vector.svg": "SVG", "svg_named.png": "SVG", "folder.jpg/inside.txt": "text",
    "notes.txt": "text",
}  # fmt: skip
TURNED = {f"exif_orientation_6{s}" for s in (".png", ".webp", "_landscape.jpg")} | {"exif_orientation_8_portrait.jpg"}
CHILD = """
import json, sys
from minidino.images.datasets import check_images, open_images
from minidino.images.decode import BadImage
from minidino.runs import peak_memory_mb
images = open_images(sys.argv[1], sys.argv[2])
outcome = {}
for i, name in enumerate(images.files):
    try:
        outcome[name] = images.image(i).size
    except BadImage as reason:
        outcome[name] = str(reason)
print(json.dumps([outcome, check_images(images, progress=False), peak_memory_mb()]))
"""


def nasty(name: str) -> np.ndarray:
    return np.asarray(decode((NASTY / name).read_bytes())).astype(float)


def encoded(image: Image.Image | np.ndarray, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, kind, **options)
    return file.getvalue()


@needs_data
def test_every_nasty_file_ends_as_expected_within_a_gibibyte(tmp_path):
    command = [sys.executable, "-c", CHILD, str(NASTY), str(tmp_path)]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, cwd=root)
    outcome, checked, peak_mb = json.loads(done.stdout)
    with open(NASTY.parent / "manifest.csv", newline="") as file:
        manifest = {row["file"]: row for row in csv.DictReader(file)}
    assert outcome.keys() == manifest.keys()
    for name, row in manifest.items():
        if name in REFUSED:
            assert isinstance(outcome[name], str) and REFUSED[name] in outcome[name], (name, outcome[name])
            continue
        width, height = map(int, row["size"].split("x"))
        assert outcome[name] == ([height, width] if name in TURNED else [width, height]), name
    assert {row["file"] for row in checked["quarantined"]} == REFUSED.keys()
    assert checked["decoded"] + len(checked["quarantined"]) == len(manifest) == 116
    assert peak_mb < 1024


@needs_data
def test_all_orientations_show_the_same_picture():
    upright = nasty("photo.ppm")
    for i in range(2, 9):
        got = nasty(f"exif_orientation_{i}.jpg")
        turns = [np.rot90(flipped, k) for flipped in (got, got[:, ::-1]) for k in range(4)]
        off = [np.abs(turned - upright).mean() for turned in turns]
        assert off[0] < 5 < 8 * off[0] < min(off[1:]), i  # JPEG against lossless costs 4.9 levels
    raw = np.asarray(Image.open(NASTY / "exif_orientation_6.png"))
    assert np.array_equal(nasty("exif_orientation_6.png"), np.rot90(raw, -1))
    assert np.array_equal(nasty("exif_orientation_9.jpg"), np.asarray(Image.open(NASTY / "exif_orientation_9.jpg")))


@needs_data
@pytest.mark.parametrize(
    "name, reference, tolerance",
    [
        ("cmyk_plain.jpg", "ok.jpg", 4.5), ("cmyk_adobe.jpg", "cmyk.tif", 1.0),
        ("rgb16.png", "ok.jpg", 3.0), ("gray16.png", "rgb16.png", 1.0),
        ("float32.tif", "rgb16.png", 3.0), ("gray16.pgm", "photo.ppm", 1.0), ("rgb_trns.png", "palette_trns.png", 0.0),
        ("progressive.jpg", "ok.jpg", 1.0), ("rgba.webp", "rgba.png", 3.0), ("transparent.gif", "rgba.png", 3.0),
    ],
)  # fmt: skip
def test_the_same_picture_in_another_coding(name, reference, tolerance):
    # mean error in levels; an RGB JPEG of the size of cmyk_plain.jpg (sampling_444.jpg) is 3.6 off for its coding alone
    got, expected = decode((NASTY / name).read_bytes()), decode((NASTY / reference).read_bytes())
    expected = expected.resize(got.size, Image.Resampling.LANCZOS)
    if name.startswith(("gray", "float")):
        expected = expected.convert("L").convert("RGB")
    assert np.abs(np.asarray(got, float) - np.asarray(expected, float)).mean() <= tolerance


@needs_data
def test_transparency_lies_over_white():
    raw = np.asarray(Image.open(NASTY / "rgba.png")).astype(float)
    alpha = raw[..., 3:] / 255
    assert np.abs(nasty("rgba.png") - (raw[..., :3] * alpha + 255 * (1 - alpha))).max() <= 1
    assert (nasty("all_transparent.png") == 255).all()


@pytest.mark.parametrize("dtype, factor", [(np.uint16, 257), (np.int32, 257), (np.float32, 1 / 255), (np.float32, 1.0)])
def test_deep_pixels_are_scaled_not_clipped(dtype, factor):
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    picture = decode(encoded((grey * dtype(factor)).astype(dtype), "TIFF"))
    assert np.abs(np.asarray(picture, int) - grey[..., None]).max() <= 1
    signed = np.linspace(-3, 5, 256, dtype=np.float32).reshape(16, 16)  # no natural scale: its own range
    assert np.abs(np.asarray(decode(encoded(signed, "TIFF")), int) - grey[..., None]).max() <= 1


def test_twelve_bits_white_is_zero_and_nan():
    grey = np.arange(64, dtype=np.uint16).reshape(8, 8)
    inverted = decode(encoded(grey * 1040, "TIFF", tiffinfo={262: 0}))
    assert np.abs(np.asarray(inverted)[..., 0] - (255 - grey * 1040 / 257)).max() <= 1
    with pytest.raises(BadImage, match="finite"):
        decode(encoded(np.full((2, 2), np.nan, np.float32), "TIFF"))
    if NASTY.exists():
        assert nasty("gray12.tif").max() == round(30 * 255 / 4095)  # its brightest raw value is 30


def test_lab_agrees_with_the_formulas():
    color = pytest.importorskip("skimage.color")
    lab = np.array([[[128, 20, 236], [200, 250, 30], [60, 0, 0], [150, 30, 20]]], dtype=np.uint8)  # a, b signed
    picture = decode(encoded(Image.frombytes("LAB", (4, 1), lab.tobytes()), "TIFF"))
    values = np.concatenate([lab[..., :1] * (100 / 255), lab[..., 1:].view(np.int8)], axis=-1)
    to_srgb = [[3.13386, -1.61687, -0.49061], [-0.97877, 1.91614, 0.03345], [0.07195, -0.22899, 1.40524]]  # Bradford
    linear = color.lab2xyz(values, illuminant="D50") @ np.array(to_srgb).T
    srgb = np.where(linear > 0.0031308, 1.055 * linear.clip(1e-9) ** (1 / 2.4) - 0.055, 12.92 * linear)
    assert np.abs(np.asarray(picture) - 255 * srgb).max() < 2


def interlaced_png(grey: np.ndarray) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    starts = ("0::8 0::8", "0::8 4::8", "4::8 0::4", "0::4 2::4", "2::4 0::2", "0::2 1::2", "1::2 0::1")
    passes = [tuple(slice(*[int(x) if x else None for x in a.split(":")]) for a in s.split()) for s in starts]
    rows = b"".join(b"\0" + row.tobytes() for rows in passes for row in grey[rows] if row.size)
    header = struct.pack(">IIBBBBB", grey.shape[1], grey.shape[0], 8, 0, 0, 0, 1)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (8, 8), (11, 2), (2, 13)])
def test_interlaced_png_is_whole(shape):
    grey = np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)
    assert np.array_equal(np.asarray(decode(interlaced_png(grey)))[..., 0], grey)


def test_limits_and_globals(monkeypatch):
    before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
    png = encoded(Image.new("RGB", (8, 6)))
    monkeypatch.setattr("minidino.images.decode.MAX_PIXELS", 48)
    assert decode(png).size == (8, 6)
    with pytest.raises(BadImage, match="8 x 7 is 56 pixels, more than the limit of 48"):
        decode(encoded(Image.new("RGB", (8, 7))))
    with pytest.raises(BadImage, match="text"):
        decode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n")  # never handed to an interpreter
    assert (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES) == before


def test_shrink_and_square():
    assert shrink(Image.new("RGB", (300, 200)), 50).size == (75, 50)
    assert shrink(Image.new("RGB", (30, 20)), 50).size == (30, 20)  # never enlarged
    assert shrink(Image.new("RGB", (1, 3000)), 50).size == (1, 4)
    picture = np.zeros((20, 60, 3), np.uint8)
    picture[:, 20:40] = 255
    assert (np.asarray(square(Image.fromarray(picture), 20)) == 255).all()
    assert np.asarray(square(Image.fromarray(picture), 10))[:, 1:9].min() == 255


def test_a_table_of_pictures_says_what_to_do():
    with pytest.raises(BadImage, match="a Parquet table; write the pictures in it to files"):
        decode(b"PAR1\x15\x04" + bytes(99) + b"PAR1")


@pytest.mark.parametrize("where", ["out", None])
def test_pictures_that_are_left_out_are_told_by_a_warning(tmp_path, where, recwarn):
    pool, out = tmp_path / "pool", where and tmp_path / where
    pool.mkdir()
    Image.new("RGB", (8, 8)).save(pool / "a.png")
    (pool / "notes.txt").write_text("no picture, and not meant to be one")
    load_pixels(open_images(pool, tmp_path / "c"), 8, out, progress=False)
    assert not recwarn.list
    (pool / "b.png").write_bytes(b"")
    load_pixels(open_images(pool, tmp_path / "c"), 8, out, progress=False)
    (told,) = [str(warning.message) for warning in recwarn.list]
    assert told.startswith("1 of 3 files of pool are left out, 'b.png': empty file") and ("quarantine.csv" in told) == bool(where)
