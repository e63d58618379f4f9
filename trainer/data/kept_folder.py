"""The folder for what is computed from data and kept for later runs: indexes of rows, results of checks. Never beside the data itself."""

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trainer.contract import DataSpec


def kept_folder(data: DataSpec, name: str) -> Path:
    """A writable folder `name` below `data.root`, else below the folder for temporary files, where it belongs to this user only. In a container the
    first is there only with built-in data, and the second ends with the container."""
    folder = Path(data.root) / name
    return folder if is_writable(folder) else temporary_folder(name)


def is_writable(folder: Path) -> bool:
    """Whether there is such a folder, or it could be made, and files can be made in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return os.access(folder, os.W_OK | os.X_OK)
    except OSError:
        return False


def temporary_folder(name: str) -> Path:
    """A folder `name` of this user's own below the folder for temporary files."""
    own = Path(tempfile.gettempdir()) / f"omnilaunch-{os.getuid()}"
    own.mkdir(mode=0o700, exist_ok=True)
    if own.is_symlink() or own.stat().st_uid != os.getuid():  # another user made it
        own = Path(tempfile.mkdtemp(prefix="omnilaunch-"))
    folder = own / name
    folder.mkdir(exist_ok=True)
    return folder


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds an exclusive lock. The kernel releases it when the process ends."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
