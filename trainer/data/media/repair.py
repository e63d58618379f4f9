"""Bytes of a damaged PNG or JPEG as a file that Pillow reads: without broken texts, or completed where some bytes at the end are missing.

Pillow has a switch for truncated images, but it is one for all threads and all files (ImageFile.LOAD_TRUNCATED_IMAGES). Here the file is
completed instead.
"""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from PIL import Image, PngImagePlugin

PNG, JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"
LEAST_SHARE = 0.75  # of the rows of a truncated image: with fewer it would be another picture than the text describes
END_OF_IMAGE = b"\xff\xd9"
BROKEN_TEXT, TRUNCATED = "with a broken text, ignored", "truncated, read as far as it goes"
# Chunks of a PNG that do not change its pixels or their orientation.
NO_PIXELS = frozenset({b"tEXt", b"zTXt", b"iTXt", b"tIME", b"pHYs", b"iCCP", b"gAMA", b"cHRM", b"sRGB", b"bKGD", b"hIST", b"sPLT", b"dSIG"})
COMPRESSED = frozenset({b"zTXt", b"iTXt"})
PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))  # Adam7: x, y, steps
CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # colour type of IHDR -> channels
GREY = range(126, 131)  # what libjpeg's decoder fills the blocks with that a file does not have


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """`complete`: all of its bytes are there. `right`: its checksum is."""

    kind: bytes
    data: bytes
    complete: bool
    right: bool


@dataclass(frozen=True, kw_only=True)
class Repaired:
    """`notes`: what was ignored or is missing, for the count of conversions."""

    content: bytes
    notes: tuple[str, ...]

    @property
    def truncated(self) -> bool:
        return TRUNCATED in self.notes


def repair(content: bytes, *, truncated: bool) -> Repaired | None:
    """None if there is nothing that can be repaired. `truncated`: also complete a truncated image. Raises ValueError if that has less than
    LEAST_SHARE of its rows."""
    if content.startswith(PNG):
        return repair_png(content, truncated=truncated)
    if truncated and content.startswith(JPEG):
        return complete_jpeg(content)
    return None


# --------------------------------------------------------------------------------------------------------------------- PNG


def repair_png(content: bytes, *, truncated: bool) -> Repaired | None:
    chunks = tuple(read_chunks(content))
    kept = tuple(chunk for chunk in chunks if not is_broken_text(chunk))
    notes = (BROKEN_TEXT,) if len(kept) < len(chunks) else ()
    if truncated and (not kept or kept[-1].kind != b"IEND" or not kept[-1].complete):
        kept, notes = complete_chunks(kept), (*notes, TRUNCATED)
    return Repaired(content=PNG + b"".join(map(write_chunk, kept)), notes=notes) if notes else None


def read_chunks(content: bytes) -> Iterator[Chunk]:
    """Up to IEND, or the end of the file. The last one may be incomplete."""
    place, kind = len(PNG), b""
    while place + 8 <= len(content) and kind != b"IEND":
        length, kind = int.from_bytes(content[place : place + 4]), content[place + 4 : place + 8]
        data, checksum = content[place + 8 : place + 8 + length], content[place + 8 + length : place + 12 + length]
        right = checksum == zlib.crc32(data, zlib.crc32(kind)).to_bytes(4)
        yield Chunk(kind=kind, data=data, complete=len(checksum) == 4, right=right)
        place += 12 + length


def is_broken_text(chunk: Chunk) -> bool:
    """A chunk without pixels whose checksum is wrong, or a text that is larger than Pillow reads."""
    if chunk.kind not in NO_PIXELS or not chunk.complete:
        return False
    large = chunk.kind in COMPRESSED and unpacked_size(chunk.data) > PngImagePlugin.MAX_TEXT_CHUNK
    return large or not chunk.right


