"""The program's front door: the table of verbs, its help, what is refused, and how errors end."""

import gc
import shlex
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

from launcher.cli import AXES as AXES_TEXT, GROUPS, VERBS, help_text, main, make_parser, parse
from launcher.config.schema import AXES
from launcher.errors import ConfigRefused

PROJECT = Path(__file__).resolve().parents[2]
HEAVY = (
    "hydra",
    "omegaconf",
    "jinja2",
    "rich",
    "fabric",
    "paramiko",
    "yaml",
    "docker",
    "launcher.config",
    "launcher.record",
    "launcher.commands",
)


@pytest.fixture(autouse=True)
def collector() -> Iterator[None]:
    """`main` turns the garbage collector off for the whole process."""
    yield
    gc.enable()


def test_help_has_every_verb_in_its_group_the_axes_and_the_exit_codes() -> None:
    text = help_text()
    assert all(f"  {name:12} {verb.help}" in text and verb.group in GROUPS for name, verb in VERBS.items())
    assert tuple(AXES_TEXT.split(", ")) == AXES
    assert all(f"{code} " in text for code in (0, 1, 2, 3, 4, 5, 7, 130)) and all(len(line) <= 140 for line in text.splitlines())


def test_help_imports_nothing_that_takes_time() -> None:
    code = f"import sys; from launcher.cli import main; main(['--help']); print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run((sys.executable, "-c", code), cwd=PROJECT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("name", VERBS)
def test_the_help_of_a_verb_has_two_examples_that_it_can_parse(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse([name, "--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0 and VERBS[name].help[1:] in text
    *_, first, second = text.splitlines()
    assert len({first, second}) == 2
    for line in (first, second):
        program, *words = shlex.split(line)
        assert program == "omnilaunch" and words[0] == name
        assert callable(parse(words).verb)


def test_a_verb_imports_only_its_own_module(capsys: pytest.CaptureFixture[str]) -> None:
    """`plan` must not pay for `bench`."""
    code = "import sys; from launcher.cli import parse; parse(['plan']); print(sorted(n for n in sys.modules if n.startswith('launcher.commands.')))"
    done = subprocess.run((sys.executable, "-c", code), cwd=PROJECT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['launcher.commands.plan']"


def test_every_module_of_a_verb_has_the_two_functions() -> None:
    for verb in VERBS.values():
        module = import_module(f"launcher.commands.{verb.module}")
        assert callable(module.add_arguments) and callable(module.run)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["lanch"], "unknown verb 'lanch'; did you mean 'launch'? valid are: attach, bench,"),
        (["bench_rerun"], "did you mean 'bench-rerun'?"),
        (["--json", "plan"], "unknown verb '--json'"),
        ([], "no verb; valid are: attach"),
        (["image", "biuld"], "unknown action 'biuld' of image; did you mean 'build'? valid are: build, fetch,"),
        (["data", "chek"], "unknown action 'chek' of data; did you mean 'check'?"),
        (["options", "hardwear"], "unknown axis 'hardwear'; did you mean 'hardware'?"),
        (["completion", "fish"], "unknown shell 'fish'; valid are: bash, zsh"),
        (["plan", "model=tinyllava"], "did you mean 'tiny_llava'?"),
    ],
)
def test_unknown_words_get_the_nearest_valid_one(words: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert text in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["plan", "--jsn"], "unrecognized arguments: --jsn; did you mean '--json'? valid are: --full, --help, --json, --run-id, --trace"),
        (["launch", "--detatch", "cluster=lab"], "did you mean '--detach'?"),
        (
            ["image", "build", "--fersh"],
            "unrecognized arguments: --fersh; did you mean '--fresh'? valid are: --architecture, --fresh, --help",
        ),
        (["logs", "monday", "--folow"], "did you mean '--follow'?"),
        (["options", "hardware", "a=b"], "unrecognized arguments: a=b"),
        (["status"], "the following arguments are required: RUN"),
        (["image"], "the following arguments are required: ACTION"),
    ],
)
def test_unknown_options_get_the_nearest_one(words: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2 and text in capsys.readouterr().err


def test_overrides_after_an_option_belong_to_those_before_it() -> None:
    arguments = parse(["plan", "hardware=p4", "--json", "run.steps=3", "--run-id", "monday", "run.seed=2"])
    assert arguments.overrides == ["hardware=p4", "run.steps=3", "run.seed=2"] and arguments.json and arguments.run_id == "monday"


def test_options_are_not_abbreviated() -> None:
    with pytest.raises(SystemExit):
        parse(["plan", "--js"])
    assert make_parser("plan")[0].allow_abbrev is False


def refuse(_: Namespace) -> int:
    raise PermissionError(13, "Permission denied", "runs/monday/logs/stop0.log")


def interrupt(_: Namespace) -> int:
    raise KeyboardInterrupt


def fail(_: Namespace) -> int:
    raise ConfigRefused("not like this")


# root may write anywhere, so the refusal of the system is raised by hand
@pytest.mark.parametrize(
    ("verb", "code", "text"),
    [
        (refuse, 2, "omnilaunch: runs/monday/logs/stop0.log: Permission denied. Run the command as the owner"),
        (interrupt, 130, ""),
        (fail, 2, "omnilaunch: not like this"),
    ],
)
def test_how_errors_end(verb: object, code: int, text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("launcher.cli.parse", lambda _: Namespace(verb=verb))
    assert main(["stop", "monday"]) == code
    said = capsys.readouterr().err
    assert text in said and "Traceback" not in said


def test_a_reader_that_closes_the_pipe_is_no_error() -> None:
    argv = f"{shlex.quote(sys.executable)} -m launcher.cli plan | head -1"
    done = subprocess.run(("bash", "-o", "pipefail", "-c", argv), cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
