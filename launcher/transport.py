"""The seam between the launcher and a machine: a command in, a Result out. Commands are argv tuples and never meet a shell here."""

import os
import signal
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from launcher.errors import NodeFailed

# What a process on this machine keeps of the launcher's own environment. All else is set by the plan, so that a variable in
# somebody's .bashrc cannot change a result.
KEPT_VARIABLES = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "USER", "LOGNAME", "HF_HOME", "HF_TOKEN", "XDG_CACHE_HOME")


@dataclass(frozen=True, kw_only=True)
class Result:
    """How a command ended. `output` is stdout, `errors` stderr, both as text."""

    argv: tuple[str, ...]
    code: int
    output: str
    errors: str

    def expect(self, what: str) -> "Result":
        """Self when the code is 0; otherwise NodeFailed with the last ten lines."""
        if self.code == 0:
            return self
        tail = "\n".join((self.errors or self.output).strip().splitlines()[-10:])
        raise NodeFailed(f"{what} failed with exit code {self.code}: {' '.join(self.argv)}\n{tail}")


class Running(Protocol):
    """A command under way. `signal` reaches it and all that it started."""

    pid: int

    def poll(self) -> int | None: ...
    def signal(self, number: signal.Signals) -> None: ...
    def wait(self, timeout_s: float) -> int | None: ...


class Transport(Protocol):
    def run(
        self, argv: tuple[str, ...], *, environment: Mapping[str, str] | None = None, timeout_s: float = 60, folder: Path | None = None
    ) -> Result: ...
    def start(
        self, argv: tuple[str, ...], *, log: Path, environment: Mapping[str, str] | None = None, folder: Path | None = None
    ) -> Running: ...


class Local:
    """This machine."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self.kept = {key: environ[key] for key in KEPT_VARIABLES if key in environ}

    def run(
        self, argv: tuple[str, ...], *, environment: Mapping[str, str] | None = None, timeout_s: float = 60, folder: Path | None = None
    ) -> Result:
        """Wait for a command. A missing program or a timeout is NodeFailed; any exit code is a Result."""
        try:
            done = subprocess.run(
                argv,
                env={**self.kept, **(environment or {})},
                cwd=folder,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=timeout_s,
                stdin=subprocess.DEVNULL,
            )
        except FileNotFoundError as error:
            raise NodeFailed(f"{error.filename!r} was not found on this machine, needed for: {' '.join(argv)}") from error
        except subprocess.TimeoutExpired as error:
            raise NodeFailed(f"no answer within {timeout_s:g} s: {' '.join(argv)}") from error
        return Result(argv=argv, code=done.returncode, output=done.stdout, errors=done.stderr)

    def start(
        self, argv: tuple[str, ...], *, log: Path, environment: Mapping[str, str] | None = None, folder: Path | None = None
    ) -> "LocalProcess":
        """Start a command in a session of its own, so that a terminal's Ctrl-C reaches the launcher alone; output goes to `log`."""
        with log.open("ab") as file:
            try:
                process = subprocess.Popen(
                    argv,
                    env={**self.kept, **(environment or {})},
                    cwd=folder,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,
                )
            except FileNotFoundError as error:
                raise NodeFailed(f"{error.filename!r} was not found on this machine, needed for: {' '.join(argv)}") from error
        return LocalProcess(process)


class LocalProcess:
    def __init__(self, process: "subprocess.Popen[bytes]") -> None:
        self.process, self.pid = process, process.pid

    def poll(self) -> int | None:
        return self.process.poll()

    def signal(self, number: signal.Signals) -> None:
        """To the process group; one that is gone already is no error."""
        try:
            os.killpg(self.pid, number)
        except ProcessLookupError:
            return

    def wait(self, timeout_s: float) -> int | None:
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None


def processes_with(variable: str, value: str, *, proc: Path = Path("/proc")) -> tuple[int, ...]:
    """Ids of this machine's processes that were started with `variable=value`, this one excepted.

    torchrun gives every rank a session of its own, so a process group does not hold them all; what they inherit does.
    """
    wanted = f"{variable}={value}".encode()
    return tuple(
        sorted(
            int(entry.name)
            for entry in proc.iterdir()
            if entry.name.isdigit() and carries(entry, wanted) and int(entry.name) != os.getpid()
        )
    )


def carries(entry: Path, wanted: bytes) -> bool:
    try:
        return wanted in (entry / "environ").read_bytes().split(b"\0")
    except OSError:  # ended meanwhile, or another user's
        return False


def kill_processes(pids: tuple[int, ...], kill: Callable[[int, int], None] = os.kill) -> None:
    for pid in pids:
        try:
            kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
