"""The lock of a run: one launcher at a time supervises it. And the request to stop a run, which every launcher of its folder sees.

The lock is an open file description lock (fcntl(2), F_OFD_SETLK) on a file in the folder. The kernel releases it when the process that holds
it ends, in whatever way. F_OFD_GETLK asks who holds it without taking it, so that looking never makes another launcher fail.
"""

import fcntl
import json
import os
import re
import socket
import struct
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from launcher.errors import ConfigRefused
from trainer import contract

RUN_LOCK_FILE = "launcher.lock"
STOP_FILE = "stop.json"
# struct flock of Linux on 64 bits: type, whence, start, length (0: to the end of the file), pid (0: F_OFD_* demands it).
FLOCK = "hhqqi4x"
WRITE_LOCK = struct.pack(FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
HOLDER = re.compile(r"process (?P<pid>[0-9]+) on (?P<host>\S+)")  # the text of the file
HELD: set[int] = set()  # file descriptors of the locks that this process holds


def forget_locks() -> None:
    """A forked child shares its parent's locks until it closes them: without this, the lock would outlive the parent."""
    for descriptor in HELD:
        os.close(descriptor)
    HELD.clear()


os.register_at_fork(after_in_child=forget_locks)


@contextmanager
def hold_lock(path: Path, refusal: str) -> Iterator[None]:
    """Hold the lock on `path`, which is created if it is missing. Raises ConfigRefused at once if the lock is held, with the text `refusal`,
    in which `{holder}` becomes the process that holds it. Raises OSError if the file cannot be opened."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    HELD.add(descriptor)
    try:
        try:
            fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, WRITE_LOCK)
        except BlockingIOError as error:
            holder = os.pread(descriptor, 1000, 0).decode(errors="replace").strip() or "unknown"
            raise ConfigRefused(refusal.replace("{holder}", holder)) from error
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        yield
    finally:
        if descriptor in HELD:  # not in a forked child, which has closed it
            HELD.remove(descriptor)
            os.close(descriptor)


def lock_run(folder: Path) -> AbstractContextManager[None]:
    """Hold the lock of a run. Raises ConfigRefused if another launcher holds it."""
    name = folder.name
    refusal = (
        f"run {name} is supervised by another launcher ({{holder}}). To follow it from here: omnilaunch logs -f {name}. "
        f"To end it: omnilaunch stop {name}"
    )
    return hold_lock(folder / RUN_LOCK_FILE, refusal)


def is_locked(folder: Path) -> bool:
    """Whether a launcher supervises the run now. Does not take the lock, not even for a moment."""
    try:
        descriptor = os.open(folder / RUN_LOCK_FILE, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        answer = fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, WRITE_LOCK)
    finally:
        os.close(descriptor)
    return bool(struct.unpack(FLOCK, answer)[0] != fcntl.F_UNLCK)


@dataclass(frozen=True, kw_only=True)
class Holder:
    """The process of this machine that holds a lock. `problem`: why it cannot be signalled, '' where it can."""

    pid: int
    described: str
    problem: str = ""


def find_holder(folder: Path) -> Holder | None:
    """Who holds the lock of a run now, by what it wrote into the file and by the files that it has open. None for a process of another machine
    or container."""
    file = folder / RUN_LOCK_FILE
    described = file.read_text(encoding="utf-8", errors="replace").strip()
    found = HOLDER.fullmatch(described)
    if found is None or found["host"] != socket.gethostname():
        return None
    pid = int(found["pid"])
    try:
        opened = any(entry.exists() and entry.samefile(file) for entry in Path(f"/proc/{pid}/fd").iterdir())
    except PermissionError:
        return Holder(pid=pid, described=described, problem="it belongs to another user, who can stop it")
    except OSError:
        return None
    return Holder(pid=pid, described=described) if opened else None


def ask_to_stop(folder: Path, now: datetime) -> None:
    """From now on, the end of the run is not a failure, and the run is not started again."""
    contract.write_text(json.dumps({"asked_at": now.isoformat(timespec="milliseconds")}) + "\n", folder / STOP_FILE)


def is_asked_to_stop(folder: Path) -> bool:
    return (folder / STOP_FILE).exists()
