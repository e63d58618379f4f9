"""Runs commands on a machine: an argv tuple in, a Result out. No shell reads a command here."""

import contextlib
import os
import select
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from launcher.errors import NodeFailed

# Variables that a process on this machine inherits from the launcher. The plan sets all others, so that a variable in a .bashrc cannot change
# a result.
KEPT_VARIABLES = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "USER", "LOGNAME", "HF_HOME", "HF_TOKEN", "XDG_CACHE_HOME")
# What set_env.sh of CANN and of its ATB export for a process on this machine, next to PATH and LD_LIBRARY_PATH: where they are installed. A
# container sources them itself (images/entrypoint.sh). Of PYTHONPATH their own folders are kept, whose packages CANN's compiler imports.
TOOLKIT_HOMES = ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME", "ATB_HOME_PATH")
TOOLKIT_VARIABLES = (*TOOLKIT_HOMES, "ASCEND_OPP_PATH", "ASCEND_CUSTOM_OPP_PATH", "ASCEND_AICPU_PATH", "TOOLCHAIN_HOME")
PIECE_BYTES = 1 << 18


@dataclass(frozen=True, kw_only=True)
class Result:
    """The end of a command. `output`: stdout, `errors`: stderr, as text."""

    argv: tuple[str, ...]
    code: int
    output: str
    errors: str

    def expect(self, what: str) -> "Result":
        """Self when the exit code is 0; otherwise raises NodeFailed with the last ten lines of output."""
        if self.code == 0:
            return self
        tail = "\n".join((self.errors or self.output).strip().splitlines()[-10:])
        raise NodeFailed(f"{what} failed with exit code {self.code}: {' '.join(self.argv)}\n{tail}")


class Running(Protocol):
    """A running command. `signal` reaches it and its child processes."""

    pid: int

    def poll(self) -> int | None: ...
    def signal(self, number: signal.Signals) -> None: ...
    def wait(self, timeout_s: float) -> int | None: ...


class Transport(Protocol):
    """One machine. All methods raise NodeFailed when the machine fails; an exit code of the command is a Result."""

    host: str

    @property
    def remarks(self) -> tuple[str, ...]:
        """What a user should know of how the machine is reached: keywords of the ssh config that are ignored."""
        ...

    def run(
        self, argv: tuple[str, ...], *, environment: Mapping[str, str] | None = None, timeout_s: float = 60, folder: Path | None = None
    ) -> Result: ...
    def start(
        self, argv: tuple[str, ...], *, log: Path, environment: Mapping[str, str] | None = None, folder: Path | None = None
    ) -> Running: ...
    def put(self, content: bytes, path: str, *, mode: int = 0o600) -> None: ...
    def get(self, path: str) -> bytes | None: ...
    def feed(self, argv: tuple[str, ...], chunks: Iterable[bytes], *, timeout_s: float) -> Result: ...
    def stream(self, argv: tuple[str, ...], *, silence_s: float = 1800) -> AbstractContextManager[Iterator[bytes]]: ...
    def close(self) -> None: ...


def python_path(environ: Mapping[str, str]) -> dict[str, str]:
    """PYTHONPATH with the folders of the toolkit alone; {} without any."""
    homes = [Path(environ[name]) for name in TOOLKIT_HOMES if environ.get(name)]
    folders = [Path(text) for text in environ.get("PYTHONPATH", "").split(os.pathsep) if text]
    kept = [str(folder) for folder in folders if any(folder.is_relative_to(home) for home in homes)]
    return {"PYTHONPATH": os.pathsep.join(kept)} if kept else {}


