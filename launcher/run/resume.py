"""Another attempt of a run that was stopped, killed or failed: what is left of the last one is ended, its files are archived, and the ranks start
from the newest checkpoint. `settle` comes first, then `resume`; the caller holds the lock of the run."""

import shutil
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from launcher.errors import ConfigRefused, NodeFailed, RunEnded
from launcher.plan.commands import FOLDER_VARIABLE
from launcher.plan.plan import Plan, encode_spec, refuse
from launcher.record.checksums import SEAL_FILE
from launcher.record.description import command_from_weights
from launcher.record.lock import STOP_FILE
from launcher.record.metrics import read_rows
from launcher.record.reader import read_if_there
from launcher.record.record import (
    ATTEMPTS,
    IMAGES_FILE,
    PLAN_FILE,
    RECORD_FILE,
    RESUMPTION_FILE,
    SOURCE_FILE,
    Attempt,
    AttemptOutcome,
    ChangedSetting,
    NodeResult,
    Record,
    Resumption,
    load_attempts,
    load_resumptions,
    next_number,
    step_of,
    utc_now,
)
from launcher.record.source import SourceState
from launcher.run.gang import container_processes
from launcher.run.launch import VERBS, conclude, detach_run, supervise, write_plan, write_result
from launcher.run.monitor import watch_attempt
from launcher.run.node_process import KILLED
from launcher.run.prepare import AgainRequest, NodeProcesses, prepare_and_start, start_context, working_nodes
from launcher.run.restart import FoundStates, archive_attempt, find_states
from launcher.run.run_folder import WorkingNode
from launcher.run.session import Session
from launcher.run.signals import STOPPED_CODE, Stopped, StopRequest, catch_stops
from launcher.run.stop import NO_CONTAINER, RUNNING, end_processes, state_of
from launcher.ssh.parallel import attempt_each
from launcher.ssh.transport import processes_with
from trainer import contract
from trainer.contract import DATA_FILE, DATA_LEFT_OUT_FILE, DATA_PENDING_FILE, INPUTS_FILE, METRICS_FILE, SPEC_FILE
from trainer.contract.wording import plural

KEPT = (DATA_FILE, DATA_LEFT_OUT_FILE, INPUTS_FILE, IMAGES_FILE)  # of an attempt; the next one writes them again
MOVED = (RECORD_FILE, SEAL_FILE, STOP_FILE)


@dataclass(frozen=True, kw_only=True)
class LastAttempt:
    """What is resumed. `plan`: of the last attempt; `record`: how it ended, None without a record; `outcome`: how its containers ended, where a
    launcher was not there. `started`: when the run began. `source`: of its record. `session`: with its nodes."""

    plan: Plan
    record: Record | None
    started: datetime
    source: SourceState
    session: Session
    outcome: AttemptOutcome | None = None

    @property
    def folder(self) -> Path:
        return Path(self.plan.folder)


def settle(last: LastAttempt) -> LastAttempt:
    """End what a launcher that was killed left behind. Raises ConfigRefused where containers of the run still run: they can be supervised."""
    if last.record is not None:
        return last
    if last.plan.config.cluster.runtime == "process":
        end_orphans(last.plan, last.session)
        return last
    nodes = working_nodes(last.plan, last.session)
    states = attempt_each(state_of, nodes)
    running = [node.command.host for node, state in zip(nodes, states, strict=True) if isinstance(state, str) and state.startswith(RUNNING)]
    if running:
        run_id = last.plan.run_id
        raise ConfigRefused(
            f"run {run_id} still runs on {', '.join(running)}, without a launcher. To supervise it: omnilaunch attach {run_id}. To end it: "
            f"omnilaunch stop {run_id}"
        )
    for node, state in zip(nodes, states, strict=True):
        if isinstance(state, NodeFailed):
            last.session.say(f"{node.command.host} does not respond: whether a container of the run is there is not known")
    if all(state == NO_CONTAINER or isinstance(state, NodeFailed) for state in states):
        return last
    last.session.say(f"the containers of run {last.plan.run_id} have ended without a launcher: their logs are read to the end")
    processes = NodeProcesses(trainers=container_processes(last.plan.commands, start_context(last.plan, last.session)))
    with catch_stops() as stop:
        return replace(last, outcome=watch_attempt(last.plan, last.folder, last.session, processes, stop))


def end_orphans(plan: Plan, session: Session) -> None:
    """Ranks outlive a launcher that was killed."""
    if processes_with(FOLDER_VARIABLE, plan.spec.output):
        session.say(f"the ranks of run {plan.run_id} still run without their launcher: they are asked to save and end")
        end_processes(plan)


