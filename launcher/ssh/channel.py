"""One command on an open SSH connection: the line that is sent, and its output.

This is the only module that quotes. sshd passes a command to the user's login shell. For a POSIX shell the line is

    [eval "$(cat)"; ] [cd -- 'FOLDER' && ] { command -v 'PROGRAM' >/dev/null && echo "omnilaunch $$" || echo "omnilaunch 0"; } && exec 'PROGRAM' 'ARGUMENT' ...

with every word in single quotes, so that the shell reads no keyword, assignment or pattern in it. Output of the login files comes before
the `omnilaunch` line and is dropped. `$$` remains the id of the program, and of its process group, after `exec`. For another shell (fish, tcsh)
the same line is sent in octal, to a `sh` that decodes it: no character of it means anything to the shell that reads it first.
"""

import re
import select
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from paramiko import Channel  # type: ignore[import-untyped]

from launcher.errors import NodeFailed
from launcher.ssh.transport import PIECE_BYTES

LINE_LIMIT_BYTES = 128 * 1024 - 1  # MAX_ARG_STRLEN of Linux: sshd passes the line to the shell as one argument
SETTLE_S = 0.05  # between checks of programs that have closed their output and still run
MARK = re.compile(rb"omnilaunch (\d+)\n")
# What a login prints in place of running the command -> why, and what to do.
REFUSALS = {
    r"account is (currently )?not available": "the user has no login shell. Next: sudo chsh -s /bin/bash USER on the node, or log in as another user",
    r"password (has )?expired|password change required|required to change your password": "the user must change the password first. Next: ssh to the "
    "node by hand, and change it",
    r"account (has )?expired|account is locked": "the account is no longer valid. Next: sudo chage -l USER on the node shows it",
    r"(cd|can't cd|chdir)\b.*no such file": "the folder does not exist there",
}
NO_SHELL = (
    "the login did not run the command. Next: look for ForceCommand in its sshd_config, for command= in authorized_keys, and at the login shell "
    "of the user (getent passwd USER)"
)
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """The end of a command. `code`: -1 when a signal ended it. `pid` 0: its program was not found."""

    pid: int
    code: int
    output: bytes
    errors: bytes


class StartFailed(NodeFailed):
    """The login shell did not start the command."""


class ConnectionLost(Exception):
    """The connection was lost before the command ended."""


def quote(word: str) -> str:
    return "'" + word.replace("'", "'\"'\"'") + "'"


def command_line(argv: tuple[str, ...], *, folder: Path | None = None, reads_environment: bool = False, wraps: bool = False) -> bytes:
    """The line for the login shell. `wraps`: for one that is no POSIX shell. Raises NodeFailed for a NUL, a lone surrogate, or more than 128 KiB."""
    for word in argv:
        refuse_nul(word, "an argument")
    words = [quote(word) for word in argv]
    parts = (
        'eval "$(cat)"; ' if reads_environment else "",
        f"cd -- {quote(str(folder))} && " if folder is not None else "",
        f'{{ command -v {words[0]} >/dev/null && echo "omnilaunch $$" || echo "omnilaunch 0"; }} && exec {" ".join(words)}',
    )
    line = encoded("".join(parts))
    line = wrapped(line) if wraps else line
    if len(line) > LINE_LIMIT_BYTES:
        raise NodeFailed(
            f"a command of {len(line)} bytes is too long for SSH (at most {LINE_LIMIT_BYTES}): {argv[0]!r} … Next: put the data in a file"
        )
    return line


def wrapped(line: bytes) -> bytes:
    """The line in octal, but for letters, digits and spaces, as an argument of a `sh` that decodes and runs it."""
    octal = "".join(chr(byte) if chr(byte).isascii() and (chr(byte).isalnum() or chr(byte) == " ") else f"\\0{byte:03o}" for byte in line)
    return f"""exec sh -c 'exec sh -c "$(printf %b "$1")"' sh '{octal}'""".encode("ascii")


def environment_lines(environment: Mapping[str, str]) -> bytes:
    """Lines that `eval` reads from stdin, so that a value is never in an argv or in `ps`. Raises NodeFailed for an invalid name."""
    for key, value in environment.items():
        if not NAME.fullmatch(key):
            raise NodeFailed(f"{key!r} cannot be the name of an environment variable: letters, digits and _ only")
        refuse_nul(value, f"the value of {key}")
    return encoded("".join(f"export {key}={quote(value)}\n" for key, value in environment.items()))


