"""Carrying out a plan: open the run, prepare and start, watch, start again, close. Every way this can end writes a record."""

import json
import signal
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from launcher.errors import ConfigRefused, LaunchError, NodeFailed, RunEnded
from launcher.plan.plan import Plan, refuse, to_plain
from launcher.record.description import resume_line
from launcher.record.lock import is_asked_to_stop, lock_run
from launcher.record.metrics import read_rows
from launcher.record.record import (
    ATTEMPTS,
    PLAN_FILE,
    Attempt,
    AttemptOutcome,
    Failure,
    OriginalRun,
    Record,
    checkpoint_place,
    close_run,
    load_attempts,
    load_resumptions,
    next_number,
    open_run,
    utc_now,
)
from launcher.record.source import SourceState, SourceTree
from launcher.run.diagnosis import explain_log
from launcher.run.gang import clear_and_report, container_processes
from launcher.run.monitor import AttemptFailed, end_attempt, hangup_signals, wait_for_checks, watch_attempt
from launcher.run.prepare import AgainRequest, NodeProcesses, prepare_and_start, start_context
from launcher.run.restart import archive_attempt, reason_against_restart
from launcher.run.session import Session
from launcher.run.signals import STOPPED_CODE, Stopped, StopRequest, catch_stops, handler_for
from trainer import contract
from trainer.contract import METRICS_FILE, Exit
from trainer.contract.wording import plural

# What the ranks do, by the kind of the stage.
VERBS = {
    "train": "training",
    "evaluate": "evaluating",
    "merge": "merging",
    "convert": "converting",
    "quantize": "quantizing",
    "infer": "answering",
    "serve": "serving",
}


def launch(plan: Plan, source: SourceTree, session: Session, *, detach: bool = False, original: OriginalRun | None = None) -> Record | None:
    """Run to the end and return the record; None when the run continues in the background (`detach`). Raises ConfigRefused before anything is
    created when the plan may not be launched; any other LaunchError is raised after its record was written."""
    refuse(plan.verdict, launching=True, overrides=plan.overrides)
    lock = session.project / "images" / plan.image.lock if plan.image.lock else None
    try:
        folder, started = open_run(plan, source.state, diff=source.diff, lock=lock, original=original), utc_now()
    except OSError as error:
        raise RunEnded(
            f"{plan.folder} could not be written: {error.strerror}. Free some disk space there and launch again; nothing was started"
        ) from error
    session.say(f"run {plan.run_id}")

    def work(stop: StopRequest) -> AttemptOutcome | None:
        try:
            processes = prepare_and_start(plan, session, stop)
        except Stopped:
            return AttemptOutcome(status="stopped", code=STOPPED_CODE)
        session.say(
            f"{VERBS[plan.spec.stage.kind]}: {plural(plan.spec.device.world_size, 'rank')} on {plural(len(processes.trainers), 'node')}"
        )
        return (detach_run if detach else supervise)(plan, folder, session, processes, stop)

    with lock_run(folder):
        return conclude(plan, source.state, started, work)


def attach(plan: Plan, source: SourceState, started: datetime, session: Session) -> Record | None:
    """Supervise a run whose launcher has ended, with the same result as if it had not."""
    folder = Path(plan.folder)
    session.say(f"attached to run {plan.run_id}")

    def work(stop: StopRequest) -> AttemptOutcome:
        processes = NodeProcesses(trainers=container_processes(plan.commands, start_context(plan, session)))
        return supervise(plan, folder, session, processes, stop)

    with lock_run(folder):
        return conclude(plan, source, started, work)


def conclude(plan: Plan, source: SourceState, started: datetime, work: Callable[[StopRequest], AttemptOutcome | None]) -> Record | None:
    """Do the work and write the record, whatever the result. The caller holds the lock of the run: `lock_run` raises ConfigRefused, and nothing is
    written, when another launcher supervises it."""
    with catch_stops() as stop:
        try:
            outcome = work(stop)
        except LaunchError as error:
            failure = launcher_failure(error)
            refused = isinstance(error, ConfigRefused)
            write_result(
                plan, source, started, AttemptOutcome(status="refused" if refused else "failed", code=error.exit_code, failure=failure)
            )
            more = advice(failure) + next_line(plan, "refused" if refused else "failed")
            if more:
                raise type(error)(f"{error}{more}") from error
            raise
        except BaseException as error:
            write_result(plan, source, started, AttemptOutcome(status="failed", code=Exit.BUG, failure=launcher_failure(error)))
            raise
        if outcome is None:
            return None
        record = write_result(plan, source, started, outcome)
        raise_failure(record, plan)
        return record


