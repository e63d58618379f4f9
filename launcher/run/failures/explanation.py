"""What a log shows: every known failure in it with its line, the first cause first; or the lines that look most like errors."""

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from launcher.run.diagnosis import SHOWN
from launcher.run.failures.log_text import PIECE, LogText
from launcher.run.failures.symptom import KINDS, Symptom, load_symptoms
from launcher.run.node_log import NO_RANK

MOST_SHOWN = 3  # failures that are explained in full
MOST_LIKELY = 5  # lines of a log in which nothing is known
RANK = re.compile(r"\[rank ?(\d{1,9})\]|\bRankID:(\d{1,9})|\[Rank (\d{1,9})\]")  # as torch and torch_npu write it
# Ways in which a line has its time; only times that are written alike can be compared.
TIMES = (
    re.compile(r"\b(20\d\d-[01]\d-[0-3]\d)[ T_-]([0-2]\d:[0-5]\d:[0-6]\d[.,\d]{0,13})"),
    re.compile(r"\[[EWF]([01]\d?[0-3]\d) ([0-2]\d:[0-5]\d:[0-6]\d\.\d{1,9})"),
)
# What makes a line look like an error, the most first.
LIKELY = (
    (8, re.compile(r"^(?:\[rank ?\d+\]:? ?)?(?:[A-Za-z_]\w{0,60}\.){0,6}[A-Z]\w{0,60}(?:Error|Exception|Interrupt|Exit)\b")),
    (6, re.compile(r"\b(?:FATAL|CRITICAL|PANIC|fatal|panic)\b")),
    (5, re.compile(r"\bERROR\b|^[Ee]rror\b|^\[E|\[ERROR\]")),
    (3, re.compile(r"\b(?:[Ee]rror|[Ff]ailed|[Ff]ailure|[Cc]annot|[Rr]efused|[Dd]enied|[Uu]nable|[Aa]borted)\b|错误|失败|异常|无法|报错")),
    (1, re.compile(r"\bTraceback\b|\b[Ww]arning\b|\bWARN\b|警告")),
)
DIGITS = re.compile(r"\d+")


@dataclass(frozen=True, kw_only=True)
class KnownFailure:
    """`number`: the line of the log, from 1; `line`: its text; `rank`: NO_RANK where the line names none; `time`: '' likewise."""

    symptom: Symptom
    number: int
    line: str
    rank: int
    time: str


@dataclass(frozen=True, kw_only=True)
class LikelyLine:
    number: int
    line: str


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """`found`: by what they say about the cause, then by time or line. `likely`: where nothing is known."""

    found: tuple[KnownFailure, ...]
    likely: tuple[LikelyLine, ...] = ()
    compared: int

    @property
    def explained(self) -> tuple[KnownFailure, ...]:
        """Those of the best kind, at most MOST_SHOWN."""
        return tuple(each for each in self.found if each.symptom.kind == self.found[0].symptom.kind)[:MOST_SHOWN]

    @property
    def others(self) -> tuple[KnownFailure, ...]:
        return self.found[len(self.explained) :]


def explain(log: LogText) -> Explanation:
    symptoms = load_symptoms()
    best: dict[int, tuple[int, int, KnownFailure]] = {}  # line -> (kind, place in the tables, finding): one failure a line
    for order, symptom in enumerate(symptoms):
        if found := re.search(symptom.pattern, log.text, re.MULTILINE):
            finding = find(symptom, log, found.start())
            judged = KINDS.index(symptom.kind), order, finding
            best[finding.number] = min(best.get(finding.number, judged), judged, key=lambda each: each[:2])
    kinds = [tuple(each for kind, _, each in best.values() if kind == number) for number in range(len(KINDS))]
    every = tuple(finding for group in kinds for finding in in_order(group))
    return Explanation(found=every, likely=() if every else likely_lines(log), compared=len(symptoms))


def find(symptom: Symptom, log: LogText, place: int) -> KnownFailure:
    part = bisect_right(log.starts, place) - 1
    start = log.starts[part]
    line = log.text[start : start + PIECE].split("\n", 1)[0]
    cut = max(0, min(place - start - SHOWN // 3, len(line) - SHOWN))  # so that what matched is shown
    named = RANK.search(line) if log.ranks[part] == NO_RANK else None
    return KnownFailure(
        symptom=symptom,
        number=log.numbers[part],
        line=line[cut : cut + SHOWN].strip(),
        rank=next((int(group) for group in named.groups() if group), NO_RANK) if named else log.ranks[part],
        time=time_of(line)[1],
    )


def time_of(line: str) -> tuple[int, str]:
    """(which of TIMES, the time as text that sorts); (-1, '') where the line has none."""
    for number, pattern in enumerate(TIMES):
        if found := pattern.search(line):
            return number, f"{found[1]} {found[2].rstrip('.,').replace(',', '.')}"
    return -1, ""


def in_order(findings: Sequence[KnownFailure]) -> list[KnownFailure]:
    """By their times where all lines have one that is written alike, since the lines of ranks can stand in any order; else as they stand."""
    forms = {time_of(each.line)[0] for each in findings}
    by_time = len(forms) == 1 and -1 not in forms
    return sorted(findings, key=lambda each: (each.time if by_time else "", each.number))


def likely_lines(log: LogText) -> tuple[LikelyLine, ...]:
    """The lines that look most like errors, each once, in the order of the log. Of equal ones the last: an error is often printed at the end."""
    scored: dict[str, tuple[int, int, str]] = {}
    for number, line in zip(log.numbers, log.text.split("\n"), strict=True):
        points = next((points for points, pattern in LIKELY if pattern.search(line)), 0)
        if points:
            scored[DIGITS.sub("0", line[:SHOWN])] = (points, number, line[:SHOWN].strip())
    best = sorted(scored.values(), key=lambda each: (-each[0], -each[1]))[:MOST_LIKELY]
    return tuple(LikelyLine(number=number, line=line) for _, number, line in sorted(best, key=lambda each: each[1]))
