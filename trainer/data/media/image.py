"""Image files to upright RGB pixels."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from trainer.contract import InputRefused

# Without a list, Pillow also tries formats that start other programs (EPS runs Ghostscript). A camera's MPO opens as JPEG.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
MAX_PIXELS = 89_478_485  # Pillow's own threshold: a quarter of a GiB of RGB
MAX_ASPECT = 200  # Qwen2-VL's smart_resize raises above it

ORIENTATION = 0x0112  # tag of EXIF 2.32; 1 = upright
ROTATED = range(2, 9)
SIDEWAYS = range(5, 9)
MODES = {"RGB": "", "L": "grey", "LA": "grey", "1": "black and white", "P": "palette", "PA": "palette"}  # other modes are reported by name
EXIF_KEYS = frozenset({"exif", "Raw profile type exif"})  # where Pillow keeps EXIF tags that precede the pixels of a PNG


def open_image(path: Path) -> Image.Image:
    """The first frame as RGB, rotated upright by its EXIF tag, transparency on white.

    Raises InputRefused with the path for a file that cannot be decoded completely, is too large or too narrow.
    """
    with refusing(path), Image.open(path, formats=FORMATS) as image:
        check_size(image.size)
        return flatten(ImageOps.exif_transpose(image))


def read_size(path: Path) -> tuple[int, int]:
    """(width, height) of what `open_image` returns, from the header of the file. An EXIF tag after the pixels of a PNG is ignored. Raises
    InputRefused as `open_image` does."""
    with refusing(path), Image.open(path, formats=FORMATS) as image:
        check_size(image.size)
        # getexif() would decode the pixels of a PNG to look for a tag after them.
        untagged = image.format == "PNG" and EXIF_KEYS.isdisjoint(image.info)
        return turn_size(image, 1 if untagged else image.getexif().get(ORIENTATION, 1))


@contextmanager
def refusing(path: Path) -> Iterator[None]:
    """Turns the exceptions of decoders, which may be of any type, into InputRefused."""
    try:
        yield
    except Exception as error:
        raise InputRefused(f"{path}: {describe(error)}\n    replace the file, or remove its row") from error


@dataclass(frozen=True, kw_only=True, slots=True)
class Examined:
    """`sha256`: of the bytes of the file, '' if it cannot be read. `size`: (width, height) in pixels, upright; (0, 0) with a `problem`.
    `conversions`: what is necessary to make it upright RGB."""

    sha256: str
    size: tuple[int, int] = (0, 0)
    conversions: tuple[str, ...] = ()
    problem: str | None = None


def examine_image(path: Path) -> Examined:
    """Hash and size of the file, and whether `open_image` would accept it. The file is read once, and decoded only as far as necessary.

    The end of the file is verified too: decoding stops at the last pixel, after which a PNG may be truncated or have a wrong checksum.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        return Examined(sha256="", problem=f"cannot be read: {error.strerror}")
    digest = hashlib.sha256(content).hexdigest()
    try:
        size, conversions = examine(content)
    except Exception as error:
        return Examined(sha256=digest, problem=describe(error))
    return Examined(sha256=digest, size=size, conversions=conversions)


def examine(content: bytes) -> tuple[tuple[int, int], tuple[str, ...]]:
    with Image.open(BytesIO(content), formats=FORMATS) as image:
        check_size(image.size)
        turn = image.getexif().get(ORIENTATION, 1)
        size = turn_size(image, turn)
        conversions = tuple(word for word in (convert_mode(image), "turned by EXIF" if turn in ROTATED else "") if word)
        image.draft(None, (1, 1))  # a JPEG is read completely, but only every eighth row and column is computed
        if conversions:
            flatten(ImageOps.exif_transpose(image))
        else:
            image.load()
    with Image.open(BytesIO(content), formats=FORMATS) as image:
        image.verify()
    return size, conversions


def turn_size(image: Image.Image, turn: int) -> tuple[int, int]:
    """(width, height) of an image that was just opened, upright. For a TIFF, Pillow has already swapped the size, but not rotated the pixels."""
    return image.size[::-1] if turn in SIDEWAYS and image.format != "TIFF" else image.size


def convert_mode(image: Image.Image) -> str:
    """What `flatten` has to convert, '' for plain RGB."""
    if image.mode.startswith("I"):
        return "16-bit grey"
    return "transparent" if image.has_transparency_data else MODES.get(image.mode, image.mode)


def hash_file(path: Path) -> str:
    """SHA-256 of the file's bytes, in hex. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_size(size: tuple[int, int]) -> None:
    """Raises ValueError. `size` in pixels; called before any pixel is decoded."""
    if size[0] * size[1] > MAX_PIXELS:
        raise ValueError(f"{size[0]}x{size[1]} pixels are more than the limit of {MAX_PIXELS}")
    if max(size) > MAX_ASPECT * min(size):
        raise ValueError(f"{size[0]}x{size[1]} pixels: one side is more than {MAX_ASPECT} times the other")


def flatten(image: Image.Image) -> Image.Image:
    """Convert any mode to RGB. Raises ValueError for floating-point pixels, because their range is not known."""
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range; save the image with 8 bits per channel")
    if image.mode.startswith("I"):  # 16-bit grey; convert("RGB") would clip it to white
        return Image.fromarray((np.clip(np.asarray(image), 0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        colours = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), colours).convert("RGB")
    return image.convert("RGB")


def describe(error: Exception) -> str:
    """What an exception of a decoder (SyntaxError, struct.error, IndexError ...) means for the file."""
    if isinstance(error, UnidentifiedImageError):
        return f"is not an image in a supported format ({', '.join(FORMATS)})"
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return f"has more pixels than the limit of {MAX_PIXELS}"
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read: {error.strerror}"
    if any(word in str(error) for word in ("truncated", "incomplete")):
        return f"is truncated: {error}"
    return f"cannot be decoded: {error or type(error).__name__}"
