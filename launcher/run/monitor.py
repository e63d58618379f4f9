"""Watching an attempt: its ranks and its data check until all have ended, and the outcome."""

import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from launcher.plan.commands import CANN_LOGS
from launcher.plan.plan import Plan
from launcher.record.lock import is_asked_to_stop
from launcher.record.reader import read_if_there
from launcher.record.record import AttemptOutcome, Failure, NodeResult
from launcher.run.data_check import check_failure, fetch_problems, refuse_data, say_left_out
from launcher.run.failure_search import find_failure
from launcher.run.gang import TICK_S, clear_all, clear_and_report, node_log_path, node_results, watch
from launcher.run.node_log import StartPhase, last_lines, silence_s, start_phases
from launcher.run.node_process import NodeProcess
from launcher.run.prepare import NodeProcesses, working_nodes
from launcher.run.progress import ProgressView
from launcher.run.run_folder import FETCH_S, Mirror, WorkingNode, fetch_large, fetch_results
from launcher.run.session import Session
from launcher.run.signals import STOPPED_CODE, StopRequest, handler_for
from launcher.run.stop_limit import describe_wait, grace_s
from launcher.ssh.parallel import after, attempt_each
from trainer.contract import ENVIRONMENT_FILE, METRICS_FILE, RESULT_FILE, SERVING_FILE, STREAM_FILE, Exit, TrainResult
from trainer.contract.listing import list_some
from trainer.contract.wording import plural

MIRROR_INTERVAL_S = 1.0
SAY_INTERVAL_S = 10.0  # between two lines about a data check that is waited for
SHOWN_RANKS = 8
STOPPED_FETCH_S, STOPPED_AGAIN_FETCH_S = 20.0, 2.0  # in place of FETCH_S after a stop request, and after a second one


def watch_attempt(plan: Plan, folder: Path, session: Session, processes: NodeProcesses, stop: StopRequest) -> AttemptOutcome:
    """Watch until all processes have ended. Raises ConfigRefused when the data has problems. The trainer writes ENVIRONMENT_FILE when its model is
    ready and the rows of an earlier attempt after its checkpoint are removed; until then there is no progress to show."""
    limit_s, began, watch_checks = plan.config.run.start_timeout_s, time.monotonic(), CheckWatch(plan, folder, session, processes.checks)
    growing = () if plan.is_local else (progress_file(plan), ENVIRONMENT_FILE)  # files of node 0 that are copied here while they grow
    mirrors, mirrored_at = {name: Mirror(working_nodes(plan, session)[0], name, folder) for name in growing}, 0.0
    asked = list[int]()  # the stop request, once it was answered

    with handler_for(hangup_signals(plan), signal.SIG_DFL), ProgressView(folder, session.say, terminal=session.terminal) as progress:

        def tick() -> None:
            nonlocal mirrored_at
            ready = (folder / ENVIRONMENT_FILE).exists()
            watch_checks()
            if is_asked_to_stop(folder) and not stop.count:  # in this order: `omnilaunch stop` writes the file after its signal
                stop.ask("omnilaunch stop")
            if stop.count and not asked:
                asked.append(stop.count)
                session.say(describe_wait(plan, folder, started_here=bool(processes.checks)))
            if mirrors and time.monotonic() - mirrored_at >= MIRROR_INTERVAL_S:
                mirrors[progress_file(plan) if ready else ENVIRONMENT_FILE].update()
                mirrored_at = time.monotonic()
            if ready:
                progress.tick()
            elif not stop.count and time.monotonic() - began > limit_s:
                raise AttemptFailed(slow_start(plan, folder, limit_s))

        try:
            nodes = watch(processes.trainers, stop, tick, grace_s=lambda: grace_s(plan, folder, started_here=bool(processes.checks)))
            unchecked = "" if any(node.code for node in nodes) else finish_checks(folder, session, processes.checks, stop)
        except AttemptFailed as error:
            return end_attempt(plan, folder, session, processes, error, stop)
        finally:
            clear_and_report(processes.checks, stop, session.say)
            for mirror in mirrors.values():
                mirror.settle()
        fetch(plan, folder, session, stop)
        progress.tick()
    outcome = judge_attempt(plan, folder, nodes, stop, stopped_by_launcher=any(process.stopping for process in processes.trainers))
    return replace(outcome, unchecked=unchecked)


