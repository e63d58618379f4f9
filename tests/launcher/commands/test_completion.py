"""Completion: the candidates for a line, and the two scripts in real shells."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.cli import VERBS, main, make_parser
from launcher.commands.completion import OPTION, complete, read_help

PROJECT = Path(__file__).resolve().parents[3]
RUNS = ("monday", "monday-2", "tuesday")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with three runs, and the program on the path of the shells."""
    for number, run_id in enumerate(RUNS):
        (tmp_path / "runs" / run_id).mkdir(parents=True)
        (tmp_path / "runs" / run_id / "plan.json").write_text("{}", encoding="utf-8")
        (tmp_path / "runs" / run_id / "result.json").write_text(json.dumps({"started_at": f"2026-11-2{number}T00:00:00+00:00"}))
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "omnilaunch"
    program.write_text(f'#!/bin/sh\nPYTHONPATH={PROJECT} exec {sys.executable} -m launcher.cli "$@"\n', encoding="utf-8")
    program.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    return tmp_path


# line after `omnilaunch ` -> the candidates
LINES = {
    "": [*sorted((*VERBS, "--help", "--version", "help", "version"))],
    "hel": ["help"],
    "help bench-": ["bench-rerun"],
    "bench": ["bench", "bench-rerun"],
    "plan hardware=h2": ["hardware=h200"],
    "plan hardwar": ["hardware.", "hardware="],
    "plan run.st": ["run.start_timeout_s=", "run.steps=", "run.stop_timeout_s="],
    "launch cluster.delivery.ind": ["cluster.delivery.index="],
    "plan stage.opt": ["stage.optimizer."],
    "plan stage.optimizer.be": ["stage.optimizer.beta1=", "stage.optimizer.beta2="],
    "plan --json precision=pu": ["precision=pure_bf16"],
    "plan experiment=cpu_tiny_llava_l": ["experiment=cpu_tiny_llava_lora"],
    "plan stage.checkpoint=mon": ["stage.checkpoint=monday", "stage.checkpoint=monday-2"],
    "plan run.evaluation.base=l": ["run.evaluation.base=last"],
    "plan --": ["--conf", "--full", "--help", "--json", "--run-id", "--trace"],
    "logs ": ["last", *RUNS],
    "logs -f t": ["tuesday"],
    "compare monday t": ["tuesday"],
    "rerun mon": ["monday", "monday-2"],
    "render tue": ["tuesday"],
    "render --to x hardware=p": ["hardware=p4"],
    "image ": ["--help", "build", "fetch", "inspect", "ls", "prune", "refresh", "render"],
    "image build hardware=r": ["hardware=rtx3090"],
    "image fetch --": ["--architecture", "--conf", "--help", "--to"],
    "data che": ["check"],
    "data check data=f": ["data=files"],
    "runs ta": ["tag"],
    "runs tag ": ["cluster.", "cluster=", "data.", "data=", "experiment=", "hardware.", "hardware=", "last", "model.", "model=", *RUNS,
        "precision.", "precision=", "run.", "stage.", "stage=", "strategy.", "strategy=", "tune="],
    "runs stage=lo": ["stage=lora"],
    "options p": ["precision", "precision."],
    "options run.st": ["run.start_timeout_s", "run.steps", "run.stop_timeout_s"],
    "options stage.optimizer.lr stage=lo": ["stage=lora"],
    "options --": ["--conf", "--help", "--json", "--search"],
    "plan model.image": ["model.image_token="],
    "plan hardware.pea": [],
    "bench h200_qwen2_5_vl_7b_f": ["h200_qwen2_5_vl_7b_full"],
    "bench cpu_tiny_llava_full cluster=lo": ["cluster=local"],
    "completion ": ["bash", "zsh"],
    "nonsense ": [],
    "plan nonsense.x": [],
    "plan hardware=nonsense": [],
}  # fmt: skip


