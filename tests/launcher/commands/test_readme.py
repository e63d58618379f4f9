"""The refusals that the README shows are what the program prints."""

import gc
import re
import shlex
from pathlib import Path

import pytest

from launcher.cli import main

README = Path(__file__).resolve().parents[3] / "README.md"
CONSOLE = re.compile(r"^```console\n(.*?)^```", re.MULTILINE | re.DOTALL)
PROMPT = re.compile(r"^\$ (.*)\n", re.MULTILINE)


def shown_refusals() -> list[tuple[str, str]]:
    """(command, its output) of every `omnilaunch` command in a console block whose output is a refusal."""
    found = []
    for block in CONSOLE.findall(README.read_text(encoding="utf-8")):
        _, *pairs = PROMPT.split(block)
        found += [(command, output) for command, output in zip(pairs[::2], pairs[1::2], strict=True) if "\nomnilaunch: " in f"\n{output}"]
    return found


def test_the_readme_shows_a_refusal() -> None:
    assert any(command.startswith("omnilaunch plan") for command, _ in shown_refusals())


@pytest.mark.parametrize(("command", "output"), shown_refusals(), ids=lambda value: value.split("\n")[0])
def test_refusals_are_those_of_the_program(command: str, output: str, capsys: pytest.CaptureFixture[str]) -> None:
    program, *words = shlex.split(command, comments=True)
    assert program == "omnilaunch" and words[0] == "plan"
    try:
        assert main(words) == 2
    finally:
        gc.enable()  # which `main` turns off for the whole process
    said = capsys.readouterr()
    assert said.out == "" and said.err == output
