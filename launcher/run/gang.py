"""All nodes of a run as one: started together or not at all, watched together, stopped together. The first failure stops every node."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.errors import NodeFailed
from launcher.plan.commands import NodeCommand
from launcher.record.record import NodeResult
from launcher.run.ask_ranks import may_save
from launcher.run.container import clear_node
from launcher.run.node_process import CheckNodeProcess, ChildNodeProcess, ContainerNodeProcess, NodeProcess
from launcher.run.signals import StopRequest
from launcher.run.stop_limit import START_GRACE_S
from launcher.ssh.parallel import after, attempt_each, together
from launcher.ssh.transport import Transport

TICK_S = 0.1
START_LIMIT_S = 3.0  # after a stop request, for the starts that are under way
REMOVE_LIMIT_S, REMOVE_AGAIN_S = 6.0, 2.0  # after a stop request, and after a second one, for the removal of what did start
CLEAR_LIMIT_S = 15.0  # after a stop request, for clearing the nodes; one that does not respond is then reported
UNFOLLOW_LIMIT_S = 1.0  # for closing logs that are no longer needed
FAILED_GRACE_S = 8.0  # for the ranks to end when another one has failed
ASK_LIMIT_S = 5.0  # for the nodes to be asked to stop; the request to a node that responds later continues in the background


@dataclass(frozen=True, kw_only=True)
class StartContext:
    """What starting the nodes' processes takes: a transport for each command, the folder for logs, that for child processes, secret variables."""

    transports: tuple[Transport, ...]
    logs: Path
    project: Path
    secrets: Mapping[str, str]
    node_timeout_s: float


def start_trainers(commands: tuple[NodeCommand, ...], context: StartContext, stop: StopRequest) -> tuple[NodeProcess, ...]:
    """Start every node or none. When one does not start, those that did are ended, and NodeFailed lists all failures. After a stop request no start
    is waited for; the caller then calls `remove_by_name`."""
    if commands[0].runtime == "process":
        return start_children(commands, context)
    processes = container_processes(commands, context)
    answers = attempt_each(
        lambda process: process.start(context.secrets, lambda: bool(stop.count)), processes, until=stop.limit(START_LIMIT_S)
    )
    failures = [answer for answer in answers if isinstance(answer, NodeFailed)]
    if failures:
        ends = attempt_each(ContainerNodeProcess.kill, processes, until=stop.limit(0))
        attempt_each(ContainerNodeProcess.unfollow, processes, until=after(UNFOLLOW_LIMIT_S))
        left = "".join(
            f"\n  not cleared: {process.command.host}: {str(end).splitlines()[0]}; when it responds: "
            f"ssh {process.command.host} docker rm --force {process.command.name}"
            for process, end in zip(processes, ends, strict=True)
            if isinstance(end, NodeFailed)
        )
        raise NodeFailed(f"{together(failures, len(processes))}{left}")
    return processes


def remove_by_name(commands: tuple[NodeCommand, ...], context: StartContext, stop: StopRequest) -> dict[str, str]:
    """Remove the containers of a start that was cancelled; host -> why that is not certain. A node that did not respond in time may still do it,
    since it has the command."""
    pairs = list(zip(commands, context.transports, strict=True))
    answers = attempt_each(lambda pair: clear_node(*pair), pairs, until=stop.limit(REMOVE_LIMIT_S, REMOVE_AGAIN_S))
    return {command.host: str(answer) for command, answer in zip(commands, answers, strict=True) if isinstance(answer, NodeFailed)}


def start_children(commands: tuple[NodeCommand, ...], context: StartContext) -> tuple[NodeProcess, ...]:
    started: list[NodeProcess] = []
    try:
        for command, transport in zip(commands, context.transports, strict=True):
            log = node_log_path(context.logs, command)
            started.append(ChildNodeProcess(command, command.start, transport, log, context.project, secrets=context.secrets))
    except NodeFailed:
        for process in started:
            process.kill()
        raise
    return tuple(started)


def container_processes(commands: tuple[NodeCommand, ...], context: StartContext) -> tuple[ContainerNodeProcess, ...]:
    """One for each node, of containers that are to be started or that an earlier launcher started; the logs of those continue where it ended."""
    return tuple(
        ContainerNodeProcess(command, transport, node_log_path(context.logs, command), node_timeout_s=context.node_timeout_s)
        for command, transport in zip(commands, context.transports, strict=True)
    )