def detach_run(plan: Plan, folder: Path, session: Session, processes: NodeProcesses, stop: StopRequest) -> AttemptOutcome | None:
    """Wait for the data check, since no launcher reads its result later; then leave the run. Raises ConfigRefused for data with problems."""

    def is_over() -> bool:
        return bool(stop.count) or is_asked_to_stop(folder) or any(process.poll() for process in processes.trainers)

    with handler_for(hangup_signals(plan), signal.SIG_DFL):
        try:
            wait_for_checks(folder, processes.checks, is_over)
        except AttemptFailed as error:
            return end_attempt(plan, folder, session, processes, error, stop)
        finally:
            clear_and_report(processes.checks, stop, session.say)
    return supervise(plan, folder, session, NodeProcesses(trainers=processes.trainers), stop) if is_over() else None


def supervise(plan: Plan, folder: Path, session: Session, processes: NodeProcesses, stop: StopRequest) -> AttemptOutcome:
    """Watch until the end. A failed attempt is followed by another one from the newest checkpoint, as long as run.restarts allows."""
    while True:
        began = utc_now()
        outcome = watch_attempt(plan, folder, session, processes, stop)
        if outcome.status != "failed" or not plan.config.run.restarts:
            return outcome
        if is_asked_to_stop(folder):
            return replace(outcome, status="stopped", code=STOPPED_CODE)
        earlier, since = load_attempts(folder), first_of_resumption(folder)
        attempt = finished_attempt(next_number(earlier), began, folder, outcome)
        reason = reason_against_restart([each for each in earlier if each.number >= since], attempt, restarts=plan.config.run.restarts)
        if reason:
            session.say(f"not started again: {reason}")
            return outcome
        try:
            plan, session, processes = start_again(plan, folder, session, attempt, stop)
        except Stopped:
            return replace(outcome, status="stopped", code=STOPPED_CODE)
        except LaunchError as error:
            return restart_failed(outcome, folder, attempt, error)


def start_again(plan: Plan, folder: Path, session: Session, attempt: Attempt, stop: StopRequest) -> tuple[Plan, Session, NodeProcesses]:
    """Start another attempt on the remaining nodes and their spares. Raises Stopped, NodeFailed, and what `prepare_and_start` raises."""
    why = attempt.failure.message if attempt.failure else "it did not finish"
    session.say(f"attempt {attempt.number} failed after step {attempt.steps}: {why}")
    with stop.interrupting():
        plan, session = session.move(plan, frozenset(node.host for node in attempt.nodes if node.lost or node.left))
    archive_attempt(folder, attempt, mirrored=not plan.is_local)
    number = attempt.number + 1
    write_plan(plan, folder, number)
    most = first_of_resumption(folder) + plan.config.run.restarts
    session.say(f"attempt {number} of at most {most}, on {', '.join(command.host for command in plan.commands)}")
    return plan, session, prepare_and_start(plan, session, stop, again=AgainRequest())


def first_of_resumption(folder: Path) -> int:
    """The attempt from which run.restarts counts: the first one, or the one that the last resumption started."""
    return max((resumption.attempt for resumption in load_resumptions(folder)), default=1)


def write_plan(plan: Plan, folder: Path, number: int) -> None:
    """The plan of another attempt, which may differ from the run's first one."""
    target = folder / ATTEMPTS / str(number) / PLAN_FILE
    target.parent.mkdir(parents=True, exist_ok=True)
    contract.write_text(json.dumps(to_plain(plan), indent=2, ensure_ascii=False) + "\n", target)


