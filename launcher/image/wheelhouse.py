"""A wheelhouse: a folder with every file that a stack's image needs, for sites without a network.

`omnilaunch image fetch` fills the folder on a machine with a network. A build with cluster.delivery.wheelhouse=FOLDER then runs
with the network off. Every wheel and source distribution is checked against the hashes of the lock, every system package
against the folder's own list.

    FOLDER/*.whl, *.tar.gz     the locked packages: wheels and source distributions
    FOLDER/system/<stage>/     Debian packages for the stages of the Dockerfile
    FOLDER/wheelhouse.json     stack, architecture and the sha256 of every file
"""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from packaging.utils import InvalidSdistFilename, InvalidWheelFilename, parse_sdist_filename, parse_wheel_filename
from packaging.version import Version

from launcher.config.schema import Delivery
from launcher.errors import ImageFailed
from launcher.image.lock import LockedPackage, lock_files, locked_packages
from launcher.image.stack import Stack, digest
from trainer.contract.listing import list_some

MANIFEST = "wheelhouse.json"
SYSTEM = "system"
GLIBC_MINORS = range(35, 4, -1)  # of manylinux tags, newest first, as pip prefers them on the oldest base (Ubuntu 22.04: glibc 2.35)
LEGACY_TAGS = ("manylinux1", "manylinux2010", "manylinux2014", "linux")
WHEEL = ".whl"
SDIST = ".tar.gz"
SDISTS = (SDIST, ".zip", ".tar.bz2", ".tgz", ".tar.xz")  # those that pip installs; the last three are legacy
SHOWN = 5  # file names in an error
NEXT = "fill it again with: omnilaunch image fetch"

Files = dict[tuple[str, Version], tuple[Path, ...]]


# --------------------------------------------------------------------------------------------------------------- fetch


def fetch_wheels(
    stack: Stack, *, architecture: str, root: Path, folder: Path, environ: Mapping[str, str], delivery: Delivery, say: Callable[[str], None]
) -> tuple[Path, ...]:
    """Download every file of the stack's locks for `architecture` into `folder`, and return the files. pip checks the hashes while it
    downloads, and they are checked again afterwards. Files that are already in the folder are not downloaded. Raises ImageFailed."""
    complete_lock = stack.locks.get(architecture, "")
    if not complete_lock:
        ready = ", ".join(name for name, there in stack.locks.items() if there) or "none yet"
        raise ImageFailed(
            f"stack {stack.name} has no lock for {architecture} (images/versions.yaml, key stacks.{stack.name}.locks); it has: {ready}"
        )
    locks = lock_files(root, complete_lock)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ImageFailed(f"the wheelhouse {folder} cannot be created: {error}") from error
    for lock in locks:
        say(f"fetching {lock.relative_to(root)} for {architecture}")
        run_pip(download_command(lock, architecture, stack.python, folder, delivery), environ, say)
    found = complete(locked_packages(*locks), folder)
    say(f"{len(found)} files, {sum(path.stat().st_size for path in found) / 1e9:.2f} GB, every hash as locked")
    return found


def download_command(lock: Path, architecture: str, python: str, folder: Path, delivery: Delivery) -> tuple[str, ...]:
    """The argv of pip download. Source distributions are downloaded as they are. --no-deps lets pip download for another platform
    than its own; the lock already names every dependency."""
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
    """Report each file that pip downloads. Raises ImageFailed with pip's last lines."""
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


def complete(packages: tuple[LockedPackage, ...], folder: Path) -> tuple[Path, ...]:
    """One file of `folder` for every package, its content checked against the lock. Raises ImageFailed, naming every package
    without a file and every file whose hash is not in the lock."""
    candidates, invalid = distributions(folder)
    found, missing, altered = [], [], []
    for package in packages:
        files = candidates.get((package.name, package.version), ())
        good = next((path for path in files if digest(path) in package.hashes), None)
        if good:
            found.append(good)
        elif files:
            altered.append(files[0].name)
        else:
            missing.append(str(package))
    if missing or altered:
        lists = {"not the locked file": altered, "missing": missing, "not a valid file name of a package": invalid if missing else ()}
        lines = (f"  {what}: {list_some(names, SHOWN)}" for what, names in lists.items() if names)
        raise ImageFailed("\n".join((f"the wheelhouse {folder} does not have the files of the lock; {NEXT}", *lines)))
    return tuple(found)


