"""The seam between the launcher and a machine: a command in, a Result out. Commands are argv tuples and never meet a shell here."""

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

# What a process on this machine keeps of the launcher's own environment. All else is set by the plan, so that a variable in
# somebody's .bashrc cannot change a result.
KEPT_VARIABLES = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "USER", "LOGNAME", "HF_HOME", "HF_TOKEN", "XDG_CACHE_HOME")
PIECE_BYTES = 1 << 18


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
    """One machine. Everything raises NodeFailed when the machine, not the command, is at fault."""

    host: str

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


class Local:
    """This machine."""

    def __init__(self, environ: Mapping[str, str], host: str = "localhost") -> None:
        self.host = host
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

    def put(self, content: bytes, path: str, *, mode: int = 0o600) -> None:
        """Write a file whole or not at all; missing folders are made with mode 0755."""
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
        """The content of a file; None when there is none."""
        try:
            return Path(path).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise NodeFailed(f"{self.host}: {path} could not be read: {error.strerror}") from error

    def feed(self, argv: tuple[str, ...], chunks: Iterable[bytes], *, timeout_s: float) -> Result:
        """Give a command the chunks as its stdin. When `chunks` raises, the command is killed before it sees its stdin end."""
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
        """The stdout of a command piece by piece. In place of its end the iterator raises NodeFailed when the command fails, and so it
        does after `silence_s` without output. Leaving early kills the command."""
        with tempfile.TemporaryFile() as errors:
            process = self._open(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors)
            try:
                yield self._streamed(argv, process, errors, silence_s)
            finally:
                end(process)

    def close(self) -> None:
        """Nothing is kept open."""

    def _open(self, argv: tuple[str, ...], **streams: Any) -> "subprocess.Popen[bytes]":
        try:
            return subprocess.Popen(argv, env=self.kept, bufsize=0, **streams)
        except FileNotFoundError as error:
            raise NodeFailed(f"{error.filename!r} was not found on this machine, needed for: {' '.join(argv)}") from error

    def _send(self, process: "subprocess.Popen[bytes]", chunks: Iterable[bytes]) -> None:
        """All chunks, then the end. A command that stops reading is no error here: how it ended says more."""
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


def text_of(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode("utf-8", errors="replace")


def end(process: "subprocess.Popen[bytes]") -> None:
    """Kill a command, if it still runs, before its pipes are closed: it must not take a broken input for a whole one."""
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
