"""Ending a run on its nodes by name, whoever started it, and making sure that it is gone: containers, processes, device memory."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from launcher.doctor.smi import NPU_QUERY, NVIDIA_APPS_QUERY, UnreadableTable, nvidia_processes, read_npu
from launcher.errors import NodeFailed
from launcher.image.docker import is_absent
from launcher.plan.commands import data_env_file, data_name, env_file
from launcher.run.node_process import remove_env_file
from launcher.run.run_folder import WorkingNode
from launcher.ssh.parallel import attempt_each

POLL_S = 0.5
REMOVAL_S = 5.0  # that an engine may take to remove a container after it has said so, or which another client has asked it to
NO_CONTAINER = "no container"
RUNNING = ("running", "created", "restarting", "paused")


@dataclass(frozen=True, kw_only=True)
class Ending:
    """What became of a container. `left`: '' when nothing of it is there any more, else what is, or why that is not known."""

    host: str
    left: str


def end_run(sites: Sequence[WorkingNode], *, accelerator: str, grace_s: float) -> tuple[Ending, ...]:
    """Ask all to save and end, remove them `grace_s` later, and look. No node waits for another, or for one that does not answer."""

    def end(site: WorkingNode) -> str:
        pids = processes_of(site)
        site.transport.run(site.command.stop)  # one that has ended is no error
        deadline = time.monotonic() + grace_s
        while state_of(site).startswith(RUNNING) and time.monotonic() < deadline:
            time.sleep(POLL_S)
        site.transport.run(site.command.remove)
        site.transport.run((*site.command.remove[:-1], data_name(site.command.name)))
        for path in (env_file, data_env_file):
            remove_env_file(site.transport, path(site.command.folder, site.command.node_rank))
        return what_is_left(site, pids, accelerator)

    answers = attempt_each(end, sites)
    return tuple(Ending(host=site.command.host, left=str(answer)) for site, answer in zip(sites, answers, strict=True))


def state_of(site: WorkingNode) -> str:
    """`<status> <exit code>` as the engine says it, or that there is no container. Raises NodeFailed when the engine does not answer."""
    found = site.transport.run(site.command.probe)
    if found.code == 0:
        return found.output.strip()
    if is_absent(found.errors):
        return NO_CONTAINER
    raise NodeFailed(f"{site.command.host}: its Docker engine does not answer: {found.errors.strip()}")


def processes_of(site: WorkingNode) -> frozenset[int]:
    """The node's ids of all processes in the container."""
    listed = site.transport.run(("docker", "top", site.command.name, "-eo", "pid"))
    if listed.code:  # no `ps` on the node
        listed = site.transport.run(("docker", "inspect", "--format", "{{.State.Pid}}", site.command.name))
    return frozenset(int(word) for word in listed.output.split() if word.isdecimal() and int(word))


def what_is_left(site: WorkingNode, pids: frozenset[int], accelerator: str) -> str:
    deadline = time.monotonic() + REMOVAL_S
    while found := containers_of(site):
        if time.monotonic() > deadline:
            return f"container {', '.join(found)} is still there; docker rm --force {found[0]} there says why"
        time.sleep(POLL_S)
    alive = site.transport.run(("ls", "-d", *(f"/proc/{pid}" for pid in sorted(pids)))).output.split() if pids else []
    if alive:
        names = " ".join(path.removeprefix("/proc/") for path in alive)
        return f"processes of it still run: {names}. A driver call that hangs keeps them; restart the node if they stay"
    return held_memory(site, pids, accelerator)


def containers_of(site: WorkingNode) -> list[str]:
    named = ("docker", "ps", "--all", "--format", "{{.Names}}", "--filter", f"name=^{site.command.name}(-data)?$")
    return site.transport.run(named).expect(f"{site.command.host}: asking what is left").output.split()


def held_memory(site: WorkingNode, pids: frozenset[int], accelerator: str) -> str:
    """Device memory that the driver still counts for one of the processes."""
    if not pids or accelerator == "cpu":
        return ""
    asked = site.transport.run(NVIDIA_APPS_QUERY if accelerator == "cuda" else NPU_QUERY)
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
