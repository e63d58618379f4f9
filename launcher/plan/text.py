"""Text for a terminal: tables, numbers as people read them, colours, wrapped lines, and command lines that can be copied."""

import math
import shlex
import sys
import unicodedata
from collections.abc import Iterator, Mapping
from pathlib import Path

from launcher.memory.states import GIB
from launcher.redact import mask_credentials

COLOURS = {"green": "32", "yellow": "33", "red": "31", "bold": "1"}


def wants_colours(environ: Mapping[str, str], *, terminal: bool) -> bool:
    """As https://no-color.org and https://bixense.com/clicolors define it: NO_COLOR first, then the variables that force colours."""
    if environ.get("NO_COLOR"):
        return False
    if any(environ.get(name, "0") not in ("", "0") for name in ("CLICOLOR_FORCE", "FORCE_COLOR")):
        return True
    return terminal and environ.get("TERM") != "dumb" and environ.get("CLICOLOR") != "0"


def paint(text: str, colour: str, *, colours: bool) -> str:
    return f"\033[{COLOURS[colour]}m{text}\033[0m" if colours else text


def measure(text: str) -> int:
    """Columns that the text takes: wide characters, as Chinese ones, take two, and combining ones none."""
    return sum(0 if unicodedata.combining(letter) else 2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text)


def shorten(text: str, most: int = 44) -> str:
    """One line of at most `most` columns. A longer one keeps both ends, since names, hashes and paths may differ at either."""
    line = " ".join(text.split())
    if measure(line) <= most:
        return line
    end = (most - 1) // 2
    head, tail = line[: most - 1 - end], line[len(line) - end :]
    while measure(head) > most - 1 - end:
        head = head[:-1]
    while measure(tail) > end:
        tail = tail[1:]
    return f"{head}…{tail}"


def wrap(text: str, width: int, *, first: str = "", indent: str = "") -> Iterator[str]:
    """Lines of at most `width` columns, broken at spaces. The first begins with `first`, the others with `indent`. A longer word stays
    whole."""
    line, empty = first, True
    for word in text.split():
        if not empty and measure(f"{line} {word}") > width:
            yield line
            line, empty = indent, True
        line, empty = f"{line}{'' if empty else ' '}{word}", False
    yield line


def table(rows: Mapping[str, str]) -> str:
    width = max(map(measure, rows))
    return "\n".join(f"{name}{' ' * (width - measure(name))}  {value}" for name, value in rows.items())


def gib(size_bytes: int) -> str:
    return f"{size_bytes / GIB:9.3f} GiB"


def figure(value: float) -> str:
    """A loss, a score or a rate with four significant digits; integers, and what has more digits before the point, without a fraction."""
    if not math.isfinite(value):
        return str(value)
    if value == int(value) or abs(value) >= 9999.5:
        return f"{value:,.0f}"
    return f"{value:#,.4g}".removesuffix(".") if abs(value) >= 0.001 else f"{value:.2e}"


def duration(seconds: float) -> str:
    """`0.8 s`, `41 s`, `3 min 20 s`, `1 h 03 min`, `2 d 05 h`."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600:02d} h"


def size(size_bytes: float) -> str:
    """`63.2 GiB`, or `140 MiB` for less than one GiB."""
    return f"{size_bytes / GIB:,.1f} GiB" if size_bytes >= GIB else f"{size_bytes / 2**20:,.0f} MiB"


def command_line(*words: str) -> str:
    return shlex.join((program(), *map(mask_credentials, words)))


def program() -> str:
    """The command as the user typed it: `make` runs .venv/bin/omnilaunch, which need not be on PATH."""
    return sys.argv[0] if Path(sys.argv[0]).name == "omnilaunch" else "omnilaunch"


def relative(path: Path) -> str:
    """Relative to the working directory, where it is below it."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)
