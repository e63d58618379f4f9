"""The program's front door: the table of verbs, its help, what is refused, and how errors end."""

import gc
import os
import re
import shlex
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

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
        (["help", "lanch"], "unknown verb 'lanch'; did you mean 'launch'?"),
        (["image", "biuld"], "unknown action 'biuld' of image; did you mean 'build'? valid are: build, fetch,"),
        (["data", "chek"], "unknown action 'chek' of data; did you mean 'check'?"),
        (["options", "hardwear"], "unknown key 'hardwear'; did you mean 'hardware'?"),
        (["completion", "fish"], "unknown shell 'fish'; valid are: bash, zsh"),
        (["plan", "model=tinyllava"], "write model=tiny_llava"),
        (["options", "run.seed", "a=b"], "unknown key 'a'"),
        (["options", "run.seed", "run.steps"], "give one key, then overrides; these are 2: run.seed, run.steps"),
    ],
)
def test_unknown_words_get_the_nearest_valid_one(words: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert text in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (
            ["plan", "--jsn"],
            "unrecognized arguments: --jsn; did you mean '--json'? valid are: --conf, --full, --help, --json, --run-id, --trace",
        ),
        (["launch", "--detatch", "cluster=lab"], "did you mean '--detach'?"),
        (
            ["image", "build", "--fersh"],
            "unrecognized arguments: --fersh; did you mean '--fresh'? valid are: --architecture, --conf, --fresh, --help",
        ),
        (["logs", "monday", "--folow"], "did you mean '--follow'?"),
        (["status", "monday", "a=b"], "unrecognized arguments: a=b"),
        (["status"], "the following arguments are required: RUN"),
        (["image"], "the following arguments are required: ACTION"),
    ],
)
def test_unknown_options_get_the_nearest_one(words: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2 and text in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        (["compare", "a", "--json", "b"], "runs", ["a", "b"]),
        (["compare", "--band", "loss=0.01", "a", "b", "--unlike", "c"], "runs", ["a", "b", "c"]),
        (["logs", "-f", "monday"], "run", "monday"),
        (["report", "a", "--out", "x.html", "b"], "runs", ["a", "b"]),
        (["rerun", "--run-id", "again", "monday", "--detach", "run.seed=2"], "overrides", ["run.seed=2"]),
        (["runs", "--disk", "stage=lora", "--all", "run.seed=1"], "words", ["stage=lora", "run.seed=1"]),
        (["runs", "prune", "--keep", "1", "monday"], "words", ["prune", "monday"]),
        (["bench", "--dirty", "a try", "cell", "--anew", "cluster=lab"], "words", ["cell", "cluster=lab"]),
        (["render", "--to", "x", "monday"], "overrides", ["monday"]),
        (["options", "--conf", "x", "hardware"], "key", "hardware"),
        (["image", "refresh", "--upgrade", "cpu", "p4"], "stacks", ["cpu", "p4"]),
        (["image", "build", "hardware=p4", "--fresh", "cluster=lab"], "overrides", ["hardware=p4", "cluster=lab"]),
        (["data", "check", "--json", "data=digits"], "overrides", ["data=digits"]),
    ],
)
def test_names_may_follow_an_option(words: list[str], key: str, value: object) -> None:
    assert getattr(parse(words), key) == value


def test_a_word_too_many_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["status", "a", "b"], ["completion", "bash", "zsh"], ["image", "ls", "x"], ["logs", "a", "-f", "b"]):
        with pytest.raises(SystemExit):
            parse(words)
        assert f"unrecognized arguments: {words[-1]}" in capsys.readouterr().err


def test_overrides_after_an_option_belong_to_those_before_it() -> None:
    arguments = parse(["plan", "hardware=p4", "--json", "run.steps=3", "--run-id", "monday", "run.seed=2"])
    assert arguments.overrides == ["hardware=p4", "run.steps=3", "run.seed=2"] and arguments.json and arguments.run_id == "monday"


def test_options_are_not_abbreviated() -> None:
    with pytest.raises(SystemExit):
        parse(["plan", "--js"])
    assert make_parser("plan")[0].allow_abbrev is False


