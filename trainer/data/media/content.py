"""What a file that is not a readable image is, from its first bytes, and the next step."""

import re
from collections.abc import Callable
from dataclasses import dataclass

HEAD_BYTES = 1024
REPLACE = "replace the image file, or remove its row"
CONVERT = "convert it to PNG or JPEG"
FRAMES = "save frames of it as images, and list those"
ARCHIVE = "unpack it, and give the path of an image in it"
# Brands of ISO/IEC 14496-12 files: https://mp4ra.org/registered-types/brands
HEIF_BRANDS = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"})


@dataclass(frozen=True, kw_only=True)
class Kind:
    """`matches` gets the first HEAD_BYTES bytes of a file."""

    matches: Callable[[bytes], bool]
    what: str
    fix: str


def starts(*prefixes: bytes) -> Callable[[bytes], bool]:
    return lambda head: head.startswith(prefixes)


def is_heif(head: bytes) -> bool:
    return head[4:8] == b"ftyp" and head[8:12] in HEIF_BRANDS


def text_with(pattern: bytes) -> Callable[[bytes], bool]:
    """A text whose first visible characters match the pattern, in any case."""
    found = re.compile(rb"(?:\xef\xbb\xbf)?\s*" + pattern, re.IGNORECASE | re.DOTALL)
    return lambda head: found.match(head) is not None


# Tried in order. Signatures: https://www.garykessler.net/library/file_sigs.html and the specifications of the formats.
KINDS = (
    Kind(matches=lambda head: not head, what="is empty", fix="copy or download the file again"),
    Kind(
        matches=starts(b"version https://git-lfs.github.com/"),
        what="is a pointer of Git LFS, not the image itself",
        fix="run git lfs pull in its repository",
    ),
    Kind(
        matches=text_with(rb"(?:<\?xml.*?)?(?:<!--.*?-->\s*)?(?:<!doctype svg|<svg)"),
        what="is an SVG drawing, which has no pixels",
        fix="convert it to PNG at the size that the model should get",
    ),
    Kind(
        matches=text_with(rb"(?:<\?xml[^>]*>\s*)?(?:<!--.*?-->\s*)?(?:<!doctype html|<html|<head|<body)"),
        what="is an HTML page: a download that failed",
        fix="download the image again",
    ),
    Kind(matches=text_with(rb"<\?xml"), what="is XML: a download that failed, or a drawing", fix="download the image again"),
    Kind(matches=starts(b"%PDF"), what="is a PDF document", fix="convert its pages to PNG"),
    Kind(matches=starts(b"%!PS"), what="is a PostScript document", fix=CONVERT),
    Kind(matches=is_heif, what="is a HEIC image, which Pillow cannot read", fix=CONVERT),
    Kind(matches=lambda head: head[4:12] in (b"ftypavif", b"ftypavis"), what="is an AVIF image that cannot be read", fix=CONVERT),
    Kind(matches=lambda head: head[4:8] in (b"ftyp", b"moov", b"mdat"), what="is a video", fix=FRAMES),
    Kind(matches=starts(b"\x1aE\xdf\xa3", b"FLV\x01", b"\x00\x00\x01\xba", b"\x00\x00\x01\xb3"), what="is a video", fix=FRAMES),
    Kind(matches=lambda head: head[:4] == b"RIFF" and head[8:12] == b"AVI ", what="is a video", fix=FRAMES),
    Kind(matches=lambda head: head[:4] == b"RIFF" and head[8:12] == b"WAVE", what="is a sound", fix=REPLACE),
    Kind(matches=starts(b"ID3", b"OggS", b"fLaC", b"\xff\xfb", b"\xff\xf3"), what="is a sound", fix=REPLACE),
    Kind(matches=starts(b"PAR1"), what="is a parquet file, not an image", fix="give it as data.train, if it holds the rows"),
    Kind(matches=starts(b"PK\x03\x04", b"\x1f\x8b", b"7z\xbc\xaf", b"Rar!", b"BZh", b"\xfd7zXZ"), what="is an archive", fix=ARCHIVE),
    Kind(matches=lambda head: head[257:262] == b"ustar", what="is an archive", fix=ARCHIVE),
    Kind(matches=starts(b"\x93NUMPY"), what="is an array of NumPy", fix=f"{CONVERT}: Image.fromarray(array).save(...)"),
    Kind(matches=starts(b"\x89HDF"), what="is an HDF5 file", fix="save its images as files"),
    Kind(matches=starts(b"8BPS"), what="is a Photoshop document", fix=CONVERT),
    Kind(
        matches=lambda head: head[128:132] == b"DICM", what="is a DICOM image", fix=f"{CONVERT}, with the window that the model should get"
    ),
    Kind(
        matches=text_with(rb"(?:data:image/|/9j/|iVBORw0KGgo|R0lGOD|UklGR)"),
        what="is an image as base64 text",
        fix="decode it (base64 -d), and save the bytes",
    ),
    Kind(matches=text_with(rb"[{\[]\s*[\"{\[\]}\-\d]"), what="is JSON, not an image", fix=REPLACE),
    Kind(
        matches=lambda head: not head.strip(b"\0"), what="holds zero bytes only: a copy that failed", fix="copy or download the file again"
    ),
)


def name_content(head: bytes) -> tuple[str, str] | None:
    """(what it is, fix) of a file that is not an image in a supported format; None if its first bytes do not say it."""
    return next(((kind.what, kind.fix) for kind in KINDS if kind.matches(head)), None)
