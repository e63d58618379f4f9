"""Carry out a plan: open the run, bring the image, check the data, start, watch, close. Every way out of here leaves a record."""

import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import FrameType

from launcher.build import build
from launcher.engine import find
from launcher.errors import ConfigRefused, ImageFailed, LaunchError, RunEnded
from launcher.gang import Crewed, NodeResult, StopRequest, find_members, node_log, start_checks, start_members, watch
from launcher.member import Member
from launcher.node import Mirror, Site, fetch_results, place_run
from launcher.plan import Plan, refuse
from launcher.progress import Progress
from launcher.record import Failure, Record, SourceState, Status, close_run, find_failure, open_run, read_if_there, utc_now
from launcher.ship import pull, ship
from launcher.transport import Transport
from trainer.contract import DATA_FILE, ENVIRONMENT_FILE, METRICS_FILE, RESULT_FILE, DataReport, Exit, TrainResult

SHOWN_PROBLEMS = 20
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
MIRROR_INTERVAL_S = 1.0


@dataclass(frozen=True, kw_only=True)
class Desk:
    """What a launch uses of the outside: where the project lies, how the working nodes are reached (in their order) and this machine,
    secret variables for the ranks, where to say things."""

    project: Path
    transports: tuple[Transport, ...]
    here: Transport
    secrets: Mapping[str, str]
    say: Callable[[str], None]
    terminal: bool


@dataclass(frozen=True, kw_only=True)
class Outcome:
    status: Status
    code: int
    nodes: tuple[NodeResult, ...] = ()
    failure: Failure | None = None


class Stopped(Exception):
    """The user asked for a stop while nothing was running yet."""


# -------------------------------------------------------------------------------------------------------------- launch


def launch(plan: Plan, source: SourceState, desk: Desk, *, detach: bool = False) -> Record | None:
    """Run to the end and return the record; None when the run goes on by itself (`detach`). Raises ConfigRefused before anything is made
    when the plan may not be launched; any other LaunchError comes after its record was written."""
    refuse(plan.verdict, launching=True)
    folder, started = open_run(plan, source), utc_now()
    desk.say(f"run {plan.run_id}")

    def work() -> Outcome | None:
        try:
            with stops_interrupt():
                members = bring_up(plan, folder, desk)
        except Stopped:
            return Outcome(status="stopped", code=stopped_code())
        desk.say(f"training: {plan.spec.device.world_size} rank(s) on {len(members)} node(s)")
        return None if detach else see_through(plan, folder, desk, members)

    return conclude(plan, source, started, folder, work)


def attach(plan: Plan, source: SourceState, started: datetime, desk: Desk) -> Record | None:
    """Take up the supervision of a run whose launcher is gone: the same end as if it had stayed."""
    folder = Path(plan.folder)
    desk.say(f"attached to run {plan.run_id}")
    return conclude(plan, source, started, folder, lambda: see_through(plan, folder, desk, find_members(plan.commands, crewed(plan, desk))))


def conclude(plan: Plan, source: SourceState, started: datetime, folder: Path, work: Callable[[], Outcome | None]) -> Record | None:
    """Do the work and write the record, whatever comes of it."""
    try:
        outcome = work()
    except LaunchError as error:
        status: Status = "refused" if isinstance(error, ConfigRefused) else "failed"
        close(plan, source, started, Outcome(status=status, code=error.exit_code, failure=described(error)))
        raise
    except BaseException as error:
        close(plan, source, started, Outcome(status="failed", code=Exit.BUG, failure=described(error)))
        raise
    if outcome is None:
        return None
    record = close(plan, source, started, outcome)
    explain(record, folder)
    return record


def bring_up(plan: Plan, folder: Path, desk: Desk) -> tuple[Member, ...]:
    """Everything before the first step. Raises Stopped, ConfigRefused for bad data, ImageFailed, NodeFailed."""
    if plan.config.cluster.runtime == "docker":
        bring_image(plan, desk)
        sites = sites_of(plan, desk)
        user = plan.commands[0].start[plan.commands[0].start.index("--user") + 1]
        place_run(
            sites, plan.spec, image=plan.image.tag, user=user, shared=plan.config.cluster.shared, local=plan.folder == plan.spec.output
        )
    desk.say("checking the data")
    with catch_stops() as stop:
        checked = watch(start_checks(plan.commands, crewed(plan, desk)), stop, lambda: None, grace_s=0)
    if stop.count:
        raise Stopped
    if any(node.code for node in checked):
        fetch(plan, folder, desk)
        refuse_data(folder, checked)
    return start_members(plan.commands, crewed(plan, desk))


def bring_image(plan: Plan, desk: Desk) -> None:
    """The plan's image on every node, by the way that the cluster's config says."""
    delivery, sites = plan.config.cluster.delivery, sites_of(plan, desk)
    if delivery.kind == "pull":
        pull(plan.image.tag, delivery.registry, sites, desk.say)
        return
    image_id = find(plan.image) if delivery.kind == "ship" else build(plan.image, root=desk.project, delivery=delivery, on_line=desk.say)
    if image_id is None:
        raise ImageFailed(
            f"{plan.image.tag} is not on this machine, and cluster.delivery.kind=ship builds none: build it with "
            "omnilaunch image build, or use cluster.delivery.kind=build"
        )
    if plan.folder != plan.spec.output:
        ship(plan.image.tag, image_id, sites, desk.here, desk.say)


