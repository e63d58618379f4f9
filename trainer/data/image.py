"""Image files to upright RGB pixels."""

import hashlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from trainer.contract import InputRefused

# PIL would also try formats that start other programs (EPS runs Ghostscript). A camera's MPO opens as JPEG.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
MAX_PIXELS = 89_478_485  # Pillow's own threshold: a quarter of a GiB of RGB
MAX_ASPECT = 200  # Qwen2-VL's smart_resize raises above it, and no tower sees anything in such a strip


def open_image(path: Path) -> Image.Image:
    """The first frame as RGB, turned upright by its EXIF tag, transparency over white.

    Raises InputRefused that names the file for anything that cannot be decoded whole, is too large or too narrow.
    """
    try:
        return decode(path)
    except Exception as error:
        raise InputRefused(f"{path}: {describe(error)}\n    replace the file, or leave its row out") from error


def verify_image(path: Path) -> str | None:
    """What is wrong with the image, or None. Decodes all of it and reads on to the end: decoding stops at the last pixel, where a PNG
    may have lost its tail or hold a false checksum."""
    try:
        decode(path)
        with Image.open(path, formats=FORMATS) as image:
            image.verify()
    except Exception as error:
        return describe(error)
    return None


def hash_file(path: Path) -> str:
    """SHA-256 of the file's bytes, in hex. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def decode(path: Path) -> Image.Image:
    with Image.open(path, formats=FORMATS) as image:
        check_size(image.size)
        return flatten(ImageOps.exif_transpose(image))


def check_size(size: tuple[int, int]) -> None:
    """Raises ValueError. `size` in pixels, before a single one of them is decoded."""
    if size[0] * size[1] > MAX_PIXELS:
        raise ValueError(f"{size[0]}x{size[1]} pixels are more than the limit of {MAX_PIXELS}")
    if max(size) > MAX_ASPECT * min(size):
        raise ValueError(f"{size[0]}x{size[1]} pixels: one side is more than {MAX_ASPECT} times the other")


def flatten(image: Image.Image) -> Image.Image:
    """Any mode to RGB. Raises ValueError for floating-point pixels, which have no known range."""
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range; save it with 8 bits a channel")
    if image.mode.startswith("I"):  # 16-bit grey; convert("RGB") would clip it to white
        return Image.fromarray((np.clip(np.asarray(image), 0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        colours = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), colours).convert("RGB")
    return image.convert("RGB")


def describe(error: Exception) -> str:
    """Decoders raise anything (SyntaxError, struct.error, IndexError ...): say what it means for the file."""
    if isinstance(error, UnidentifiedImageError):
        return f"is not an image that can be read ({', '.join(FORMATS)})"
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return f"has more pixels than the limit of {MAX_PIXELS}"
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read: {error.strerror}"
    if any(word in str(error) for word in ("truncated", "incomplete")):
        return f"is truncated: {error}"
    return f"cannot be decoded: {error or type(error).__name__}"
