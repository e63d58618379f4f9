"""One launcher at a time looks after a run, and a run that was asked to stop is known to every launcher of this folder."""

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from launcher.errors import ConfigRefused
from trainer import contract

CLAIM_FILE = "launcher.lock"
STOP_FILE = "stop.json"


@contextmanager
def claim(folder: Path) -> Iterator[None]:
    """Hold the run for as long as this process lives, however it ends. Raises ConfigRefused where another one holds it."""
    with (folder / CLAIM_FILE).open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise ConfigRefused(
                f"run {folder.name} is looked after by another launcher ({file.read().strip() or 'unknown'}). To follow it from here: "
                f"omnilaunch logs -f {folder.name}. To end it: omnilaunch stop {folder.name}"
            ) from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def is_claimed(folder: Path) -> bool:
    try:
        with claim(folder):
            return False
    except ConfigRefused:
        return True


def ask_to_stop(folder: Path, now: datetime) -> None:
    """From here on an end of the run is no failure, and nobody starts it again."""
    contract.write_text(json.dumps({"asked_at": now.isoformat(timespec="milliseconds")}) + "\n", folder / STOP_FILE)


def is_asked_to_stop(folder: Path) -> bool:
    return (folder / STOP_FILE).exists()
