"""Run in a trial container by the Python of the image: what a rank does before its first line. Arguments: files to write. Ends with one line that
says what failed.
"""

import glob
import os
import sys
import threading
from collections.abc import Callable
from functools import partial


def open_device(path: str) -> None:
    os.close(os.open(path, os.O_RDWR))


def attempt(what: str, work: Callable[[], object]) -> None:
    try:
        work()
    except BaseException as error:
        sys.exit(f"{what}: {error or type(error).__name__}")


def write(path: str) -> None:
    with open(path, "w"):  # noqa: PTH123  runs in the image's Python alone
        return


def main(files: list[str]) -> None:
    for path in files:
        attempt(f"{path} cannot be written by uid {os.getuid()}", partial(write, path))
    attempt("a thread cannot be started", lambda: threading.Thread(target=int).start())
    for path in sorted(glob.glob("/dev/davinci[0-9]*")):  # noqa: PTH207
        attempt(f"{path} cannot be opened by uid {os.getuid()} with groups {os.getgroups()}", partial(open_device, path))
    attempt("torch cannot be imported", lambda: __import__("torch"))


if __name__ == "__main__":
    main(sys.argv[1:])
