"""Every command in a console block of README.md and docs/ works as it is written: see tests/documented.py."""

import gc
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib.machinery import PathFinder
from pathlib import Path

import pytest

from launcher.cli import main, parse
from tests.documented import (
    ADAPTED,
    DOCUMENTS,
    READ_ONLY,
    REPEATED,
    ROOT,
    TRAINED,
    Command,
    as_planned,
    commands_in,
    commands_of_block,
    made_by,
    outside_of_console,
    programs,
    with_known_runs,
    write_files,
)

COMMANDS = [command for document in DOCUMENTS for command in commands_in(document)]
LAUNCHES = (
    ("run.steps=3", "stage.optimizer.warmup=0", "run.evaluation.limit=4", "--run-id", TRAINED),
    ("run.steps=3", "stage.optimizer.warmup=0", "run.evaluation.limit=4", "--run-id", REPEATED),
    ("stage=lora", f"stage.checkpoint={TRAINED}", "run.steps=2", "stage.optimizer.warmup=0", "run.evaluation.limit=4", "--run-id", ADAPTED),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that the documents name, a trained run and an adapter of it."""
    made = tmp_path_factory.mktemp("documented")
    write_files(made)
    for words in LAUNCHES:
        launched = subprocess.run(
            (sys.executable, "-m", "launcher.cli", "launch", *words), cwd=made, capture_output=True, text=True, check=False
        )
        assert launched.returncode == 0, launched.stderr
    return made


@pytest.fixture
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("OMNILAUNCH_CONF", str(folder / "conf"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(folder / "config"))
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("COLUMNS", "100")  # the width of the documents' output
    yield folder
    gc.enable()  # which `main` turns off for the whole process


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_a_documented_command_works(command: Command, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in programs(command.text):
        run(words, command, capsys)


def run(words: list[str], command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    if words[0] == "omnilaunch":
        check_output(run_omnilaunch(words[1:], capsys), command, words)
    elif words[0] == "make":
        for made in made_by(words):
            check_output(run_omnilaunch(made[1:], capsys), command, made)
    elif words[0] in ("python", ".venv/bin/python"):
        assert can_be_run(words[1:]), f"there is no {' '.join(words[1:3])}"
    elif words[0] == "pytest":
        assert all((ROOT / word).exists() for word in words[1:] if word.startswith("tests/"))
    else:  # a program of the system: at least a command that a shell can read
        assert subprocess.run(("bash", "-n", "-c", command.text), check=False).returncode == 0


def can_be_run(words: list[str]) -> bool:
    """Whether python finds this file or `-m MODULE`. Not by importlib.util.find_spec: for pip, setuptools then gives up its own distutils, and
    later tests of this process meet the deprecated one."""
    if words[0] != "-m":
        return (ROOT / words[0]).is_file()
    module = ROOT / words[1].replace(".", "/")
    return module.is_dir() or module.with_suffix(".py").is_file() or PathFinder.find_spec(words[1]) is not None


def run_omnilaunch(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """(exit code, what it printed). Code -1: the options and overrides were only read."""
    words = [word.replace("~", os.environ["HOME"], 1) if word.startswith("~") else word for word in with_known_runs(words)]
    if words[0] == "render":  # after the licence was accepted, as the README says above it
        main(["licence", "accept", "cann"])
    if words[0] in READ_ONLY or "--resume" in words:
        parse(words)
        return -1, ""
    for report in {*Path.cwd().glob("report-*"), *Path.cwd().glob("*.html")}:  # an existing report is not overwritten
        report.unlink()
    code = main(as_planned(words) if words[0] == "launch" else words)
    said = capsys.readouterr()
    return code, said.out + said.err


def check_output(result: tuple[int, str], command: Command, words: list[str]) -> None:
    code, printed = result
    refused = any(line.startswith("omnilaunch: ") for line in command.shown)
    assert code in ((2,) if refused else (-1, 0)), printed
    if words[1] != "plan" or code == -1:
        return  # what a run printed is not that of its plan
    for piece in pieces(command.shown):
        assert piece in one_line(printed), f"{piece}\nis not in\n{printed}"


def pieces(shown: Sequence[str]) -> list[str]:
    """The shown text between its lines of `...`; a document may break lines where the terminal did not."""
    return [piece for text in re.split(r"^\.\.\.$", "\n".join(shown), flags=re.MULTILINE) if (piece := one_line(text))]


def one_line(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_are_in_console_blocks(document: Path) -> None:
    assert outside_of_console(document) == []


def test_there_are_commands_to_test() -> None:
    assert len(COMMANDS) > 60 and {command.document.name for command in COMMANDS} >= {"README.md", "training.md", "deployment.md"}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_prompt_is_a_command(document: Path) -> None:
    prompts = re.findall(r"^\$ ", document.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(list(commands_in(document))) == len(prompts)


def test_a_block_is_split_into_commands_and_their_output() -> None:
    block = "$ omnilaunch plan \\\n    stage=lora   # a note\nok\n$ make plan HW=cpu && omnilaunch runs\n"
    first, second = commands_of_block(Path("x.md"), block, first_line=10)
    assert (first.line, first.text, first.shown) == (10, "omnilaunch plan stage=lora   # a note", ("ok",))
    assert programs(first.text) == [["omnilaunch", "plan", "stage=lora"]]
    assert programs(second.text) == [["make", "plan", "HW=cpu"], ["omnilaunch", "runs"]] and second.line == 13
    assert made_by(["make", "plan", "HW=cpu"])[0][:3] == ["omnilaunch", "plan", "hardware=cpu"]


def test_placeholders_become_runs() -> None:
    words = with_known_runs(["stage.checkpoint=LORA_RUN", "last/300", "monday", "20261121-0245", "lora.json", "stage=full", "stage.x=lora"])
    assert words == [f"stage.checkpoint={ADAPTED}", REPEATED, TRAINED, TRAINED, "lora.json", "stage=full", "stage.x=lora"]


def test_a_wrong_command_is_found(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = ("$ omnilaunch plan hardware=h300", "$ omnilaunch compare RUN nowhere", "$ omnilaunch plan\nnot printed")
    for command in (commands for text in wrong for commands in commands_of_block(Path("x.md"), text, first_line=1)):
        with pytest.raises(AssertionError):
            test_a_documented_command_works(command, here, capsys)
