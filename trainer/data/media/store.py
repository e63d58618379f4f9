"""Images that are not files: bytes in a table or an archive, base64 in JSON. Each is written once, as a file named by its SHA-256, and read as any other."""

import hashlib
import os
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from trainer.contract import InputRefused, TrainSpec
from trainer.data.kept_folder import is_writable, temporary_folder

MEDIA_FOLDER = "media"  # of trainer.data.kept_folder, else of the run's folder
MOST_BYTES = 2**28  # of an image file; the number of its pixels is checked when it is decoded
# The first bytes of the formats of trainer.data.media.image, and of those that it refuses by name. RIFF and ftyp say more after four bytes.
MAGICS = {
    b"\x89PNG\r\n\x1a\n": ".png",
    b"\xff\xd8\xff": ".jpg",
    b"GIF8": ".gif",
    b"II*\x00": ".tif",
    b"MM\x00*": ".tif",
    b"BM": ".bmp",
    b"P5": ".ppm",
    b"P6": ".ppm",
    b"\x00\x00\x00\x0cjP  ": ".jp2",
}
BOXED = {b"avif": ".avif", b"avis": ".avif", b"heic": ".heic", b"heix": ".heic", b"mif1": ".heic"}  # ISO/IEC 14496-12: the brand of ftyp
OTHER = ".bin"


def find_suffix(content: bytes) -> str:
    """That of an image format by its first bytes, else OTHER."""
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return ".webp"
    if content[4:8] == b"ftyp":
        return BOXED.get(content[8:12], OTHER)
    return next((suffix for magic, suffix in MAGICS.items() if content.startswith(magic)), OTHER)


@dataclass(frozen=True, kw_only=True)
class MediaStore:
    """`folders`: where the files may be: the first that can be written, else a folder for temporary files."""

    folders: tuple[Path, ...] = ()

    def open(self) -> Path:
        """The folder, made if it is not there."""
        return next(filter(is_writable, self.folders), None) or temporary_folder(MEDIA_FOLDER)

    def keep(self, content: bytes) -> Path:
        """The path of a file with this content. Processes may keep the same one at the same time. Raises ValueError for more than MOST_BYTES and for
        nothing, InputRefused where it cannot be written."""
        if not content:
            raise ValueError("has no bytes")
        if len(content) > MOST_BYTES:
            raise ValueError(f"has {len(content):,} bytes, more than the limit of {MOST_BYTES:,}")
        digest = hashlib.sha256(content).hexdigest()
        folder = self.open()
        target = folder / digest[:2] / f"{digest}{find_suffix(content)}"
        try:
            if not target.is_file() or target.stat().st_size != len(content):
                target.parent.mkdir(parents=True, exist_ok=True)
                write_new(content, target)
        except OSError as error:
            fix = "free disk space there, or set cluster.root to another folder"
            raise InputRefused(f"{folder}: an image of the data cannot be kept: {error.strerror}\n    {fix}") from error
        return target


def write_new(content: bytes, target: Path) -> None:
    """Under another name, and renamed: an incomplete file is never found."""
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=".")
    try:
        with os.fdopen(handle, "wb") as written:
            written.write(content)
        Path(name).rename(target)
    except BaseException:
        with suppress(OSError):
            Path(name).unlink(missing_ok=True)
        raise


def store_of(spec: TrainSpec) -> MediaStore:
    """Below `data.root`; in a container that has no such folder, in the run's."""
    return MediaStore(folders=(Path(spec.data.root) / MEDIA_FOLDER, *((Path(spec.output) / MEDIA_FOLDER,) if spec.output else ())))
