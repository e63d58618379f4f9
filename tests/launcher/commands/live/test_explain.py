"""`omnilaunch explain`: what is printed and returned, and what it does with bad and hostile input."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.cli import main
from launcher.run.failures.log_text import HEAD_BYTES, TAIL_BYTES
from trainer.contract import RANK_PREFIX

PROJECT = Path(__file__).resolve().parents[4]
MEMORY = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB"
LOST = "[rank1]: EI0009: [PID: 3] Transport init error. Reason: [Create][DestLink]Create Dest error!"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(here: Path, text: str | bytes, name: str = "train.log") -> str:
    (here / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return name


def test_a_known_failure(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", write(here, f"step 1\n{RANK_PREFIX.format(rank=2)}{MEMORY}\n{LOST}\n")]) == 0
    head, empty, place, *rest = capsys.readouterr().out.splitlines()
    assert head.startswith("train.log: 3 lines, ") and empty == "" and place == f"line 2 (rank 2): {MEMORY}"
    assert rest[0] == "  known as: cuda-out-of-memory" and rest[1] == "  meaning: A GPU ran out of memory during a step."
    assert rest[2].startswith("  do: strategy.micro_batch=1") and rest[3].startswith("  source: ")
    assert rest[4:] == ["", "also in this log, and often because of it:", "  line 3 (rank 1): hccl-transport"]


def test_a_log_without_a_cause_says_where_to_look(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", write(here, LOST)]) == 0
    assert "the cause is not in this log: explain the logs of the other ranks and nodes too" in capsys.readouterr().out


def test_an_unknown_failure(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", write(here, "step 1\nValueError: the sampler is empty\n")]) == 7
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("none of 2") and lines[1].endswith(" known failures (docs/errors.md) is in it")
    assert lines[2:] == ["the lines that look most like errors:", "  line 2: ValueError: the sampler is empty"]


def test_json(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "--json", write(here, f"\x1b[2J{MEMORY}\n内存不足\n")]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["file"], said["lines"], said["not_searched_bytes"], said["ended"], said["look_like_errors"]) == (
        "train.log",
        2,
        0,
        True,
        [],
    )
    (found,) = said["found"]
    assert {*found} == {"name", "kind", "number", "rank", "time", "line", "meaning", "do", "source"}
    assert (found["name"], found["number"], found["rank"], found["line"]) == ("cuda-out-of-memory", 1, None, MEMORY)


def test_what_is_piped_in(here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(MEMORY.encode())))
    assert main(["explain", "-"]) == 0
    assert capsys.readouterr().out.startswith("the input: 1 line, ")


def test_an_input_that_is_closed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stdin", None)
    assert main(["explain", "-"]) == 2
    assert "there is no input" in capsys.readouterr().err


def test_a_pipe_by_its_name(here: Path) -> None:
    os.mkfifo("pipe")
    command = (sys.executable, "-m", "launcher.cli", "explain", "pipe")
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(PROJECT)}, stdout=subprocess.PIPE, text=True) as running:
        Path("pipe").write_text(MEMORY, encoding="utf-8")
        out, _ = running.communicate()
    assert running.returncode == 0 and "cuda-out-of-memory" in out


def test_of_a_long_log_it_says_what_was_not_searched(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = write(here, b"step\n" * ((HEAD_BYTES + 2 * TAIL_BYTES) // 5) + MEMORY.encode())
    assert main(["explain", name]) == 0
    head, _, place, *_ = capsys.readouterr().out.splitlines()
    assert "in the middle were not searched" in head and place.startswith(f"line {(HEAD_BYTES + 2 * TAIL_BYTES) // 5 + 1}: ")


# (words of the command, what is said)
REFUSED = {
    "nothing.log": "there is no file nothing.log. A run has its logs in runs/RUN/logs. To explain what a program prints: PROGRAM 2>&1 | omnilaunch explain -",
    "monday": "there is no file monday: omnilaunch explain runs/monday/logs/node0.log, omnilaunch explain runs/monday/logs/node1.log. A run",
    "runs/monday": "runs/monday is a folder; explain reads one file: omnilaunch explain runs/monday/logs/node0.log, ",
    "runs": "runs is a folder; explain reads one file\n",
    "empty.log": "empty.log is empty: there is nothing to explain",
    "log.gz": "log.gz is not text. If it is compressed, unpack it first: zcat log.gz | omnilaunch explain -",
}


@pytest.mark.parametrize(("name", "text"), REFUSED.items())
def test_bad_input_is_refused(here: Path, name: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "runs/monday/logs").mkdir(parents=True)
    for node in (0, 1):
        write(here, MEMORY, f"runs/monday/logs/node{node}.log")
    write(here, b"", "empty.log")
    write(here, b"\x1f\x8b\x08" + bytes(range(256)), "log.gz")
    assert main(["explain", name]) == 2
    said = capsys.readouterr()
    assert text in said.err and said.out == ""


@pytest.mark.parametrize("arguments", [[], ["--json"]])
def test_a_hostile_log_gives_the_terminal_no_commands(here: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    hostile = "".join(map(chr, (*range(1, 32), *range(127, 160), 0x202E, 0x2066, 0x200B)))
    name = write(here, f"{hostile}{MEMORY}{hostile}\nRuntimeError: {hostile}\n")
    assert main(["explain", name, *arguments]) == 0
    said = capsys.readouterr().out
    assert all(character.isprintable() or character == "\n" for character in said) and MEMORY in said


def test_nothing_of_a_log_is_executed(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    attacks = "$(touch C)\n`touch C`\n'; touch C; '\nError: {0.__class__} %s %n !!python/object:os.system ['touch C']\n"
    assert main(["explain", write(here, attacks)]) == 7
    assert sorted(path.name for path in here.iterdir()) == ["train.log"] and "{0.__class__} %s %n" in capsys.readouterr().out
