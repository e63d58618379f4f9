"""Watching an attempt: its ranks and its data check beside each other, until all have ended, and what that means."""

import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.plan.plan import Plan
from launcher.record.lock import is_asked_to_stop
from launcher.record.record import Failure, Status, find_failure, read_if_there
from launcher.run.gang import TICK_S, clear_all, node_log, watch
from launcher.run.node_log import StartPhase, silence_s, standings
from launcher.run.node_process import NodeProcess, NodeResult
from launcher.run.prepare import NodeProcesses, Session, broken_check, fetch, fetch_problems, refuse_data, sites_of
from launcher.run.progress import ProgressView
from launcher.run.run_folder import Mirror
from launcher.run.signals import STOPPED_CODE, StopRequest, released
from trainer.contract import ENVIRONMENT_FILE, METRICS_FILE, RESULT_FILE, SERVING_FILE, STREAM_FILE, Exit, TrainResult

MIRROR_INTERVAL_S = 1.0
SHOWN_RANKS = 8
# Before the first row there is nothing to save, and an interpreter that still imports as the first process of a container hears no SIGTERM.
START_GRACE_S = 3.0


@dataclass(frozen=True, kw_only=True)
class AttemptOutcome:
    status: Status
    code: int
    nodes: tuple[NodeResult, ...] = ()
    failure: Failure | None = None


def watch_attempt(plan: Plan, folder: Path, desk: Session, crew: NodeProcesses, stop: StopRequest) -> AttemptOutcome:
    """Watch until all members have ended, and judge. Raises ConfigRefused when the data turns out to be bad. The trainer writes its
    environment when its model is ready and the rows of an earlier attempt are cut: until then there is nothing to show."""
    limit_s, began = plan.config.run.start_timeout_s, time.monotonic()
    mirrors = mirrors_of(plan, folder, desk)
    looked_at = 0.0

    with released(signals_of_others(plan)), ProgressView(folder, desk.say, terminal=desk.terminal) as progress:

        def tick() -> None:
            nonlocal looked_at
            ready = (folder / ENVIRONMENT_FILE).exists()
            look_at_checks(crew.checks)
            if not stop.count and is_asked_to_stop(folder):
                stop.ask("omnilaunch stop")
            if mirrors and time.monotonic() - looked_at >= MIRROR_INTERVAL_S:
                mirrors[shown_file(plan) if ready else ENVIRONMENT_FILE].update()
                looked_at = time.monotonic()
            if ready:
                progress.tick()
            elif not stop.count and time.monotonic() - began > limit_s:
                raise NotReady(slow_start(plan, folder, limit_s))

        try:
            nodes = watch(crew.members, stop, tick, grace_s=lambda: grace_s(plan, folder, began_here=bool(crew.checks)))
            if not any(node.code for node in nodes):
                finish_checks(crew.checks, lambda: bool(stop.count) or is_asked_to_stop(folder))
        except BadData as error:
            return judge_data(plan, folder, desk, crew, error.check)
        except NotReady as error:
            return judge_start(plan, folder, desk, crew, error.failure)
        finally:
            clear_all(crew.checks)
            for mirror in mirrors.values():
                mirror.settle()
        fetch(plan, folder, desk)
        progress.tick()
    return judge(plan, folder, nodes, stop)


def grace_s(plan: Plan, folder: Path, *, began_here: bool = True) -> float:
    """How long the ranks may take to save and end. Asked again and again, since a first row may have been on its way here. Of a run that
    another launcher began (`began_here` false) there may be hours of rows that have not come here yet."""
    rows = folder / METRICS_FILE
    nothing_done = began_here and plan.spec.stage.kind == "train" and not (rows.exists() and rows.stat().st_size)
    return min(plan.config.run.stop_timeout_s, START_GRACE_S) if nothing_done else plan.stop_limit_s


def signals_of_others(plan: Plan) -> tuple[signal.Signals, ...]:
    """Those that end a launcher that watches. A closed terminal ends that of containers as a kill does, which harms nothing; one of processes
    ends them."""
    return (signal.SIGHUP,) if plan.config.cluster.runtime == "docker" else ()


class NotReady(Exception):
    """The ranks are not ready when they should be."""

    def __init__(self, failure: Failure) -> None:
        self.failure = failure


