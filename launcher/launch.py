"""Carry out a plan: open the run, build, check the data, start, watch, close. Every way out of here leaves a record."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import FrameType

from launcher.build import build
from launcher.errors import ConfigRefused, LaunchError, RunEnded
from launcher.gang import NodeResult, StopRequest, node_log, start_members, start_preparation, watch
from launcher.plan import Plan, refuse
from launcher.progress import Progress
from launcher.record import Failure, Record, SourceState, Status, close_run, find_failure, give, open_run, read_if_there, utc_now
from launcher.transport import Transport
from trainer.contract import DATA_FILE, ENVIRONMENT_FILE, RESULT_FILE, DataReport, Exit, TrainResult

SHOWN_PROBLEMS = 20
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True, kw_only=True)
class Desk:
    """What a launch uses of the outside: where the project lies, how to reach machines, where to say things."""

    project: Path
    transport: Transport
    say: Callable[[str], None]
    terminal: bool


@dataclass(frozen=True, kw_only=True)
class Outcome:
    status: Status
    code: int
    nodes: tuple[NodeResult, ...] = ()
    failure: Failure | None = None


def launch(plan: Plan, source: SourceState, desk: Desk) -> Record:
    """Run to the end and return the record. Raises ConfigRefused before anything is made when the plan may not be launched;
    any other LaunchError comes after its record was written."""
    refuse(plan.verdict, launching=True)
    folder, started = open_run(plan, source), utc_now()
    desk.say(f"run {plan.run_id}")
    with catch_stops() as stop:
        try:
            outcome = carry_out(plan, folder, desk, stop)
        except LaunchError as error:
            close(
                plan,
                source,
                started,
                Outcome(status="refused" if isinstance(error, ConfigRefused) else "failed", code=error.exit_code, failure=described(error)),
            )
            raise
        except BaseException as error:
            close(plan, source, started, Outcome(status="failed", code=Exit.BUG, failure=described(error)))
            raise
        record = close(plan, source, started, outcome)
    explain(record, folder)
    return record


def carry_out(plan: Plan, folder: Path, desk: Desk, stop: StopRequest) -> Outcome:
    if plan.config.cluster.runtime == "docker":
        build(plan.image, root=desk.project, delivery=plan.config.cluster.delivery, on_line=desk.say)
        give(
            folder,
            Path(plan.spec.data.root),
            plan.config.cluster.user or plan.commands[0].start[plan.commands[0].start.index("--user") + 1],
        )
    desk.say("checking the data")
    prepared = watch(start_preparation(plan.commands, desk.transport, desk.project), stop, lambda: None, grace_s=0)
    if stop.count:
        return Outcome(status="stopped", code=stopped_code(), nodes=prepared)
    if any(node.code for node in prepared):
        return refuse_data(folder, prepared)
    members = start_members(plan.commands, desk.transport, desk.project)
    desk.say(f"training: {plan.spec.device.world_size} rank(s) on {len(members)} node(s)")
    began, limit_s = time.monotonic(), plan.config.run.start_timeout_s
    with Progress(folder, desk.say, terminal=desk.terminal) as progress:

        def tick() -> None:
            progress.tick()
            if time.monotonic() - began > limit_s and not (folder / ENVIRONMENT_FILE).exists():
                raise RunEnded(
                    f"no rank had its model ready within run.start_timeout_s={limit_s}; all were ended.\n  log: {node_log(plan.commands[0])}"
                )

        nodes = watch(members, stop, tick, grace_s=plan.config.run.stop_timeout_s)
    return judge(plan, folder, nodes, stop)


def judge(plan: Plan, folder: Path, nodes: tuple[NodeResult, ...], stop: StopRequest) -> Outcome:
    """Finished is what the trainer says it is, and every node must agree."""
    result: TrainResult | None = read_if_there(TrainResult, folder / RESULT_FILE)
    if stop.count or (result and result.status == "stopped"):
        return Outcome(status="stopped", code=stopped_code(), nodes=nodes)
    if result and not any(node.code for node in nodes):
        return Outcome(status="finished", code=Exit.OK, nodes=nodes)
    failure = find_failure(plan, nodes)
    refused = failure is not None and failure.code == Exit.USAGE
    return Outcome(status="refused" if refused else "failed", code=Exit.USAGE if refused else Exit.RUN, nodes=nodes, failure=failure)


def refuse_data(folder: Path, nodes: tuple[NodeResult, ...]) -> Outcome:
    """The data's problems as the error; a check that broke without saying why is a failed run."""
    report: DataReport | None = read_if_there(DataReport, folder / DATA_FILE)
    if report is None or not report.problems:
        log = folder / "logs" / "data0.log"
        tail = tuple(log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
        code = Exit.USAGE if any(node.code == Exit.USAGE for node in nodes) else Exit.RUN
        failure = Failure(host=nodes[0].host, rank=-1, code=code, message="the data check ended without a report", log=str(log), tail=tail)
        return Outcome(status="refused" if code == Exit.USAGE else "failed", code=code, nodes=nodes, failure=failure)
    shown = "\n".join(f"  {problem}" for problem in report.problems[:SHOWN_PROBLEMS])
    more = len(report.problems) - SHOWN_PROBLEMS
    rest = f"\n  ... and {more} more in {folder / DATA_FILE}" if more > 0 else ""
    raise ConfigRefused(f"the data cannot be trained on ({len(report.problems)} problem(s)); nothing was started:\n{shown}{rest}")


def explain(record: Record, folder: Path) -> None:
    """Raise what a failed run is about; a finished or stopped one passes."""
    if record.failure is None:
        return
    failure = record.failure
    who = f"rank {failure.rank} on {failure.host}" if failure.rank >= 0 else failure.host
    tail = "\n".join(f"    {line}" for line in failure.tail)
    kept = f"\n  kept: {folder / record.checkpoint}" if record.checkpoint else ""
    text = f"the run failed first at {who}: {failure.message}\n{tail}\n  log: {failure.log}\n  record: {folder}{kept}"
    raise ConfigRefused(text) if record.status == "refused" else RunEnded(text)


def close(plan: Plan, source: SourceState, started: datetime, outcome: Outcome) -> Record:
    return close_run(
        plan, source, outcome.status, outcome.code, started=started, ended=utc_now(), nodes=outcome.nodes, failure=outcome.failure
    )


def described(error: BaseException) -> Failure:
    """An error of the launcher itself as the failure of a record."""
    return Failure(
        host="launcher",
        rank=-1,
        code=int(getattr(error, "exit_code", Exit.BUG)),
        message=f"{type(error).__name__}: {error}",
        log="",
        tail=(),
    )


def stopped_code() -> int:
    """As a shell reports a command that Ctrl-C ended."""
    return 128 + signal.SIGINT


@contextmanager
def catch_stops() -> Iterator[StopRequest]:
    """Ctrl-C, SIGTERM and a closed terminal become requests; the handlers of before come back at the end."""
    stop = StopRequest()

    def ask(number: int, frame: FrameType | None) -> None:
        stop.ask(signal.Signals(number).name)

    before = {number: signal.signal(number, ask) for number in STOP_SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
