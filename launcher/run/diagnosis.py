"""What an error in a log means and what to do about it, by the tables of known failures. `python -m launcher.run.diagnosis` prints docs/errors.md.

A failed run's logs hold one cause and many consequences. So a line that names a cause is preferred to one that names a layer, that to what other
ranks print because of it. Among equals the first line of the log is used, and of two rows that match one line the first of its table.
"""

import re
import sys
from dataclasses import dataclass

from launcher.run.failures.symptom import KINDS, TABLES, Kind, Symptom, load_symptoms, load_table

SHOWN = 300  # characters of a line: a C++ trace can be a page in one line
ROOT_RANK = re.compile(r"^Root Cause [^\n]*\n(?:[^\n]*\n){1,4}?\s*rank\s*: (\d+) [^\n]*\n\s*exitcode\s*: (-?\d+)", re.MULTILINE)
FAILED_RANK = re.compile(r"^\[\d+\]:\s*\n(?:[^\n]*\n){1,3}?\s*rank\s*: (\d+) [^\n]*\n\s*exitcode\s*: (-?\d+)", re.MULTILINE)
TITLES = {
    "cause": "names the cause",
    "layer": "names the layer that failed",
    "consequence": "follows from a failure elsewhere",
    "wrapper": "wraps another error",
}


EXPLAIN = """
## Explain any log

```console
$ omnilaunch explain runs/monday/logs/node0.log
$ omnilaunch explain train.log                  # of any program, started in any way
$ docker logs NAME 2>&1 | omnilaunch explain -
$ omnilaunch explain train.log --json
```

It prints up to three failures that name a cause: the line and its number, the meaning, what to do, and the source. They stand in the order of
their times if all these lines have one, else of their lines, since the first cause is often the only one. Failures that only follow are listed
below. In the log of a rank that was ended by the others there is no cause: explain the logs of the other nodes too.

- Exit code 0: a known failure is in it. 7: none is; then the lines that look most like errors are printed. 2: no such file, a folder, or not text.
- A log is read as UTF-8, GB 18030, or UTF-16 with a mark. Colours and control characters are removed before anything is printed.
- Of a long log the first 1 MiB and the last 2 MiB are searched, and it says how much was not. A pipe is read up to 256 MiB.
- Compressed logs: `zcat node0-cann.tgz | omnilaunch explain -`.
- No connection is made, and nothing in the log is executed.
"""


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """`line`: the one of the log that matched, '' when only the exit code did."""

    name: str
    kind: Kind
    line: str
    means: str
    fix: str
    source: str


def explain_log(text: str, code: int = 0) -> Diagnosis | None:
    """The known failure that says most about why a process ended that printed `text` and had this exit code (negative, or 128 and more: by a
    signal); None when none matches."""
    found = [
        (start, order, symptom) for order, symptom in enumerate(load_symptoms()) if (start := find_line(symptom, text, code)) is not None
    ]
    if not found:
        return None
    start, _, symptom = min(found, key=lambda each: (KINDS.index(each[2].kind), each[0], each[1]))
    line = text[start:].split("\n", 1)[0].strip()[:SHOWN]
    return Diagnosis(name=symptom.name, kind=symptom.kind, line=line, means=symptom.means, fix=symptom.fix, source=symptom.source)


def find_line(symptom: Symptom, text: str, code: int) -> int | None:
    """Where the first line that matches begins; the end of the text where only the exit code matches."""
    found = re.search(symptom.pattern, text, re.MULTILINE)
    if found:
        return text.rfind("\n", 0, found.start()) + 1
    return len(text) if code in symptom.codes else None


def root_rank(text: str) -> tuple[int, int] | None:
    """The rank that torchrun saw end first, and its exit code (negative: by a signal), from torchrun's closing summary."""
    found = ROOT_RANK.search(text)
    return (int(found[1]), int(found[2])) if found else None


def failed_ranks(text: str) -> tuple[tuple[int, int], ...]:
    """All ranks that torchrun's closing summary lists, and their exit codes; the one of `root_rank` first."""
    root = root_rank(text)
    listed = [(int(rank), int(code)) for rank, code in FAILED_RANK.findall(text)]
    return tuple(dict.fromkeys(([root] if root else []) + listed))


def find_known(name: str) -> Symptom:
    """The row of the tables with this name."""
    return next(symptom for symptom in load_symptoms() if symptom.name == name)


# ---------------------------------------------------------------------------------------------------------------- docs


def describe_symptoms() -> str:
    """docs/errors.md: every known failure with its meaning, what to do, and the source."""
    head = (
        "# Errors\n\nWritten from the tables in launcher/run/failures/*.yaml by\n"
        "`python -m launcher.run.diagnosis > docs/errors.md`. Do not edit.\n\n"
        "When a run fails, the logs of all nodes are compared with these, and the one that says most about the cause is printed once: a line that\n"
        "names the cause, before one that names only the layer, before what other ranks print because of it.\n"
    )
    return head + EXPLAIN + "".join(f"\n## {title}\n" + "".join(map(describe_symptom, load_table(name))) for name, title in TABLES.items())


def describe_symptom(symptom: Symptom) -> str:
    codes = f"\n- or exit code: {', '.join(map(str, symptom.codes))}" if symptom.codes else ""
    example = " ".join(symptom.example.split())
    return (
        f"\n### {symptom.name}\n\n{symptom.means}\n\n- do: {symptom.fix}\n- it {TITLES[symptom.kind]}\n- for example: `` {example} ``\n"
        f"- in the log: `` {symptom.pattern} ``{codes}\n- source: {symptom.source}\n"
    )


if __name__ == "__main__":
    sys.stdout.write(describe_symptoms())
