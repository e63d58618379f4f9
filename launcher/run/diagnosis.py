"""What an error in a log means and what to do about it, by the tables of known failures. Pure, but for `python -m launcher.run.diagnosis`, which
draws docs/errors.md again.

A failed run's logs hold one cause and many consequences. So a line that names a cause goes before one that names a layer, that before what
other ranks say because of it, and among equals the first line of the log; of two rows that fit one line, the first of its table.
"""

import re
import sys
from dataclasses import dataclass
from functools import cache

from launcher.run.failures.ascend import ASCEND
from launcher.run.failures.cuda import CUDA
from launcher.run.failures.host import HOST
from launcher.run.failures.symptom import KINDS, Kind, Symptom

TABLE_FILE = "docs/errors.md"
TABLES = {"Ascend: HCCL, CANN, torch_npu": ASCEND, "CUDA and NCCL": CUDA, "Host, docker, torch, DeepSpeed, hub": HOST}
SYMPTOMS: tuple[Symptom, ...] = (*ASCEND, *CUDA, *HOST)
SHOWN = 300  # characters of a line: a C++ trace can be a page in one
ROOT_RANK = re.compile(r"^Root Cause [^\n]*\n(?:[^\n]*\n){1,4}?\s*rank\s*: (\d+) [^\n]*\n\s*exitcode\s*: (-?\d+)", re.MULTILINE)
TITLES = {
    "cause": "names the cause",
    "layer": "names the layer that failed",
    "consequence": "follows from a failure elsewhere",
    "wrapper": "wraps another error",
}


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """`line`: the log's, '' where the exit code alone told."""

    name: str
    kind: Kind
    line: str
    means: str
    fix: str
    source: str


def explain_log(text: str, code: int = 0) -> Diagnosis | None:
    """The known failure that says most about why a process ended that printed `text` and had this exit code (negative, or 128 and more: by a
    signal); None when none is known."""
    found = [(place, order, symptom) for order, symptom in enumerate(SYMPTOMS) if (place := place_of(symptom, text, code)) is not None]
    if not found:
        return None
    place, _, symptom = min(found, key=lambda each: (KINDS.index(each[2].kind), each[0], each[1]))
    line = text[place:].split("\n", 1)[0].strip()[:SHOWN]
    return Diagnosis(name=symptom.name, kind=symptom.kind, line=line, means=symptom.means, fix=symptom.fix, source=symptom.source)


def place_of(symptom: Symptom, text: str, code: int) -> int | None:
    """Where the first line that shows it begins; past the end where only the exit code does."""
    found = compiled(symptom.pattern).search(text)
    if found:
        return text.rfind("\n", 0, found.start()) + 1
    return len(text) if code in symptom.codes else None


@cache
def compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern, re.MULTILINE)


def root_rank(text: str) -> tuple[int, int] | None:
    """The rank that torchrun saw end first, and its exit code (negative: by a signal), from the summary that it closes with."""
    found = ROOT_RANK.search(text)
    return (int(found[1]), int(found[2])) if found else None


# ---------------------------------------------------------------------------------------------------------------- docs


def describe_symptoms() -> str:
    """docs/errors.md: every known failure with its meaning, what to do, and where that was read."""
    head = (
        "# Errors\n\nDrawn from the tables in launcher/run/failures/ascend.py, cuda_symptom.py and host_symptom.py by\n"
        "`python -m launcher.run.diagnosis > docs/errors.md`. Do not edit.\n\n"
        "When a run fails, the logs of all nodes are held against these, and the one that says most about the cause is shown once: a line that\n"
        "names the cause, before one that names only the layer, before what other ranks say because of it.\n"
    )
    return head + "".join(f"\n## {title}\n" + "".join(map(describe_symptom, table)) for title, table in TABLES.items())


def describe_symptom(symptom: Symptom) -> str:
    codes = f"\n- or exit code: {', '.join(map(str, symptom.codes))}" if symptom.codes else ""
    return (
        f"\n### {symptom.name}\n\n{symptom.means}\n\n- do: {symptom.fix}\n- it {TITLES[symptom.kind]}\n"
        f"- in the log: `` {symptom.pattern} ``{codes}\n- source: {symptom.source}\n"
    )


if __name__ == "__main__":
    sys.stdout.write(describe_symptoms())
