"""Counts the commands and words of docs/jobs.md. `python -m tests.jobs` writes the table into docs/status.md."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

JOBS, STATUS = (Path(__file__).resolve().parent.parent / "docs" / name for name in ("jobs.md", "status.md"))
BEGIN, END = "<!-- jobs: begin -->", "<!-- jobs: end -->"
OURS, PEERS = "omnilaunch", ("LLaMA-Factory", "ms-swift")
BLOCK = re.compile(r"^```(console|text (?:LLaMA-Factory|ms-swift))\n(.*?)^```", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"# \S+\.(yaml|json)")  # what follows is written into that file


@dataclass(frozen=True, kw_only=True)
class Effort:
    commands: int
    words: int


def count(block: str) -> Effort:
    """Commands, and words of the commands and of the files that must be written. Words in quotes count one by one."""
    commands = words = 0
    in_file = False
    for line in block.splitlines():
        if FILE.fullmatch(line):
            in_file = True
        elif in_file:
            words += len(line.split())
        else:
            commands += 1
            words += sum(len(word.split()) for word in shlex.split(line.removeprefix("$ "), comments=True))
    return Effort(commands=commands, words=words)


def jobs() -> dict[str, dict[str, Effort]]:
    """Title of a job -> tool -> what it takes. A tool without a block cannot do the job."""
    found = {}
    for section in JOBS.read_text(encoding="utf-8").split("\n## ")[1:]:
        blocks = {OURS if kind == "console" else kind.removeprefix("text "): count(text) for kind, text in BLOCK.findall(section)}
        found[section.partition("\n")[0]] = blocks
    return found


def table() -> str:
    lines = [f"| job: commands / words | {' | '.join((OURS, *PEERS))} |", "|---|---|---|---|"]
    for title, efforts in jobs().items():
        cells = (f"{effort.commands} / {effort.words}" if (effort := efforts.get(tool)) else "not available" for tool in (OURS, *PEERS))
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def with_table(text: str) -> str:
    return re.sub(f"{BEGIN}.*?{END}", lambda _: f"{BEGIN}\n\n{table()}\n\n{END}", text, flags=re.DOTALL)


if __name__ == "__main__":
    STATUS.write_text(with_table(STATUS.read_text(encoding="utf-8")), encoding="utf-8")
