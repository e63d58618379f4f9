"""Images that are written into a row as text: `data:` URIs and base64. They are kept as files, whose paths take their place."""

import binascii
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from trainer.data.media.store import MOST_BYTES, OTHER, MediaStore, find_suffix
from trainer.data.rows.parsed_row import REPORTED, AddProblem, ImageReference

BASE64 = re.compile(r"[A-Za-z0-9+/_\-\s]+={0,2}\s*")
HEADS = (
    "iVBORw0KGgo",
    "/9j/",
    "R0lGOD",
    "UklGR",
    "SUkq",
    "TU0A",
    "Qk",
    "AAAA",
)  # base64 of the first bytes of PNG, JPEG, GIF, WebP, TIFF, BMP, AVIF
LEAST, CERTAIN = 64, 1024  # characters: of the smallest image, and of a text that is longer than the path of a file without a dot
LISTED = "save the image as a file and give its path"
WRITE = "write the base64 of an image file, or " + LISTED


def keep_images(images: Sequence[ImageReference], folder: Path, store: MediaStore, add_problem: AddProblem) -> tuple[ImageReference, ...]:
    """The images with the paths of files for those that are written in the row. `folder`: where relative paths start. One that cannot be read is a
    problem, and its name is REPORTED. Raises InputRefused where a file cannot be kept."""
    kept: list[ImageReference] = []
    for image in images:
        text = inline_text(image.name, folder)
        if text is None:
            kept.append(image)
            continue
        try:
            kept.append(replace(image, name=str(store.keep(read_inline(text)))))
        except ValueError as error:
            add_problem(image.field, str(error), WRITE)
            kept.append(replace(image, name=REPORTED))
    return tuple(kept)


def inline_text(name: Any, folder: Path) -> str | None:
    """The text of an image in the row; None for a path."""
    if isinstance(name, dict) and isinstance(name.get("bytes"), str):
        return name["bytes"]
    if not isinstance(name, str):
        return None
    if name.lower().startswith("data:"):
        return name
    return name if looks_like_base64(name) and not is_path(name, folder) else None


def looks_like_base64(text: str) -> bool:
    return len(text) >= LEAST and (len(text) >= CERTAIN or text.startswith(HEADS)) and BASE64.fullmatch(text) is not None


def is_path(name: str, folder: Path) -> bool:
    try:
        return (folder / name).is_file()
    except (OSError, ValueError):  # too long for a file name
        return False


def read_inline(text: str) -> bytes:
    """The bytes of an image. Raises ValueError."""
    data = text
    if text[:5].lower() == "data:":
        head, comma, data = text.partition(",")
        if not comma or not head.lower().endswith(";base64"):
            raise ValueError(f"{text[:40]!r} is a data: URI that is not in base64")
        kind = head[5:].split(";")[0].lower()
        if kind and not kind.startswith("image/") and kind != "application/octet-stream":
            raise ValueError(f"is a data: URI of {kind[:40]!r}, not of an image")
    content = decode_base64(data)
    if find_suffix(content) == OTHER:
        raise ValueError(f"is base64 of {len(content):,} bytes that do not begin as an image does")
    return content


def decode_base64(text: str) -> bytes:
    """Also of the alphabet for URLs, in lines, and without the padding. Raises ValueError."""
    text = "".join((unquote(text) if "%" in text else text).split()).replace("-", "+").replace("_", "/").rstrip("=")
    if len(text) * 3 // 4 > MOST_BYTES:
        raise ValueError(f"is base64 of {len(text) * 3 // 4:,} bytes, more than the limit of {MOST_BYTES:,}")
    try:
        return binascii.a2b_base64(text + "=" * (-len(text) % 4), strict_mode=True)
    except ValueError as error:
        raise ValueError(f"is not valid base64: {error}") from error
