"""Carry out a plan: open the run, prepare and start, watch, start again, close. Every way out of here leaves a record."""

import json
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from launcher.errors import ConfigRefused, LaunchError, NodeFailed, RunEnded
from launcher.plan.plan import Plan, refuse, to_plain
from launcher.record.lock import claim, is_asked_to_stop
from launcher.record.record import (
    ATTEMPTS,
    PLAN_FILE,
    Attempt,
    Failure,
    Precedent,
    Record,
    Status,
    checkpoint_place,
    close_run,
    load_attempts,
    open_run,
    read_rows,
    utc_now,
)
from launcher.record.source import SourceState, SourceTree
from launcher.run.diagnosis import explain_log
from launcher.run.gang import clear_all, find_members
from launcher.run.monitor import AttemptOutcome, BadData, finish_checks, judge_data, signals_of_others, watch_attempt
from launcher.run.prepare import NodeProcesses, Session, bring_up, crewed
from launcher.run.restart import reason_not_to, set_aside
from launcher.run.signals import STOPPED_CODE, Stopped, StopRequest, catch_stops, released
from trainer import contract
from trainer.contract import METRICS_FILE, Exit

# -------------------------------------------------------------------------------------------------------------- launch

# What the ranks are said to be about, by the kind of the stage.
VERBS = {
    "train": "training",
    "evaluate": "evaluating",
    "merge": "merging",
    "convert": "converting",
    "quantize": "quantizing",
    "infer": "answering",
    "serve": "serving",
}


def launch(plan: Plan, source: SourceTree, desk: Session, *, detach: bool = False, precedent: Precedent | None = None) -> Record | None:
    """Run to the end and return the record; None when the run goes on by itself (`detach`). Raises ConfigRefused before anything is made
    when the plan may not be launched; any other LaunchError comes after its record was written."""
    refuse(plan.verdict, launching=True, overrides=plan.overrides)
    lock = desk.project / "images" / plan.image.lock if plan.image.lock else None
    try:
        folder, started = open_run(plan, source.state, diff=source.diff, lock=lock, precedent=precedent), utc_now()
    except OSError as error:
        raise RunEnded(
            f"{plan.folder} could not be written: {error.strerror}. Free room there, and launch again; nothing was started"
        ) from error
    desk.say(f"run {plan.run_id}")

    def work(stop: StopRequest) -> AttemptOutcome | None:
        try:
            crew = bring_up(plan, desk, stop)
        except Stopped:
            return AttemptOutcome(status="stopped", code=STOPPED_CODE)
        desk.say(f"{VERBS[plan.spec.stage.kind]}: {plan.spec.device.world_size} rank(s) on {len(crew.members)} node(s)")
        return leave(plan, folder, desk, crew, stop) if detach else see_through(plan, folder, desk, crew, stop)

    return conclude(plan, source.state, started, folder, work)


def attach(plan: Plan, source: SourceState, started: datetime, desk: Session) -> Record | None:
    """Take up the supervision of a run whose launcher is gone: the same end as if it had stayed."""
    folder = Path(plan.folder)
    desk.say(f"attached to run {plan.run_id}")
    return conclude(plan, source, started, folder, lambda stop: see_through(plan, folder, desk, found(plan, desk), stop))


def conclude(
    plan: Plan, source: SourceState, started: datetime, folder: Path, work: Callable[[StopRequest], AttemptOutcome | None]
) -> Record | None:
    """Do the work and write the record, whatever comes of it. Raises ConfigRefused, writing nothing, where another launcher is at it."""
    with claim(folder), catch_stops() as stop:
        return concluded(plan, source, started, folder, lambda: work(stop))


def concluded(plan: Plan, source: SourceState, started: datetime, folder: Path, work: Callable[[], AttemptOutcome | None]) -> Record | None:
    try:
        outcome = work()
    except LaunchError as error:
        status: Status = "refused" if isinstance(error, ConfigRefused) else "failed"
        failure = described(error)
        close(plan, source, started, AttemptOutcome(status=status, code=error.exit_code, failure=failure))
        if failure.meaning:
            raise type(error)(f"{error}{advice(failure)}") from error
        raise
    except BaseException as error:
        close(plan, source, started, AttemptOutcome(status="failed", code=Exit.BUG, failure=described(error)))
        raise
    if outcome is None:
        return None
    record = close(plan, source, started, outcome)
    explain(record, plan, folder)
    return record


def leave(plan: Plan, folder: Path, desk: Session, crew: NodeProcesses, stop: StopRequest) -> AttemptOutcome | None:
    """Wait for the data check, which nobody would look at later; then the run is on its own. Raises ConfigRefused for bad data."""
    with released(signals_of_others(plan)):
        try:
            finish_checks(crew.checks, lambda: bool(stop.count) or is_asked_to_stop(folder) or any(m.poll() for m in crew.members))
        except BadData as error:
            return judge_data(plan, folder, desk, crew, error.check)
        finally:
            clear_all(crew.checks)
    if stop.count or is_asked_to_stop(folder) or any(member.poll() for member in crew.members):
        return see_through(plan, folder, desk, NodeProcesses(members=crew.members), stop)
    return None