def distributions(folder: Path) -> tuple[Files, list[str]]:
    """The wheels and source distributions of `folder` by normalized name and version; then the names of those whose file name cannot
    be parsed, which pip ignores too."""
    found: Files = {}
    invalid: list[str] = []
    for path in sorted(folder.iterdir()):
        if not path.name.endswith((WHEEL, *SDISTS)):
            continue
        try:
            key = parse_file_name(path.name)
        except (InvalidWheelFilename, InvalidSdistFilename):
            invalid.append(path.name)
        else:
            found[key] = (*found.get(key, ()), path)
    return found, invalid


def parse_file_name(name: str) -> tuple[str, Version]:
    """Normalized name and version of a wheel or source distribution. Raises InvalidWheelFilename or InvalidSdistFilename."""
    if name.endswith(WHEEL):
        return parse_wheel_filename(name)[:2]
    suffix = next(suffix for suffix in SDISTS if name.endswith(suffix))
    return parse_sdist_filename(name.removesuffix(suffix) + SDIST)


def local_files(root: Path, lock: str, delivery: Delivery) -> dict[str, Path]:
    """Path in the build context -> file. From a wheelhouse, one file for every locked package. From a local folder of
    cluster.delivery.find_links, those locked packages that it has; pip checks their hashes during the build."""
    packages = locked_packages(*lock_files(root, lock))
    if delivery.wheelhouse:
        return {path.name: path for path in complete(packages, existing(delivery.wheelhouse, "wheelhouse"))}
    if delivery.find_links and "://" not in delivery.find_links:
        candidates, _ = distributions(existing(delivery.find_links, "find_links"))
        return {path.name: path for package in packages for path in candidates.get((package.name, package.version), ())}
    return {}


def existing(path: str, key: str) -> Path:
    folder = Path(path)
    if not folder.is_dir():
        raise ImageFailed(f"cluster.delivery.{key}: the folder {folder} does not exist")
    return folder


# ---------------------------------------------------------------------------------------------------- system packages


def system_files(delivery: Delivery) -> dict[str, Path]:
    """<stage>/<file> -> Debian package of the wheelhouse, checked against the wheelhouse's list. Raises ImageFailed for a package that
    is missing, altered or not in the list."""
    folder = Path(delivery.wheelhouse) / SYSTEM
    if not delivery.wheelhouse or not folder.is_dir():
        return {}
    listed = {name: sha256 for name, sha256 in read_manifest(folder.parent).items() if name.startswith(f"{SYSTEM}/")}
    found = {path.relative_to(folder.parent).as_posix(): path for path in sorted(folder.rglob("*.deb"))}
    wrong = [name for name in sorted({*listed, *found}) if name not in found or digest(found[name]) != listed.get(name)]
    if wrong:
        raise ImageFailed(f"the wheelhouse {folder.parent} does not match its own {MANIFEST}: {list_some(wrong, SHOWN)}; {NEXT}")
    return {name.removeprefix(f"{SYSTEM}/"): path for name, path in found.items()}


def write_manifest(folder: Path, stack: Stack, architecture: str) -> Path:
    """Write the list of every file with its sha256. It is written last, by a rename: a folder that has the list is complete."""
    patterns = (*(f"*{suffix}" for suffix in (WHEEL, *SDISTS)), f"{SYSTEM}/*/*.deb")
    files = sorted(path for pattern in patterns for path in folder.glob(pattern))
    content = {
        "stack": stack.name,
        "architecture": architecture,
        "files": {path.relative_to(folder).as_posix(): digest(path) for path in files},
    }
    unfinished = folder / f".{MANIFEST}"
    unfinished.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(folder / MANIFEST)
    return folder / MANIFEST


def read_manifest(folder: Path) -> dict[str, str]:
    try:
        content: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return dict(content["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ImageFailed(f"{folder / MANIFEST}: cannot be read as the list of a wheelhouse: {error}; {NEXT}") from error
