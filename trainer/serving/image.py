"""Decode an image of a client to upright RGB pixels. Format and size are checked before any pixel is decoded."""

import base64
import binascii
import re
from collections.abc import Callable
from contextlib import nullcontext
from io import BytesIO
from threading import Lock

from PIL import Image, ImageOps

from trainer.data.media.image import check_size, describe, flatten
from trainer.serving.refusal import RequestRefused, invalid

FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
DATA = re.compile(r"data:image/(?:png|jpeg|jpg|webp|gif);base64,", re.IGNORECASE)
LEAST_SIDE = 4  # pixels
LARGE_PIXELS = 4 * 10**6  # such images are decoded one at a time: Pillow takes up to 12 bytes a pixel
# Of a JPEG. A scan takes a few bytes of the file but a pass over all pixels. Usual progressive files have about 10.
MOST_SCANS = 64
SCAN = b"\xff\xda"
ONE_LARGE = Lock()


def is_data(url: str) -> bool:
    return url[:5].lower() == "data:"


def read_data(url: str, most: int, param: str) -> bytes:
    """The bytes of a data URI. Raises RequestRefused."""
    header = DATA.match(url)
    if header is None:
        raise invalid(param, "a data URI must start with data:image/png;base64, (or jpeg, webp or gif)", "invalid_image")
    if (len(url) - header.end()) * 3 // 4 > most + 2:
        raise too_many_bytes(most, param)
    try:
        content = base64.b64decode(url[header.end() :], validate=True)
    except (binascii.Error, ValueError):
        raise invalid(param, "is not base64", "invalid_image") from None
    if len(content) > most:
        raise too_many_bytes(most, param)
    return content


def too_many_bytes(most: int, param: str) -> RequestRefused:
    return invalid(param, f"the image has more than {most} bytes: send a smaller one", "image_too_large")


def decode(content: bytes, most_pixels: int, param: str) -> Image.Image:
    """The first frame, converted as trainer.data.media.image.open_image converts a file. Raises RequestRefused."""
    try:
        width, height = size_of(content)
        check_bounds(width, height, most_pixels)
        if content[:2] == b"\xff\xd8" and content.count(SCAN) > MOST_SCANS:
            raise ValueError(f"more than {MOST_SCANS} scans")
        with ONE_LARGE if width * height > LARGE_PIXELS else nullcontext():
            return make_upright(content, most_pixels)
    except Exception as error:  # decoders raise exceptions of any type
        raise invalid(param, f"the image {describe(error)}", "invalid_image") from error


def make_upright(content: bytes, most_pixels: int) -> Image.Image:
    with Image.open(BytesIO(content), formats=FORMATS) as image:
        check_bounds(*image.size, most_pixels)
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode != "RGB" or image.has_transparency_data:
            return flatten(image)
        image.load()
        return image


def check_bounds(width: int, height: int, most_pixels: int) -> None:
    """Raises ValueError."""
    if width * height > most_pixels:
        raise ValueError(f"{width}x{height} pixels are more than the limit of {most_pixels}")
    if min(width, height) < LEAST_SIDE:
        raise ValueError(f"{width}x{height} pixels: each side must have at least {LEAST_SIDE}")
    check_size((width, height))


# --------------------------------------------------------------------- sizes, before a library allocates memory for pixels


def size_of(content: bytes) -> tuple[int, int]:
    """(width, height) in the header. For a JPEG Pillow reads it without decoding; for a WebP Pillow would allocate all pixels at once.
    Raises ValueError."""
    for starts, read in SIGNATURES:
        if content.startswith(starts):
            size = read(content)
            if not all(size):
                raise ValueError(f"{size[0]}x{size[1]} pixels")
            return size
    raise ValueError(f"the format is not one of {', '.join(FORMATS)}")


def png_size(content: bytes) -> tuple[int, int]:
    if content[12:16] != b"IHDR" or len(content) < 33:
        raise ValueError("the header is incomplete")
    return int.from_bytes(content[16:20]), int.from_bytes(content[20:24])


def gif_size(content: bytes) -> tuple[int, int]:
    if len(content) < 13:
        raise ValueError("the header is incomplete")
    return int.from_bytes(content[6:8], "little"), int.from_bytes(content[8:10], "little")


def webp_size(content: bytes) -> tuple[int, int]:
    """RFC 9649, sections 2.5 to 2.7."""
    kind, data = content[12:16], content[20:30]
    if content[8:12] != b"WEBP" or len(data) < 10:
        raise ValueError("the header is incomplete")
    if kind == b"VP8X":
        return int.from_bytes(data[4:7], "little") + 1, int.from_bytes(data[7:10], "little") + 1
    if kind == b"VP8L":
        bits = int.from_bytes(data[1:5], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8 ":
        return int.from_bytes(data[6:8], "little") & 0x3FFF, int.from_bytes(data[8:10], "little") & 0x3FFF
    raise ValueError("unknown kind of WebP")


def jpeg_size(content: bytes) -> tuple[int, int]:
    with Image.open(BytesIO(content), formats=("JPEG",)) as image:
        return image.size


SIGNATURES: tuple[tuple[bytes, Callable[[bytes], tuple[int, int]]], ...] = (
    (b"\x89PNG\r\n\x1a\n", png_size),
    (b"\xff\xd8", jpeg_size),
    (b"GIF87a", gif_size),
    (b"GIF89a", gif_size),
    (b"RIFF", webp_size),
)
