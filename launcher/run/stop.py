"""Ending a run on its nodes by name, whoever started it, and making sure that it is gone: containers, processes, device memory."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from launcher.doctor.smi import NPU_QUERY, NVIDIA_APPS_QUERY, UnreadableTable, nvidia_processes, read_npu
from launcher.errors import NodeFailed
from launcher.plan.commands import data_env_file, data_name, env_file, is_absent
from launcher.run.node_process import remove_env_file
from launcher.run.run_folder import WorkingNode
from launcher.ssh.parallel import attempt_each

POLL_S = 0.5
REMOVAL_S = 5.0  # that an engine may take to remove a container after it has said so, or which another client has asked it to
NO_CONTAINER = "no container"
RUNNING = ("running", "created", "restarting", "paused")


@dataclass(frozen=True, kw_only=True)
class StopResult:
    """What became of a container. `left`: '' when nothing of it is there any more, else what is, or why that is not known."""

    host: str
    left: str


def end_run(nodes: Sequence[WorkingNode], *, accelerator: str, grace_s: float) -> tuple[StopResult, ...]:
    """Ask all to save and end, remove them `grace_s` later, and look. No node waits for another, or for one that does not answer."""

    def end(node: WorkingNode) -> str:
        pids = processes_of(node)
        node.transport.run(node.command.stop)  # one that has ended is no error
        deadline = time.monotonic() + grace_s
        while state_of(node).startswith(RUNNING) and time.monotonic() < deadline:
            time.sleep(POLL_S)
        node.transport.run(node.command.remove)
        node.transport.run((*node.command.remove[:-1], data_name(node.command.name)))
        for path in (env_file, data_env_file):
            remove_env_file(node.transport, path(node.command.folder, node.command.node_rank))
        return find_leftovers(node, pids, accelerator)

    answers = attempt_each(end, nodes)
    return tuple(StopResult(host=node.command.host, left=str(answer)) for node, answer in zip(nodes, answers, strict=True))


def state_of(node: WorkingNode) -> str:
    """`<status> <exit code>` as the engine says it, or that there is no container. Raises NodeFailed when the engine does not answer."""
    found = node.transport.run(node.command.probe)
    if found.code == 0:
        return found.output.strip()
    if is_absent(found.errors):
        return NO_CONTAINER
    raise NodeFailed(f"{node.command.host}: its Docker engine does not answer: {found.errors.strip()}")


def processes_of(node: WorkingNode) -> frozenset[int]:
    """The node's ids of all processes in the container."""
    listed = node.transport.run(("docker", "top", node.command.name, "-eo", "pid"))
    if listed.code:  # no `ps` on the node
        listed = node.transport.run(("docker", "inspect", "--format", "{{.State.Pid}}", node.command.name))
    return frozenset(int(word) for word in listed.output.split() if word.isdecimal() and int(word))


def find_leftovers(node: WorkingNode, pids: frozenset[int], accelerator: str) -> str:
    deadline = time.monotonic() + REMOVAL_S
    while found := containers_of(node):
        if time.monotonic() > deadline:
            return f"container {', '.join(found)} is still there; docker rm --force {found[0]} there says why"
        time.sleep(POLL_S)
    alive = node.transport.run(("ls", "-d", *(f"/proc/{pid}" for pid in sorted(pids)))).output.split() if pids else []
    if alive:
        names = " ".join(path.removeprefix("/proc/") for path in alive)
        return f"processes of it still run: {names}. A driver call that hangs keeps them; restart the node if they stay"
    return held_memory(node, pids, accelerator)


def containers_of(node: WorkingNode) -> list[str]:
    named = ("docker", "ps", "--all", "--format", "{{.Names}}", "--filter", f"name=^{node.command.name}(-data)?$")
    return node.transport.run(named).expect(f"{node.command.host}: asking what is left").output.split()


def held_memory(node: WorkingNode, pids: frozenset[int], accelerator: str) -> str:
    """Device memory that the driver still counts for one of the processes."""
    if not pids or accelerator == "cpu":
        return ""
    asked = node.transport.run(NVIDIA_APPS_QUERY if accelerator == "cuda" else NPU_QUERY)
    if asked.code:
        return (
            f"{'nvidia-smi' if accelerator == 'cuda' else 'npu-smi'} does not say whether its device memory is free: {asked.errors.strip()}"
        )
    try:
        if accelerator == "cuda":
            holders = {process.pid for _, process in nvidia_processes(asked.output)}
        else:
            holders = {process.pid for device in read_npu(asked.output) for process in device.processes}
    except UnreadableTable as error:
        return f"whether its device memory is free is not known: {error}"
    held = sorted(holders & pids)
    return f"device memory is still held by its process(es) {' '.join(map(str, held))}" if held else ""
