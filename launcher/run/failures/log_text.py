"""Reading a log that a stranger may have written: of any size, in any encoding, with colours and control characters. Pure but for the reading."""

import re
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import BinaryIO

from launcher.errors import ConfigRefused
from launcher.run.node_log import NO_RANK, PREFIXED

CHUNK_BYTES = 1 << 18
HEAD_BYTES, TAIL_BYTES = 1 << 20, 1 << 21  # of a longer log: a cause is where it starts or where it ends
PIPE_BYTES = 1 << 28  # of what has no size, such as a pipe that never ends
PIECE, OVERLAP = 1000, 400  # characters of a long line that are searched at once: a search may take the square of a line's length
SAMPLE_BYTES, MOST_CONTROL = 1 << 16, 0.05  # share of control characters, of which text has hardly any
LEAST_SAMPLE = 1 << 12  # a few in a short log are no reason to refuse it
MAGIC = (b"\x1f\x8b", b"PK\x03\x04", b"\x7fELF", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"\x89PNG", b"%PDF", b"\xff\xd8\xff")
UTF_16 = {b"\xff\xfe": "utf-16-le", b"\xfe\xff": "utf-16-be"}
CONTROL = bytes((*range(1, 9), 11, *range(14, 27), *range(28, 32), 127))  # not NUL, tab, line feed, form feed, carriage return, escape
# Commands to a terminal: colours and cursor, titles, and what is left of them in a line that was cut.
ANSI = re.compile(r"\x1b\[[0-?]{0,64}[ -/]{0,8}[@-~]|\x1b[\]PX^_][^\x07\x1b\n]{0,1000}(?:\x07|\x1b\\)|\x1b[ -/]{0,4}[0-~]?")
UNSHOWN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u00ad\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb\ud800-\udfff]")


@dataclass(frozen=True, kw_only=True)
class LogText:
    """`text`: printable lines without the rank in front, one or several for a line of the log. `starts`: where each begins in `text`; `numbers`:
    the line of the log that it is from, counted from 1; `ranks`: its rank, or NO_RANK. `size`: bytes that there were. `skipped`: bytes between
    head and tail that were not searched. `ended`: false where reading stopped at PIPE_BYTES."""

    text: str
    starts: tuple[int, ...]
    numbers: tuple[int, ...]
    ranks: tuple[int, ...]
    lines: int
    size: int
    skipped: int
    ended: bool


def read_log(file: BinaryIO, name: str, *, most: int = 0) -> LogText:
    """`most`: bytes after which reading stops, 0 = at the end. Raises ConfigRefused where `name` holds no text."""
    head, tail, size, ended = read_ends(file, most)
    encoding = find_encoding(head.data, name)
    end = tail.data[1:] if encoding == "utf-16-le" and tail.data[:1] == b"\0" else tail.data  # the other half of a line break
    parts = [*pieces(head.data, encoding, 1), *(pieces(end, encoding, tail.line) if end else ())]
    return LogText(
        text="\n".join(part.text for part in parts),
        starts=tuple(accumulate((len(part.text) + 1 for part in parts[:-1]), initial=0)),
        numbers=tuple(part.number for part in parts),
        ranks=tuple(part.rank for part in parts),
        lines=head.lines,
        size=size,
        skipped=size - len(head.data) - len(tail.data),
        ended=ended,
    )


@dataclass(frozen=True, kw_only=True)
class End:
    """Bytes of a log. `line`: the number of their first line; `lines`: of the whole log."""

    data: bytes
    line: int = 1
    lines: int = 0


def read_ends(file: BinaryIO, most: int) -> tuple[End, End, int, bool]:
    """(the beginning, the end where it is not in the beginning, bytes, whether all was read)."""
    head, tail, size, breaks, ended = bytearray(), deque[bytes](), 0, 0, False
    while not ended and (not most or size < most):
        chunk = file.read(CHUNK_BYTES)
        ended = not chunk
        size, breaks, room = size + len(chunk), breaks + chunk.count(b"\n"), HEAD_BYTES - len(head)
        head += chunk[:room]
        tail.append(chunk[room:])
        if len(tail) > TAIL_BYTES // CHUNK_BYTES + 1:
            tail.popleft()
    end = b"".join(tail)
    if len(head) + len(end) == size:
        head, end = head + end, b""
    end = end[end.find(b"\n", 0, CHUNK_BYTES) + 1 :]  # the first line is cut, unless it is very long
    lines = breaks + (1 if size and not (end or head).rstrip(b"\0").endswith(b"\n") else 0)
    return End(data=bytes(head), lines=lines), End(data=end, line=breaks - end.count(b"\n") + 1), size, ended


def find_encoding(data: bytes, name: str) -> str:
    """Of the beginning of a log. Raises ConfigRefused where it is no text."""
    if data[:2] in UTF_16:
        return UTF_16[data[:2]]
    sample = data[:SAMPLE_BYTES].replace(b"\0", b"")  # a file that a crash cut may have a hole
    if not sample:
        raise ConfigRefused(f"{name} is empty: there is nothing to explain. Give the file that the program's output was written to")
    control = len(sample) - len(sample.translate(None, CONTROL))
    if sample.startswith(MAGIC) or control > MOST_CONTROL * max(len(sample), LEAST_SAMPLE):
        raise ConfigRefused(f"{name} is not text. If it is compressed, unpack it first: zcat {name} | omnilaunch explain -")
    return "utf-8" if is_text(sample, "utf-8") or not is_text(sample, "gb18030") else "gb18030"


def is_text(sample: bytes, encoding: str) -> bool:
    """The last character may be cut."""
    try:
        sample.decode(encoding)
    except UnicodeDecodeError as error:
        return error.start >= len(sample) - 4
    return True


@dataclass(frozen=True, kw_only=True)
class Part:
    """Of a line of the log."""

    number: int
    rank: int
    text: str


def pieces(data: bytes, encoding: str, first: int) -> Iterator[Part]:
    """Each line as printable text; a long one in several parts that overlap, and one with carriage returns in one for each."""
    for number, line in enumerate(data.decode(encoding, errors="replace").removesuffix("\n").split("\n"), first):
        for part in line.rstrip("\r").split("\r"):
            clean = printable_line(part)
            named = PREFIXED.match(clean)
            rank, clean = (int(named[1]), clean[named.end() :]) if named else (NO_RANK, clean)
            for start in range(0, max(1, len(clean) - OVERLAP), PIECE - OVERLAP):
                yield Part(number=number, rank=rank, text=clean[start : start + PIECE])


def printable_line(text: str) -> str:
    """Without commands to a terminal, control characters, and those that hide text or turn its direction."""
    return UNSHOWN.sub("", ANSI.sub("", text) if "\x1b" in text else text)
