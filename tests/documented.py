"""The commands in the documents, and a folder in which they can be run: with data, images and runs under the names that the documents use.

A command is run as it is written, but for three kinds of change: placeholders of runs (RUN, monday) become runs of that folder, what would
start a run or change a node becomes the plan of it, and `make` becomes the commands that `make -n` prints.
"""

import json
import re
import shlex
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
BLOCK = re.compile(r"^```(?P<kind>[^\n]*)\n(?P<text>.*?)^```", re.MULTILINE | re.DOTALL)
PROGRAM = re.compile(r"(?:\$ )?(?:omnilaunch [a-z]|make [a-z])")  # what begins a command that must be in a console block
TRAINED, REPEATED, ADAPTED = "documented-full", "documented-again", "documented-lora"
RUNS = {
    **dict.fromkeys(("RUN", "OTHER_RUN", "MERGED_RUN", "FOLDER", "full", "proj", "lm", "merged"), TRAINED),
    **dict.fromkeys(("first", "monday"), TRAINED),
    **dict.fromkeys(("last", "second", "tuesday"), REPEATED),
    **dict.fromkeys(("LORA_RUN", "lora"), ADAPTED),
}
RECORDED = re.compile(r"20\d{6}-\d{4}(\d\d-[\w-]+)?")  # a run id, or the beginning of one
STEP_OF_RUN = re.compile(r"[\w-]+/\d+")
KEYS_OF_RUNS = ("stage.checkpoint", "run.evaluation.base", "RESUME", "RUN")
# Verbs that start runs, change nodes or need an engine: of `launch` the plan is made, of the others options and overrides are read.
READ_ONLY = ("attach", "explain", "stop", "rerun", "bench", "bench-rerun", "image", "doctor", "model")
KEPT_OF_LAUNCH = ("--run-id",)  # the options that plan has too


@dataclass(frozen=True, kw_only=True)
class Command:
    """`text`: without the prompt, its continued lines joined. `shown`: the lines that the document shows as its output."""

    document: Path
    line: int
    text: str
    shown: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.document.name}:{self.line}: {self.text}"


def commands_in(document: Path) -> Iterator[Command]:
    text = document.read_text(encoding="utf-8")
    for block in BLOCK.finditer(text):
        if block["kind"] == "console":
            yield from commands_of_block(document, block["text"], first_line=text[: block.start("text")].count("\n") + 1)


def commands_of_block(document: Path, block: str, *, first_line: int) -> Iterator[Command]:
    lines = block.splitlines()
    starts = [number for number, line in enumerate(lines) if line.startswith("$ ")]
    for start, end in pairwise([*starts, len(lines)]):
        words, number = lines[start][2:], start + 1
        while words.endswith("\\"):
            words, number = f"{words[:-1].rstrip()} {lines[number].strip()}", number + 1
        yield Command(document=document, line=first_line + start, text=words, shown=tuple(lines[number:end]))


def outside_of_console(document: Path) -> list[str]:
    """Commands in indented or other blocks, which no test would find."""
    text = document.read_text(encoding="utf-8")
    others = [line for block in BLOCK.finditer(text) if block["kind"] != "console" for line in block["text"].splitlines()]
    indented = [line for line in BLOCK.sub("", text).splitlines() if line.startswith("    ")]
    return [line.strip() for line in (*others, *indented) if PROGRAM.match(line.strip())]


def programs(text: str) -> list[list[str]]:
    """The commands of a line, split at && and ;. A comment at the end is dropped."""
    lexer = shlex.shlex(text, posix=True, punctuation_chars=";&|<>()")
    lexer.whitespace_split = True
    found: list[list[str]] = [[]]
    for word in lexer:
        if word in ("&&", ";", "|", "&"):
            found.append([])
        else:
            found[-1].append(word)
    return [words for words in found if words]


def with_known_runs(words: Sequence[str]) -> list[str]:
    """The words with runs of the prepared folder in place of placeholders: those that name a run, and the values of the keys that do."""
    return [_with_known_run(word) for word in words]


def _with_known_run(word: str) -> str:
    key, equals, name = word.rpartition("=")
    if equals and key not in KEYS_OF_RUNS:
        return word
    name = name.partition("/")[0] if STEP_OF_RUN.fullmatch(name) else name
    return f"{key}{equals}{TRAINED if RECORDED.fullmatch(name) else RUNS.get(name, name)}"


def as_planned(words: Sequence[str]) -> list[str]:
    """`launch` as the plan of the same run: without the options that only a launch has."""
    kept, rest = ["plan"], iter(words[1:])
    for word in rest:
        if word in KEPT_OF_LAUNCH:
            kept += [word, next(rest)]
        elif not word.startswith("-"):
            kept.append(word)
    return kept


def made_by(words: Sequence[str]) -> list[list[str]]:
    """The `omnilaunch` commands that a `make` command would run. Raises CalledProcessError for a target that does not exist."""
    printed = subprocess.run(("make", "-n", *words[1:]), cwd=ROOT, capture_output=True, text=True, check=True).stdout
    lines = (line.replace(".venv/bin/omnilaunch", "omnilaunch") for line in printed.splitlines() if ".venv/bin/omnilaunch" in line)
    return [shlex.split(line) for line in lines]


def write_files(folder: Path) -> None:
    """The files that the documents name: rows, images, and the cluster file of the reader."""
    from PIL import Image

    for name in ("images", "photos"):
        (folder / name).mkdir()
    for name in ("a.png", "b.png", "cat.png", "images/cat.png", "images/a.png", "images/b.png", "photos/a.png"):
        Image.new("RGB", (32, 32), "white").save(folder / name)
    turns = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "A cat."}]
    rows = [{"id": str(number), "image": "a.png", "conversations": turns} for number in range(256)]
    for name in ("train.json", "held_out.json", "a.json"):
        (folder / name).write_text(json.dumps(rows), encoding="utf-8")
    (folder / "rows.jsonl").write_text('{"image": "a.png", "prompt": "What is this?"}\n', encoding="utf-8")
    example = (ROOT / "conf" / "cluster" / "example.yaml").read_text(encoding="utf-8").replace("192.0.2.", "10.0.0.")  # filled in
    for own in (folder / "conf" / "cluster", folder / "my-conf" / "cluster"):
        own.mkdir(parents=True)
        for name in ("lab", "pair"):
            (own / f"{name}.yaml").write_text(example.replace("name: example", f"name: {name}"), encoding="utf-8")
