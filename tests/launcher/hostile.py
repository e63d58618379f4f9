"""Strings that a shell would take to be more than strings, and a look at what runs on this machine."""

import time
from collections.abc import Iterator
from pathlib import Path

from hypothesis import HealthCheck, given, seed, settings, strategies as st

CONTENT = bytes(range(256)) * 16_000  # 4 MB of every byte
ATTACKS = (
    "$(touch C)",
    "`touch C`",
    "; touch C #",
    "' ; touch C ; '",
    '" ; touch C ; "',
    "\n touch C\n",
    "&& touch C",
    "| touch C",
    "> C",
    "${C:=x}",
)
TEXT = st.text(alphabet=st.characters(exclude_characters="\0", exclude_categories=("Cs",)), max_size=30)
SHELL_TEXT = st.text(alphabet="'\"\\$`!*?[]{}()<>|&;#~=%^ \t\r\n-a", max_size=30)
WORDS = st.one_of(TEXT, SHELL_TEXT, st.tuples(TEXT | SHELL_TEXT, st.sampled_from(ATTACKS), SHELL_TEXT).map("".join))


def hostile(count: int) -> list[str]:
    found: list[str] = []

    @seed(4)
    @settings(max_examples=count, database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(word=WORDS)
    def keep(word: str) -> None:
        found.append(word)

    keep()
    return found


def running(*argv: str) -> list[int]:
    """Ids of processes with exactly these arguments, after a moment for them to go."""
    wanted = b"\0".join(word.encode() for word in argv) + b"\0"
    time.sleep(0.2)
    return [pid for pid, line in command_lines() if line == wanted]


def every_argv() -> bytes:
    """The arguments of every process of this machine, one after the other."""
    return b" ".join(line for _, line in command_lines())


def command_lines() -> Iterator[tuple[int, bytes]]:
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            yield int(entry.name), (entry / "cmdline").read_bytes()
        except OSError:  # it has just ended
            continue