def finish(last: LastAttempt) -> Record | None:
    """The record of a run that finished without a launcher; None for any other."""
    if last.outcome is None or last.outcome.status != "finished":
        return None
    return write_result(last.plan, last.source, last.started, last.outcome)


def resume(plan: Plan, resumption: Resumption, last: LastAttempt, session: Session, *, source: SourceState, detach: bool) -> Record | None:
    """Run to the end and return the record; None when the run continues in the background (`detach`). Raises ConfigRefused, and changes nothing, for
    checkpoints that cannot be resumed; any other LaunchError is raised after the record was written."""
    refuse(plan.verdict, launching=True, overrides=plan.overrides)
    nodes, folder = working_nodes(plan, session), last.folder
    sources = () if plan.is_local or plan.config.cluster.shared else other_nodes(last, nodes)
    found = choose_states(plan, (*nodes, *sources))
    rows = read_rows(folder / METRICS_FILE)
    say_start(plan, found, rows[-1].step if rows else 0, session)
    attempt = describe_end(last, number := next_number(load_attempts(folder)))
    changes = (*resumption.changes, *moved_nodes(last.plan, plan, resumption.changes))
    resumption = replace(
        resumption, attempt=number + 1, started_at=utc_now().isoformat(timespec="milliseconds"), step=step_of(found.newest), changes=changes
    )

    def work(stop: StopRequest) -> AttemptOutcome | None:
        try:
            archive(last, attempt, plan)
            begin(plan, resumption, last, source)
        except OSError as error:
            raise RunEnded(f"{folder} could not be written: {error}. Free some disk space there, and resume again") from error
        try:
            processes = prepare_and_start(plan, session, stop, again=AgainRequest(checks_first=True, sources=sources))
        except Stopped:
            return AttemptOutcome(status="stopped", code=STOPPED_CODE)
        session.say(
            f"{VERBS[plan.spec.stage.kind]}: {plural(plan.spec.device.world_size, 'rank')} on {plural(len(processes.trainers), 'node')}"
        )
        return (detach_run if detach else supervise)(plan, folder, session, processes, stop)

    return conclude(plan, last.source, last.started, work)


# -------------------------------------------------------------------------------------------------------- where it continues


def other_nodes(last: LastAttempt, nodes: tuple[WorkingNode, ...]) -> tuple[WorkingNode, ...]:
    """Nodes of the last attempt that respond and take no part in this one."""
    taking_part = {node.command.host for node in nodes}
    others = [node for node in working_nodes(last.plan, last.session) if node.command.host not in taking_part]
    answers = attempt_each(lambda node: node.transport.run(("true",)), others)
    return tuple(node for node, answer in zip(others, answers, strict=True) if not isinstance(answer, NodeFailed))


def choose_states(plan: Plan, nodes: tuple[WorkingNode, ...]) -> FoundStates:
    """The newest checkpoint of all nodes. Raises ConfigRefused where there are checkpoints and none can be resumed: to start at step 1 would lose
    what can be repaired."""
    steps, run_id = plan.spec.steps, plan.run_id
    answers = attempt_each(lambda node: find_states(node, steps), nodes)
    found = [answer for answer in answers if isinstance(answer, FoundStates)]
    if failed := next((answer for answer in answers if isinstance(answer, NodeFailed)), None):
        raise failed
    best = max(found, key=lambda each: step_of(each.newest))
    broken = {name: why for each in found for name, why in each.broken.items() if step_of(name) > step_of(best.newest)}
    ended = max((each.ended for each in found), key=step_of)
    if not best.newest and ended:
        raise ConfigRefused(
            f"the checkpoint {ended} of run {run_id} has weights only, since it was its last step; a run of {steps} steps cannot resume from it. "
            f"Start a new run from these weights: {command_from_weights(plan)}"
        )
    if not best.newest and broken:
        lines = "".join(f"\n  {name}: {why}" for name, why in broken.items())
        raise ConfigRefused(
            f"no checkpoint of run {run_id} is complete:{lines}\nCopy the missing files again; or remove these folders of "
            f"{plan.spec.output}/checkpoints to start at step 1"
        )
    if step_of(best.newest) > steps:
        raise ConfigRefused(
            f"run.steps={steps}, but run {run_id} has a checkpoint of step {step_of(best.newest)}: set run.steps to that or more"
        )
    return replace(best, broken=broken, ended=ended if step_of(ended) > step_of(best.newest) else "")