def start_checks(commands: tuple[NodeCommand, ...], context: StartContext, stop: StopRequest) -> tuple[NodeProcess, ...]:
    """Start the data check on every node, in the same runtime as the run. Raises NodeFailed."""

    def start(pair: tuple[NodeCommand, Transport]) -> NodeProcess:
        command, transport = pair
        log = node_log_path(context.logs, command, "data")
        if command.runtime == "process":
            return ChildNodeProcess(command, command.prepare, transport, log, context.project, secrets={}, part="data")
        return CheckNodeProcess(command, transport, log, node_timeout_s=context.node_timeout_s)

    answers = attempt_each(start, list(zip(commands, context.transports, strict=True)), until=stop.limit(START_LIMIT_S))
    failures = [answer for answer in answers if isinstance(answer, NodeFailed)]
    started = tuple(answer for answer in answers if not isinstance(answer, NodeFailed))
    if failures:
        ends = attempt_each(lambda process: process.kill(), started, until=stop.limit(0))
        left = "".join(f"\n  not cleared: {end}" for end in ends if isinstance(end, NodeFailed))
        raise NodeFailed(f"{together(failures, len(answers))}{left}")
    return started


def watch(
    processes: tuple[NodeProcess, ...], stop: StopRequest, tick: Callable[[], None], *, grace_s: Callable[[], float]
) -> tuple[NodeResult, ...]:
    """Wait until every process has ended. When one fails, or at a stop request, all that still run are asked to stop; `grace_s()` later, or at a
    second request, those that still run are killed. However this ends, nothing of the run is left on a node that responds. After a failure the
    other ranks wait for the one that is gone, so they cannot save."""
    started, asked_at, killed, most_s = time.monotonic(), 0.0, False, math.inf
    ended: dict[int, float] = {}
    left: dict[int, str] = {}
    try:
        while True:
            codes = [process.poll() for process in processes]
            tick()
            for rank, code in enumerate(codes):
                if code is not None:
                    ended.setdefault(rank, time.monotonic() - started)
            if None not in codes:
                break
            now = time.monotonic()
            running = [process for process, code in zip(processes, codes, strict=True) if code is None]
            if not asked_at and (stop.count or any(codes)):
                asked_at = now
                saves = may_save(attempt_each(lambda process: process.stop(), running, until=after(ASK_LIMIT_S)))
                most_s = FAILED_GRACE_S if any(codes) else math.inf if saves else START_GRACE_S
            if asked_at and not killed and (stop.count > 1 or now - asked_at > min(most_s, grace_s())):
                killed = True
                attempt_each(lambda process: process.kill(), running, until=after(ASK_LIMIT_S))
            time.sleep(TICK_S)
    finally:
        left = clear_all(processes, stop)
    return node_results(processes, left, seconds=ended)


def node_results(processes: Sequence[NodeProcess], left: Mapping[int, str], *, seconds: Mapping[int, float]) -> tuple[NodeResult, ...]:
    """How each process ended. `left` and `seconds` are by node rank: what clearing it reported, and when it was seen to have ended."""
    return tuple(
        NodeResult(
            host=process.command.host,
            node_rank=process.command.node_rank,
            code=process.poll() or 0,
            seconds=round(seconds.get(rank, 0.0), 3),
            killed=process.killed,
            lost=process.lost,
            left=left.get(rank, ""),
        )
        for rank, process in enumerate(processes)
    )


def clear_all(processes: Sequence[NodeProcess], stop: StopRequest) -> dict[int, str]:
    """Clear all nodes in parallel; position -> why one could not be cleared. A stop request limits how long a silent node is waited for."""
    answers = attempt_each(lambda process: process.clear(), processes, until=stop.limit(CLEAR_LIMIT_S, REMOVE_AGAIN_S))
    return {position: str(answer) for position, answer in enumerate(answers) if isinstance(answer, NodeFailed)}


def clear_and_report(processes: Sequence[NodeProcess], stop: StopRequest, say: Callable[[str], None]) -> None:
    """Clear all nodes, and print what could not be cleared: a container that stays holds its device."""
    for why in clear_all(processes, stop).values():
        say(f"not cleared: {why}")


def node_log_path(folder: Path, command: NodeCommand, kind: str = "node") -> Path:
    """The file for all output of the node's ranks, or of its data check (`data`)."""
    return folder / f"{kind}{command.node_rank}.log"
