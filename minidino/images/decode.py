"""Bytes of unknown origin in, one upright 8-bit RGB picture out, or a reason in plain words.

    decode(data)              -> picture            of three channels
    decode_channels(data, C)  -> (H, W, C) uint8    of any other number, from arrays of numpy; 1: a picture in grey
    decode_values(data)       -> numbers            as they stand in the file, for targets

What is decided here, for every image file there is:
  - the format is told from the bytes, never from the name; only formats that Pillow decodes by itself (no Ghostscript);
  - the size is read from the header and refused before a pixel is decoded;
  - cut or damaged files are refused whole, even if only the last byte is missing; damage that a decoder cannot notice
    (flipped bits inside a JPEG) passes;
  - animations and multi-page files give their first frame; transparency is laid over white;
  - deep pixels are scaled to 0..255, not clipped; embedded colour profiles are not applied;
  - an array of numpy, (H, W, C) or (H, W), holds bytes, or 16-bit numbers that are scaled to 0..255; what they mean (a
    band of a satellite, a window of a scan) is up to whoever wrote it.
"""

import io
import re
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import UInt8
from numpy.lib import format as npy
from PIL import Image, ImageCms, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "JPEG2000", "PPM", "AVIF", "ICO", "QOI", "SGI")
MAX_ASPECT = 4
MAX_PIXELS = 64_000_000  # of a picture: keeps the peak below 1 GiB
ORIENTATION = 0x0112
TIFF_BITS, TIFF_PHOTOMETRIC = 258, 262
NUMPY = b"\x93NUMPY"
READERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
UPRIGHT = {  # EXIF orientation -> what brings the picture upright; 1 and whatever is not listed: nothing
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIGNATURES = (  # what a file that Pillow cannot open most likely is; the first match names it
    (rb"\x1f\x8b", "not an image: gzip data"),
    (rb"BZh|\xfd7zXZ|\x28\xb5\x2f\xfd", "not an image: bzip2, xz or zstd data; pack a tar anew as .tar or .tar.gz"),
    (rb"PK[\x03\x05]", "not an image: a zip archive"),
    (rb".{257}ustar", "not an image: a tar archive"),
    (rb"PAR1", "not an image: a Parquet table; write the pictures in it to files"),
    (rb"%PDF", "not an image: a PDF document"),
    (rb"....ftyp(heic|heix|mif1|msf1)", "a HEIF picture, which Pillow cannot decode; convert it to JPEG or PNG"),
    (rb"\s*(<\?xml.*)?<svg", "not an image: an SVG drawing has no pixels"),
    (rb"\s*<(!doctype )?html", "not an image: an HTML page"),
    (rb"\xff\xd8", "damaged JPEG: no readable header"),
    (rb"\x89PNG", "damaged PNG: no readable header"),
    (rb"GIF8", "damaged GIF: no readable header"),
    (rb"BM", "damaged BMP: no readable header"),
    (rb"II\*|MM\x00\*", "damaged TIFF: no readable header"),
    (rb"[\t\n\r\x20-\x7e]*\Z", "not an image: text"),
)


class BadImage(ValueError):
    """A file that cannot become pixels; the message is the reason, in plain words."""


def decode(data: bytes) -> Image.Image:
    """Turn the bytes of any image file into an upright RGB picture, or say why not.

    Args:
        data: the whole file.
    Returns:
        A loaded Pillow image of mode RGB that holds no reference to `data`.
    Raises:
        BadImage: not an image, damaged, cut short, or of more than MAX_PIXELS; the message says which.
    Differs: Pillow alone accepts a PNG whose data ends early and leaves the rest black; here it is refused.
        EXIF orientation is applied, and ignored where the EXIF block is damaged or the value lies outside 1..8.
        The official decoder is Pillow's conversion alone: pictures stay as they lie, 16 bits are clipped, and where a
        picture is transparent the colours beneath show.
    """
    if data.startswith(NUMPY):
        return Image.fromarray(_array(data, 3))
    return _read(data, lambda image: _to_rgb(_upright(image)))


def decode_values(data: bytes) -> np.ndarray:
    """Turn the bytes of an image file into its numbers, upright and as they are: no palette, no scaling.

    Returns:
        (H, W), or (H, W, C) where a pixel has several.
    Raises:
        BadImage: as `decode`; a JPEG.
    """

    def values(image: Image.Image) -> np.ndarray:
        if image.format == "JPEG":
            raise BadImage("a JPEG blurs its values; a target must be PNG or another format without loss")
        return np.asarray(_upright(image))

    return _read(data, values)


def _read(data: bytes, finish: Callable[[Image.Image], Any]) -> Any:
    """What `finish` makes of the file as Pillow reads it; whatever is wrong with it becomes BadImage."""
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        pixels = int(re.search(r"\d+", str(error))[0])
        limit = min(MAX_PIXELS, 2 * (Image.MAX_IMAGE_PIXELS or MAX_PIXELS))
        raise BadImage(f"claims {pixels:,} pixels, more than the limit of {limit:,}") from None
    except UnidentifiedImageError:
        raise BadImage(_what_is(data)) from None
    except Exception as error:  # hostile bytes make plugins raise anything: ValueError, KeyError, OverflowError, ...
        raise BadImage(f"damaged header: {_words(error)}") from None
    _refuse_size(*image.size)
    try:
        if image.format == "PNG":
            _refuse_missing_rows(data)
        image.load()
        return finish(image)
    except BadImage:
        raise
    except Exception as error:  # as above
        raise BadImage(f"damaged {image.format}: {_words(error)}") from None


def decode_channels(data: bytes, channels: int) -> UInt8[np.ndarray, "H W C"]:
    """Turn the bytes of an array of numpy into pixels of so many channels, or say why not; for 1 any picture does, too.

    Raises:
        BadImage: as `decode`; an array of another shape or type.
    """
    if data.startswith(NUMPY):
        return _array(data, channels)
    picture = decode(data)  # which knows better what is wrong with it, if something is
    if channels != 1:
        raise BadImage(f"a picture, where an array of numpy (.npy) with {channels} channels is expected")
    return np.array(picture.convert("L"))[..., None]


def _array(data: bytes, channels: int) -> UInt8[np.ndarray, "H W C"]:
    """The bytes of a .npy file as pixels."""
    file = io.BytesIO(data)
    try:
        shape, _, kind = READERS[npy.read_magic(file)](file)
    except Exception:  # as for pictures
        raise BadImage("damaged array of numpy: no readable header") from None
    known = kind in (np.uint8, np.uint16) and (len(shape) == 3 or (len(shape) == 2 and channels == 1))
    if not known or (*shape, 1)[2] != channels:
        raise BadImage(f"expected an array (H, W, {channels}) of uint8 or uint16, got {shape} of {kind}")
    _refuse_size(shape[1], shape[0])
    try:
        values = np.load(io.BytesIO(data), allow_pickle=False).reshape(*shape[:2], channels)
    except Exception as error:
        raise BadImage(f"damaged array of numpy: {_words(error)}") from None
    return values if kind == np.uint8 else ((values.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)


def shrink(image: Image.Image, short_side: int) -> Image.Image:
    """Bring the shorter side down to `short_side` pixels (bicubic, antialiased); smaller pictures are never enlarged.

    Panoramas are first cropped in the centre to 4:1, so that one of them cannot fill a batch.
    """
    width, height = image.size
    longest = MAX_ASPECT * min(width, height)
    if max(width, height) > longest:
        image = image.crop(_centre_box(width, height, min(width, longest), min(height, longest)))
        width, height = image.size
    scale = short_side / min(width, height)
    if scale >= 1:
        return image
    return image.resize((max(1, round(width * scale)), max(1, round(height * scale))), Image.Resampling.BICUBIC)


def square(image: Image.Image, size: int) -> Image.Image:
    """Cut the largest centred square out and resize it to `size` x `size` pixels (bicubic, antialiased)."""
    side = min(image.size)
    box = _centre_box(*image.size, side, side)
    return image.crop(box) if side == size else image.resize((size, size), Image.Resampling.BICUBIC, box=box)


def _refuse_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise BadImage(f"{width} x {height} is {width * height:,} pixels, more than the limit of {MAX_PIXELS:,}")
    if width * height == 0:
        raise BadImage(f"{width} x {height} px has no pixels")


def _centre_box(width: int, height: int, new_width: int, new_height: int) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of a centred window, in whole pixels."""
    left, top = (width - new_width) // 2, (height - new_height) // 2
    return left, top, left + new_width, top + new_height


def _what_is(data: bytes) -> str:
    """Name the content of a file that no decoder recognises."""
    if not data:
        return "empty file"
    fitting = (words for start, words in SIGNATURES if re.match(start, data[:1024], re.DOTALL | re.IGNORECASE))
    return next(fitting, "not an image: unknown content")


def _words(error: Exception) -> str:
    return str(error).strip() or type(error).__name__


def _upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF (or XMP) orientation."""
    try:
        turn = UPRIGHT.get(image.getexif().get(ORIENTATION))
    except Exception:  # a damaged EXIF block raises anything, and says nothing against the pixels
        turn = None
    return image if turn is None else image.transpose(turn)


def _to_rgb(image: Image.Image) -> Image.Image:
    """Any mode of Pillow to RGB: deep pixels scaled, colour spaces converted, transparency over white."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _eight_bits(image)
    if image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return ImageCms.applyTransform(image, ImageCms.buildTransform(lab, srgb, "LAB", "RGB"))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image.getchannel("A"))
        return white
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Deep grey to 8-bit grey (with alpha where a transparent grey level is declared).

    The full scale is the declared one: 65535 for 16 bits, 4095 for a 12-bit TIFF. 32-bit integers and floats declare
    none: [0, 1] floats, [0, 255] floats and [0, 65535] integers are taken as such, anything else runs from its own
    minimum to its own maximum.
    """
    values = np.asarray(image)
    low, high = float(values.min()), float(values.max())
    if not np.isfinite([low, high]).all():
        raise BadImage("pixels are not finite numbers")
    tags = getattr(image, "tag_v2", {})
    if image.mode.startswith("I;16"):
        bits = tags.get(TIFF_BITS, (16,))[0]
        low, high = 0.0, 2.0**bits - 1
        if tags.get(TIFF_PHOTOMETRIC) == 0:  # white is zero, which Pillow turns round for 8 bits only
            low, high = high, low
    else:
        for top in (1, 255) if image.mode == "F" else (65535,):
            if low >= 0 and high <= top:
                low, high = 0.0, float(top)
                break
    scale = 255 / (high - low) if high != low else 0.0
    grey = Image.fromarray(((values - np.float32(low)) * np.float32(scale) + np.float32(0.5)).astype(np.uint8))
    if isinstance(key := image.info.get("transparency"), int):
        grey.putalpha(Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8)))
    return grey


def _refuse_missing_rows(data: bytes) -> None:
    """Raise BadImage where the compressed data of a PNG is shorter than its header promises."""
    width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", data[16:29])
    bits = depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    adam7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
    expected = 0
    for left, top, step_x, step_y in adam7 if interlaced else ((0, 0, 1, 1),):
        columns, rows = -((left - width) // step_x), -((top - height) // step_y)
        expected += rows * (1 + -(-columns * bits // 8)) if columns > 0 else 0
    found, inflate, position = 0, zlib.decompressobj(), 8
    while position + 8 <= len(data) and found < expected:
        length, kind = struct.unpack(">I4s", data[position : position + 8])
        if kind == b"IDAT":
            packed = data[position + 8 : position + 8 + length]
            while packed and found < expected:
                found += len(inflate.decompress(packed, 1 << 20))
                packed = inflate.unconsumed_tail
        position += 12 + length
    if found < expected:
        raise BadImage(f"damaged PNG: pixel data ends after {found:,} of {expected:,} bytes")
