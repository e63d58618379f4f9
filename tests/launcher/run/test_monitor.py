"""The ranks and the data check run in parallel: whichever ends first, the outcome is right."""

import json
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from launcher.errors import ConfigRefused
from launcher.plan.commands import NodeCommand
from launcher.plan.plan import Plan
from launcher.plan.stop_limit import LEAST_S
from launcher.record.lock import ask_to_stop
from launcher.record.record import AttemptOutcome
from launcher.run import monitor
from launcher.run.launch import detach_run
from launcher.run.monitor import hangup_signals, watch_attempt
from launcher.run.prepare import NodeProcesses
from launcher.run.run_folder import Mirror, WorkingNode
from launcher.run.session import Session
from launcher.run.signals import StopRequest
from launcher.run.stop_limit import START_GRACE_S, STEPS, describe_wait, grace_s
from launcher.ssh.transport import Local
from trainer import contract
from trainer.contract import SCHEMA, DataProblem, DataReport, StepRow, TrainResult

Code = int | None


class Scripted:
    """A node process that ends with `code` after `seconds` (None: never), and with 137 when it is killed."""

    def __init__(self, command: NodeCommand, code: Code, seconds: float = 0.0) -> None:
        self.command, self.code, self.lost, self.stopping = command, code, False, False
        self.ends_at = time.monotonic() + seconds
        self.killed = False

    def poll(self) -> Code:
        if self.killed:
            return 137
        return self.code if self.code is not None and time.monotonic() >= self.ends_at else None

    def stop(self) -> bool:
        self.stopping = True
        self.kill()
        return True

    def kill(self) -> None:
        self.killed = self.killed or self.poll() is None

    clear = kill


@pytest.fixture
def plan(plan_for: Callable[..., Plan], tmp_path: Path) -> Plan:
    plan = plan_for(f"cluster.root={tmp_path}", "run.steps=10", "stage.optimizer.warmup=1", "run.stop_timeout_s=1")
    (Path(plan.folder) / "logs").mkdir(parents=True)
    (Path(plan.folder) / "environment.json").write_text("{}", encoding="utf-8")
    return plan


def session() -> Session:
    here = Local({"PATH": "/usr/bin:/bin"})
    return Session(
        project=Path("/"), transports=(here,), here=here, secrets={}, say=print, terminal=False, move=lambda plan, lost: (plan, session())
    )


def processes(plan: Plan, ranks: tuple[Code, float], check: tuple[Code, float]) -> NodeProcesses:
    (command,) = plan.commands
    return NodeProcesses(trainers=(Scripted(command, *ranks),), checks=(Scripted(command, *check),))


def watched(plan: Plan, ranks: tuple[Code, float], check: tuple[Code, float]) -> AttemptOutcome:
    return watch_attempt(plan, Path(plan.folder), session(), processes(plan, ranks, check), StopRequest())


def trained(plan: Plan, status: str, steps: int) -> None:
    result = TrainResult(
        schema=SCHEMA, status="finished", steps=steps, seconds=1.0, samples_per_s=1.0, final_loss=1.0, checkpoint="", weights_sha256="",
        evaluation={},
    )  # fmt: skip
    contract.write(replace(result, status=status), Path(plan.folder) / contract.RESULT_FILE)  # type: ignore[arg-type]


def test_a_run_that_is_faster_than_its_check_waits_for_it(plan: Plan) -> None:
    trained(plan, "finished", 10)
    began = time.monotonic()
    assert watched(plan, (0, 0.0), (0, 0.6)).status == "finished"
    assert time.monotonic() - began >= 0.6


def test_a_rank_that_fails_during_the_data_check_is_the_failure(plan: Plan) -> None:
    outcome = watched(plan, (1, 0.1), (None, 0.0))
    assert outcome.status == "failed" and outcome.failure is not None and "data" not in outcome.failure.message


def test_bad_data_stops_the_ranks(plan: Plan) -> None:
    problem = DataProblem(file="/d/train.json", row=2, field="image", problem="no image file", fix="put it there")
    report = DataReport(schema=SCHEMA, sha256="", train_rows=2, evaluation_rows=0, images=0, problems=(problem,))
    contract.write(report, Path(plan.folder) / contract.DATA_FILE)
    mine = processes(plan, (None, 0.0), (2, 0.1))
    with pytest.raises(ConfigRefused, match=r"train\.json row 2"):
        watch_attempt(plan, Path(plan.folder), session(), mine, StopRequest())
    assert mine.trainers[0].poll() == 137


def test_a_check_that_fails_itself_is_a_failed_attempt_and_not_a_refusal(plan: Plan) -> None:
    outcome = watched(plan, (None, 0.0), (137, 0.1))
    assert outcome.status == "failed" and outcome.failure is not None
    assert "data check ended with exit code 137" in outcome.failure.message