@pytest.mark.parametrize("words", [[], ["help"], ["--help"], ["-h"]])
def test_the_help_needs_no_option(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 0 and capsys.readouterr() == (f"{help_text()}\n", "")


@pytest.mark.parametrize("words", [["help", "plan"], ["help", "image", "build"], ["image", "--help"], ["plan", "-h"]])
def test_the_help_of_a_verb(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    verb = [word for word in words if not word.startswith("-") and word != "help"]
    assert ended.value.code == 0 and capsys.readouterr().out.startswith(f"usage: omnilaunch {' '.join(verb)} ")


@pytest.mark.parametrize("words", [["version"], ["--version"]])
def test_the_version_and_the_commit(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 0
    said = capsys.readouterr().out
    assert re.fullmatch(r"omnilaunch \d+\.\d+\.\d+(, commit [0-9a-f]{12}( with changes)?)?, Python 3\.\d+\.\d+\n", said), said


def refuse(_: Namespace) -> int:
    raise PermissionError(13, "Permission denied", "runs/monday/logs/stop0.log")


def interrupt(_: Namespace) -> int:
    raise KeyboardInterrupt


def fail(_: Namespace) -> int:
    raise ConfigRefused("not like this")


def fail_with_foreign_text(_: Namespace) -> int:
    raise ConfigRefused("run \033[2J\033[8m")


# root may write anywhere, so the refusal of the system is raised by hand
@pytest.mark.parametrize(
    ("verb", "code", "text"),
    [
        (refuse, 2, "omnilaunch: runs/monday/logs/stop0.log: Permission denied. Run the command as the owner"),
        (interrupt, 130, ""),
        (fail, 2, "omnilaunch: not like this"),
        (fail_with_foreign_text, 2, r"omnilaunch: run \u001b[2J\u001b[8m"),
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


def omnilaunch(*words: str, cwd: Path, **given: Any) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    argv = (sys.executable, "-m", "launcher.cli", *words)
    return subprocess.run(argv, cwd=cwd, env=environment, text=True, check=False, stderr=subprocess.PIPE, **given)


@pytest.mark.parametrize(
    ("words", "buffered"),
    [
        *((words, True) for words in ("--help", "plan --help", "version", "plan", "options", "runs")),
        ("plan --help", False),
        ("runs", False),
    ],
)
def test_an_output_that_cannot_be_written_is_no_success(
    words: str, buffered: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What does not fit on a disk is lost, and a script must know."""
    monkeypatch.setenv("PYTHONUNBUFFERED", "" if buffered else "1")
    with Path("/dev/full").open("w") as full:
        done = omnilaunch(*words.split(), cwd=tmp_path, stdout=full)
    assert done.returncode == 2
    assert done.stderr == (
        "\nomnilaunch: the output could not be written: No space left on device. Free disk space there, and run the command again\n"
    )


@pytest.mark.parametrize("words", ["options", "plan --json", "runs", "--help", "launch --help"])
def test_a_reader_that_leaves_early_is_no_error(words: str, tmp_path: Path) -> None:
    program = f"PYTHONPATH={shlex.quote(str(PROJECT))} {shlex.quote(sys.executable)} -m launcher.cli {words} | :"
    environ = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}  # which a plan names as ignored
    done = subprocess.run(("bash", "-o", "pipefail", "-c", program), cwd=tmp_path, capture_output=True, text=True, check=False, env=environ)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("words", "code"),
    [
        *(((verb,), 2) for verb in ("plan", "runs", "doctor")),
        (("status", "last"), 2),
        (("--help",), 0),
        (("plan", "--help"), 0),
        (("bench",), 0),
        (("bench",), 0),
        (("options",), 0),
    ],
)
def test_a_working_directory_that_was_deleted(words: tuple[str, ...], code: int, tmp_path: Path) -> None:
    """No verb ends with a traceback, and the help is shown all the same."""
    gone = tmp_path / "gone"
    gone.mkdir()
    done = omnilaunch(*words, cwd=gone, stdout=subprocess.PIPE, preexec_fn=gone.rmdir)
    assert done.returncode == code and "Traceback" not in done.stderr
    assert ("the working directory was deleted. Change to another one" in done.stderr) is (code == 2)
