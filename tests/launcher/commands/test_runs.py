"""Verbs that take the name of a run: each accepts an id, a unique prefix, `last` and a path, and refuses an ambiguous name."""

import gc
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.cli import main
from tests.launcher.planted import copy_run, set_value


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Three copies of a real run, which started one after the other."""
    for hour, run_id in enumerate(("monday", "monday-2", "tuesday"), start=1):
        copy_run(tmp_path / "runs", run_id, set_value("result.json", "started_at", f"2026-11-21T0{hour}:00:00.000+00:00"))
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    gc.enable()  # which `main` turns off for the whole process


@pytest.mark.parametrize("name", ["tuesday", "tue", "last", "runs/tuesday"])
@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (("status", "RUN"), 0, "finished at"),
        (("logs", "RUN"), 0, ""),
        (("attach", "RUN"), 2, "has no containers"),
        (("stop", "RUN"), 0, "finished at"),
        (("report", "RUN", "--markdown", "--out", "-"), 0, "# `tuesday`"),
        (("compare", "monday", "RUN"), 0, "tuesday"),
        (("fit-report", "RUN"), 0, "tuesday"),
        (("runs", "tag", "RUN", "kept"), 0, "tuesday  #kept"),
        (("runs", "prune", "RUN"), 0, "tuesday"),
        (("render", "RUN", "--to", "bundle"), 2, ""),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_every_verb_takes_every_form(
    here: Path, words: tuple[str, ...], code: int, text: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([name if word == "RUN" else word for word in words]) == code, capsys.readouterr()
    said = capsys.readouterr()
    assert text in said.out + said.err


@pytest.mark.parametrize("verb", ["status", "logs", "attach", "stop", "report", "compare", "fit-report", "rerun", "render"])
@pytest.mark.parametrize(
    ("name", "text"), [("mon", "'mon' is the beginning of 2 run ids: monday-2, monday"), ("friday", "there is no run 'friday'")]
)
def test_every_verb_refuses_alike(here: Path, verb: str, name: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    extra = ("--to", "bundle") if verb == "render" else ("tuesday",) if verb == "compare" else ()
    assert main([verb, name, *extra]) == 2
    assert text in capsys.readouterr().err


def test_prune_takes_runs_by_name(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", "prune", "monday", "last"]) == 0
    said = capsys.readouterr().out
    assert "2 runs, " in said and "monday-2" not in said and "nothing was removed" in said
    assert main(["runs", "prune", "monday", "last", "--yes"]) == 0
    assert sorted(path.name for path in (here / "runs").iterdir()) == ["monday-2"]
    assert main(["runs", "prune", "mond", "--keep", "1", "--yes"]) == 0
    assert "nothing to remove" in capsys.readouterr().out, "--keep holds for the named runs, too"


def test_the_full_id_is_recorded(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "runs" / "monday" / "checkpoints" / "step-000003").mkdir(parents=True)
    assert main(["plan", "stage=lora", "stage.checkpoint=last", "--json"]) == 2
    assert "stage.checkpoint=tuesday: that run saved no checkpoint" in capsys.readouterr().err
    assert main(["plan", "stage=lora", "stage.checkpoint=mon", "--json"]) == 2
    assert "stage.checkpoint=mon: 'mon' is the beginning of 2" in capsys.readouterr().err
    assert main(["plan", "stage=evaluate", "run.evaluation.base=fri", "stage.checkpoint=tuesday"]) == 2
    assert main(["launch", "--run-id", "last"]) == 2
    assert "--run-id last: this word means the newest run" in capsys.readouterr().err


def test_json_of_a_plan_has_the_full_id(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.launcher.record.test_checkpoint_reference import save

    save(here / "runs" / "tuesday", 3)
    assert main(["plan", "stage=lora", "stage.checkpoint=last/3", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["overrides"] == ["stage=lora", "stage.checkpoint=tuesday/3"]
    assert plan["config"]["stage"]["checkpoint"] == str(here / "runs" / "tuesday" / "checkpoints" / "step-000003")


def test_a_folder_that_no_command_can_name_is_not_offered_to_be_resumed(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy_run(here / "runs", "wednesday", set_value("result.json", "status", "failed"))
    assert main(["runs"]) == 0 and "launch --resume" in capsys.readouterr().out
    (here / "runs" / "wednesday").rename(here / "runs" / "bad\033[31mX")
    assert main(["runs"]) == 0
    said = capsys.readouterr().out
    assert "\033" not in said and "--resume" not in said