def unpacked_size(data: bytes) -> int:
    """Bytes of a compressed text, at most one more than Pillow reads; 0 if it is not compressed."""
    start = data.find(b"\x78")  # the first byte of a zlib stream, after keyword and method
    try:
        return len(zlib.decompressobj().decompress(data[start:], PngImagePlugin.MAX_TEXT_CHUNK + 1)) if start >= 0 else 0
    except zlib.error:
        return 0


def write_chunk(chunk: Chunk) -> bytes:
    """With the checksum that the file had, right or wrong: a wrong one of pixels is still refused."""
    checksum = zlib.crc32(chunk.data, zlib.crc32(chunk.kind))
    return len(chunk.data).to_bytes(4) + chunk.kind + chunk.data + (checksum if chunk.right else checksum ^ 1).to_bytes(4)


def complete_chunks(chunks: tuple[Chunk, ...]) -> tuple[Chunk, ...]:
    """With all rows, the missing ones black, and IEND. Raises ValueError."""
    header = next((chunk.data for chunk in chunks if chunk.kind == b"IHDR" and chunk.right), b"")
    if len(header) != 13 or header[9] not in CHANNELS:
        raise ValueError("is truncated in its header")
    wrong = next((chunk for chunk in chunks if chunk.complete and not chunk.right), None)
    if wrong is not None:
        raise ValueError(f"has a wrong checksum in {wrong.kind.decode('ascii', 'replace')}")
    rows = decompress_all(b"".join(chunk.data for chunk in chunks if chunk.kind == b"IDAT"))
    whole = sum(raw_rows(header))
    refuse_little(len(rows) / max(whole, 1))
    pixels = zlib.compress(rows + bytes(whole - len(rows)), 1)
    before = tuple(chunk for chunk in chunks if chunk.kind not in (b"IDAT", b"IEND") and chunk.complete)
    return (*before, Chunk(kind=b"IDAT", data=pixels, complete=True, right=True), Chunk(kind=b"IEND", data=b"", complete=True, right=True))


def raw_rows(header: bytes) -> Iterator[int]:
    """The bytes of all rows with their filter bytes, of each pass of an interlaced PNG (PNG specification, 8.2)."""
    width, height = int.from_bytes(header[:4]), int.from_bytes(header[4:8])
    bits = header[8] * CHANNELS[header[9]]
    for left, top, across, down in PASSES if header[12] else ((0, 0, 1, 1),):
        columns, rows = -(-(width - left) // across), -(-(height - top) // down)
        if columns > 0 and rows > 0:
            yield rows * (1 + (columns * bits + 7) // 8)


def decompress_all(compressed: bytes) -> bytes:
    """As much as there is."""
    stream, parts = zlib.decompressobj(), []
    try:
        for start in range(0, len(compressed), 4096):
            parts.append(stream.decompress(compressed[start : start + 4096]))
    except zlib.error:
        pass  # damaged from here on
    return b"".join(parts)


# -------------------------------------------------------------------------------------------------------------------- JPEG


def complete_jpeg(content: bytes) -> Repaired | None:
    """With an end mark, so that libjpeg fills what is missing with grey. None if the file is complete."""
    if END_OF_IMAGE in content[-64:]:
        return None
    completed = content + END_OF_IMAGE * 2
    with Image.open(BytesIO(completed), formats=("JPEG",)) as image:
        refuse_little(1 - grey_rows(np.asarray(image)) / image.height)
    return Repaired(content=completed, notes=(TRUNCATED,))


def grey_rows(pixels: np.ndarray) -> int:
    """How many rows at the end are plain grey. `pixels`: (rows, columns) or (rows, columns, channels) uint8."""
    flat = pixels.reshape(len(pixels), -1)
    pictured = np.flatnonzero(((flat < GREY.start) | (flat >= GREY.stop)).any(axis=1))
    return len(flat) - 1 - int(pictured[-1]) if len(pictured) else len(flat)


def refuse_little(share: float) -> None:
    if share < LEAST_SHARE:
        raise ValueError(f"is truncated: only {share:.0%} of it can be decoded, less than {LEAST_SHARE:.0%}")
