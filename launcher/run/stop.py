"""Ending a run on its nodes by the names of its containers, whoever started it, and checking that containers, processes and device memory are gone."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.doctor.smi import NPU_QUERY, NVIDIA_APPS_QUERY, UnreadableTable, nvidia_processes, read_npu
from launcher.plan.commands import FOLDER_VARIABLE
from launcher.plan.plan import Plan
from launcher.run.ask_ranks import ask_container, ask_orphans, kill_own
from launcher.run.container import NO_CONTAINER as NO_CONTAINER, POLL_S, clear_node, container_state
from launcher.run.run_folder import WorkingNode
from launcher.run.stop_limit import START_GRACE_S, find_limit_s
from launcher.ssh.parallel import attempt_each
from launcher.ssh.transport import kill_processes, processes_with

RUNNING = ("running", "created", "restarting", "paused")


@dataclass(frozen=True, kw_only=True)
class StopResult:
    """`left`: '' when nothing of the run exists on the host any more, else what does, or why that is not known."""

    host: str
    left: str


def end_run(nodes: Sequence[WorkingNode], *, accelerator: str, grace_s: float) -> tuple[StopResult, ...]:
    """Ask all containers to save and stop, remove them `grace_s` later, and check. No node waits for another one."""

    def end(node: WorkingNode) -> str:
        pids = processes_of(node)
        saves = ask_container(node.command, node.transport)
        deadline = time.monotonic() + (grace_s if saves else min(grace_s, START_GRACE_S))
        while state_of(node).startswith(RUNNING) and time.monotonic() < deadline:
            time.sleep(POLL_S)
        clear_node(node.command, node.transport)
        return find_leftovers(node, pids, accelerator)

    answers = attempt_each(end, nodes)
    hosts = [node.command.host for node in nodes]
    return tuple(StopResult(host=host, left=str(answer).removeprefix(f"{host}: ")) for host, answer in zip(hosts, answers, strict=True))


def end_processes(plan: Plan) -> None:
    """Ask the ranks of a run of processes to save and end, and kill what is left after the limit. Raises NodeFailed for processes of another
    user."""
    folder = plan.spec.output
    saves, began = ask_orphans(folder), time.monotonic()
    limit_s = find_limit_s(plan, Path(plan.folder)) if saves else START_GRACE_S
    while (left := processes_with(FOLDER_VARIABLE, folder)) and time.monotonic() - began < limit_s:
        time.sleep(POLL_S)
    while left:
        kill_processes(left, kill_own)
        time.sleep(POLL_S)
        left = processes_with(FOLDER_VARIABLE, folder)


def state_of(node: WorkingNode) -> str:
    """`<status> <exit code>` of the container, or NO_CONTAINER. Raises NodeFailed when the engine does not respond."""
    return container_state(node.command, node.transport)


def processes_of(node: WorkingNode) -> frozenset[int]:
    """The node's ids of all processes in the container."""
    listed = node.transport.run(("docker", "top", node.command.name, "-eo", "pid"))
    if listed.code:  # the node has no `ps`
        listed = node.transport.run(("docker", "inspect", "--format", "{{.State.Pid}}", node.command.name))
    return frozenset(int(word) for word in listed.output.split() if word.isdecimal() and int(word))


def find_leftovers(node: WorkingNode, pids: frozenset[int], accelerator: str) -> str:
    """Which of the container's processes still run, or what device memory they hold; '' when none is left."""
    alive = node.transport.run(("ls", "-d", *(f"/proc/{pid}" for pid in sorted(pids)))).output.split() if pids else []
    if alive:
        names = " ".join(path.removeprefix("/proc/") for path in alive)
        return f"processes of the run still run: {names}. A driver call that hangs can hold them; restart the node if they stay"
    return held_memory(node, pids, accelerator)


def held_memory(node: WorkingNode, pids: frozenset[int], accelerator: str) -> str:
    """Device memory that the driver still reports for one of the processes."""
    if not pids or accelerator == "cpu":
        return ""
    asked = node.transport.run(NVIDIA_APPS_QUERY if accelerator == "cuda" else NPU_QUERY)
    if asked.code:
        tool = "nvidia-smi" if accelerator == "cuda" else "npu-smi"
        return f"it is not known whether its device memory is free, since {tool} failed: {asked.errors.strip()}"
    try:
        if accelerator == "cuda":
            holders = {process.pid for _, process in nvidia_processes(asked.output)}
        else:
            holders = {process.pid for device in read_npu(asked.output) for process in device.processes}
    except UnreadableTable as error:
        return f"it is not known whether its device memory is free: {error}"
    held = sorted(holders & pids)
    return f"device memory is still held by pid {' '.join(map(str, held))}" if held else ""
