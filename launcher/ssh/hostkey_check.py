"""Refuses a node whose host key is unknown or has changed, with the command that accepts the key."""

import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass

from paramiko import PKey  # type: ignore[import-untyped]

from launcher.errors import NodeFailed
from launcher.ssh.host_certificate import check_certificate
from launcher.ssh.known_hosts import KnownKey, decoded, fingerprint, known_name
from launcher.ssh.target import SshTarget


@dataclass(frozen=True, kw_only=True)
class HostKeyCheck:
    """A missing-host-key policy of paramiko. It decides about every key: paramiko's own list, which holds only one key of each kind for a
    host, stays empty."""

    target: SshTarget
    now: Callable[[], float] = time.time

    def missing_host_key(self, client: object, name: str, key: PKey) -> None:
        """Raises NodeFailed unless the key is a known one."""
        if key.public_blob is not None:
            if problem := check_certificate(key.public_blob.key_blob, self.target, self.now()):
                raise NodeFailed(problem)
            return
        kind, body = key.get_name(), key.asbytes()
        same_kind = [known for known in self.target.known if known.kind == kind and not known.authority]
        if body in [decoded(known) for known in same_kind]:
            return
        if same_kind:
            raise NodeFailed(self.changed_text(kind, body, same_kind[0]))
        raise NodeFailed(self.unknown_text(kind, body))

    def unknown_text(self, kind: str, body: bytes) -> str:
        scan = f"{self.target.scan_prefix}ssh-keyscan -p {self.target.port} -H {shlex.quote(self.target.host)}"
        return (
            f"{self.target.title}: its host key is unknown, so it may be another machine. No login was tried.\n"
            f"  its key: {kind} {fingerprint(body)}\n"
            f"  On the node, run `ssh-keygen -lf` on the .pub files in /etc/ssh and compare. If the fingerprint is the same:\n"
            f"  Next: {scan} >> {shlex.quote(str(self.target.known_hosts))}"
        )

    def changed_text(self, kind: str, body: bytes, known: KnownKey) -> str:
        file = shlex.quote(known.place.rpartition(":")[0])
        name = shlex.quote(known_name(self.target.host, self.target.port))
        return (
            f"{self.target.title}: its host key has CHANGED: it was reinstalled, or another machine answers at its address. No login was tried.\n"
            f"  its key: {kind} {fingerprint(body)}\n"
            f"  {known.place} has {kind} {fingerprint(decoded(known))}\n"
            f"  Find out which. If the node was reinstalled:\n"
            f"  Next: ssh-keygen -f {file} -R {name}   and then check the new key as for a new host"
        )
