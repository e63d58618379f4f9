"""What `launch --resume` does before it starts anything: what is left of a run is ended, its files are archived, a checkpoint is chosen."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from launcher.errors import ConfigRefused
from launcher.plan.commands import NodeCommand
from launcher.plan.plan import Plan
from launcher.record.lock import STOP_FILE
from launcher.record.record import Failure, NodeResult, Record, SourceState, load_attempts, write_record
from launcher.run.restart import find_states
from launcher.run.resume import LastAttempt, archive, choose_states, describe_end, finish, settle
from launcher.run.run_folder import WorkingNode
from launcher.run.session import Session
from launcher.ssh.transport import Local
from tests.launcher.planted import write_run
from trainer import contract
from trainer.contract import SCHEMA, TrainResult
from trainer.contract.checkpoint_files import STATE_FILE

PROJECT = Path(__file__).resolve().parents[3]


# ------------------------------------------------------------------------------------------------ what is kept of an attempt


def last_attempt(folder: Path, plan: Plan, record: Record | None) -> LastAttempt:
    return LastAttempt(
        plan=plan, record=record, started=datetime(2026, 11, 21, tzinfo=UTC), source=SourceState(commit="", dirty=False), session=None
    )  # type: ignore[arg-type]


def stopped_record(run_id: str, *, failure: Failure | None = None) -> Record:
    return Record(
        schema=SCHEMA,
        run_id=run_id,
        status="failed" if failure else "stopped",
        exit_code=130,
        started_at="2026-11-21T00:00:00.000+00:00",
        ended_at="2026-11-21T00:01:00.000+00:00",
        seconds=60.0,
        steps=7,
        train_seconds=None,
        samples_per_s=None,
        final_loss=None,
        evaluation={},
        checkpoint="",
        weights_sha256="",
        data_sha256="",
        source=SourceState(commit="", dirty=False),
        image="",
        forced="",
        nodes=(NodeResult(host="localhost", node_rank=0, code=0, seconds=50.0, killed=False),),
        failure=failure,
    )


@pytest.fixture
def stopped(tmp_path: Path, plan_for: Callable[..., Plan]) -> tuple[Path, Plan]:
    folder = tmp_path / "runs" / "R"
    plan = plan_for()
    plan = replace(plan, folder=str(folder))
    write_run(folder, plan)
    (folder / "logs/node0.log").write_text("log", encoding="utf-8")
    (folder / "metrics.jsonl").write_text("", encoding="utf-8")
    (folder / STOP_FILE).write_text("{}", encoding="utf-8")
    (folder / "data.json").write_text("{}", encoding="utf-8")
    return folder, plan


def test_the_record_of_the_earlier_end_is_archived(stopped: tuple[Path, Plan]) -> None:
    folder, plan = stopped
    record = write_record(stopped_record("R"), folder)
    last = last_attempt(folder, plan, record)
    attempt = describe_end(last, 1)
    assert (attempt.status, attempt.seconds, attempt.nodes) == ("stopped", 60.0, record.nodes)
    archive(last, attempt, plan)
    assert {path.name for path in (folder / "attempts/1").iterdir()} == {
        *("result.json", "seal.json", "stop.json", "logs", "metrics.jsonl", "data.json", "attempt.json")
    }
    assert not (folder / "result.json").exists() and not (folder / "stop.json").exists() and (folder / "data.json").exists()
    assert load_attempts(folder) == (attempt,)


def test_a_launcher_that_is_killed_while_it_archives_loses_nothing(stopped: tuple[Path, Plan]) -> None:
    """Everything was moved, and attempt.json not yet written: the next launcher finds the record in the archive, and the logs stay."""
    folder, plan = stopped
    failure = Failure(host="localhost", rank=0, code=1, message="it broke", log="", tail=())
    record = write_record(stopped_record("R", failure=failure), folder)
    archive(last_attempt(folder, plan, record), describe_end(last_attempt(folder, plan, record), 1), plan)
    (folder / "attempts/1/attempt.json").unlink()
    assert load_attempts(folder) == ()
    again = last_attempt(folder, plan, None)
    attempt = describe_end(again, 1)
    assert attempt.status == "failed" and attempt.failure == failure
    archive(again, attempt, plan)
    assert (folder / "attempts/1/logs/node0.log").read_text(encoding="utf-8") == "log"
    assert (folder / "attempts/1/result.json").is_file() and load_attempts(folder) == (attempt,)


def test_an_attempt_without_a_record_was_killed(stopped: tuple[Path, Plan]) -> None:
    folder, plan = stopped
    attempt = describe_end(last_attempt(folder, plan, None), 1)
    assert attempt.status == "killed" and attempt.failure is None
    assert [(node.host, node.killed, node.code) for node in attempt.nodes] == [("localhost", True, 137)]


# ----------------------------------------------------------------------------------------------------- which checkpoint


def save(run: Path, step: int, *, world_size: int = 1, says: dict[str, int] | None = None) -> None:
    folder = run / "checkpoints" / f"step-{step:06d}"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"12345")
    state = {"schema": SCHEMA, "step": step, "weights_sha256": "", "data_sha256": "", "world_size": world_size, "spec": {}}
    (folder / STATE_FILE).write_text(json.dumps({**state, "files": says or {"model.safetensors": 5}}), encoding="utf-8")


def node_of(folder: Path) -> WorkingNode:
    names = {"host": "here", "node_rank": 0, "runtime": "docker", "name": "c", "environment": {}, "prepare": (), "start": ()}
    return WorkingNode(command=NodeCommand(folder=str(folder), **names), transport=Local({"PATH": "/usr/bin:/bin"}))  # type: ignore[arg-type]


def test_the_newest_complete_checkpoint_is_found(tmp_path: Path) -> None:
    save(tmp_path, 2)
    save(tmp_path, 4)
    save(tmp_path, 6, says={"model.safetensors": 5, "resume/rank0.pt": 7})
    save(tmp_path, 8)
    (tmp_path / "checkpoints/step-000008" / STATE_FILE).write_text("{", encoding="utf-8")
    save(tmp_path, 10, world_size=0)
    found = find_states(node_of(tmp_path), 12)
    assert (found.newest, found.ended, list(found.broken)) == ("step-000004", "step-000010", ["step-000008", "step-000006"])
    assert "resume/rank0.pt missing" in found.broken["step-000006"]
    assert find_states(node_of(tmp_path), 10).newest == "step-000010", "there is nothing left to do but to evaluate"


@pytest.mark.parametrize(
    ("states", "said"),
    [
        (({"step": 12, "world_size": 0},), "step-000012 of run R has weights only"),
        (({"step": 6, "says": {"model.safetensors": 9}},), "no checkpoint of run R is complete:\n  step-000006: model.safetensors missing"),
        (({"step": 400},), "run.steps=300, but run R has a checkpoint of step 400"),
    ],
)
def test_checkpoints_that_cannot_be_resumed_are_refused_before_anything_is_changed(
    tmp_path: Path, plan_for: Callable[..., Plan], states: tuple[dict[str, Any], ...], said: str
) -> None:
    for state in states:
        save(tmp_path, **state)
    with pytest.raises(ConfigRefused) as caught:
        choose_states(plan_for("run.steps=300"), (node_of(tmp_path),))
    assert said in str(caught.value)


def test_the_checkpoint_of_a_node_that_takes_no_part_is_found(tmp_path: Path, plan_for: Callable[..., Plan]) -> None:
    save(tmp_path / "old", 5)
    (tmp_path / "new").mkdir()
    assert choose_states(plan_for("run.steps=300"), (node_of(tmp_path / "new"), node_of(tmp_path / "old"))).newest == "step-000005"
    assert choose_states(plan_for(), (node_of(tmp_path / "new"),)).newest == "", "it starts at step 1"


# ----------------------------------------------------------------------------------------- containers without their launcher


@pytest.fixture
def docker(tmp_path: Path, plan_for: Callable[..., Plan]) -> Callable[[str], LastAttempt]:
    """A run with containers on this machine, and an engine that says `state` of them."""

    def make(state: str) -> LastAttempt:
        program = tmp_path / "docker"
        program.write_text(f'#!/bin/sh\ncase "$1" in logs) echo its last line;; inspect) {state};; *) ;; esac\n')
        program.chmod(0o755)
        plan = replace(plan_for("cluster.runtime=docker"), folder=str(tmp_path / "R"))
        if not (tmp_path / "R").exists():
            write_run(tmp_path / "R", plan)
        here = Local({"PATH": f"{tmp_path}:{os.environ['PATH']}"})
        said: list[str] = []
        session = Session(
            project=PROJECT, transports=(here,), here=here, secrets={}, say=said.append, terminal=False, move=lambda plan, lost: (plan, session)
        )  # fmt: skip
        return replace(last_attempt(tmp_path / "R", plan, None), session=session)

    return make


def test_containers_that_still_run_are_to_be_attached(docker: Callable[[str], LastAttempt]) -> None:
    with pytest.raises(ConfigRefused, match=r"run R still runs on localhost, without a launcher\. To supervise it: omnilaunch attach R\."):
        settle(docker("echo running 0"))


def test_containers_that_ended_without_a_launcher_are_read_to_the_end(docker: Callable[[str], LastAttempt]) -> None:
    """As after the machine was started again."""
    last = settle(docker("echo exited 137"))
    assert last.outcome is not None and last.outcome.status == "failed" and last.outcome.nodes[0].code == 137
    assert "its last line" in (last.folder / "logs/node0.log").read_text()
    attempt = describe_end(last, 1)
    assert attempt.status == "failed" and attempt.failure is not None
    assert finish(last) is None


def test_a_run_that_finished_without_a_launcher_gets_its_record(docker: Callable[[str], LastAttempt]) -> None:
    last = docker("echo exited 0")
    result = TrainResult(
        schema=SCHEMA, status="finished", steps=300, seconds=1.0, samples_per_s=1.0, final_loss=1.0, checkpoint="", weights_sha256="",
        evaluation={},
    )  # fmt: skip
    contract.write(result, last.folder / "train_result.json")
    record = finish(settle(last))
    assert record is not None and (record.status, record.steps) == ("finished", 300) and (last.folder / "result.json").is_file()


def test_containers_that_are_gone_leave_nothing_to_settle(docker: Callable[[str], LastAttempt]) -> None:
    last = settle(docker("echo error: no such object >&2; exit 1"))
    assert last.outcome is None and describe_end(last, 1).status == "killed"
