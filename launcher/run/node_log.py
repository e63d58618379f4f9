"""Reading a node's log: which rank a line is from, the last lines, and how far the start of each rank is."""

import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from trainer.contract import PHASE_LINE, RANK_PREFIX, START_PHASES

END_BYTES = 1 << 20  # of a log: to compare 4 MB with all known failures takes 4 s
LAST_LINES = 15
NO_RANK = -1  # a line of torchrun or docker, and every line where there is one rank
NO_OUTPUT = "no output yet"
PREFIXED = re.compile("^" + re.escape(RANK_PREFIX).replace(re.escape("{rank}"), r"(\d+)"), re.MULTILINE)
PHASE = re.compile(re.escape(PHASE_LINE).replace(re.escape("{phase}"), "(" + "|".join(map(re.escape, START_PHASES)) + ")"))


@dataclass(frozen=True, kw_only=True)
class StartPhase:
    """How far the start of a rank is. `phase`: index in START_PHASES of the last one that it announced, -1: none yet. `last_line`: its own, or that of
    its node when it has printed none."""

    host: str
    rank: int
    phase: int
    last_line: str

    def describe(self) -> str:
        return f"rank {self.rank} on {self.host}: {START_PHASES[self.phase] if self.phase >= 0 else NO_OUTPUT}"


def read_end(log: Path) -> str:
    """The last END_BYTES of a log, '' when there is none. A first line that is cut is left out: its rank is unknown, and it may begin in the middle
    of a character."""
    if not log.exists():
        return ""
    with log.open("rb") as file:
        start = max(0, log.stat().st_size - END_BYTES)
        file.seek(start)
        end = file.read()
    if start:
        end = end.partition(b"\n")[2] or end
    return end.decode("utf-8", errors="replace")


def last_lines(log: Path) -> tuple[str, ...]:
    return tuple(read_end(log).splitlines()[-LAST_LINES:])


def unnamed(text: str) -> str:
    """The same lines without the rank in front, as known failures are compared."""
    return PREFIXED.sub("", text)


def lines_of(text: str, rank: int) -> tuple[str, ...]:
    """The lines of one rank, without the rank in front."""
    return tuple(PREFIXED.sub("", line) for line in text.splitlines() if rank_of(line) == rank)


def rank_of(line: str) -> int:
    found = PREFIXED.match(line)
    return int(found[1]) if found else NO_RANK


def start_phases(log: Path, host: str, ranks: Iterable[int]) -> tuple[StartPhase, ...]:
    """The phase of each of a node's ranks, the slowest first. Where lines name no rank, all are those of the only rank."""
    ranks, text = tuple(ranks), read_end(log)
    alone = len(ranks) == 1 and not PREFIXED.search(text)
    last = next((line for line in reversed(text.splitlines()) if line.strip()), "")
    found = []
    for rank in ranks:
        lines = lines_of(text, NO_RANK if alone else rank)
        announced = [START_PHASES.index(match[1]) for line in lines if (match := PHASE.search(line))]
        own = next((line for line in reversed(lines) if line.strip()), last)
        found.append(StartPhase(host=host, rank=rank, phase=announced[-1] if announced else -1, last_line=own))
    return tuple(sorted(found, key=lambda start: (start.phase, start.rank)))


def silence_s(log: Path) -> float | None:
    """Seconds since something was added to a log; None when there is none."""
    return max(0.0, time.time() - log.stat().st_mtime) if log.exists() else None
