"""A folder with every file that a stack's image needs, for sites without a network: filled here, carried there, built from there.

`image fetch` fills it; a build with cluster.delivery.wheelhouse=FOLDER runs with the network off. Every wheel and source
distribution is held against the hashes of the lock, every system package against the folder's own list.

    FOLDER/*.whl, *.tar.gz     the locked packages
    FOLDER/system/<stage>/     Debian packages for the stages of the Dockerfile
    FOLDER/wheelhouse.json     stack, architecture and the sha256 of every file
"""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.config.schema import Delivery
from launcher.errors import ImageFailed
from launcher.image.stack import BUILD_LOCK, Stack, digest, torch_lock

MANIFEST = "wheelhouse.json"
SYSTEM = "system"
GLIBC_MINORS = range(35, 4, -1)  # of manylinux tags, the best first, as pip would choose on the oldest base (Ubuntu 22.04: glibc 2.35)
LEGACY_TAGS = ("manylinux1", "manylinux2010", "manylinux2014", "linux")
DISTRIBUTION = re.compile(r"^(?P<name>[A-Za-z0-9._]+?)-(?P<version>\d[^-]*?)(-[^/]*\.whl|\.tar\.gz|\.zip)$")
ROW = re.compile(r"^(?P<name>[\w.-]+)==(?P<version>\S+)(?P<hashes>(?:[ \\\n]+--hash=sha256:[0-9a-f]{64})*)", re.MULTILINE)
SHOWN = 5
NEXT = "fill it again with: omnilaunch image fetch"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One requirement of a lock. `hashes`: sha256 of every file that may serve."""

    name: str
    version: str
    hashes: frozenset[str]

    def __str__(self) -> str:
        return f"{self.name}=={self.version}"


def locked_rows(*locks: Path) -> tuple[Row, ...]:
    """The rows of the locks. Raises ImageFailed for a lock that cannot be read or a row without a hash."""
    return tuple(row for lock in locks for row in rows_of(lock))


def rows_of(lock: Path) -> Iterator[Row]:
    try:
        text = lock.read_text(encoding="utf-8")
    except OSError as error:
        raise ImageFailed(f"{lock}: cannot be read: {error}") from error
    for match in ROW.finditer(text):
        hashes = frozenset(re.findall(r"sha256:([0-9a-f]{64})", match["hashes"]))
        if not hashes:
            raise ImageFailed(f"{lock}: {match['name']} has no hash; write the lock again with: omnilaunch image refresh")
        yield Row(name=normal(match["name"]), version=match["version"], hashes=hashes)


def lock_files(root: Path, lock: str) -> tuple[Path, ...]:
    """The locks of one image in the order of their layers: what builds, torch where it stands alone, everything."""
    whole = root / "images" / lock
    alone = torch_lock(whole)
    return (root / "images" / "locks" / BUILD_LOCK, *((alone,) if alone.is_file() else ()), whole)


def normal(name: str) -> str:
    """As the packaging specification compares project names."""
    return re.sub(r"[-_.]+", "-", name).lower()


# --------------------------------------------------------------------------------------------------------------- fetch


def fetch_wheels(
    stack: Stack,
    *,
    architecture: str,
    root: Path,
    folder: Path,
    environ: Mapping[str, str],
    delivery: Delivery,
    say: Callable[[str], None],
) -> tuple[Path, ...]:
    """Download every file of the stack's locks for `architecture` into `folder`, hashes checked by pip while downloading and by
    us afterwards; the files. What is there already is not downloaded again. Raises ImageFailed."""
    locks = lock_files(root, required_lock(stack, architecture))
    make_folder(folder)
    for lock in locks:
        say(f"fetching {lock.relative_to(root)} for {architecture}")
        run_pip(download_command(lock, architecture, stack.python, folder, delivery), environ, say)
    found = complete(locked_rows(*locks), (folder,))
    say(f"{len(found)} files, {sum(path.stat().st_size for path in found) / 1e9:.2f} GB, every hash as locked")
    return found


def required_lock(stack: Stack, architecture: str) -> str:
    lock = stack.locks.get(architecture, "")
    if not lock:
        ready = ", ".join(name for name, there in stack.locks.items() if there) or "none yet"
        raise ImageFailed(
            f"stack {stack.name} has no lock for {architecture} (images/versions.yaml, key stacks.{stack.name}.locks); it has: {ready}"
        )
    return lock


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ImageFailed(f"the wheelhouse {folder} cannot be made: {error}") from error


def download_command(lock: Path, architecture: str, python: str, folder: Path, delivery: Delivery) -> tuple[str, ...]:
    """pip as an argv. Sources are taken along as they are: --no-deps lets pip look for another platform than its own, and the
    lock holds every dependency already."""
    platforms = (*(f"manylinux_2_{minor}_{architecture}" for minor in GLIBC_MINORS), *(f"{tag}_{architecture}" for tag in LEGACY_TAGS))
    abis = ("none", "abi3", f"cp{python.replace('.', '')}")
    given = (
        ("--index-url", delivery.index), ("--extra-index-url", delivery.extra_index),
        ("--find-links", delivery.find_links), ("--cert", delivery.ca_bundle), ("--proxy", delivery.proxy),
    )  # fmt: skip
    return (
        sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--progress-bar", "off", "--exists-action", "i",
        "--require-hashes", "--no-deps", "--no-build-isolation", "--dest", str(folder), "--find-links", str(folder),
        "--implementation", "cp", "--python-version", python,
        *(part for abi in abis for part in ("--abi", abi)),
        *(part for platform in platforms for part in ("--platform", platform)),
        *(part for option, value in given if value for part in (option, value)),
        "--requirement", str(lock),
    )  # fmt: skip


def run_pip(command: tuple[str, ...], environ: Mapping[str, str], say: Callable[[str], None]) -> None:
    """Show what is being downloaded; raise ImageFailed with pip's last lines."""
    last: list[str] = []
    with subprocess.Popen(command, env=dict(environ), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace") as pip:
        for line in pip.stdout or ():
            last = [*last[-14:], line.rstrip()]
            if re.match(r"\s+Downloading \S+ \(\d", line):
                say(f"  {line.strip().removeprefix('Downloading ').rsplit('/', 1)[-1]}")
    if pip.returncode:
        shown = "\n  ".join(line for line in last if line and "is ignored: it is neither" not in line)
        raise ImageFailed(f"the packages were not fetched (pip ended with {pip.returncode}):\n  {shown}")


# --------------------------------------------------------------------------------------------------------------- check


def complete(rows: tuple[Row, ...], folders: tuple[Path, ...]) -> tuple[Path, ...]:
    """One file for every row, its content held against the lock. Raises ImageFailed that names all rows without a file and all
    files that are not the locked ones."""
    candidates = distributions(folders)
    found, missing, altered = [], [], []
    for row in rows:
        files = candidates.get((row.name, row.version), ())
        good = [path for path in files if digest(path) in row.hashes]
        if good:
            found.append(good[0])
        elif files:
            altered.append(files[0].name)
        else:
            missing.append(str(row))
    if missing or altered:
        where = " and ".join(map(str, folders))
        told = [f"  not the locked file: {some(altered)}"] if altered else []
        told += [f"  missing: {some(missing)}"] if missing else []
        raise ImageFailed("\n".join((f"the wheelhouse {where} is not what the lock asks for; {NEXT}", *told)))
    return tuple(found)


def some(names: list[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def distributions(folders: tuple[Path, ...]) -> dict[tuple[str, str], tuple[Path, ...]]:
    """(name, version) -> the files of it."""
    found: dict[tuple[str, str], tuple[Path, ...]] = {}
    for folder in folders:
        for path in sorted(folder.iterdir()):
            if match := DISTRIBUTION.match(path.name):
                key = (normal(match["name"]), match["version"])
                found[key] = (*found.get(key, ()), path)
    return found


def local_files(root: Path, lock: str, delivery: Delivery) -> dict[str, Path]:
    """Path in the build context -> file: what the lock asks for, of the wheelhouse (which must have all of it) or of a local
    folder of cluster.delivery.find_links (which may have some; pip checks those inside)."""
    rows = locked_rows(*lock_files(root, lock))
    if delivery.wheelhouse:
        folder = existing(delivery.wheelhouse, "wheelhouse")
        return {path.name: path for path in complete(rows, (folder,))}
    if delivery.find_links and "://" not in delivery.find_links:
        candidates = distributions((existing(delivery.find_links, "find_links"),))
        return {path.name: path for row in rows for path in candidates.get((row.name, row.version), ())}
    return {}


def existing(path: str, key: str) -> Path:
    folder = Path(path)
    if not folder.is_dir():
        raise ImageFailed(f"the folder {folder} of cluster.delivery.{key} does not exist")
    return folder


# ---------------------------------------------------------------------------------------------------- system packages


def system_files(delivery: Delivery) -> dict[str, Path]:
    """<stage>/<file> -> Debian package of the wheelhouse, held against its list. Raises ImageFailed for one that is missing,
    altered or not in the list."""
    folder = Path(delivery.wheelhouse) / SYSTEM
    if not delivery.wheelhouse or not folder.is_dir():
        return {}
    listed = {name: sha256 for name, sha256 in read_manifest(folder.parent)["files"].items() if name.startswith(f"{SYSTEM}/")}
    there = {path.relative_to(folder.parent).as_posix(): path for path in sorted(folder.rglob("*.deb"))}
    wrong = [name for name in sorted({*listed, *there}) if name not in there or digest(there[name]) != listed.get(name)]
    if wrong:
        raise ImageFailed(f"the wheelhouse {folder.parent} does not agree with its own {MANIFEST}: {some(wrong)}; {NEXT}")
    return {name.removeprefix(f"{SYSTEM}/"): path for name, path in there.items()}


def write_manifest(folder: Path, stack: Stack, architecture: str) -> Path:
    """List every file with its sha256, written last and at once: a folder with a list is a whole one."""
    files = sorted(path for pattern in ("*.whl", "*.tar.gz", "*.zip", f"{SYSTEM}/*/*.deb") for path in folder.glob(pattern))
    content = {
        "stack": stack.name,
        "architecture": architecture,
        "files": {path.relative_to(folder).as_posix(): digest(path) for path in files},
    }
    aside = folder / f".{MANIFEST}"
    aside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    aside.replace(folder / MANIFEST)
    return folder / MANIFEST


def read_manifest(folder: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return {"files": dict(content["files"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ImageFailed(f"{folder / MANIFEST}: cannot be read as the list of a wheelhouse: {error}; {NEXT}") from error