class Local:
    """This machine."""

    remarks: tuple[str, ...] = ()

    def __init__(self, environ: Mapping[str, str], host: str = "localhost") -> None:
        self.host = host
        self.kept = {key: environ[key] for key in (*KEPT_VARIABLES, *TOOLKIT_VARIABLES) if key in environ} | python_path(environ)

    def run(
        self, argv: tuple[str, ...], *, environment: Mapping[str, str] | None = None, timeout_s: float = 60, folder: Path | None = None
    ) -> Result:
        """Run a command and wait for it; any exit code is a Result. Raises NodeFailed for a missing program and a timeout."""
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
            raise missing_program(argv, error) from error
        except subprocess.TimeoutExpired as error:
            raise NodeFailed(f"no answer within {timeout_s:g} s: {' '.join(argv)}") from error
        return Result(argv=argv, code=done.returncode, output=done.stdout, errors=done.stderr)

    def start(
        self, argv: tuple[str, ...], *, log: Path, environment: Mapping[str, str] | None = None, folder: Path | None = None
    ) -> "LocalProcess":
        """Start a command in a session of its own, so that Ctrl-C on the terminal reaches only the launcher; output goes to `log`."""
        with log.open("ab") as file:
            streams = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": subprocess.STDOUT}
            return LocalProcess(self._open(argv, environment, cwd=folder, start_new_session=True, **streams))

    def put(self, content: bytes, path: str, *, mode: int = 0o600) -> None:
        """Write the whole file or nothing; missing folders are created with mode 0755."""
        target = Path(path)
        aside = target.with_name(f"{target.name}.part.{os.getpid()}.{threading.get_ident()}")
        try:
            for folder in reversed([parent for parent in target.parents if not parent.exists()]):
                folder.mkdir(exist_ok=True)
                folder.chmod(0o755)
            try:
                with os.fdopen(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                    file.write(content)
                    os.fchmod(file.fileno(), mode)
                aside.replace(target)
            finally:
                aside.unlink(missing_ok=True)
        except OSError as error:
            raise NodeFailed(f"{self.host}: {path} could not be written: {error.strerror}") from error

    def get(self, path: str) -> bytes | None:
        """The content of a file; None when it does not exist."""
        try:
            return Path(path).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise NodeFailed(f"{self.host}: {path} could not be read: {error.strerror}") from error

    def feed(self, argv: tuple[str, ...], chunks: Iterable[bytes], *, timeout_s: float) -> Result:
        """Send the chunks to the stdin of a command. When `chunks` raises, the command is killed before its stdin ends."""
        with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
            process = self._open(argv, stdin=subprocess.PIPE, stdout=output, stderr=errors)
            timer = threading.Timer(timeout_s, process.kill)
            timer.start()
            try:
                self._send(process, chunks)
                code = process.wait()
            finally:
                over = timer.finished.is_set()
                timer.cancel()
                end(process)
            if over and code == -signal.SIGKILL:
                raise NodeFailed(f"no answer within {timeout_s:g} s: {' '.join(argv)}")
            return Result(argv=argv, code=code, output=text_of(output), errors=text_of(errors))

    @contextlib.contextmanager
    def stream(self, argv: tuple[str, ...], *, silence_s: float = 1800) -> Iterator[Iterator[bytes]]:
        """The stdout of a command in pieces. The iterator raises NodeFailed at the end when the command failed, and after `silence_s` without
        output. Leaving early kills the command."""
        with tempfile.TemporaryFile() as errors:
            process = self._open(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors)
            try:
                yield self._streamed(argv, process, errors, silence_s)
            finally:
                end(process)

    def close(self) -> None:
        """There is nothing to close."""

    def _open(self, argv: tuple[str, ...], environment: Mapping[str, str] | None = None, **options: Any) -> "subprocess.Popen[bytes]":
        try:
            return subprocess.Popen(argv, env={**self.kept, **(environment or {})}, bufsize=0, **options)
        except FileNotFoundError as error:
            raise missing_program(argv, error) from error
        except OSError as error:  # not executable, or too many open files
            raise NodeFailed(f"{argv[0]} could not be started on this machine: {error.strerror}") from error

    def _send(self, process: "subprocess.Popen[bytes]", chunks: Iterable[bytes]) -> None:
        """Send all chunks, then end the stdin. A command that stops reading is not an error here: its exit code decides."""
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            for chunk in chunks:
                rest = memoryview(chunk)
                while rest:
                    rest = rest[process.stdin.write(rest) :]
            process.stdin.close()

    def _streamed(self, argv: tuple[str, ...], process: "subprocess.Popen[bytes]", errors: IO[bytes], silence_s: float) -> Iterator[bytes]:
        assert process.stdout is not None
        poll = select.poll()
        poll.register(process.stdout, select.POLLIN)
        while True:
            if not poll.poll(silence_s * 1000):
                raise NodeFailed(f"no output within {silence_s:g} s: {' '.join(argv)}")
            if not (chunk := process.stdout.read(PIECE_BYTES)):
                break
            yield chunk
        code = process.wait()
        Result(argv=argv, code=code, output="", errors=text_of(errors)).expect(f"reading the output of {argv[0]}")


def missing_program(argv: tuple[str, ...], error: FileNotFoundError) -> NodeFailed:
    return NodeFailed(f"{error.filename!r} was not found on this machine, needed for: {' '.join(argv)}")


def text_of(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode("utf-8", errors="replace")


def end(process: "subprocess.Popen[bytes]") -> None:
    """Kill a command, if it still runs, before its pipes are closed, so that it does not accept a partial input as complete."""
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


class LocalProcess:
    def __init__(self, process: "subprocess.Popen[bytes]") -> None:
        self.process, self.pid = process, process.pid

    def poll(self) -> int | None:
        return self.process.poll()

    def signal(self, number: signal.Signals) -> None:
        """Signal the process group. It is not an error when it has ended."""
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
    """Ids of the processes of this machine that were started with `variable=value`, except this one.

    torchrun starts every rank in a session of its own, so the process group does not contain them; they do inherit the variable.
    """
    wanted = f"{variable}={value}".encode()
    return tuple(
        sorted(
            int(entry.name)
            for entry in proc.iterdir()
            if entry.name.isdigit() and has_variable(entry, wanted) and int(entry.name) != os.getpid()
        )
    )


def has_variable(entry: Path, wanted: bytes) -> bool:
    try:
        return wanted in (entry / "environ").read_bytes().split(b"\0")
    except OSError:  # it has ended, or belongs to another user
        return False


def kill_processes(pids: tuple[int, ...], kill: Callable[[int, int], None] = os.kill) -> None:
    for pid in pids:
        try:
            kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
