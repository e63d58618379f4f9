"""Watching an attempt: its ranks and its data check beside each other, until all have ended, and what that means."""

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from launcher.claim import is_asked_to_stop
from launcher.errors import RunEnded
from launcher.gang import TICK_S, clear_all, node_log, watch
from launcher.interrupt import STOP_SIGNALS, STOPPED_CODE, WATCH_SIGNALS, StopRequest, catch_stops
from launcher.member import Member, NodeResult
from launcher.node import Mirror
from launcher.plan import Plan
from launcher.preparation import Crew, Desk, broken_check, fetch, refuse_data, sites_of
from launcher.progress import Progress
from launcher.record import Failure, Status, find_failure, read_if_there
from trainer.contract import DATA_FILE, ENVIRONMENT_FILE, METRICS_FILE, RESULT_FILE, Exit, TrainResult

MIRROR_INTERVAL_S = 1.0


@dataclass(frozen=True, kw_only=True)
class Outcome:
    status: Status
    code: int
    nodes: tuple[NodeResult, ...] = ()
    failure: Failure | None = None


def watch_attempt(plan: Plan, folder: Path, desk: Desk, crew: Crew) -> Outcome:
    """Watch until all members have ended, and judge. Raises ConfigRefused when the data turns out to be bad. The trainer writes its
    environment when its model is ready and the rows of an earlier attempt are cut: until then there is nothing to show."""
    limit_s, began = plan.config.run.start_timeout_s, time.monotonic()
    mirrors = mirrors_of(plan, folder, desk)
    looked_at = 0.0

    with catch_stops(signals_of(plan)) as stop, Progress(folder, desk.say, terminal=desk.terminal) as progress:

        def tick() -> None:
            nonlocal looked_at
            ready = (folder / ENVIRONMENT_FILE).exists()
            look_at_checks(crew.checks)
            if not stop.count and is_asked_to_stop(folder):
                stop.ask("omnilaunch stop")
            if mirrors and time.monotonic() - looked_at >= MIRROR_INTERVAL_S:
                mirrors[METRICS_FILE if ready else ENVIRONMENT_FILE].update()
                looked_at = time.monotonic()
            if ready:
                progress.tick()
            elif time.monotonic() - began > limit_s:
                raise RunEnded(
                    f"no rank had its model ready within run.start_timeout_s={limit_s}; all were ended.\n"
                    f"  log: {node_log(folder / 'logs', plan.commands[0])}"
                )

        try:
            nodes = watch(crew.members, stop, tick, grace_s=plan.config.run.stop_timeout_s)
            if not any(node.code for node in nodes):
                finish_checks(crew.checks, lambda: bool(stop.count) or is_asked_to_stop(folder))
        except BadData as error:
            return judge_data(plan, folder, desk, crew, error.check)
        finally:
            clear_all(crew.checks)
        fetch(plan, folder, desk)
        progress.tick()
    return judge(plan, folder, nodes, stop)


def signals_of(plan: Plan) -> tuple[signal.Signals, ...]:
    """A closed terminal ends the launcher of containers as a kill does, which harms nothing; processes end with it."""
    return WATCH_SIGNALS if plan.config.cluster.runtime == "docker" else STOP_SIGNALS


class BadData(Exception):
    """A data check has ended with an error."""

    def __init__(self, check: Member) -> None:
        self.check = check


def look_at_checks(checks: tuple[Member, ...]) -> None:
    """Raises BadData with the first check that has ended by itself with an error."""
    for check in checks:
        if check.poll():
            raise BadData(check)


def finish_checks(checks: tuple[Member, ...], asked_to_stop: Callable[[], bool]) -> None:
    """A run that was faster than the check of its data waits for it. Raises BadData."""
    while not asked_to_stop() and any(check.poll() is None for check in checks):
        time.sleep(TICK_S)
        look_at_checks(checks)
    look_at_checks(checks)


def judge_data(plan: Plan, folder: Path, desk: Desk, crew: Crew, check: Member) -> Outcome:
    """A check that refused refuses the run (ConfigRefused); one that broke fails the attempt. The ranks have been ended by now."""
    code = check.poll()
    clear_all(crew.members)
    fetch(plan, folder, desk)
    if code == Exit.USAGE:
        fetch_report(crew, desk, folder, check)
        refuse_data(folder, check)
    nodes = tuple(
        NodeResult(
            host=member.command.host,
            node_rank=member.command.node_rank,
            code=member.poll() or 0,
            seconds=0.0,
            killed=True,
            lost=member.lost,
        )
        for member in crew.members
    )
    return Outcome(status="failed", code=Exit.RUN, nodes=nodes, failure=broken_check(folder, check))


def fetch_report(crew: Crew, desk: Desk, folder: Path, check: Member) -> None:
    """The report of the node whose check it was."""
    transport = desk.transports[check.command.node_rank]
    content = transport.get(str(PurePosixPath(check.command.folder) / DATA_FILE))
    if content is not None:
        (folder / DATA_FILE).write_bytes(content)


def judge(plan: Plan, folder: Path, nodes: tuple[NodeResult, ...], stop: StopRequest) -> Outcome:
    """Finished is what the trainer says it is, and every node must agree."""
    result: TrainResult | None = read_if_there(TrainResult, folder / RESULT_FILE)
    if result and result.status == "finished" and not any(node.code for node in nodes):
        return Outcome(status="finished", code=Exit.OK, nodes=nodes)
    if stop.count or (result and result.status == "stopped" and result.steps < plan.spec.steps):
        return Outcome(status="stopped", code=STOPPED_CODE, nodes=nodes)
    failure = find_failure(plan, nodes)
    refused = failure is not None and failure.code == Exit.USAGE
    lost = any(node.lost for node in nodes)
    code = Exit.USAGE if refused else Exit.NODE if lost else Exit.RUN
    return Outcome(status="refused" if refused else "failed", code=code, nodes=nodes, failure=failure)


def mirrors_of(plan: Plan, folder: Path, desk: Desk) -> dict[str, Mirror]:
    """What of node 0 is kept up to date here while it grows; nothing where this machine is the node."""
    if plan.folder == plan.spec.output:
        return {}
    return {name: Mirror(sites_of(plan, desk)[0], name, folder) for name in (METRICS_FILE, ENVIRONMENT_FILE)}
