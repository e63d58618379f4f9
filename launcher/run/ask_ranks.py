"""Asks the ranks of a node to save and end. The signal goes to the ranks themselves, not to torchrun: torchrun kills them 30 s after its own
SIGTERM (torch 2.7, and by default later ones too), and a step and the write of a large state take longer."""

import os
import signal
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from launcher.errors import NodeFailed
from launcher.plan.commands import FOLDER_VARIABLE, TORCHRUN, NodeCommand
from launcher.ssh.transport import Running, Transport, processes_with

SCRIPT = Path(__file__).parent / "node_scripts" / "ask_ranks.sh"
NO_RANKS = 3  # exit code of the script
SCRIPT_S = 20.0  # for a container to run the script


def ask_container(command: NodeCommand, transport: Transport) -> bool:
    """Whether there may be something to save: False where torchrun has no ranks. A container that has ended is no error."""
    if TORCHRUN in command.start:
        asked = transport.feed(("docker", "exec", "--interactive", command.name, "sh", "-s"), (SCRIPT.read_bytes(),), timeout_s=SCRIPT_S)
        if asked.code == 0:
            return True
        transport.run(command.stop)
        return asked.code != NO_RANKS
    transport.run(command.stop)
    return True


def ask_child(command: NodeCommand, running: Running) -> bool:
    """As `ask_container`, for torchrun or a single process that is a child of this one."""
    ranks = children_of(running.pid, command.folder) if TORCHRUN in command.start else ()
    for pid in ranks:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    if not ranks:
        running.signal(signal.SIGTERM)
    return bool(ranks) or TORCHRUN not in command.start


def ask_orphans(folder: str) -> bool:
    """As `ask_container`, for the processes of this machine that belong to the run in `folder`. Raises NodeFailed for those of another user."""
    pids = processes_with(FOLDER_VARIABLE, folder)
    first = [pid for pid in pids if parent_of(pid) not in pids]
    saves = False
    for pid in first:
        ranks = children_of(pid, folder) if is_torchrun(pid) else ()
        for asked in ranks or (pid,):
            kill_own(asked, signal.SIGTERM)
        saves = saves or bool(ranks) or not is_torchrun(pid)
    return saves


def children_of(pid: int, folder: str) -> tuple[int, ...]:
    return tuple(each for each in processes_with(FOLDER_VARIABLE, folder) if parent_of(each) == pid)


def is_torchrun(pid: int) -> bool:
    return TORCHRUN in read_proc(pid, "cmdline").split("\0")


def parent_of(pid: int) -> int:
    fields = read_proc(pid, "stat").rpartition(")")[2].split()
    return int(fields[1]) if fields else 0


def read_proc(pid: int, name: str) -> str:
    """'' for a process that has ended."""
    try:
        return Path(f"/proc/{pid}/{name}").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def kill_own(pid: int, number: int) -> None:
    """Raises NodeFailed for a process of another user."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return
    except PermissionError as error:
        raise NodeFailed(f"process {pid} of the run still runs, and belongs to another user: end it there, and try again") from error


def may_save(answers: Sequence[bool | NodeFailed]) -> bool:
    """Whether any node has something to save. A node that did not answer may have."""
    return any(answer is not False for answer in answers)