def say_start(plan: Plan, found: FoundStates, steps: int, session: Session) -> None:
    """`steps`: the last step that the run has a row of."""
    for name, why in found.broken.items():
        session.say(f"skipping checkpoint {name}: {why}")
    if found.ended:
        session.say(f"checkpoint {found.ended} has weights only: it is kept as checkpoints/ended-at-{found.ended}")
    if not found.newest:
        repeats = f", and repeats steps 1 to {steps}" if steps else ""
        session.say(f"resuming run {plan.run_id}: it has no checkpoint, so it starts at step 1{repeats}")
        return
    step = step_of(found.newest)
    repeats = f"; steps {step + 1} to {steps} are repeated" if steps > step else ""
    session.say(f"resuming run {plan.run_id} after step {step} of {plan.spec.steps}, from checkpoint {found.newest}{repeats}")


def moved_nodes(before: Plan, after: Plan, changes: tuple[ChangedSetting, ...]) -> tuple[ChangedSetting, ...]:
    """A spare that took the place of a node that does not respond."""
    old, new = (", ".join(command.host for command in plan.commands) for plan in (before, after))
    known = any(change.key == "cluster.nodes" for change in changes)
    return () if old == new or known else (ChangedSetting(key="cluster.nodes", old=old, new=new, kind="nodes"),)


# ------------------------------------------------------------------------------------------------------- the last attempt


def describe_end(last: LastAttempt, number: int) -> Attempt:
    """The last attempt, from its record, its containers, or the times of its files."""
    folder = last.folder
    archived = folder / ATTEMPTS / str(number) / RECORD_FILE  # by a launcher that was killed during the archiving
    record: Record | None = last.record or read_if_there(Record, archived)
    began, rows = began_at(last, number), read_rows(folder / METRICS_FILE)
    steps, started_at = rows[-1].step if rows else 0, began.isoformat(timespec="milliseconds")
    if record is not None:
        seconds = (datetime.fromisoformat(record.ended_at) - began).total_seconds()
        return Attempt(
            number=number,
            started_at=started_at,
            seconds=round(max(0.0, seconds), 3),
            steps=steps,
            nodes=record.nodes,
            failure=record.failure,
            status=record.status,
        )
    files = (folder / METRICS_FILE, *folder.glob("logs/*.log"))
    ended = max((datetime.fromtimestamp(path.stat().st_mtime, UTC) for path in files if path.exists()), default=began)
    seconds = round(max(0.0, (ended - began).total_seconds()), 3)
    killed = (
        NodeResult(host=command.host, node_rank=command.node_rank, code=KILLED, seconds=seconds, killed=True)
        for command in last.plan.commands
    )
    attempt = Attempt(
        number=number, started_at=started_at, seconds=seconds, steps=steps, nodes=tuple(killed), failure=None, status="killed"
    )
    outcome = last.outcome
    return replace(attempt, nodes=outcome.nodes, failure=outcome.failure, status=outcome.status) if outcome else attempt


def began_at(last: LastAttempt, number: int) -> datetime:
    resumed = next((each for each in load_resumptions(last.folder) if each.attempt == number), None)
    if resumed is not None:
        return datetime.fromisoformat(resumed.started_at)
    plan = last.folder / ATTEMPTS / str(number) / PLAN_FILE
    return datetime.fromtimestamp(plan.stat().st_mtime, UTC) if plan.exists() else last.started


def archive(last: LastAttempt, attempt: Attempt, plan: Plan) -> None:
    """Move what the last attempt left to attempts/<number>/. attempt.json comes last: a launcher that is killed before it does the same again."""
    folder = last.folder
    target = folder / ATTEMPTS / str(attempt.number)
    target.mkdir(parents=True, exist_ok=True)
    for name in KEPT:
        if (folder / name).exists():
            shutil.copy2(folder / name, target / name)
    for name in MOVED:
        if (folder / name).exists():
            (folder / name).replace(target / name)
    archive_attempt(folder, attempt, mirrored=not plan.is_local)


def begin(plan: Plan, resumption: Resumption, last: LastAttempt, source: SourceState) -> None:
    """Write what the next attempt is made of, before it starts."""
    folder, target = last.folder, last.folder / ATTEMPTS / str(resumption.attempt)
    write_plan(plan, folder, resumption.attempt)
    contract.write(resumption, target / RESUMPTION_FILE)
    if source != last.source:
        contract.write(source, target / SOURCE_FILE)
    written = folder / SPEC_FILE  # its keys are used, since the run's trainer may be an older one
    contract.write_text(encode_spec(plan.spec, like=written if written.is_file() else None), written)
    if plan.is_local:
        (folder / DATA_PENDING_FILE).touch()
