"""Where each row of a large annotation file starts, so that a row can be read without the rows before it, and the file need not be in memory.

An index is a file of fixed-size entries that is mapped into memory: opening it takes no time, and all ranks of a node share its pages. It is made
once, in one pass over the file, and found again by the file's path, size, time and first and last bytes. It is kept in a folder of ours.

A row of a table, of an archive or of a compressed file cannot be read alone. The rows of such a file are written once as JSON Lines, beside the images
that it has as bytes, and their index is that of these lines.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from trainer.contract import DataProblem, InputRefused
from trainer.contract.json_shape import Shape
from trainer.data.containers.annotation import find_layout, read_rows, stream_rows
from trainer.data.containers.json_text import RowDecoder, scan_list, scan_objects
from trainer.data.kept_folder import locked
from trainer.data.media.image import hash_file
from trainer.data.media.store import MediaStore

ENTRY = np.dtype([("start", "<u8"), ("size", "<u4"), ("row", "<u4"), ("part", "<u4")])  # bytes; numbers of row and of conversation in it
HEADER_BYTES = 64  # SHA-256 of the annotation file, in hex
VERSION = 2
ROWS_FOLDER = "rows"  # of the folder with the images: rows that name them go when these do
EDGE_BYTES = 2**16
CHUNK_BYTES = 2**24
FEED, BRACE, BRACKET = b"\n{["
BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, kw_only=True)
class RowIndex:
    """`entries`: one for each conversation of the file, in order, of dtype ENTRY. `text`: the file that they are places of: `file` itself, or its rows
    as JSON Lines. `sha256`: of `file`."""

    file: Path
    text: Path
    entries: NDArray[np.void]
    sha256: str

    def __len__(self) -> int:
        return len(self.entries)

    def read(self, place: int) -> tuple[int, int, Any]:
        """(row, part, content) of the conversation at `place`, from 0: of a row with several, the content of the whole row. Raises OSError, and
        ValueError or RecursionError for a row that is not JSON."""
        start, size, row, part = self.entries[place].tolist()
        with self.text.open("rb") as opened:
            text = os.pread(opened.fileno(), size, start).decode()
        decoder = RowDecoder()
        content = decoder.decode(text)
        if decoder.repeated:
            raise ValueError(f"the key {decoder.repeated!r} is given twice, with different values")
        return row, part, content


def open_index(file: Path, folder: Path, store: MediaStore | None = None) -> RowIndex:
    """The index of a file, made if `folder` does not have it. Processes that need it at the same time wait for the first one. `store`: for the images
    in a file that has them as bytes. Raises OSError, and InputRefused for a list that is not JSON, and a table or archive with an invalid row."""
    store = store or MediaStore()
    layout = find_layout(file)
    if layout is None:
        folder = store.open() / ROWS_FOLDER
        folder.mkdir(exist_ok=True)
    name, key = hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:16], identity(file)
    target = folder / f"{name}-{key}.rows"
    text = file if layout else target.with_suffix(".jsonl")
    with locked(folder / f"{name}.lock"):
        if not (target.is_file() and text.is_file()):
            make_index(file, target, layout, text, store)
            for old in (*folder.glob(f"{name}-*.rows"), *folder.glob(f"{name}-*.jsonl")):
                if old not in (target, text):
                    old.unlink(missing_ok=True)
    with target.open("rb") as opened:
        digest = opened.read(HEADER_BYTES).decode()
    empty = target.stat().st_size == HEADER_BYTES
    entries = np.empty(0, ENTRY) if empty else np.memmap(target, ENTRY, mode="r", offset=HEADER_BYTES)
    return RowIndex(file=file, text=text, entries=entries, sha256=digest)


def identity(file: Path) -> str:
    """Changes when the file does: from its size, times and inode, and its first and last bytes. Raises OSError."""
    stat = file.stat()
    with file.open("rb") as opened:
        head = opened.read(EDGE_BYTES)
        opened.seek(max(0, stat.st_size - EDGE_BYTES))
        tail = opened.read(EDGE_BYTES)
    text = f"{VERSION} {file.suffix} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns} {stat.st_ino}\0"
    return hashlib.sha256(text.encode() + head + tail).hexdigest()[:24]


def make_index(file: Path, target: Path, layout: Shape | None, text: Path, store: MediaStore) -> None:
    """Written under another name and renamed, so that an incomplete index is never found."""
    with replacing(target) as written, file.open("rb") as opened:
        written.write(b"0" * HEADER_BYTES)
        digest = hashlib.sha256()
        for entries in scan(file, opened, digest, layout) if layout else write_lines(file, text, store):
            written.write(entries.tobytes())
        written.seek(0)
        written.write((digest.hexdigest() if layout else hash_file(file)).encode())


@contextmanager
def replacing(target: Path) -> Iterator[BinaryIO]:
    """A file that becomes `target` when it is complete."""
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as written:
            yield written
        Path(name).rename(target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def scan(file: Path, opened: BinaryIO, digest: Any, layout: Shape) -> Iterator[NDArray[np.void]]:
    """Entries of a file, some thousand at a time. `digest` gets all of its bytes."""
    yield from scan_lines(opened, digest) if layout == "lines" else scan_values(file, opened, digest, layout)


def write_lines(file: Path, text: Path, store: MediaStore) -> Iterator[NDArray[np.void]]:
    """Write the rows of a file as JSON Lines. Raises InputRefused for a row that has a problem."""
    entries: list[tuple[int, ...]] = []
    start = 0
    with replacing(text) as written:
        for found in stream_rows(file, store=store):
            if isinstance(found, DataProblem):
                raise InputRefused(str(found))
            line = json.dumps(found[1]).encode()
            written.write(line + b"\n")
            entries += ((start, len(line), found[0], part) for part in range(count_conversations(found[1])))
            start += len(line) + 1
            if len(entries) >= EDGE_BYTES:
                yield np.array(entries, ENTRY)
                entries = []
    yield np.array(entries, ENTRY)


# ------------------------------------------------------------------------------------------------------------------- lines


def scan_lines(opened: BinaryIO, digest: Any) -> Iterator[NDArray[np.void]]:
    """One entry for a line that begins with a brace; the others are looked at."""
    before, line, rest = 0, 1, b""  # bytes and lines before `rest`, which has no line feed
    while chunk := opened.read(CHUNK_BYTES):
        digest.update(chunk)
        text = rest + chunk
        ends = np.flatnonzero(np.frombuffer(text, np.uint8) == FEED)
        yield index_lines(text, ends, before, line)
        used = int(ends[-1]) + 1 if len(ends) else 0
        before, line, rest = before + used, line + len(ends), text[used:]
    if rest:
        yield index_lines(rest + b"\n", np.array([len(rest)]), before, line)


def index_lines(text: bytes, ends: NDArray[np.int64], before: int, line: int) -> NDArray[np.void]:
    """`ends`: where the lines of `text` end; it begins at byte `before` of the file, with line number `line`."""
    starts = np.concatenate(([0], ends[:-1] + 1)) if len(ends) else ends
    found = np.zeros(len(ends), ENTRY)
    found["start"], found["size"], found["row"] = starts + before, ends - starts, line + np.arange(len(ends))
    plain = np.frombuffer(text, np.uint8)[starts] == BRACE
    others = [entry for place in np.flatnonzero(~plain) for entry in parts_of(text[starts[place] : ends[place]], found[place])]
    if not others:
        return found[plain]
    return np.sort(np.concatenate([found[plain], np.array(others, ENTRY)]), order=["row", "part"])


def parts_of(text: bytes, entry: np.void) -> list[tuple[int, ...]]:
    """The entries of a line: none if it is blank, and one for each conversation of a list."""
    start, size, row, _ = entry.tolist()
    skipped = len(BOM) if start == 0 and text.startswith(BOM) else 0
    text = text[skipped:]
    if not text.strip():
        return []
    count = 1
    if text.lstrip()[0] == BRACKET:
        with suppress(ValueError, RecursionError):  # reported when the row is read
            count = count_conversations(json.loads(text))
    return [(start + skipped, size - skipped, row, part) for part in range(count)]


def count_conversations(value: Any) -> int:
    return len(value) if isinstance(value, list) and value else 1


# -------------------------------------------------------------------------------------------------------------------- list


def scan_values(file: Path, opened: BinaryIO, digest: Any, layout: Shape) -> Iterator[NDArray[np.void]]:
    """One entry for each value of a JSON list, or of objects one after the other. Read as Latin-1, in which each byte is a character: the places of
    brackets and quotes are the same."""

    def read(size: int) -> str:
        chunk = opened.read(size)
        digest.update(chunk)
        return chunk.decode("latin-1")

    begin = read(EDGE_BYTES)
    skipped = len(BOM) if begin.encode("latin-1").startswith(BOM) else 0
    listed = ((start, end, row, value) for row, (start, end, value) in enumerate(scan_list(begin[skipped:], read), start=1))
    found = listed if layout == "list" else scan_objects(begin[skipped:], read)
    entries: list[tuple[int, ...]] = []
    try:
        for start, end, row, value in found:
            entries += ((start + skipped, end - start, row, part) for part in range(count_conversations(value)))
            if len(entries) >= EDGE_BYTES:
                yield np.array(entries, ENTRY)
                entries = []
    except (ValueError, RecursionError) as error:
        _, problems = read_rows(file)
        raise InputRefused("\n".join(map(str, problems)) or f"{file}: {error}") from error
    yield np.array(entries, ENTRY)