def refuse_nul(text: str, what: str) -> None:
    if "\0" in text:
        raise NodeFailed(f"{what} contains a NUL character, which cannot be sent in a command: {text!r}")


def encoded(text: str) -> bytes:
    try:
        return text.encode("utf-8", errors="surrogateescape")
    except UnicodeEncodeError as error:
        raise NodeFailed(
            f"{text[error.start : error.end]!r} is half a character (a lone surrogate), which cannot be sent in a command"
        ) from error


def pieces(channel: Channel, *, timeout_s: float | None, silence_s: float | None = None) -> Iterator[tuple[bytes, bytes]]:
    """(stdout, stderr) as they arrive, both always read, until the command has ended. Raises TimeoutError after `timeout_s` in all, or after
    `silence_s` without a byte; ConnectionLost when the connection is lost."""
    started = heard = time.monotonic()
    poll = select.poll()
    poll.register(channel.fileno(), select.POLLIN)
    while True:
        over = has_ended(channel)  # checked before the output is read, so that the last output is not missed
        piece = drain(channel)
        now = time.monotonic()
        if any(piece):
            heard = now
            yield piece
        elif over:
            break
        else:
            limits = [limit for limit in (timeout_s and started + timeout_s, silence_s and heard + silence_s) if limit]
            wait_s = min(limits) - now if limits else 3600.0
            if wait_s <= 0:
                raise TimeoutError
            if channel.eof_received:
                channel.status_event.wait(wait_s)  # its pipe stays readable forever
            else:
                poll.poll(wait_s * 1000)
    if is_lost(channel):
        raise ConnectionLost


def has_ended(channel: Channel) -> bool:
    return bool(channel.closed or (channel.eof_received and channel.exit_status_ready()))


def is_lost(channel: Channel) -> bool:
    """Whether a channel ended by its connection, not by its command: sshd sends EOF before it closes, a lost connection sends nothing."""
    return channel.exit_status == -1 and not (channel.eof_received and channel.get_transport().is_active())


def drain(channel: Channel) -> tuple[bytes, bytes]:
    """The bytes that have arrived on stdout and stderr; does not wait."""
    output = channel.recv(PIECE_BYTES) if channel.recv_ready() else b""
    errors = channel.recv_stderr(PIECE_BYTES) if channel.recv_stderr_ready() else b""
    return output, errors


class Marker:
    """Finds the `omnilaunch PID` line in the output, and passes on only what follows it."""

    def __init__(self) -> None:
        self.pid: int | None = None
        self.before = b""

    def strip(self, output: bytes) -> bytes:
        if self.pid is not None:
            return output
        self.before += output
        found = MARK.search(self.before)
        if found is None:
            return b""
        self.pid, rest = int(found[1]), self.before[found.end() :]
        self.before = self.before[: found.start()]
        return rest


def collect(node: str, channel: Channel, *, timeout_s: float, marker: Marker) -> Exchange:
    """The whole output of a command. `marker` belongs to the caller, who needs the pid when this raises TimeoutError or ConnectionLost."""
    output, errors = bytearray(), bytearray()
    for out, err in pieces(channel, timeout_s=timeout_s):
        output += marker.strip(out)
        errors += err
    return ended(node, channel, marker, bytes(output), bytes(errors))


def ended(node: str, channel: Channel, marker: Marker, output: bytes, errors: bytes) -> Exchange:
    """Raises NodeFailed when the login shell did not start the command: no POSIX shell, no login, or a missing folder."""
    if marker.pid is None:
        said = (marker.before + errors).decode(errors="replace").strip()[-500:]
        code, why = (
            channel.exit_status,
            next((why for pattern, why in REFUSALS.items() if re.search(pattern, said, re.IGNORECASE)), NO_SHELL),
        )
        raise StartFailed(f"{node}: {said!r}: {why}" if said else f"{node}: the command did not start (exit code {code}): {why}")
    return Exchange(pid=marker.pid, code=channel.exit_status, output=output, errors=errors)
