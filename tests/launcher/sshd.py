"""A real sshd of the test's own: its host key, its config, its port, its user's keys, all below one folder. Ended by its own pid."""

import contextlib
import os
import socket
import subprocess
import time
from pathlib import Path

from launcher.config.schema import Node
from launcher.ssh.ssh_config import SshSettings

USER = "root"  # sshd lets in whom it runs as


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def make_key(path: Path, kind: str = "ed25519", passphrase: str = "") -> Path:
    subprocess.run(("ssh-keygen", "-q", "-t", kind, "-N", passphrase, "-f", str(path)), check=True, stdin=subprocess.DEVNULL)
    return path


class Sshd:
    """`extra`: further lines of its sshd_config. Its log is at `folder/log`."""

    def __init__(self, folder: Path, client_key: Path, *extra: str, port: int | None = None) -> None:
        folder.mkdir(parents=True)
        self.folder, self.port, self.host_key = folder, port or free_port(), make_key(folder / "host")
        (folder / "authorized").write_text(client_key.with_suffix(".pub").read_text())
        lines = (
            *extra,  # the first of two values holds
            "ListenAddress 127.0.0.1",
            f"Port {self.port}",
            f"HostKey {self.host_key}",
            f"AuthorizedKeysFile {folder / 'authorized'}",
            f"PidFile {folder / 'pid'}",
            "StrictModes no",
            "UsePAM no",
            "PasswordAuthentication no",
            "KbdInteractiveAuthentication no",
            "LogLevel VERBOSE",
        )
        (folder / "config").write_text("\n".join(lines) + "\n")
        os.makedirs("/run/sshd", exist_ok=True)  # noqa: PTH103  sshd will not start without it
        argv = ("/usr/sbin/sshd", "-D", "-f", str(folder / "config"), "-E", str(folder / "log"))
        self.process = subprocess.Popen(argv, stdin=subprocess.DEVNULL)
        self.wait_ready()

    def wait_ready(self) -> None:
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline and self.process.poll() is None:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.02)
        raise AssertionError((self.folder / "log").read_text())

    def known_line(self, name: str = "") -> str:
        kind, body, *_ = self.host_key.with_suffix(".pub").read_text().split()
        return f"{name or f'[127.0.0.1]:{self.port}'} {kind} {body}\n"

    def children(self) -> tuple[int, ...]:
        """Ids of the processes that serve one connection each."""
        return tuple(int(pid) for pid in Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split())

    def has_children(self, count: int) -> bool:
        """Whether it comes to so many within two seconds."""
        deadline = time.monotonic() + 2
        while len(self.children()) != count and time.monotonic() < deadline:
            time.sleep(0.02)
        return len(self.children()) == count

    def end(self) -> None:
        for pid in self.children():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 9)
        self.process.terminate()
        self.process.wait()


def access_in(folder: Path, client_key: Path, *known: str, **changes: object) -> SshSettings:
    """Paths below `folder` alone: the real ~/.ssh is neither read nor written."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "known_hosts").write_text("".join(known))
    values = {
        "config": folder / "config",
        "known_hosts": (folder / "known_hosts",),
        "keys": (client_key,),
        "user": USER,
        "agent": False,
        "connect_timeout_s": 8,
        "silence_s": 30,
        **changes,
    }
    return SshSettings(**values)  # type: ignore[arg-type]


def node_at(sshd: Sshd, **changes: object) -> Node:
    return Node(**{"host": "127.0.0.1", "port": sshd.port, **changes})  # type: ignore[arg-type]
