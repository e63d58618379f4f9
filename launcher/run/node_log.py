"""Reading a node's log: whose a line is, the last lines, and how far the start of each rank has come."""

import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from trainer.contract import PHASE_LINE, RANK_PREFIX, START_PHASES

END_BYTES = 1 << 20  # of a log: 4 MB take 4 s to be held against all known failures
NO_RANK = -1  # in place of a rank: a line of torchrun or docker, and every line where there is one rank
UNSEEN = "has said nothing yet"
PREFIXED = re.compile("^" + re.escape(RANK_PREFIX).replace(re.escape("{rank}"), r"(\d+)"), re.MULTILINE)
PHASE = re.compile(re.escape(PHASE_LINE).replace(re.escape("{phase}"), "(" + "|".join(map(re.escape, START_PHASES)) + ")"))


@dataclass(frozen=True, kw_only=True)
class StartPhase:
    """How far a rank has come with its start. `phase`: of START_PHASES what it said last that it begins, -1: nothing yet. `last_line`: of
    its lines, or of its node's where it has none."""

    host: str
    rank: int
    phase: int
    last_line: str

    def describe(self) -> str:
        return f"rank {self.rank} on {self.host}: {START_PHASES[self.phase] if self.phase >= 0 else UNSEEN}"


def read_end(log: Path) -> str:
    """The last END_BYTES of a log, '' when there is none."""
    if not log.exists():
        return ""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - END_BYTES))
        return file.read().decode("utf-8", errors="replace")


def unnamed(text: str) -> str:
    """The same lines without the ranks in front: what known failures look like."""
    return PREFIXED.sub("", text)


def lines_of(text: str, rank: int) -> tuple[str, ...]:
    """The lines of one rank, without its name in front."""
    return tuple(PREFIXED.sub("", line) for line in text.splitlines() if rank_of(line) == rank)


def rank_of(line: str) -> int:
    found = PREFIXED.match(line)
    return int(found[1]) if found else NO_RANK


def start_phases(log: Path, host: str, ranks: Iterable[int]) -> tuple[StartPhase, ...]:
    """Of each of a node's ranks, the slowest first. Where a line names no rank it is that of the only one."""
    ranks, text = tuple(ranks), read_end(log)
    alone = len(ranks) == 1 and not PREFIXED.search(text)
    last = next((line for line in reversed(text.splitlines()) if line.strip()), "")
    found = []
    for rank in ranks:
        lines = lines_of(text, NO_RANK if alone else rank)
        said = [START_PHASES.index(match[1]) for line in lines if (match := PHASE.search(line))]
        own = next((line for line in reversed(lines) if line.strip()), last)
        found.append(StartPhase(host=host, rank=rank, phase=said[-1] if said else -1, last_line=own))
    return tuple(sorted(found, key=lambda standing: (standing.phase, standing.rank)))


def silence_s(log: Path) -> float | None:
    """Seconds since something was added to a log; None where there is none."""
    return max(0.0, time.time() - log.stat().st_mtime) if log.exists() else None