def test_a_stop_ends_the_wait_for_a_check(plan: Plan) -> None:
    trained(plan, "finished", 10)
    ask_to_stop(Path(plan.folder), datetime.now(UTC))
    assert watched(plan, (0, 0.0), (None, 0.0)).status == "finished"

    assert "a stop was requested" in watched(plan, (0, 0.0), (None, 0.0)).unchecked


def test_a_check_that_ends_with_an_error_after_the_ranks_does_not_lose_their_work(plan: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    trained(plan, "finished", 10)
    outcome = watched(plan, (0, 0.0), (137, 0.3))
    assert (outcome.status, outcome.code) == ("finished", 0)
    assert "the data check ended with exit code 137 and without a report" in outcome.unchecked
    assert "the data was not checked to its end: on localhost" in capsys.readouterr().out


def test_bad_data_refuses_a_run_that_has_finished(plan: Plan) -> None:
    trained(plan, "finished", 10)
    problem = DataProblem(file="/d/train.json", row=2, field="image", problem="no image file", fix="put it there")
    report = DataReport(schema=SCHEMA, sha256="", train_rows=2, evaluation_rows=0, images=0, problems=(problem,))
    contract.write(report, Path(plan.folder) / contract.DATA_FILE)
    with pytest.raises(ConfigRefused, match=r"train\.json row 2"):
        watched(plan, (0, 0.0), (2, 0.3))


def test_a_wait_says_how_far_the_check_is(plan: Plan, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    trained(plan, "finished", 10)
    monkeypatch.setattr(monitor, "SAY_INTERVAL_S", 0.1)
    (Path(plan.folder) / "logs/data0.log").write_text("data: 4,096 rows checked, 12 % of the files\n")
    assert watched(plan, (0, 0.0), (0, 0.6)).unchecked == ""
    assert "waiting for the data check on localhost: data: 4,096 rows checked, 12 % of the files" in capsys.readouterr().out


@pytest.mark.parametrize("steps, status", [(10, "failed"), (4, "stopped")])
def test_a_run_that_fails_after_its_last_step_was_not_stopped(plan: Plan, steps: int, status: str) -> None:
    """The trainer's result says `stopped` until the evaluation is over."""
    trained(plan, "stopped", steps)
    assert watched(plan, (1, 0.0), (0, 0.0)).status == status


class Saving(Scripted):
    """It saves and ends with 0 when it is asked to stop."""

    def stop(self) -> bool:
        self.stopping, self.code, self.ends_at = True, 0, 0.0
        return True


@pytest.mark.parametrize("code", [137, 143, 5])
def test_a_node_that_failed_is_the_failure_though_the_others_saved_and_stopped(plan: Plan, code: int) -> None:
    """The launcher asked them to stop; the trainer's result says `stopped` because of that alone."""
    trained(plan, "stopped", 4)
    (first,) = plan.commands
    second = replace(first, host="b", node_rank=1)
    processes = NodeProcesses(trainers=(Saving(first, None), Scripted(second, code)))
    outcome = watch_attempt(plan, Path(plan.folder), session(), processes, StopRequest())
    assert outcome.status == "failed" and outcome.failure is not None
    assert (outcome.failure.host, outcome.failure.code) == ("b", code)
    assert [(node.code, node.killed) for node in outcome.nodes] == [(0, False), (code, False)]
    assert ("killed from outside" in outcome.failure.meaning) == (code == 137)


def test_a_run_is_detached_when_its_data_is_checked(plan: Plan) -> None:
    assert detach_run(plan, Path(plan.folder), session(), processes(plan, (None, 0.0), (0, 0.2)), StopRequest()) is None


def test_a_run_that_fails_before_it_is_detached_is_reported(plan: Plan) -> None:
    outcome = detach_run(plan, Path(plan.folder), session(), processes(plan, (1, 0.2), (None, 0.0)), StopRequest())
    assert outcome is not None and outcome.status == "failed"


def test_before_the_first_row_the_grace_time_is_short(plan_for: Callable[..., Plan], tmp_path: Path) -> None:
    plan = plan_for(f"cluster.root={tmp_path}", "run.stop_timeout_s=60")
    rows = tmp_path / contract.METRICS_FILE
    assert grace_s(plan, tmp_path) == START_GRACE_S < 60
    assert grace_s(plan, tmp_path, started_here=False) == 60, "a run that was left to itself may have trained for hours"
    rows.touch()
    assert grace_s(plan, tmp_path) == START_GRACE_S
    rows.write_text("{}\n", encoding="utf-8")
    assert grace_s(plan, tmp_path) == 60
    assert grace_s(replace(plan, spec=replace(plan.spec, stage=replace(plan.spec.stage, kind="evaluate"))), Path("/nowhere")) == 60


def row(step: int, seconds: float) -> str:
    made = StepRow(step=step, steps=300, loss=1.0, lr=0.1, grad_norm=1.0, samples=8, tokens=80, seconds=seconds, peak_bytes=1)
    return json.dumps(asdict(made)) + "\n"


def test_the_limit_of_a_stop_follows_the_steps_and_the_states(plan_for: Callable[..., Plan], tmp_path: Path) -> None:
    """41 steps of 14 s were lost to a limit of 8 s."""
    plan = plan_for(f"cluster.root={tmp_path}")
    (tmp_path / contract.METRICS_FILE).write_text("".join(row(step, 14.0) for step in range(1, 42)))
    assert LEAST_S < plan.stop_limit_s < LEAST_S + 2, "the states of the tiny model are written in no time"
    assert grace_s(plan, tmp_path) == plan.stop_limit_s + STEPS * 14.0
    assert describe_wait(plan, tmp_path) == (
        "step 42 is being finished and saved. This may take up to 3 min 11 s; press Ctrl-C again to end without saving"
    )
    chosen = plan_for(f"cluster.root={tmp_path}", "run.stop_timeout_s=20")
    assert grace_s(chosen, tmp_path) == 20, "what the user says counts"


def test_before_the_first_row_a_stop_says_that_there_is_nothing_to_save(plan_for: Callable[..., Plan], tmp_path: Path) -> None:
    assert describe_wait(plan_for(), tmp_path).startswith("it is ending; before the first step there is nothing to save")
    assert describe_wait(plan_for("stage=serve", "stage.checkpoint=/a"), tmp_path).startswith("the requests that were accepted")


def test_the_states_of_a_large_model_have_the_time_to_be_written(plan_for: Callable[..., Plan]) -> None:
    words = ("hardware=ascend910b", "model=qwen2_5_vl_32b", "stage=full", "precision=bf16", "cluster=example")
    plan = plan_for(*words, "cluster.devices_per_node=8")
    node_bytes = plan.states.total_bytes * 8
    assert node_bytes > 100 * 2**30 and plan.stop_limit_s >= LEAST_S + node_bytes / 1e8
    shared = plan_for(*words, "cluster.devices_per_node=8", "cluster.shared=true")
    assert shared.stop_limit_s > 1.9 * (plan.stop_limit_s - LEAST_S), "both nodes write at the same disks"
    (first, *_) = plan.commands
    assert first.container is not None and first.container.stop_timeout_s >= plan.stop_limit_s
    assert first.start[first.start.index("--stop-timeout") + 1] == str(first.container.stop_timeout_s)
    assert "--stop-timeout" not in first.prepare


def test_a_closed_terminal_ends_only_the_launcher_of_containers(plan_for: Callable[..., Plan]) -> None:
    assert hangup_signals(plan_for()) == ()
    assert hangup_signals(plan_for("cluster.runtime=docker")) == (signal.SIGHUP,)


def test_a_start_that_takes_too_long_is_a_failed_attempt_that_names_the_slowest(plan_for: Callable[..., Plan], tmp_path: Path) -> None:
    plan = plan_for(f"cluster.root={tmp_path}", "cluster.devices_per_node=2", "run.start_timeout_s=1")
    logs = Path(plan.folder) / "logs"
    logs.mkdir(parents=True)
    (logs / "node0.log").write_text(
        "[rank 0] omnilaunch: starting: loading its libraries\n[rank 1] omnilaunch: starting: loading its libraries\n"
        "[rank 0] omnilaunch: starting: meeting the other ranks\n[rank 1] Downloading shards\n"
    )
    mine = processes(plan, (None, 0.0), (0, 0.0))
    outcome = watch_attempt(plan, Path(plan.folder), session(), mine, StopRequest())
    assert (outcome.status, outcome.code) == ("failed", 5) and outcome.failure is not None
    assert "run.start_timeout_s=1" in outcome.failure.message and "1 of 2 ranks were in the earliest phase" in outcome.failure.message
    assert "rank 1 on localhost: loading its libraries" in outcome.failure.message and outcome.failure.tail[0] == "Downloading shards"
    assert outcome.nodes[0].killed and mine.trainers[0].poll() == 137


def test_a_slow_node_does_not_delay_the_watching_of_the_others(tmp_path: Path) -> None:
    class Slow(Local):
        @contextmanager
        def stream(self, argv: tuple[str, ...], **named: object) -> Iterator[Iterator[bytes]]:
            time.sleep(1.0)
            yield iter([b"a row\n"])

    command = NodeCommand(host="a", node_rank=0, runtime="docker", name="c", folder="/run", environment={}, prepare=(), start=())
    mirror = Mirror(WorkingNode(command=command, transport=Slow({})), "metrics.jsonl", tmp_path)
    began = time.monotonic()
    mirror.update()
    mirror.update()
    assert time.monotonic() - began < 0.5
    mirror.settle()
    assert (tmp_path / "metrics.jsonl").read_text() == "a row\n", "one question at a time"