def hangup_signals(plan: Plan) -> tuple[signal.Signals, ...]:
    """The signals that end a launcher while it watches. Containers run on without it, so a closed terminal may end it; child processes do not."""
    return (signal.SIGHUP,) if plan.config.cluster.runtime == "docker" else ()


# --------------------------------------------------------------------------------------------------- ended by the launcher


class AttemptFailed(Exception):
    """The launcher ends the attempt: the ranks were not ready in time, or a data check (`check`) ended with an error."""

    def __init__(self, failure: Failure, check: NodeProcess | None = None) -> None:
        self.failure, self.check = failure, check


def slow_start(plan: Plan, folder: Path, limit_s: int) -> Failure:
    """Which ranks delay the start, as the failure of an attempt: those in the earliest phase, and what they printed last."""
    per_node, found = plan.spec.device.devices_per_node, list[StartPhase]()
    for command in plan.commands:
        ranks = range(command.node_rank * per_node, (command.node_rank + 1) * per_node)
        found += start_phases(node_log_path(folder / "logs", command), command.host, ranks)
    earliest = min(start.phase for start in found)
    slow = [start for start in found if start.phase == earliest]
    first = slow[0]
    log = node_log_path(folder / "logs", plan.commands[first.rank // per_node])
    quiet_s = silence_s(log)
    return Failure(
        host=first.host,
        rank=first.rank,
        code=Exit.RUN,
        message=f"no rank was ready within run.start_timeout_s={limit_s}, and all were stopped. {len(slow)} of {plural(len(found), 'rank')} were in "
        f"the earliest phase: {list_some([start.describe() for start in slow], SHOWN_RANKS, '; ')}",
        log=str(log),
        tail=(first.last_line or "(no output)", *((f"(no further line for {quiet_s:.0f} s)",) if quiet_s is not None else ())),
    )


def raise_bad_data(folder: Path, checks: tuple[NodeProcess, ...]) -> None:
    """Raises AttemptFailed with the first check that has ended by itself with an error."""
    for check in checks:
        if check.poll():
            raise AttemptFailed(check_failure(folder, check), check)


class CheckWatch:
    """Called again and again: raises AttemptFailed for a check that has ended with an error, and says once which rows are left out. Of nodes elsewhere
    the summary of the run says it."""

    def __init__(self, plan: Plan, folder: Path, session: Session, checks: tuple[NodeProcess, ...]) -> None:
        self.folder, self.say, self.checks = folder, session.say, checks
        self.silent = not plan.is_local or not checks

    def __call__(self) -> None:
        raise_bad_data(self.folder, self.checks)
        if not self.silent and all(check.poll() == 0 for check in self.checks):
            self.silent = say_left_out(self.folder, self.say)


def finish_checks(folder: Path, session: Session, checks: tuple[NodeProcess, ...], stop: StopRequest) -> str:
    """A run that was faster than its data check waits for it, and says how far it is. Returns why the data was not checked to its end, '' if it was:
    what the ranks have finished is not lost with it. Raises AttemptFailed for problems in the data."""
    said_at = time.monotonic()

    def is_over() -> bool:
        nonlocal said_at
        if time.monotonic() - said_at >= SAY_INTERVAL_S:
            session.say(f"the ranks have finished; waiting for the data check {describe_progress(folder, checks)}")
            said_at = time.monotonic()
        return bool(stop.count) or is_asked_to_stop(folder)

    try:
        wait_for_checks(folder, checks, is_over)
    except AttemptFailed as error:
        if error.check is None or error.check.poll() == Exit.USAGE:
            raise
        unchecked = f"on {error.failure.host}: {error.failure.message}"
    else:
        unchecked = "a stop was requested before the data check had ended" if any(check.poll() is None for check in checks) else ""
    if unchecked:
        session.say(f"the data was not checked to its end: {unchecked}. Check it: omnilaunch data check, with the same overrides")
    return unchecked


def describe_progress(folder: Path, checks: tuple[NodeProcess, ...]) -> str:
    """The last line of each check that is under way."""
    lines = [(check, last_lines(node_log_path(folder / "logs", check.command, "data"))) for check in checks if check.poll() is None]
    return "; ".join(f"on {check.command.host}" + (f": {found[-1]}" if found else "") for check, found in lines)


def wait_for_checks(folder: Path, checks: tuple[NodeProcess, ...], is_over: Callable[[], bool]) -> None:
    """Until the checks have ended, or `is_over`. Raises AttemptFailed."""
    while not is_over() and any(check.poll() is None for check in checks):
        time.sleep(TICK_S)
        raise_bad_data(folder, checks)
    raise_bad_data(folder, checks)


def end_attempt(
    plan: Plan, folder: Path, session: Session, processes: NodeProcesses, error: AttemptFailed, stop: StopRequest
) -> AttemptOutcome:
    """Kill the ranks. A check that found problems refuses the run (ConfigRefused); otherwise the attempt has failed."""
    left = clear_all(processes.trainers, stop)
    fetch(plan, folder, session, stop)
    check = error.check
    if check and check.poll() == Exit.USAGE:
        fetch_problems(folder, session, check)
        refuse_data(folder, check)
    lost = any(process.lost for process in (*processes.trainers, *([check] if check else [])))
    nodes = node_results(processes.trainers, left, seconds={})
    return AttemptOutcome(status="failed", code=Exit.NODE if lost else Exit.RUN, nodes=nodes, failure=error.failure)


# ------------------------------------------------------------------------------------------------------------- outcome


def judge_attempt(
    plan: Plan, folder: Path, nodes: tuple[NodeResult, ...], stop: StopRequest, *, stopped_by_launcher: bool = False
) -> AttemptOutcome:
    """Finished is what the trainer reports as finished, if no node has an error. Where the launcher stopped the other nodes because one had failed
    (`stopped_by_launcher`), that the trainer reports `stopped` is no reason to forget the failure."""
    result: TrainResult | None = read_if_there(TrainResult, folder / RESULT_FILE)
    if result and result.status == "finished" and not any(node.code for node in nodes):
        return AttemptOutcome(status="finished", code=Exit.OK, nodes=nodes)
    stopped_itself = result and result.status == "stopped" and result.steps < plan.spec.steps and not stopped_by_launcher
    if stop.count or stopped_itself:
        return AttemptOutcome(status="stopped", code=STOPPED_CODE, nodes=nodes)
    failure = find_failure(plan, nodes)
    refused = failure is not None and failure.code == Exit.USAGE
    lost = any(node.lost for node in nodes)
    code = Exit.USAGE if refused else Exit.NODE if lost else Exit.RUN
    return AttemptOutcome(status="refused" if refused else "failed", code=code, nodes=nodes, failure=failure)


# ------------------------------------------------------------------------------------------------- files of the nodes


def progress_file(plan: Plan) -> str:
    """The file that a user is shown during the run."""
    return {"serve": SERVING_FILE, "infer": STREAM_FILE}.get(plan.spec.stage.kind, METRICS_FILE)


def fetch(plan: Plan, folder: Path, session: Session, stop: StopRequest) -> None:
    """Copy what the ranks left on other machines. What cannot be copied in time stays on the nodes."""
    if plan.is_local:
        return
    nodes, stopped, over = working_nodes(plan, session), stop.limit(STOPPED_FETCH_S, STOPPED_AGAIN_FETCH_S), after(FETCH_S)
    fetch_results(nodes, folder, ranks_per_node=plan.spec.device.devices_per_node, until=lambda: over() or stopped())
    if plan.config.hardware.accelerator != "npu":
        return

    def fetch_cann_log(node: WorkingNode) -> None:
        fetch_large(node, CANN_LOGS, folder / "logs" / f"node{node.command.node_rank}-{CANN_LOGS}.tgz", packed=True)

    cann_over = after(FETCH_S)
    attempt_each(fetch_cann_log, nodes, until=lambda: cann_over() or stopped())
