"""What this machine uses to log in to a node: ssh config, known hosts, keys and agent. Read once, shared by all connections."""

import functools
import glob
import os
import re
import shlex
import socket
import threading
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.hazmat.primitives.serialization.ssh import SSHCertificate, load_ssh_public_identity
from paramiko import (  # type: ignore[import-untyped]
    Agent,
    AuthenticationException,
    BadAuthenticationType,
    ConfigParseError,
    PKey,
    SSHConfig,
    SSHException,
    Transport,
)
from paramiko.agent import AgentSSH  # type: ignore[import-untyped]

from launcher.config.schema import Cluster
from launcher.errors import NodeFailed
from launcher.ssh.known_hosts import KnownKey, load_known_keys

KEY_NAMES = ("id_ed25519", "id_ecdsa", "id_rsa")
INCLUDE_DEPTH = 16  # as OpenSSH
SYSTEM_CONFIG = Path("/etc/ssh/ssh_config")
MATCH_EXEC = re.compile(r"(^|\s)!?exec\s", re.IGNORECASE)
NEVER = "Match originalhost !*"  # in place of a Match that runs a command
EXEC_NOT_RUN = "Match exec is ignored: the commands of an ssh config are not run, and its lines do not apply"


@dataclass(frozen=True, kw_only=True)
class SshSettings:
    """Paths and limits. `known_hosts`: error messages advise to write to the first. `connect_timeout_s` and `silence_s`: of the cluster."""

    config: Path
    known_hosts: tuple[Path, ...]
    keys: tuple[Path, ...]
    user: str
    connect_timeout_s: float
    silence_s: float
    agent: bool = True
    system_configs: tuple[Path, ...] = ()


def default_settings(home: Path, user: str, cluster: Cluster) -> SshSettings:
    """The default paths below a home folder; `user` logs in where neither the cluster file nor the ssh config names one."""
    folder = home / ".ssh"
    return SshSettings(
        config=folder / "config",
        known_hosts=(folder / "known_hosts", folder / "known_hosts2", Path("/etc/ssh/ssh_known_hosts")),
        keys=tuple(folder / name for name in KEY_NAMES),
        user=user,
        connect_timeout_s=cluster.connect_timeout_s,
        silence_s=cluster.silence_s,
        system_configs=(SYSTEM_CONFIG,),
    )


class SshFiles:
    """The files of SshSettings. Thread-safe: each file is read once, under one lock."""

    def __init__(self, settings: SshSettings) -> None:
        self.settings = settings
        paths = (settings.config, *settings.system_configs)  # the first value of a keyword holds, as of OpenSSH
        lines = tuple(line for path in paths for line in (*config_lines(path, path.parent), "Host *"))
        self.config = parse_config(lines, settings.config)
        self.remarks = (EXEC_NOT_RUN,) if NEVER in lines else ()
        self._lock = threading.RLock()
        self._read_key = functools.cache(read_private_key)
        self._load_known = functools.cache(load_known_keys)

    def known(self, paths: tuple[Path, ...]) -> tuple[KnownKey, ...]:
        with self._lock:
            return self._load_known(paths)

    def key(self, path: Path) -> PKey | str:
        """The private key, or why it cannot be used."""
        with self._lock:
            return self._read_key(path)


def parse_config(lines: Sequence[str], path: Path) -> SSHConfig:
    """Raises NodeFailed for a line that is no keyword with a value."""
    try:
        return SSHConfig.from_text("\n".join(lines))
    except (ConfigParseError, ValueError) as error:
        raise NodeFailed(f"{path} cannot be read: {error}\n  Next: ssh -F {path} -G localhost names the line") from error


def config_lines(path: Path, folder: Path, depth: int = 0) -> Iterator[str]:
    """The lines of an ssh config, with Include lines replaced by the files they name (paramiko does not support Include), and without a Match that
    would run a command. Raises NodeFailed for a line without a value."""
    if not path.is_file() or depth > INCLUDE_DEPTH:
        return
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        keyword, _, rest = line.strip().replace("=", " ", 1).replace("\t", " ", 1).partition(" ")
        if keyword and not keyword.startswith("#") and not rest.strip():
            raise NodeFailed(f"{path} line {number}: {keyword} has no value\n  Next: give it one, or remove the line")
        if keyword.lower() == "match" and MATCH_EXEC.search(rest):
            yield NEVER
            continue
        if keyword.lower() != "include":
            yield line
            continue
        for pattern in shlex.split(rest):
            for found in sorted(glob.glob(str(folder / Path(pattern).expanduser()))):  # noqa: PTH207  an absolute pattern is allowed
                yield from config_lines(Path(found), folder, depth + 1)


