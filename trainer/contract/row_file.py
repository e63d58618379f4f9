"""What kind of file rows are in, and its text: compressed or not, in UTF-8, or in UTF-16 or UTF-32 with a byte order mark.

The standard library reads all of it but zstd and the rows of parquet and Arrow files, for which pyarrow is imported.
"""

import bz2
import codecs
import gzip
import importlib
import io
import lzma
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal, TextIO

Container = Literal["json", "csv", "tsv", "parquet", "arrow", "tar"]

INSTALL = "pip install 'pyarrow>=17'"
HEAD_BYTES = 512  # a block of a tar file
TAR_MAGIC, TAR_PLACE = b"ustar", 257  # POSIX.1-1988
PARQUET_MAGIC, PARQUET_SEALED = b"PAR1", b"PARE"  # apache/parquet-format: README.md, Encryption.md
# apache/arrow: docs/source/format/Columnar.rst. A stream, which the datasets library writes, begins with the mark of a message and not of a file.
ARROW_MAGICS = (b"ARROW1", b"FEA1", b"\xff\xff\xff\xff")
BY_SUFFIX: dict[str, Container] = {
    ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet", ".arrow": "arrow", ".feather": "arrow", ".ipc": "arrow", ".tar": "tar",
    ".tgz": "tar",
}  # fmt: skip
COMPRESSED = {".gz", ".bz2", ".xz", ".zst", ".zstd"}
UTF_32 = ((codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"))
# UTF-32 first: its mark begins as that of UTF-16 does.
ENCODINGS = (*UTF_32, (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))


def find_container(file: Path) -> Container:
    """By the first bytes, and for what has none by the name: `rows.csv`, `rows.csv.gz`. Text of another name is JSON. Raises OSError."""
    with file.open("rb") as opened:
        head = opened.read(HEAD_BYTES)
    if head.startswith((PARQUET_MAGIC, PARQUET_SEALED)):
        return "parquet"
    if head.startswith(ARROW_MAGICS):
        return "arrow"
    if head[TAR_PLACE:].startswith(TAR_MAGIC):
        return "tar"
    return BY_SUFFIX.get(suffix_of(file), "json")


def suffix_of(file: Path) -> str:
    """In lower case, without that of the compression: `.jsonl` of `rows.jsonl.gz`."""
    name = Path(file.name.lower())
    return Path(name.stem).suffix if name.suffix in COMPRESSED else name.suffix


@contextmanager
def open_binary(file: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """The content without its compression, and the file below it, whose position says how far it is read. Raises as `open_text`."""
    with file.open("rb") as binary:
        yield decompress(binary), binary


@contextmanager
def open_text(file: Path) -> Iterator[tuple[TextIO, BinaryIO]]:
    """The text, with its line feeds as they are, and the file below it, whose position says how far it is read. Raises OSError, and ModuleNotFoundError
    for zstd without pyarrow. Reading the text raises UnicodeDecodeError, and EOFError or an exception of the decoder for a damaged file."""
    with open_binary(file) as (plain, binary):
        head = plain.peek(4)[:4]  # type: ignore[attr-defined]  # all readers of DECODERS have it
        encoding = next((name for mark, name in ENCODINGS if head.startswith(mark)), "utf-8-sig")
        with io.TextIOWrapper(plain, encoding=encoding, newline="\n") as text:
            yield text, binary


def split_member(name: str) -> tuple[str, str]:
    """(key, ending) of a member of a webdataset: the name up to the first dot of its last part, and what follows. Members with the same key, next
    to each other, are one row. webdataset/webdataset: src/webdataset/tariterators.py, base_plus_ext."""
    folder, slash, last = name.removeprefix("./").rpartition("/")
    stem, _, ending = last.partition(".")
    return f"{folder}{slash}{stem}", ending.lower()


def is_plain(file: Path) -> bool:
    """Whether the text is UTF-8 and not compressed: what is at a byte of it can be read without what is before. Raises OSError."""
    with file.open("rb") as opened:
        head = opened.read(8)
    return not head.startswith((*DECODERS, *(mark for mark, _ in ENCODINGS)))


def decompress(binary: BinaryIO) -> BinaryIO:
    head = binary.peek(8)  # type: ignore[attr-defined]  # it is buffered
    opening = next((make for magic, make in DECODERS.items() if head.startswith(magic)), None)
    return opening(binary) if opening else binary


def open_zstd(binary: BinaryIO) -> BinaryIO:
    pyarrow: Any = import_pyarrow("pyarrow")
    return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(binary, mode="r"), "zstd"))


def import_pyarrow(name: str) -> Any:
    """A module of pyarrow. Raises ModuleNotFoundError."""
    return importlib.import_module(name)


DECODERS: dict[bytes, Callable[[BinaryIO], Any]] = {
    b"\x1f\x8b": lambda binary: gzip.GzipFile(fileobj=binary),
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ\x00": lzma.LZMAFile,
    b"\x28\xb5\x2f\xfd": open_zstd,  # RFC 8878
}
