"""`omnilaunch launch --resume` as a user types it: what it refuses, and that a refusal changes nothing."""

import json
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from launcher.cli import main
from launcher.commands.live import resume as resume_command
from launcher.record.lock import lock_run
from launcher.record.record import Attempt
from tests.launcher.planted import set_value
from trainer import contract

PROJECT = Path(__file__).resolve().parents[4]
Stopped = Callable[..., Path]


@pytest.fixture
def stopped(run: Callable[..., Path]) -> Stopped:
    return partial(run, status="stopped")


def content(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "launcher.lock"}


def refused(capsys: pytest.CaptureFixture[str], folder: Path, *words: str) -> str:
    before = content(folder)
    assert main(["launch", "--resume", "R", *words]) == 2
    said = capsys.readouterr().err
    assert content(folder) == before, "a refusal changes nothing"
    assert "Traceback" not in said
    return said


def test_a_finished_run(stopped: Stopped, capsys: pytest.CaptureFixture[str]) -> None:
    assert "run R is finished: all 300 steps are done" in refused(capsys, stopped("run.steps=300", status="finished"))


def test_a_run_that_never_started(stopped: Stopped, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, stopped("run.steps=300", status="refused"))
    assert "was refused before its first step" in said and "launch cluster.root=" in said and "run.steps=300" in said


def test_a_resumption_that_was_refused_can_be_followed_by_another(stopped: Stopped, capsys: pytest.CaptureFixture[str]) -> None:
    folder = stopped(status="refused")
    (folder / "attempts/1").mkdir(parents=True)
    attempt = Attempt(number=1, started_at="2026-11-21T00:00:00+00:00", seconds=1.0, steps=3, nodes=(), failure=None, status="stopped")
    contract.write(attempt, folder / "attempts/1/attempt.json")
    assert "run.seed: 1 → 5" in refused(capsys, folder, "run.seed=5"), "it is refused for this, and not for its record"


@pytest.mark.parametrize("words", [("stage=evaluate", "stage.checkpoint=/a"), ("stage=merge", "stage.checkpoint=/a")])
def test_a_stage_that_does_not_train(stopped: Stopped, capsys: pytest.CaptureFixture[str], words: tuple[str, ...]) -> None:
    said = refused(capsys, stopped(*words))
    assert "does not train" in said and f"launch cluster.root={Path.cwd()} {' '.join(words)}" in said


def test_a_run_that_is_supervised(stopped: Stopped, capsys: pytest.CaptureFixture[str]) -> None:
    folder = stopped(status="")
    with lock_run(folder):
        assert "supervised by another launcher" in refused(capsys, folder)


def test_a_record_that_this_version_cannot_read(stopped: Stopped, capsys: pytest.CaptureFixture[str]) -> None:
    folder = stopped()
    set_value("result.json", "schema", 99)(folder)
    assert "result.json was written with schema 99, this version reads 1" in refused(capsys, folder)
    set_value("result.json", "schema", 1)(folder)
    set_value("plan.json", "schema", 99)(folder)
    assert "plan.json was written with schema 99" in refused(capsys, folder)


def test_a_folder_that_was_moved(stopped: Stopped, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = stopped()
    (tmp_path / "other").mkdir()
    folder.rename(tmp_path / "other/R")
    assert main(["launch", "--resume", str(tmp_path / "other/R")]) == 2
    assert f"was made in {folder}, and this folder is {tmp_path / 'other/R'}" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_to(stopped: Stopped, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may write anywhere but on a file system that is mounted read-only: the answer of the kernel is planted."""
    folder = stopped()
    monkeypatch.setattr(resume_command.os, "access", lambda path, mode: Path(path) != folder)
    said = refused(capsys, folder)
    assert "cannot be written to by this user" in said and not (folder / "launcher.lock").exists()


def test_a_folder_that_was_partly_deleted(stopped: Stopped, capsys: pytest.CaptureFixture[str]) -> None:
    folder = stopped()
    (folder / "plan.json").unlink()
    assert "there is no run 'R'" in refused(capsys, folder)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("launch", "--resume", "R", "--run-id", "x"), "exclude each other"),
        (("launch", "--accept", "steps"), "--accept is for --resume"),
        (("launch", "--resume", "R", "--accept", "stepps"), "did you mean 'steps'"),
        (("launch", "--resume", "R", "--detach"), "--detach needs containers"),
        (("launch", "--resume", "R", "run.stepps=3"), "did you mean 'steps'"),
        (("launch", "--resume", "nothing"), "there is no run 'nothing'"),
    ],
)
def test_options_that_exclude_each_other(stopped: Stopped, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], said: str) -> None:
    stopped()
    assert main(list(words)) == 2 and said in capsys.readouterr().err


def test_the_makefile_passes_the_run_on() -> None:
    done = subprocess.run(
        ("make", "-n", "train", "RESUME=monday", "ARGS=run.steps=9 --accept steps", "-o", ".venv/.launcher", "-o", ".venv/.trainer"),
        cwd=PROJECT,
        capture_output=True,
        text=True,
    )
    assert "omnilaunch launch --resume monday" in done.stdout and "run.steps=9 --accept steps" in done.stdout, done.stdout + done.stderr
    assert "RESUME" in subprocess.run(("make", "help"), cwd=PROJECT, capture_output=True, text=True).stdout


def test_runs_and_status_print_the_command(stopped: Stopped, capsys: pytest.CaptureFixture[str]) -> None:
    folder = stopped(status="failed")
    for words in (("runs",), ("status", "R")):
        assert main(list(words)) == 0
        assert capsys.readouterr().out.rstrip().endswith("to go on: omnilaunch launch --resume R")
    (folder / "result.json").unlink()
    assert main(["status", "R"]) == 0
    said = capsys.readouterr().out
    assert "no record, before its first step: its launcher was killed" in said and "--resume R" in said
    with lock_run(folder):
        assert main(["status", "R"]) == 0
        assert main(["runs"]) == 0
    assert "before its first step" in (said := capsys.readouterr().out) and "--resume" not in said


def test_a_run_of_another_folder_is_named_by_its_path(
    stopped: Stopped, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = stopped()
    monkeypatch.chdir("/")
    assert main(["status", str(folder)]) == 0
    assert f"--resume {folder}" in capsys.readouterr().out


def test_a_finished_run_and_one_that_was_refused_print_no_command(stopped: Stopped, capsys: pytest.CaptureFixture[str]) -> None:
    folder = stopped(status="finished")
    assert main(["status", "R"]) == 0 and "--resume" not in capsys.readouterr().out
    record = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps(record | {"status": "refused"}))
    assert main(["status", "R"]) == 0 and "--resume" not in capsys.readouterr().out


def test_the_help_shows_it_and_the_completion_knows_it(stopped: Stopped, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["launch", "--help"])
    assert "omnilaunch launch --resume monday" in capsys.readouterr().out
    stopped()
    main(["--complete", "launch", "--r"])
    assert "--resume" in capsys.readouterr().out.split()
    main(["--complete", "launch", "--resume", ""])
    assert {"R", "last"} <= set(capsys.readouterr().out.split())
