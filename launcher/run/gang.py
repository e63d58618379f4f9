"""All nodes of a run as one: started together or not at all, watched together, stopped together. The first failure ends every member."""

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from launcher.errors import NodeFailed
from launcher.plan.commands import NodeCommand, data_env_file, data_name, env_file
from launcher.run.node_process import CheckNodeProcess, ChildNodeProcess, ContainerNodeProcess, NodeProcess, NodeResult, remove_env_file
from launcher.run.signals import StopRequest
from launcher.ssh.parallel import after, attempt_each, together
from launcher.ssh.transport import Transport

TICK_S = 0.1
ASKERS = 16
START_PATIENCE_S = 3.0  # after a Ctrl-C, for the starts that are under way
END_PATIENCE_S, HASTE_S = 9.0, 2.0  # after it, and after another, for the end of all that did start
LEAVE_S = 1.0  # for logs that nobody follows any more
ASK_S = 5.0  # that asking the nodes to stop holds up the watch; a node that does not answer gets to know in its own time


@dataclass(frozen=True, kw_only=True)
class StartContext:
    """What starting members takes: a transport for every command, the folders for logs and for child processes, secret variables."""

    transports: tuple[Transport, ...]
    logs: Path
    project: Path
    secrets: Mapping[str, str]
    node_timeout_s: float


def start_trainers(commands: tuple[NodeCommand, ...], context: StartContext, stop: StopRequest) -> tuple[NodeProcess, ...]:
    """Start every node or none: when one does not start, those that did are ended, and all that went wrong is told. After a request to stop
    no start is waited for, and what did start is the caller's to `remove_by_name`. Raises NodeFailed."""
    if commands[0].runtime == "process":
        return start_children(commands, context)
    members = container_processes(commands, context)
    answers = attempt_each(
        lambda member: member.start(context.secrets, lambda: bool(stop.count)), members, until=lambda: stop.is_over(START_PATIENCE_S)
    )
    failures = [answer for answer in answers if isinstance(answer, NodeFailed)]
    if failures:
        ends = attempt_each(ContainerNodeProcess.kill, members, until=lambda: bool(stop.count))
        attempt_each(ContainerNodeProcess.unfollow, members, until=after(LEAVE_S))
        left = "".join(
            f"\n  not cleared: {member.command.host}: {str(end).splitlines()[0]}; when it answers: docker rm --force {member.command.name} there"
            for member, end in zip(members, ends, strict=True)
            if isinstance(end, NodeFailed)
        )
        raise NodeFailed(f"{together(failures, len(members))}{left}")
    return members


def remove_by_name(commands: tuple[NodeCommand, ...], context: StartContext, stop: StopRequest) -> dict[str, str]:
    """Remove, by their names, the containers of a start that was given up; host -> why that is not sure. A node that has not answered in
    time may still do it: the command is there."""

    def remove(pair: tuple[NodeCommand, Transport]) -> None:
        command, transport = pair
        transport.run((*command.remove, data_name(command.name)))
        for path in (env_file, data_env_file):
            remove_env_file(transport, path(command.folder, command.node_rank))
        named = ("docker", "ps", "--all", "--quiet", "--filter", f"name=^{command.name}(-data)?$")
        if transport.run(named).expect(f"{command.host}: asking what is left").output.strip():
            raise NodeFailed(f"its engine has not ended container {command.name} yet")

    pairs = list(zip(commands, context.transports, strict=True))
    answers = attempt_each(remove, pairs, until=lambda: stop.is_over(END_PATIENCE_S, haste_s=HASTE_S))
    return {command.host: str(answer) for command, answer in zip(commands, answers, strict=True) if isinstance(answer, NodeFailed)}


def start_children(commands: tuple[NodeCommand, ...], context: StartContext) -> tuple[NodeProcess, ...]:
    started: list[NodeProcess] = []
    try:
        for command, transport in zip(commands, context.transports, strict=True):
            log = node_log_path(context.logs, command)
            started.append(ChildNodeProcess(command, command.start, transport, log, context.project, secrets=context.secrets))
    except NodeFailed:
        for member in started:
            member.kill()
        raise
    return tuple(started)


