"""Image files to upright RGB pixels."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from threading import Lock
from typing import BinaryIO, TypeVar

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from trainer.contract import InputRefused
from trainer.data.media.content import HEAD_BYTES, REPLACE, name_content
from trainer.data.media.large import LARGEST_PIXELS, MAX_PIXELS, decode_halved, is_large, shrink
from trainer.data.media.opener import FORMATS, recognise
from trainer.data.media.repair import repair

MAX_ASPECT = 200  # Qwen2-VL's smart_resize raises above it

ORIENTATION = 0x0112  # tag of EXIF 2.32; 1 = upright
ROTATED = range(2, 9)
SIDEWAYS = range(5, 9)
MODES = {"RGB": "", "L": "grey", "LA": "grey", "1": "black and white", "P": "palette", "PA": "palette"}  # other modes are reported by name
EXIF_KEYS = frozenset({"exif", "Raw profile type exif"})  # where Pillow keeps EXIF tags that precede the pixels of a PNG
ONE_LARGE = Lock()  # an image above MAX_PIXELS takes up to 1.4 GB: the threads of a process decode one at a time
HALVED = "above 89 megapixels, read at half of the sides"
MORE_PAGES = {"TIFF": "the first of several pages", "MPO": "the first of several pictures"}
ANIMATED = "the first frame of an animation"
TWELVE_BITS = 4096
FIXES = {"one side is more than": "crop it, or pad its short side", "are more than the limit": "scale it down, or cut it into parts"}

Value = TypeVar("Value")


def open_image(path: Path, *, truncated: bool = False) -> Image.Image:
    """The first frame as RGB, rotated upright by its EXIF tag, transparency on white; at half of its sides if it has more than MAX_PIXELS.

    `truncated`: read an image whose end is missing as far as it goes (data.truncated_images=read). Raises InputRefused with the path for a
    file that cannot be decoded completely, is too large or too narrow.
    """
    with refusing(path):
        return repairing(path, decode, truncated=truncated)


def read_size(path: Path, *, truncated: bool = False) -> tuple[int, int]:
    """(width, height) of what `open_image` returns, from the header of the file. An EXIF tag after the pixels of a PNG is ignored. Raises
    InputRefused as `open_image` does."""
    with refusing(path):
        return repairing(path, measure, truncated=truncated)


def repairing(path: Path, read: Callable[[BinaryIO, str], Value], *, truncated: bool) -> Value:
    """`read(stream, name)` of the file; if that fails, of its repaired bytes, if it can be repaired."""
    try:
        with path.open("rb") as stream:
            return read(stream, str(path))
    except Exception:
        if not path.is_file() or (repaired := repair(path.read_bytes(), truncated=truncated)) is None:
            raise
        return read(BytesIO(repaired.content), str(path))


def decode(stream: BinaryIO, name: str) -> Image.Image:
    with recognise(stream, name) as image:
        check_size(image.size, LARGEST_PIXELS)
        with ONE_LARGE if is_large(image.size) else nullcontext():
            upright = ImageOps.exif_transpose(decode_halved(image, stream, flatten) if is_large(image.size) else image)
        return flatten(upright)


def read_whole_size(path: Path) -> tuple[int, int]:
    """(width, height) of the image in the file, upright; larger than what `open_image` returns if it has more than MAX_PIXELS."""
    with refusing(path):
        return repairing(path, measure_whole, truncated=True)


def measure(stream: BinaryIO, name: str) -> tuple[int, int]:
    return shrink(measure_whole(stream, name))


def measure_whole(stream: BinaryIO, name: str) -> tuple[int, int]:
    with recognise(stream, name) as image:
        check_size(image.size, LARGEST_PIXELS)
        return turn_size(image, read_turn(image))


def read_turn(image: ImageFile.ImageFile) -> int:
    """The EXIF orientation. getexif() would decode the pixels of a PNG to look for a tag after them."""
    untagged = image.format == "PNG" and EXIF_KEYS.isdisjoint(image.info)
    return 1 if untagged else int(image.getexif().get(ORIENTATION, 1))


@contextmanager
def refusing(path: Path) -> Iterator[None]:
    """Turns the exceptions of decoders, which may be of any type, into InputRefused."""
    try:
        yield
    except Exception as error:
        problem, fix = explain(error, read_head(path))
        raise InputRefused(f"{path}: {problem}\n    {fix}") from error


def read_head(path: Path) -> bytes | None:
    """The first bytes of a file; None if it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(HEAD_BYTES)
    except OSError:
        return None


@dataclass(frozen=True, kw_only=True, slots=True)
class Examined:
    """`sha256`: of the bytes of the file, '' if it cannot be read. `size`: (width, height) in pixels, upright; (0, 0) with a `problem`.
    `conversions`: what is necessary to make it upright RGB. `fix`: the next step after a `problem`."""

    sha256: str
    size: tuple[int, int] = (0, 0)
    conversions: tuple[str, ...] = ()
    problem: str | None = None
    fix: str = REPLACE


