"""Open image files by Pillow's own readers, without a global limit on pixels."""

import struct
from importlib import import_module
from importlib.util import find_spec
from pathlib import PurePath
from typing import BinaryIO

from PIL import Image, ImageFile, UnidentifiedImageError

from trainer.data.media.content import is_heif

# Without a list, Pillow also tries formats that start other programs (EPS runs Ghostscript). A camera's MPO opens as JPEG.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF", "JPEG2000", "ICO")
HEIF_PACKAGE = "pillow_heif"  # optional: no image of ours has it
TGA_SUFFIXES = (".tga", ".icb", ".vda", ".vst")  # TGA has no signature, so that its reader would try any file
PREFIX_BYTES = 16


def recognise(stream: BinaryIO, name: str = "") -> ImageFile.ImageFile:
    """The image, opened but not decoded. `name`: of its file, if it has one.

    Image.open does the same, but warns above Image.MAX_IMAGE_PIXELS and refuses twice as many; that limit is one for all threads, and
    the callers have their own (`trainer.data.media.image.check_size`). Raises UnidentifiedImageError, and what the readers raise."""
    prefix = stream.read(PREFIX_BYTES)
    for form in formats_of(prefix, name):
        if form not in Image.OPEN:
            Image.init()
        if form not in Image.OPEN:  # AVIF: since Pillow 11.3
            continue
        factory, accept = Image.OPEN[form]
        accepted = accept(prefix) if accept else True
        if not accepted or isinstance(accepted, str):  # a text says why Pillow was built without the format
            continue
        stream.seek(0)
        try:
            return factory(stream, "")  # with a name, Pillow would map the file of that name into memory instead of reading the stream
        except (SyntaxError, IndexError, TypeError, struct.error):
            continue
    raise UnidentifiedImageError(f"cannot identify image file {name!r}")


def formats_of(prefix: bytes, name: str) -> tuple[str, ...]:
    if is_heif(prefix) and find_spec(HEIF_PACKAGE):
        import_module(HEIF_PACKAGE).register_heif_opener()  # adds an entry to a table; a second call changes nothing
        return ("HEIF",)
    return (*FORMATS, "TGA") if PurePath(name).suffix.lower() in TGA_SUFFIXES else FORMATS
