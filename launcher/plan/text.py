"""Text for a terminal: tables, sizes, colours, wrapped lines, and command lines that can be copied."""

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


def command_line(*words: str) -> str:
    return shlex.join((program(), *map(mask_credentials, words)))


def program() -> str:
    """The command as the user typed it: `make` runs .venv/bin/omnilaunch, which need not be on PATH."""
    return sys.argv[0] if Path(sys.argv[0]).name == "omnilaunch" else "omnilaunch"


def relative(path: Path) -> str:
    """Relative to the working directory, where it is below it."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)
