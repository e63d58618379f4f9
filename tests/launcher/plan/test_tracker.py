"""Trackers that the ranks will lack: a note of the plan where the user named one."""

from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from launcher.cli import main
from launcher.config.compose import compose
from launcher.config.schema import Run
from launcher.plan.tracker import describe_missing, is_installed
from trainer.observe import tracker

CONF = Path(__file__).parents[3] / "conf"
REMOTE = "cluster.nodes=[{host: far}]"


@pytest.mark.parametrize(
    ("overrides", "installed", "said"),
    [
        ((), (), ""),
        (("run.trackers=[wandb]",), ("wandb",), ""),
        (("run.trackers=[wandb]",), (), "this Python environment lacks wandb, so that the run will be refused: pip install wandb"),
        (("run.trackers=[tensorboard]",), (), "this Python environment lacks tensorboard"),
        (("run.trackers=[wandb]", "cluster.runtime=docker"), ("wandb",), "no image has the package wandb"),
        (("run.trackers=[tensorboard]", "cluster.runtime=docker"), (), ""),
        (
            ("run.trackers=[swanlab]", "cluster.runtime=process", REMOTE),
            ("swanlab",),
            "swanlab is in no lock; it must be installed on every node",
        ),
        (("run.trackers=[wandb]", "stage=infer"), (), ""),
    ],
)
def test_a_named_tracker_that_is_missing_is_noted(overrides: tuple[str, ...], installed: tuple[str, ...], said: str) -> None:
    notes = describe_missing(compose(overrides, CONF), named=bool(overrides), has=lambda name: name in installed)
    assert (not notes) if not said else (len(notes) == 1 and said in notes[0])


def test_each_tracker_has_a_note_of_its_own() -> None:
    config = compose(("run.trackers=[wandb,mlflow,wandb]",), CONF)
    assert [note.split(": ")[1].split(",")[0] for note in describe_missing(config, named=True, has=lambda _: False)] == [
        "this Python environment lacks wandb",
        "this Python environment lacks mlflow",
    ]
    assert describe_missing(replace(config, run=replace(config.run, trackers=())), named=True) == ()


def test_what_is_installed_is_read_from_the_metadata() -> None:
    assert version("pytest") and is_installed("pytest") and not is_installed("no-such-package")


def test_a_plan_has_the_note(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launcher.plan.tracker.is_installed", lambda _: False)
    assert main(["plan", "run.trackers=[wandb]"]) == 0
    assert "note: run.trackers: this Python environment lacks wandb" in " ".join(capsys.readouterr().out.split())
    assert main(["plan"]) == 0
    assert "run.trackers" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "near"), [("wandbb", "wandb"), ("tensorboard,Swan_Lab", "swanlab"), ("mlflow,tensorbord", "tensorboard")]
)
def test_a_tracker_that_does_not_exist_is_refused_with_the_nearest(given: str, near: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", f"run.trackers=[{given}]"]) == 2
    assert f"is not allowed; did you mean '{near}'?" in capsys.readouterr().err


def test_the_trackers_are_those_of_the_trainer() -> None:
    assert set(get_args(get_args(get_type_hints(Run)["trackers"])[0])) == set(tracker.TRACKERS)
