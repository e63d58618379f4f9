"""What the verbs for a running run share, and what attach and status do with a run that has ended."""

import gc
import json
import os
import re
from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from launcher.cli import main
from launcher.commands.live import attach, logs, status
from launcher.commands.live.live_run import load_plan, require_containers
from launcher.errors import ConfigRefused
from launcher.plan.plan import Plan
from launcher.record.lock import lock_run
from tests.launcher.planted import write_run
from trainer.contract import StepRow


@pytest.mark.parametrize(
    "overrides", [(), ("hardware=ascend910b", "model=qwen2_5_vl_32b", "stage=lora", "precision=bf16", "cluster=example")]
)
def test_a_plan_is_read_as_it_was_written(tmp_path: Path, plan_for: Callable[..., Plan], overrides: tuple[str, ...]) -> None:
    plan = plan_for(*overrides)
    assert load_plan(write_run(tmp_path / "r", plan)) == plan


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "was cut short or edited"),
        ("{", "was cut short or edited"),
        ("{}", "cannot be read by this version"),
        ('{"schema": 1, "more": 2}', "cannot be read by this version"),
    ],
)
def test_a_plan_that_cannot_be_read(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "plan.json").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigRefused, match=rf"plan\.json {said}"):
        load_plan(tmp_path)


def test_a_run_of_processes_belongs_to_its_launcher(plan_for: Callable[..., Plan]) -> None:
    with pytest.raises(ConfigRefused, match=r"cluster\.runtime=docker"):
        require_containers(plan_for(), "attach")


@pytest.mark.parametrize(
    ("words", "said"), [((), ", step 5 of 300, loss 1.235"), (("stage=merge", "stage.checkpoint=/a"), "")], ids=("full", "merge")
)
def test_the_status_of_a_run_that_did_not_train_counts_no_steps(
    tmp_path: Path, plan_for: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], said: str
) -> None:
    plan = plan_for(*words)
    write_run(tmp_path / "runs" / "monday", plan)
    ended = SimpleNamespace(
        status="finished", ended_at="2026-11-21T01:02:03.456+00:00", steps=5, seconds=3781.2, final_loss=1.23456, failure=None
    )
    monkeypatch.setattr(status, "read_record", lambda _: ended)
    monkeypatch.chdir(tmp_path)
    heard: list[str] = []
    status.run(Namespace(run="monday", say=heard.append))
    assert heard == [f"finished at 2026-11-21 01:02:03 UTC, after 1 h 03 min{said}"]


def test_the_status_of_a_run_of_processes(tmp_path: Path, plan_for: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_run(tmp_path / "runs" / "20261121-000000", plan_for())
    monkeypatch.chdir(tmp_path)
    heard: list[str] = []

    def asked() -> str:
        assert status.run(Namespace(run="last", say=heard.append)) == 0
        return heard[-1]

    with lock_run(folder):
        assert re.fullmatch(r"running for .*, before its first step", asked())
        row = StepRow(step=12, steps=300, loss=1.23456, lr=0.1, grad_norm=1.0, samples=64, tokens=2048, seconds=0.1, peak_bytes=1)
        (folder / "metrics.jsonl").write_text(json.dumps(asdict(row)) + "\n{")
        assert re.fullmatch(r"running for .*, step 12 of 300, loss 1\.235", asked())
    assert asked().splitlines() == [
        "nothing was saved: it starts again from the beginning, and repeats steps 1 to 12",
        "to go on: omnilaunch launch --resume 20261121-000000",
    ]
    assert heard[-2] == "no record, step 12 of 300, loss 1.235: its launcher was killed. To see the output: omnilaunch logs 20261121-000000"


@pytest.mark.parametrize("text", ["{", "{}", '{"schema": 1, "of_a_later_version": 2}'])
def test_a_run_with_an_unreadable_record_is_not_supervised_again(
    tmp_path: Path, plan_for: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    folder = write_run(tmp_path / "runs" / "monday", plan_for("cluster.runtime=docker"))
    (folder / "result.json").write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(attach, "supervise", lambda *_: pytest.fail("it was supervised again"))
    for verb in (attach.run, status.run):
        with pytest.raises(ConfigRefused, match=r"monday has ended, and this version cannot read its record: .*result\.json"):
            verb(Namespace(run="monday", say=print))
    assert (folder / "result.json").read_text(encoding="utf-8") == text
    said: list[str] = []
    (folder / "logs" / "node0.log").write_text("done\n", encoding="utf-8")
    assert logs.run(Namespace(run="monday", say=said.append, follow=True)) == 0 and said == ["[node0] done"]


def test_attach_turns_the_garbage_collector_on(tmp_path: Path, plan_for: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch) -> None:
    """`main` turns it off. Commands to nodes leave objects in cycles, one command per second, for days."""
    write_run(tmp_path / "runs" / "monday", plan_for("cluster.runtime=docker"))
    monkeypatch.chdir(tmp_path)
    seen: list[bool] = []

    def attached(*_: object) -> None:
        seen.append(gc.isenabled())
        raise ConfigRefused("enough")

    monkeypatch.setattr("launcher.run.launch.attach", attached)
    try:
        assert main(["attach", "monday"]) == 2 and seen == [True]
    finally:
        gc.enable()


def test_attaching_to_a_run_whose_containers_are_gone_says_how_to_resume_it(
    tmp_path: Path, plan_for: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "runs" / "R"
    write_run(folder, replace(plan_for("cluster.runtime=docker"), folder=str(folder)))
    (tmp_path / "docker").write_text("#!/bin/sh\n[ $1 = inspect ] || exit 0\necho error: no such object >&2; exit 1\n")
    (tmp_path / "docker").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    assert main(["status", "R"]) == 0
    said = capsys.readouterr().out
    assert "no container" in said and said.rstrip().endswith("to go on: omnilaunch launch --resume R")
    assert main(["attach", "R"]) == 5
    assert capsys.readouterr().err.rstrip().endswith("to go on: omnilaunch launch --resume R")