def find_trainers(commands: tuple[NodeCommand, ...], context: StartContext) -> tuple[NodeProcess, ...]:
    """Members whose containers were started by a launcher that is gone. Their logs go on where it left them."""
    return container_processes(commands, context)


def container_processes(commands: tuple[NodeCommand, ...], context: StartContext) -> tuple[ContainerNodeProcess, ...]:
    asker = new_asker(commands)
    return tuple(
        ContainerNodeProcess(command, transport, node_log_path(context.logs, command), asker, node_timeout_s=context.node_timeout_s)
        for command, transport in zip(commands, context.transports, strict=True)
    )


def new_asker(commands: tuple[NodeCommand, ...]) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=min(ASKERS, len(commands)), thread_name_prefix="omnilaunch-asker")


def start_checks(commands: tuple[NodeCommand, ...], context: StartContext, stop: StopRequest) -> tuple[NodeProcess, ...]:
    """The data check on every node, in the runtime of the run. Raises NodeFailed."""
    asker = new_asker(commands)

    def start(pair: tuple[NodeCommand, Transport]) -> NodeProcess:
        command, transport = pair
        log = context.logs / f"data{command.node_rank}.log"
        if command.runtime == "process":
            return ChildNodeProcess(command, command.prepare, transport, log, context.project, secrets={})
        return CheckNodeProcess(command, transport, log, asker, node_timeout_s=context.node_timeout_s)

    answers = attempt_each(start, list(zip(commands, context.transports, strict=True)), until=lambda: stop.is_over(START_PATIENCE_S))
    failures = [answer for answer in answers if isinstance(answer, NodeFailed)]
    started = tuple(answer for answer in answers if not isinstance(answer, NodeFailed))
    if failures:
        attempt_each(lambda member: member.kill(), started, until=lambda: bool(stop.count))
        raise together(failures, len(answers))
    return started


def watch(
    members: tuple[NodeProcess, ...], stop: StopRequest, tick: Callable[[], None], *, grace_s: Callable[[], float]
) -> tuple[NodeResult, ...]:
    """Until every member has ended. One that fails, or a request to stop, stops all; `grace_s()` later, or at a second request,
    they are killed. Whatever happens here, nothing of the run is left behind on a node that answers."""
    started, asked_at, killed = time.monotonic(), 0.0, False
    ended: dict[int, float] = {}
    left: dict[int, str] = {}
    try:
        while True:
            codes = [member.poll() for member in members]
            tick()
            for rank, code in enumerate(codes):
                if code is not None:
                    ended.setdefault(rank, time.monotonic() - started)
            if None not in codes:
                break
            now = time.monotonic()
            running = [member for member, code in zip(members, codes, strict=True) if code is None]
            if not asked_at and (stop.count or any(codes)):
                asked_at = now
                attempt_each(lambda member: member.stop(), running, until=after(ASK_S))
            if asked_at and not killed and (stop.count > 1 or now - asked_at > grace_s()):
                killed = True
                attempt_each(lambda member: member.kill(), running, until=after(ASK_S))
            time.sleep(TICK_S)
    finally:
        left = clear_all(members)
    return tuple(
        NodeResult(
            host=member.command.host,
            node_rank=member.command.node_rank,
            code=member.poll() or 0,
            seconds=round(ended[rank], 3),
            killed=killed,
            lost=member.lost,
            left=left.get(rank, ""),
        )
        for rank, member in enumerate(members)
    )


def clear_all(members: Sequence[NodeProcess]) -> dict[int, str]:
    """Clear every member side by side; place -> why it could not be."""
    answers = attempt_each(lambda member: member.clear(), members)
    return {place: str(answer) for place, answer in enumerate(answers) if isinstance(answer, NodeFailed)}


def node_log_path(folder: Path, command: NodeCommand) -> Path:
    """Everything that the node's ranks print, whole."""
    return folder / f"node{command.node_rank}.log"