def read_private_key(path: Path) -> PKey | str:
    try:
        return PKey.from_path(path)
    except FileNotFoundError:
        return "no such file"
    except (TypeError, SSHException) as error:  # cryptography raises TypeError when a passphrase is missing
        return f"needs its passphrase (ssh-add {path})" if isinstance(error, TypeError) else f"cannot be read: {error}"
    except (OSError, ValueError, UnsupportedAlgorithm) as error:
        return f"cannot be read: {error}"


def open_agent(path: str) -> AgentSSH | None:
    """The agent of a socket, or that of SSH_AUTH_SOCK for ''. None for `none`, and for a socket that does not answer."""
    if path in ("", "SSH_AUTH_SOCK"):
        return Agent()
    if path.lower() == "none":
        return None
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(os.path.expandvars(path.replace("%d", str(Path.home()))) if path[0] in "$%/" else str(Path(path).expanduser()))
        agent = AgentSSH()
        agent._connect(connection)  # as paramiko's own Agent does with SSH_AUTH_SOCK
    except (OSError, SSHException):
        connection.close()
        return None
    return agent


def certify(key: PKey, path: Path) -> PKey | None:
    """A copy of the key with the certificate of a file; None if that is of another key, or cannot be read."""
    try:
        found = load_ssh_public_identity(path.read_bytes())
        if not isinstance(found, SSHCertificate):
            return None
        if found.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).split()[1].decode() != key.get_base64():
            return None
        certified = copy(key)
        certified.load_certificate(str(path))
    except (OSError, ValueError, SSHException, UnsupportedAlgorithm):
        return None
    return certified


class Authentication:
    """Tries the key files, then the agent's keys, each with its certificate if there is one, on one connection: an AuthStrategy of paramiko. `agent`:
    as IdentityAgent of the ssh config."""

    def __init__(
        self,
        files: SshFiles,
        *,
        node: str,
        user: str,
        keys: tuple[Path, ...],
        next_command: str,
        agent: str = "",
        certificates: tuple[Path, ...] = (),
    ) -> None:
        self.files, self.node, self.user, self.keys, self.next_command = files, node, user, keys, next_command
        self.agent, self.certificates = agent, certificates

    def authenticate(self, transport: Transport) -> list[str]:
        """The methods that the server still requires, always none. Raises NodeFailed with the keys that were tried."""
        tried: list[str] = []
        agent = open_agent(self.agent) if self.files.settings.agent else None
        try:
            for name, key in self.candidates(agent):
                if isinstance(key, str):
                    tried.append(f"{name}: {key}")
                elif self.accepts(transport, name, key, tried):
                    return []
        finally:
            if agent is not None:
                agent._close()  # AgentSSH has no public one
        raise self.refusal(tried)

    def candidates(self, agent: Agent | None) -> Iterator[tuple[str, PKey | str]]:
        for path in self.keys:
            yield from self.with_certificates(str(path), self.files.key(path))
        for key in agent.get_keys() if agent is not None else ():
            yield from self.with_certificates(f"agent key {key.get_name()}", key)

    def with_certificates(self, name: str, key: PKey | str) -> Iterator[tuple[str, PKey | str]]:
        """The key with each certificate that was made for it, then the key alone, as OpenSSH tries them."""
        for path in self.certificates if not isinstance(key, str) else ():
            if certified := certify(key, path):
                yield f"{name} with {path}", certified
        yield name, key

    def accepts(self, transport: Transport, name: str, key: PKey, tried: list[str]) -> bool:
        try:
            wanted = transport.auth_publickey(self.user, key)
        except BadAuthenticationType as error:
            tried.append(f"{name}: the server does not accept keys, only {', '.join(error.allowed_types)}")
            return False
        except AuthenticationException:
            tried.append(f"{name}: refused")
            return False
        except (SSHException, EOFError) as error:
            if not tried:
                raise
            tried.append(f"{name}: the server closed the connection here (its MaxAuthTries); name the right key as IdentityFile")
            raise self.refusal(tried) from error
        if wanted:
            tried.append(f"{name}: accepted, but the server also requires {', '.join(wanted)}")
        return not wanted

    def refusal(self, tried: list[str]) -> NodeFailed:
        listed = "".join(f"\n  {line}" for line in tried) or "\n  nothing: there is no key file, and no key in an agent"
        return NodeFailed(
            f"{self.node}: the login of user {self.user!r} was refused. Tried:{listed}\n"
            f"  Check the user (cluster file nodes[].user, or User in {self.files.settings.config}), and that its authorized_keys has the public key.\n"
            f"  Next: ssh-copy-id {self.next_command}   or, for details: ssh -v {self.next_command} true"
        )