@pytest.mark.parametrize("line", LINES)
def test_candidates(here: Path, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--complete", *line.split(" ")]) == 0
    said = capsys.readouterr()
    assert sorted(said.out.split()) == sorted(LINES[line]) and said.err == ""


def test_nothing_is_ever_printed_but_candidates(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "runs" / "monday" / "result.json").write_text("{", encoding="utf-8")
    for words in (["--"], ["image", "nonsense", "--"], ["plan", "\0"], ["plan", "=", ""], ["runs", "tag", "\udcff"], ["data", "", ""], []):
        assert main(["--complete", *words]) == 0, words
        assert capsys.readouterr().err == "", words


def test_a_folder_without_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert complete(["logs", ""], VERBS, make_parser) == []


@pytest.mark.parametrize("verb", VERBS)
def test_the_options_are_those_of_the_parser(verb: str) -> None:
    parser, _ = make_parser(verb)
    known = {word for action in parser._actions for word in action.option_strings if word.startswith("--")}
    assert set(OPTION.findall(read_help(parser, []))) == known


def test_completion_composes_nothing() -> None:
    code = (
        "import sys; from launcher.cli import main; main(['--complete', 'plan', 'run.st']); main(['--complete', 'launch', '--']);"
        " print([n for n in ('hydra', 'omegaconf', 'yaml', 'jinja2', 'fabric', 'launcher.plan.plan') if n in sys.modules])"
    )
    done = subprocess.run((sys.executable, "-c", code), cwd=PROJECT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]" and "run.steps=" in done.stdout


# ------------------------------------------------------------------------------------------------------------- real shells

# line -> what stands in COMPREPLY: bash has split the word at =, and completes what follows
BASH = {
    "omnilaunch pla": ["plan"],
    "omnilaunch plan hardware=h2": ["h200"],
    "omnilaunch plan run.st": ["run.start_timeout_s=", "run.steps=", "run.stop_timeout_s="],
    "omnilaunch logs mon": ["monday", "monday-2"],
    "omnilaunch plan --js": ["--json"],
    "bin/omnilaunch status tu": ["tuesday"],
    "omnilaunch nonsense ": [],
}


@pytest.mark.parametrize("line", BASH)
def test_bash(here: Path, line: str) -> None:
    script = here / "complete.sh"
    subprocess.run(("bash", "-c", f"PATH={here}/bin:$PATH omnilaunch completion bash > {script}"), check=True)
    code = f"""
        PATH={here}/bin:$PATH; source {script}
        complete -p omnilaunch > /dev/null || exit 9
        COMP_LINE='{line}' COMP_POINT={len(line)} COMP_WORDS=() COMP_CWORD=0
        _omnilaunch; printf '%s\\n' "${{#COMPREPLY[@]}}" "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(("bash", "--norc", "-c", code), capture_output=True, text=True)
    count, *candidates = done.stdout.split()
    assert (done.returncode, done.stderr) == (0, "") and candidates == BASH[line]
    assert int(count) == len(candidates), "an empty candidate would keep bash from completing file names"


def test_bash_by_the_tab_key(here: Path) -> None:
    """An interactive bash in a pseudo-terminal, which types what a user types."""
    import os
    import pty

    (here / "rc").write_text(f"PATH={here}/bin:$PATH; PS1='$ '; source <(omnilaunch completion bash); bind 'set bell-style none'\n")
    child, terminal = pty.fork()
    if child == 0:
        os.execvp("bash", ("bash", "--rcfile", str(here / "rc"), "-i"))
    try:
        os.write(terminal, b"echo omni omnilaunch\x01\x0b")  # nothing: line editing is on
        os.write(terminal, b"omnilaunch plan hardware=h2\t\x01echo [\x05]\n")
        text = ""
        while "[omnilaunch plan hardware=h200 ]" not in text.replace("echo [", "", 1):
            text += os.read(terminal, 4096).decode(errors="replace")
            assert len(text) < 20_000, text
    finally:
        os.write(terminal, b"\x03exit\n")
        os.close(terminal)
        os.waitpid(child, 0)


@pytest.mark.skipif(not shutil.which("zsh"), reason="zsh is not installed")
@pytest.mark.parametrize("line", ["omnilaunch pla", "omnilaunch plan hardware=h2", "omnilaunch logs tu"])
def test_zsh(here: Path, line: str) -> None:
    """The function of the script, with the builtins of the completion system replaced by functions that print."""
    *words, current = line.split()
    code = f"""
        PATH={here}/bin:$PATH
        compdef() {{ :; }}; _files() {{ :; }}; compadd() {{ while [[ $1 != -- ]]; do shift; done; shift; print -l -- "$@"; }}
        source <(omnilaunch completion zsh)
        words=({line}); CURRENT={len(words) + 1}; PREFIX={current}; _omnilaunch
    """
    done = subprocess.run(("zsh", "-f", "-c", code), capture_output=True, text=True)
    wanted = {"omnilaunch pla": "plan", "omnilaunch plan hardware=h2": "hardware=h200", "omnilaunch logs tu": "tuesday"}[line]
    assert (done.returncode, done.stderr, done.stdout.split()) == (0, "", [wanted])
