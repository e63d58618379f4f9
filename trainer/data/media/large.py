"""Decode an image above MAX_PIXELS at half of its width and height, so that memory stays bounded."""

import zlib
from collections.abc import Callable, Iterator
from typing import BinaryIO

from PIL import Image, ImageFile

MAX_PIXELS = 89_478_485  # Pillow's own threshold: a quarter of a GiB of RGB
LARGEST_PIXELS = 4 * MAX_PIXELS  # decoded at half of the sides; more are refused as a decompression bomb
BAND = 256  # rows that are converted at a time; even, so that halving them is the same as halving the whole
STREAMED = ("RGB", "RGBA", "LA")  # modes of a PNG that Pillow stores in 4 bytes a pixel
READ_BYTES = 2**20

Flatten = Callable[[Image.Image], Image.Image]


def is_large(size: tuple[int, int]) -> bool:
    return size[0] * size[1] > MAX_PIXELS


def shrink(size: tuple[int, int]) -> tuple[int, int]:
    """(width, height) that the image is decoded to: as it is, or half of both, rounded up, if it has more than MAX_PIXELS."""
    return (-(-size[0] // 2), -(-size[1] // 2)) if is_large(size) else size


def decode_halved(image: ImageFile.ImageFile, stream: BinaryIO, flatten: Flatten) -> Image.Image:
    """RGB pixels of `shrink(image.size)`, not rotated, with the EXIF tags of the file. `flatten` converts some rows to RGB.

    A JPEG is scaled by its own decoder (every second coefficient), a plain PNG is decompressed some rows at a time. Any other image is decoded
    whole, in at most 4 bytes a pixel: 1.4 GB. Raises ValueError for floating-point pixels, whose scale depends on all of them."""
    size = shrink(image.size)
    if image.mode == "F":
        raise ValueError(f"{image.width}x{image.height} floating-point pixels are more than the limit of {MAX_PIXELS}")
    if image.format in ("JPEG", "MPO"):
        image.draft(None, (image.width // 2, image.height // 2))
    if image.size == size:
        halved = flatten(image)
    else:
        halved = Image.new("RGB", size)
        for top, band in read_bands(image, stream):
            halved.paste(flatten(band).reduce(2), (0, top // 2))
    if image.format != "TIFF" and "exif" in image.info:  # Pillow rotates a TIFF while it loads it
        halved.info["exif"] = image.info["exif"]
    return halved


def read_bands(image: ImageFile.ImageFile, stream: BinaryIO) -> Iterator[tuple[int, Image.Image]]:
    """(top, rows) of at most BAND rows each, in the mode of the image."""
    if image.format == "PNG" and image.mode in STREAMED and not image.info.get("interlace") and image.tile[0][3] == image.mode:
        yield from read_png_bands(image, stream)
        return
    image.load()
    for top in range(0, image.height, BAND):
        yield top, image.crop((0, top, image.width, min(top + BAND, image.height)))


def read_png_bands(image: ImageFile.ImageFile, stream: BinaryIO) -> Iterator[tuple[int, Image.Image]]:
    """Of a PNG with 8 bits a channel that is not interlaced. A row is stored as differences from the row above (PNG specification, 9.2), so
    each band is decoded together with the last row of the one before. Raises OSError for a truncated file."""
    row_bytes = image.width * len(image.getbands())
    rows = decompress(read_idat(stream), (row_bytes + 1) * BAND)
    above = bytes(row_bytes)
    for top in range(0, image.height, BAND):
        count = min(BAND, image.height - top)
        filtered = next(rows, b"")[: (row_bytes + 1) * count]
        if len(filtered) < (row_bytes + 1) * count:
            raise OSError("image file is truncated")
        stored = zlib.compress(b"\0" + above + filtered, 0)
        decoded = Image.frombytes(image.mode, (image.width, count + 1), stored, "zip", image.mode, 0)
        band = decoded.crop((0, 1, image.width, count + 1))
        band.info = {key: value for key, value in image.info.items() if key == "transparency"}
        above = decoded.crop((0, count, image.width, count + 1)).tobytes()
        yield top, band


def read_idat(stream: BinaryIO) -> Iterator[bytes]:
    """The compressed pixels of a PNG, some at a time."""
    stream.seek(8)
    while len(header := stream.read(8)) == 8:
        length, kind = int.from_bytes(header[:4]), header[4:]
        if kind != b"IDAT":
            stream.seek(length, 1)
        while kind == b"IDAT" and length and (part := stream.read(min(length, READ_BYTES))):
            length -= len(part)
            yield part
        stream.seek(4, 1)  # its checksum: the check reads it (examine_image)


def decompress(parts: Iterator[bytes], size: int) -> Iterator[bytes]:
    """Blocks of `size` bytes, the last one with what is left."""
    stream, kept = zlib.decompressobj(), bytearray()
    for part in parts:
        while part:
            kept += stream.decompress(part, size)
            part = stream.unconsumed_tail
            while len(kept) >= size:
                yield bytes(kept[:size])
                del kept[:size]
    yield bytes(kept)