def examine_image(path: Path, *, truncated: bool = False) -> Examined:
    """Hash and size of the file, and whether `open_image` would accept it. The file is read once, and decoded only as far as necessary.

    The end of the file is verified too: decoding stops at the last pixel, after which a PNG may be truncated or have a wrong checksum.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        return Examined(sha256="", problem=f"cannot be read: {error.strerror}")
    digest = hashlib.sha256(content).hexdigest()
    try:
        size, conversions = examine(content, path.name)
    except Exception as error:
        return examine_repaired(content, path.name, digest, error, truncated=truncated)
    return Examined(sha256=digest, size=size, conversions=conversions)


def examine_repaired(content: bytes, name: str, digest: str, error: Exception, *, truncated: bool) -> Examined:
    """`error`: why the file cannot be read as it is."""
    problem, fix = explain(error, content[:HEAD_BYTES])
    try:
        repaired = repair(content, truncated=False) or repair(content, truncated=True)
        size, conversions = examine(repaired.content, name) if repaired else ((0, 0), ())
    except Exception as second:
        little = describe(second)
        return Examined(sha256=digest, problem=little if little.startswith("is truncated: only") else problem, fix=fix)
    if repaired is None:
        return Examined(sha256=digest, problem=problem, fix=fix)
    if repaired.truncated and not truncated:
        advice = "copy the file again, remove its row, or read it as far as it goes: data.truncated_images=read"
        return Examined(sha256=digest, problem=problem, fix=advice)
    return Examined(sha256=digest, size=size, conversions=(*conversions, *repaired.notes))


def examine(content: bytes, name: str = "") -> tuple[tuple[int, int], tuple[str, ...]]:
    stream = BytesIO(content)
    with recognise(stream, name) as image:
        check_size(image.size, LARGEST_PIXELS)
        turn = read_turn(image) if is_large(image.size) else image.getexif().get(ORIENTATION, 1)
        size = shrink(turn_size(image, turn))
        conversions = tuple(word for word in (convert_mode(image), "turned by EXIF" if turn in ROTATED else "") if word)
        if is_large(image.size):
            conversions += (HALVED,)
            with ONE_LARGE:
                decode_halved(image, stream, flatten)
        else:
            image.draft(None, (1, 1))  # a JPEG is read completely, but only every eighth row and column is computed
            if conversions:
                flatten(ImageOps.exif_transpose(image))
            else:
                image.load()
            conversions += describe_depth(image)
    with recognise(BytesIO(content), name) as image:
        conversions += find_pages(image)
        image.verify()
    return size, conversions


def find_pages(image: ImageFile.ImageFile) -> tuple[str, ...]:
    """Whether there are more pictures than the one that is read."""
    try:
        several = getattr(image, "is_animated", False)
    except Exception:  # a damaged second frame, which is not read
        several = True
    return (MORE_PAGES.get(image.format or "", ANIMATED),) if several else ()


def turn_size(image: Image.Image, turn: int) -> tuple[int, int]:
    """(width, height) of an image that was just opened, upright. For a TIFF, Pillow has already swapped the size, but not rotated the pixels."""
    return image.size[::-1] if turn in SIDEWAYS and image.format != "TIFF" else image.size


def convert_mode(image: Image.Image) -> str:
    """What `flatten` has to convert, '' for plain RGB."""
    if image.mode.startswith("I"):
        return "16-bit grey"
    if image.mode == "F":
        return "floating point"
    return "transparent" if image.has_transparency_data else MODES.get(image.mode, image.mode)


def describe_depth(image: Image.Image) -> tuple[str, ...]:
    """Whether a 16-bit image uses few of its bits: it is divided by 256, as other programs do, and is dark then."""
    if not image.mode.startswith("I"):
        return ()
    return ("16-bit grey that uses at most 12 bits, so that it is dark",) if 255 < int(np.asarray(image).max()) < TWELVE_BITS else ()


def hash_file(path: Path) -> str:
    """SHA-256 of the file's bytes, in hex. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_size(size: tuple[int, int], most: int = MAX_PIXELS) -> None:
    """Raises ValueError. `size` in pixels; called before any pixel is decoded."""
    if size[0] * size[1] > most:
        raise ValueError(f"{size[0]}x{size[1]} pixels are more than the limit of {most}")
    if max(size) > MAX_ASPECT * min(size):
        raise ValueError(f"{size[0]}x{size[1]} pixels: one side is more than {MAX_ASPECT} times the other")


def flatten(image: Image.Image) -> Image.Image:
    """Convert any mode to RGB. Raises ValueError for floating-point pixels outside of 0 to 255, because their range is not known."""
    if image.mode == "F":
        return Image.fromarray(scale_floats(np.asarray(image))).convert("RGB")
    if image.mode.startswith("I"):  # 16-bit grey; convert("RGB") would clip it to white
        return Image.fromarray((np.clip(np.asarray(image), 0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        colours = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), colours).convert("RGB")
    return image.convert("RGB")


def scale_floats(pixels: np.ndarray) -> np.ndarray:
    """(rows, columns) float32 -> uint8. Values from 0 to 1 are a share of white; from 0 to 255 they are grey levels."""
    least, most = float(pixels.min()), float(pixels.max())
    if not (least >= 0 and most <= 255):  # NaN too
        raise ValueError(f"floating-point pixels from {least:g} to {most:g} have no known range; scale them to 0 to 1")
    levels: np.ndarray = np.rint(pixels * (255 if most <= 1 else 1)).astype(np.uint8)
    return levels


def explain(error: Exception, head: bytes | None) -> tuple[str, str]:
    """(problem, fix). `head`: the first bytes of the file, if it can be read."""
    named = name_content(head) if isinstance(error, UnidentifiedImageError) and head is not None else None
    return named or (describe(error), next((fix for words, fix in FIXES.items() if words in str(error)), REPLACE))


def describe(error: Exception) -> str:
    """What an exception of a decoder (SyntaxError, struct.error, IndexError ...) means for the file."""
    if isinstance(error, UnidentifiedImageError):
        return f"is not an image in a supported format ({', '.join(FORMATS)})"
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return f"has more pixels than the limit of {MAX_PIXELS}"
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read: {error.strerror}"
    if any(word in str(error) for word in ("truncated", "incomplete")):
        return str(error) if str(error).startswith("is truncated") else f"is truncated: {error}"
    return f"cannot be decoded: {error or type(error).__name__}"
