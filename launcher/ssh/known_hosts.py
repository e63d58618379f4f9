"""The host keys that a node may have. They come from known_hosts files only: a connection never adds one."""

import base64
import contextlib
import fnmatch
import hashlib
import hmac
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

DEFAULT_PORT = 22
HASHED = "|1|"  # |1|salt|HMAC-SHA1(salt, name), as ssh-keygen -H writes
REVOKED, AUTHORITY = "@revoked", "@cert-authority"
# The order of preference when several keys of a node are known: fastest to verify first.
KINDS = ("ssh-ed25519", "ecdsa-sha2-nistp256", "ecdsa-sha2-nistp384", "ecdsa-sha2-nistp521", "ssh-rsa")


@dataclass(frozen=True, kw_only=True)
class KnownKey:
    """One line of a known_hosts file. `names`: comma-separated patterns, or one hashed name; then `salt` and `digest` are its parts."""

    names: str
    salt: bytes = b""
    digest: bytes = b""
    kind: str
    body: str  # base64
    revoked: bool
    place: str  # file:line
    authority: bool = False  # it signs the keys of hosts


def load_known_keys(paths: Iterable[Path]) -> tuple[KnownKey, ...]:
    """All lines of the files that exist, in order. Lines that sshd(8) does not describe are skipped."""
    keys: list[KnownKey] = []
    for path in paths:
        if not path.is_file():
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
            fields = line.split()
            marker = fields.pop(0) if fields and fields[0].startswith("@") else ""
            if len(fields) >= 3 and not fields[0].startswith("#") and marker in ("", REVOKED, AUTHORITY):
                keys.append(known_key(fields[0], fields[1], fields[2], marker, f"{path}:{number}"))
    return tuple(keys)


def known_key(names: str, kind: str, body: str, marker: str, place: str) -> KnownKey:
    salt = digest = b""
    if names.startswith(HASHED):  # parsed once: each of 128 nodes compares each of 128 lines
        with contextlib.suppress(ValueError):  # an invalid line has no digest, and matches no name
            salt, digest = (base64.b64decode(part, validate=True) for part in names[len(HASHED) :].split("|"))
    return KnownKey(
        names=names, salt=salt, digest=digest, kind=kind, body=body, revoked=marker == REVOKED, place=place, authority=marker == AUTHORITY
    )


def known_name(host: str, port: int) -> str:
    """A host in known_hosts: the name for port 22, else [name]:port."""
    return host if port == DEFAULT_PORT else f"[{host}]:{port}"


def names_match(key: KnownKey, name: str) -> bool:
    """Whether a line's names match `name`: hashed, plain, with * and ?, or excluded by a leading !."""
    if key.names.startswith(HASHED):
        return hmac.compare_digest(hmac.digest(key.salt, name.encode(), "sha1"), key.digest)
    patterns = key.names.split(",")
    if any(pattern.startswith("!") and pattern_match(pattern[1:], name) for pattern in patterns):
        return False
    return any(pattern_match(pattern, name) for pattern in patterns)


def pattern_match(pattern: str, name: str) -> bool:
    escaped = pattern.lower().replace("[", "[[]")  # brackets are part of [host]:port, not a set of characters
    return fnmatch.fnmatchcase(name.lower(), escaped)


def keys_of(name: str, known: tuple[KnownKey, ...]) -> tuple[KnownKey, ...]:
    """The keys that `name` may have, and the authorities that may sign one, the fastest kind first, without those that a matching line revokes."""
    mine = [key for key in known if names_match(key, name)]
    revoked = {key.body for key in mine if key.revoked}
    kept = [key for key in mine if key.body not in revoked and key.kind in KINDS]
    return tuple(sorted(kept, key=lambda key: KINDS.index(key.kind)))


def decoded(key: KnownKey) -> bytes:
    """The key in binary; b"" for invalid base64, which equals no key."""
    try:
        return base64.b64decode(key.body, validate=True)
    except ValueError:
        return b""


def fingerprint(key: bytes) -> str:
    """SHA256:… as ssh-keygen -l prints it."""
    return "SHA256:" + base64.b64encode(hashlib.sha256(key).digest()).decode().rstrip("=")