def see_through(plan: Plan, folder: Path, desk: Desk, members: tuple[Member, ...]) -> Outcome:
    """Watch until the end, and judge."""
    limit_s, began = plan.config.run.start_timeout_s, time.monotonic()
    remote = plan.folder != plan.spec.output
    mirrors = [Mirror(sites_of(plan, desk)[0], name, folder) for name in (METRICS_FILE, ENVIRONMENT_FILE)] if remote else []
    looked_at = 0.0

    with catch_stops() as stop, Progress(folder, desk.say, terminal=desk.terminal) as progress:

        def tick() -> None:
            nonlocal looked_at
            if mirrors and time.monotonic() - looked_at >= MIRROR_INTERVAL_S:
                for mirror in mirrors:
                    mirror.update()
                looked_at = time.monotonic()
            progress.tick()
            if time.monotonic() - began > limit_s and not (folder / ENVIRONMENT_FILE).exists():
                raise RunEnded(
                    f"no rank had its model ready within run.start_timeout_s={limit_s}; all were ended.\n"
                    f"  log: {node_log(folder / 'logs', plan.commands[0])}"
                )

        nodes = watch(members, stop, tick, grace_s=plan.config.run.stop_timeout_s)
        fetch(plan, folder, desk)
        progress.tick()
    return judge(plan, folder, nodes, stop)


def judge(plan: Plan, folder: Path, nodes: tuple[NodeResult, ...], stop: StopRequest) -> Outcome:
    """Finished is what the trainer says it is, and every node must agree."""
    result: TrainResult | None = read_if_there(TrainResult, folder / RESULT_FILE)
    if result and result.status == "finished" and not any(node.code for node in nodes):
        return Outcome(status="finished", code=Exit.OK, nodes=nodes)
    if stop.count or (result and result.status == "stopped"):
        return Outcome(status="stopped", code=stopped_code(), nodes=nodes)
    failure = find_failure(plan, nodes)
    refused = failure is not None and failure.code == Exit.USAGE
    lost = any(node.lost for node in nodes)
    code = Exit.USAGE if refused else Exit.NODE if lost else Exit.RUN
    return Outcome(status="refused" if refused else "failed", code=code, nodes=nodes, failure=failure)


# --------------------------------------------------------------------------------------------------------------- parts


def crewed(plan: Plan, desk: Desk) -> Crewed:
    return Crewed(
        transports=desk.transports,
        logs=Path(plan.folder) / "logs",
        project=desk.project,
        secrets=desk.secrets,
        node_timeout_s=plan.config.cluster.node_timeout_s,
    )


def sites_of(plan: Plan, desk: Desk) -> tuple[Site, ...]:
    return tuple(Site(command=command, transport=transport) for command, transport in zip(plan.commands, desk.transports, strict=True))


def fetch(plan: Plan, folder: Path, desk: Desk) -> None:
    if plan.folder != plan.spec.output:
        fetch_results(sites_of(plan, desk), folder, ranks_per_node=plan.spec.device.devices_per_node)


def refuse_data(folder: Path, nodes: tuple[NodeResult, ...]) -> None:
    """Raise the data's problems as ConfigRefused; a check that broke without saying why is a failed run."""
    report: DataReport | None = read_if_there(DataReport, folder / DATA_FILE)
    if report is None or not report.problems:
        failed = next(node for node in nodes if node.code)
        log = folder / "logs" / f"data{failed.node_rank}.log"
        tail = "\n".join(f"    {line}" for line in log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
        text = f"the data check on {failed.host} ended with exit code {failed.code} and without a report\n{tail}\n  log: {log}\n  record: {folder}"
        raise ConfigRefused(text) if failed.code == Exit.USAGE else RunEnded(text)
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
    """Raises RunEnded where the record itself cannot be written."""
    try:
        return close_run(
            plan, source, outcome.status, outcome.code, started=started, ended=utc_now(), nodes=outcome.nodes, failure=outcome.failure
        )
    except OSError as error:
        why = f"\n  before that: {outcome.failure.message}" if outcome.failure else ""
        raise RunEnded(f"the record of the run could not be written to {plan.folder}: {error}. Free room there.{why}") from error


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
    with handling(lambda number: stop.ask(signal.Signals(number).name)):
        yield stop


@contextmanager
def stops_interrupt() -> Iterator[None]:
    """The same signals end what is going on at once, as Stopped: before the ranks run there is nothing to save."""

    def end(number: int) -> None:
        raise Stopped

    with handling(end):
        yield


@contextmanager
def handling(act: Callable[[int], None]) -> Iterator[None]:
    def handler(number: int, frame: FrameType | None) -> None:
        act(number)

    before = {number: signal.signal(number, handler) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
