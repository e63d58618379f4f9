"""Locks: files of exact versions with the hashes of every file, as uv writes and pip reads them."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from launcher.errors import ImageFailed
from launcher.image.stack import BUILD_LOCK, torch_lock

ROW = re.compile(r"^(?P<name>[\w.-]+)==(?P<version>\S+) \\\n(?: {4}--hash=sha256:[0-9a-f]{64}(?: \\)?\n)+", re.MULTILINE)
REST = re.compile(r"^(?!#|--extra-index-url )\S.*", re.MULTILINE)
FIX = "write the lock again with: omnilaunch image refresh"


@dataclass(frozen=True, kw_only=True)
class LockedPackage:
    """One row of a lock. `name` is normalized (PEP 503); `hashes` are the sha256 of every file that satisfies it."""

    name: str
    version: Version
    hashes: frozenset[str]

    def __str__(self) -> str:
        return f"{self.name}=={self.version}"


def lock_files(root: Path, lock: str) -> tuple[Path, ...]:
    """The locks of one image in the order of their layers: the build tools, torch where it has a lock of its own, all packages."""
    complete = root / "images" / lock
    torch = torch_lock(complete)
    return (root / "images" / "locks" / BUILD_LOCK, *((torch,) if torch.is_file() else ()), complete)


def locked_packages(*locks: Path) -> tuple[LockedPackage, ...]:
    """The packages of the locks. Raises ImageFailed for a lock that cannot be read, and for a package without a hash."""
    return tuple(package for lock in locks for package in packages_of(lock))


def packages_of(lock: Path) -> tuple[LockedPackage, ...]:
    try:
        text = lock.read_text(encoding="utf-8")
    except OSError as error:
        raise ImageFailed(f"{lock}: cannot be read: {error}") from error
    if rest := rest_of(text):
        raise ImageFailed(f"{lock}: {rest} has no hash; {FIX}")
    try:
        return tuple(parse_row(name, row) for name, row in split_rows(text).items())
    except InvalidVersion as error:
        raise ImageFailed(f"{lock}: {error}; {FIX}") from error


def parse_row(name: str, row: str) -> LockedPackage:
    try:
        return LockedPackage(name=name, version=Version(version_of(row)), hashes=frozenset(re.findall(r"sha256:([0-9a-f]{64})", row)))
    except InvalidVersion as error:
        raise InvalidVersion(f"{name}=={version_of(row)} is not a valid version") from error


def read_lock(path: Path) -> dict[str, str]:
    """The rows of a lock by name; {} if the file does not exist."""
    return split_rows(path.read_text(encoding="utf-8")) if path.is_file() else {}


def split_rows(text: str) -> dict[str, str]:
    """Normalized name -> row of a lock's text."""
    return {canonicalize_name(match["name"]): match.group() for match in ROW.finditer(text)}


def join(rows: Mapping[str, str]) -> str:
    """The text of a lock, sorted by name."""
    return "".join(rows[name] for name in sorted(rows))


def rest_of(text: str) -> str:
    """The first line of a lock's text that is neither a comment nor part of a row with hashes; '' if there is none."""
    found = REST.search(ROW.sub("", text))
    return found.group()[:100] if found else ""


def version_of(row: str) -> str:
    return row.split("==", 1)[1].split()[0]


def name_of(requirement: str) -> str:
    """`types-pyyaml` of `types_PyYAML>=6 ; python_version < '4'` (PEP 503)."""
    return canonicalize_name(Requirement(requirement).name)