def see_through(plan: Plan, folder: Path, desk: Session, crew: NodeProcesses, stop: StopRequest) -> AttemptOutcome:
    """Watch until the end. A failed attempt is followed by another, from the newest checkpoint, as long as run.restarts allows."""
    while True:
        began = utc_now()
        outcome = watch_attempt(plan, folder, desk, crew, stop)
        if outcome.status != "failed" or not plan.config.run.restarts:
            return outcome
        if is_asked_to_stop(folder):
            return replace(outcome, status="stopped", code=STOPPED_CODE)
        earlier = load_attempts(folder)
        attempt = attempted(len(earlier) + 1, began, folder, outcome)
        why = reason_not_to(earlier, attempt, restarts=plan.config.run.restarts)
        if why:
            desk.say(f"not started again: {why}")
            return outcome
        try:
            plan, desk, crew = start_again(plan, folder, desk, attempt, stop)
        except Stopped:
            return replace(outcome, status="stopped", code=STOPPED_CODE)
        except LaunchError as error:
            return not_again(outcome, folder, attempt, error)


def start_again(plan: Plan, folder: Path, desk: Session, attempt: Attempt, stop: StopRequest) -> tuple[Plan, Session, NodeProcesses]:
    """Another attempt on the nodes that are left and their spares. Raises Stopped, NodeFailed, and what `bring_up` raises."""
    why = attempt.failure.message if attempt.failure else "it did not finish"
    desk.say(f"attempt {attempt.number} failed after step {attempt.steps}: {why}")
    with stop.interrupting():
        plan, desk = desk.move(plan, frozenset(node.host for node in attempt.nodes if node.lost or node.left))
    set_aside(folder, attempt, mirrored=not plan.is_local)
    number = attempt.number + 1
    target = folder / ATTEMPTS / str(number) / PLAN_FILE
    target.parent.mkdir(exist_ok=True)
    contract.write_text(json.dumps(to_plain(plan), indent=2, ensure_ascii=False) + "\n", target)
    desk.say(f"attempt {number} of at most {plan.config.run.restarts + 1}, on {', '.join(command.host for command in plan.commands)}")
    return plan, desk, bring_up(plan, desk, stop, again=True)


def attempted(number: int, began: datetime, folder: Path, outcome: AttemptOutcome) -> Attempt:
    rows = read_rows(folder / METRICS_FILE)
    return Attempt(
        number=number,
        started_at=began.isoformat(timespec="milliseconds"),
        seconds=round((utc_now() - began).total_seconds(), 3),
        steps=rows[-1].step if rows else 0,
        nodes=outcome.nodes,
        failure=outcome.failure,
    )


def not_again(outcome: AttemptOutcome, folder: Path, attempt: Attempt, error: LaunchError) -> AttemptOutcome:
    """The failure of the attempt, and why no other followed. Its log may have been set aside already."""
    aside = load_attempts(folder)
    failure = aside[-1].failure if len(aside) == attempt.number else outcome.failure
    if failure is None:
        failure = described(error)
    return replace(outcome, failure=replace(failure, message=f"{failure.message}\nIt could not be started again: {error}"))


# --------------------------------------------------------------------------------------------------------------- parts


def found(plan: Plan, desk: Session) -> NodeProcesses:
    return NodeProcesses(members=find_members(plan.commands, crewed(plan, desk)))


def explain(record: Record, plan: Plan, folder: Path) -> None:
    """Raise what a failed run is about; a finished or stopped one passes."""
    if record.failure is None:
        return
    failure = record.failure
    who = f"rank {failure.rank} on {failure.host}" if failure.rank >= 0 else failure.host
    tail = "".join(f"\n    {line}" for line in failure.tail)
    left = "".join(f"\n  not cleared: {node.host}: {node.left.splitlines()[0]}" for node in record.nodes if node.left)
    left += f"\n  when it answers: omnilaunch stop {record.run_id}" if left else ""
    kept = f"\n  kept: {checkpoint_place(record, plan)}" if record.checkpoint else ""
    text = f"the run failed first at {who}: {failure.message}{tail}{advice(failure)}\n  log: {failure.log}{left}\n  record: {folder}{kept}"
    if record.status == "refused":
        raise ConfigRefused(text)
    raise NodeFailed(text) if record.exit_code == Exit.NODE else RunEnded(text)


def advice(failure: Failure) -> str:
    """What a known failure means and what to do about it, as further lines."""
    return f"\n  meaning: {failure.meaning}\n  do: {failure.fix}" if failure.meaning else ""


def close(plan: Plan, source: SourceState, started: datetime, outcome: AttemptOutcome) -> Record:
    """Raises RunEnded where the record itself cannot be written."""
    try:
        return close_run(
            plan, source, outcome.status, outcome.code, started=started, ended=utc_now(), nodes=outcome.nodes, failure=outcome.failure
        )
    except OSError as error:
        why = f"\n  before that: {outcome.failure.message}" if outcome.failure else ""
        raise RunEnded(f"the record of the run could not be written to {plan.folder}: {error}. Free room there.{why}") from error


def described(error: BaseException) -> Failure:
    """An error of the launcher itself as the failure of a record. What a node or its docker answered may be a known failure."""
    meaning = explain_log(str(error)) if isinstance(error, (NodeFailed, RunEnded)) else None
    return Failure(
        host="launcher",
        rank=-1,
        code=int(getattr(error, "exit_code", Exit.BUG)),
        message=f"{type(error).__name__}: {error}",
        log="",
        tail=(),
        meaning=meaning.means if meaning else "",
        fix=meaning.fix if meaning else "",
    )