def slow_start(plan: Plan, folder: Path, limit_s: int) -> Failure:
    """Which ranks hold up the start, as the failure of an attempt: those that have come least far, and what they were last seen doing."""
    per_node, found = plan.spec.device.devices_per_node, list[StartPhase]()
    for command in plan.commands:
        ranks = range(command.node_rank * per_node, (command.node_rank + 1) * per_node)
        found += standings(node_log(folder / "logs", command), command.host, ranks)
    least = min(standing.phase for standing in found)
    slow = [standing for standing in found if standing.phase == least]
    first = slow[0]
    command = plan.commands[first.rank // per_node]
    log = node_log(folder / "logs", command)
    quiet_s = silence_s(log)
    return Failure(
        host=first.host,
        rank=first.rank,
        code=Exit.RUN,
        message=f"no rank had its model ready within run.start_timeout_s={limit_s}; all were ended. "
        f"{len(slow)} of {len(found)} rank(s) had come least far: {describe_some(slow)}",
        log=str(log),
        tail=(first.last_line or "(nothing)", *((f"(and no line since, for {quiet_s:.0f} s)",) if quiet_s is not None else ())),
    )


def describe_some(slow: Sequence[StartPhase]) -> str:
    more = f" and {len(slow) - SHOWN_RANKS} more" if len(slow) > SHOWN_RANKS else ""
    return "; ".join(standing.describe() for standing in slow[:SHOWN_RANKS]) + more


class BadData(Exception):
    """A data check has ended with an error."""

    def __init__(self, check: NodeProcess) -> None:
        self.check = check


def look_at_checks(checks: tuple[NodeProcess, ...]) -> None:
    """Raises BadData with the first check that has ended by itself with an error."""
    for check in checks:
        if check.poll():
            raise BadData(check)


def finish_checks(checks: tuple[NodeProcess, ...], asked_to_stop: Callable[[], bool]) -> None:
    """A run that was faster than the check of its data waits for it. Raises BadData."""
    while not asked_to_stop() and any(check.poll() is None for check in checks):
        time.sleep(TICK_S)
        look_at_checks(checks)
    look_at_checks(checks)


def judge_data(plan: Plan, folder: Path, desk: Session, crew: NodeProcesses, check: NodeProcess) -> AttemptOutcome:
    """A check that refused refuses the run (ConfigRefused); one that broke fails the attempt. The ranks have been ended by now."""
    code = check.poll()
    clear_all(crew.members)
    fetch(plan, folder, desk)
    if code == Exit.USAGE:
        fetch_problems(folder, desk, check)
        refuse_data(folder, check)
    lost = check.lost or any(member.lost for member in crew.members)
    return AttemptOutcome(status="failed", code=Exit.NODE if lost else Exit.RUN, nodes=ended_nodes(crew, {}), failure=broken_check(folder, check))


def judge_start(plan: Plan, folder: Path, desk: Session, crew: NodeProcesses, failure: Failure) -> AttemptOutcome:
    """A start that took too long fails the attempt. The ranks have been ended by now; what is left of them is asked once more."""
    left = clear_all(crew.members)
    fetch(plan, folder, desk)
    lost = any(member.lost for member in crew.members)
    return AttemptOutcome(status="failed", code=Exit.NODE if lost else Exit.RUN, nodes=ended_nodes(crew, left), failure=failure)


def ended_nodes(crew: NodeProcesses, left: Mapping[int, str]) -> tuple[NodeResult, ...]:
    return tuple(
        NodeResult(
            host=member.command.host,
            node_rank=member.command.node_rank,
            code=member.poll() or 0,
            seconds=0.0,
            killed=True,
            lost=member.lost,
            left=left.get(place, ""),
        )
        for place, member in enumerate(crew.members)
    )


def judge(plan: Plan, folder: Path, nodes: tuple[NodeResult, ...], stop: StopRequest) -> AttemptOutcome:
    """Finished is what the trainer says it is, and every node must agree."""
    result: TrainResult | None = read_if_there(TrainResult, folder / RESULT_FILE)
    if result and result.status == "finished" and not any(node.code for node in nodes):
        return AttemptOutcome(status="finished", code=Exit.OK, nodes=nodes)
    if stop.count or (result and result.status == "stopped" and result.steps < plan.spec.steps):
        return AttemptOutcome(status="stopped", code=STOPPED_CODE, nodes=nodes)
    failure = find_failure(plan, nodes)
    refused = failure is not None and failure.code == Exit.USAGE
    lost = any(node.lost for node in nodes)
    code = Exit.USAGE if refused else Exit.NODE if lost else Exit.RUN
    return AttemptOutcome(status="refused" if refused else "failed", code=code, nodes=nodes, failure=failure)


def mirrors_of(plan: Plan, folder: Path, desk: Session) -> dict[str, Mirror]:
    """What of node 0 is kept up to date here while it grows; nothing where this machine is the node."""
    if plan.is_local:
        return {}
    return {name: Mirror(sites_of(plan, desk)[0], name, folder) for name in (shown_file(plan), ENVIRONMENT_FILE)}


def shown_file(plan: Plan) -> str:
    """What a user is shown of it while a run goes on."""
    return {"serve": SERVING_FILE, "infer": STREAM_FILE}.get(plan.spec.stage.kind, METRICS_FILE)