def finished_attempt(number: int, began: datetime, folder: Path, outcome: AttemptOutcome) -> Attempt:
    rows, seconds = read_rows(folder / METRICS_FILE), round((utc_now() - began).total_seconds(), 3)
    steps, started_at = rows[-1].step if rows else 0, began.isoformat(timespec="milliseconds")
    return Attempt(number=number, started_at=started_at, seconds=seconds, steps=steps, nodes=outcome.nodes, failure=outcome.failure)


def restart_failed(outcome: AttemptOutcome, folder: Path, attempt: Attempt, error: LaunchError) -> AttemptOutcome:
    """The failure of the attempt, and why no other one followed. Its log may be in the archive already."""
    archived = load_attempts(folder)
    failure = archived[-1].failure if archived and archived[-1].number == attempt.number else outcome.failure
    if failure is None:
        failure = launcher_failure(error)
    return replace(outcome, failure=replace(failure, message=f"{failure.message}\nIt could not be started again: {error}"))


# -------------------------------------------------------------------------------------------------------------- result


def raise_failure(record: Record, plan: Plan) -> None:
    """Raise the failure of a failed run; a finished or stopped run passes."""
    if record.failure is None:
        return
    failure = record.failure
    left = "".join(f"\n  not cleared: {node.host}: {node.left.splitlines()[0]}" for node in record.nodes if node.left)
    left += f"\n  when it responds: omnilaunch stop {record.run_id}" if left else ""
    kept = f"\n  checkpoint: {checkpoint_place(record, plan)}" if record.checkpoint else ""
    resume = next_line(plan, record.status)
    text = f"{describe_failure(failure)}\n  log: {failure.log}{left}\n  record: {plan.folder}{kept}{resume}"
    if record.status == "refused":
        raise ConfigRefused(text)
    raise NodeFailed(text) if record.exit_code == Exit.NODE else RunEnded(text)


def describe_failure(failure: Failure) -> str:
    """Where it failed, and why. Of a known failure first what it means and what to do; Python's traceback is in the log."""
    who = f"the run failed first at {f'rank {failure.rank} on {failure.host}' if failure.rank >= 0 else failure.host}"
    if not failure.meaning:
        return f"{who}: {failure.message}" + "".join(f"\n    {line}" for line in failure.tail)
    printed = dict.fromkeys((*failure.message.splitlines(), *filter(is_said, failure.tail)))  # the message ends the traceback too
    return f"{who}{advice(failure)}\n  message: " + "\n    ".join(line for line in printed if line.strip())


def is_said(line: str) -> bool:
    """Whether a line is what a program says, and none of Python's traceback: a place in the code, the code, or the sentences between."""
    return not (line.startswith((" ", "Traceback (most recent", "The above exception", "During handling of")) or not line.strip("^~ "))


def next_line(plan: Plan, status: str) -> str:
    """How to continue the run, as a further line."""
    line = resume_line(Path(plan.folder), plan, status)
    return f"\n{line}" if line else ""


def advice(failure: Failure) -> str:
    """What a known failure means and what to do about it, as further lines."""
    return f"\n  meaning: {failure.meaning}\n  do: {failure.fix}" if failure.meaning else ""


def write_result(plan: Plan, source: SourceState, started: datetime, outcome: AttemptOutcome) -> Record:
    """Write the record. Raises RunEnded when that fails."""
    try:
        return close_run(plan, source, outcome, started=started, ended=utc_now())
    except OSError as error:
        why = f"\n  the run itself: {outcome.failure.message}" if outcome.failure else ""
        raise RunEnded(f"the record of the run could not be written to {plan.folder}: {error}. Free some disk space there{why}") from error


def launcher_failure(error: BaseException) -> Failure:
    """An error of the launcher itself as the failure of a record. What a node or its docker printed may be a known failure."""
    code, message = int(getattr(error, "exit_code", Exit.BUG)), f"{type(error).__name__}: {error}"
    known = explain_log(str(error)) if isinstance(error, (NodeFailed, RunEnded)) else None
    meaning, fix = (known.means, known.fix) if known else ("", "")
    return Failure(host="launcher", rank=-1, code=code, message=message, log="", tail=(), meaning=meaning, fix=fix)
