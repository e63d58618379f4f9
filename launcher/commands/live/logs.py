"""`omnilaunch logs`: the output of all ranks of a run, each line with its node in front."""

import argparse
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from launcher.commands.live.live_run import add_run, connect_nodes, find_named, has_ended, load_plan
from launcher.errors import NodeFailed
from launcher.record.lock import is_locked
from trainer.contract import Exit

if TYPE_CHECKING:
    from launcher.plan.plan import Plan
    from launcher.run.run_folder import WorkingNode
    from launcher.ssh.transport import Running

POLL_S = 0.5
UNSEEN = 4  # polls without a launcher, after which it counts as killed
PIECE_BYTES = 1 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    parser.add_argument("-f", "--follow", action="store_true", help="continue until the run has ended")


def run(arguments: argparse.Namespace) -> int:
    named = find_named(arguments)
    with open_logs(named, follows=arguments.follow) as (folder, ended):
        for line in follow(folder, ended=ended):
            arguments.say(line)
    if arguments.follow and not has_ended(named) and load_plan(named).config.cluster.runtime == "process":
        arguments.say(f"the launcher of run {named.name} was killed. See: omnilaunch status {named.name}")
    return Exit.OK


@contextmanager
def open_logs(folder: Path, *, follows: bool) -> Iterator[tuple[Path, Callable[[], bool]]]:
    """(the folder that has logs/, whether the logs are complete). While a launcher supervises the run it writes them to the run's own
    folder. Otherwise they are read from the containers on the nodes, as long as there are any."""
    from launcher.run.stop import NO_CONTAINER, state_of
    from launcher.ssh.parallel import attempt_each

    plan = load_plan(folder)
    if has_ended(folder) or plan.config.cluster.runtime != "docker" or is_locked(folder):
        yield folder, is_complete(folder, plan, follows=follows)
        return
    with TemporaryDirectory(prefix="omnilaunch-") as aside, connect_nodes([plan]) as nodes:
        if not any(isinstance(state, str) and state != NO_CONTAINER for state in attempt_each(state_of, nodes)):
            yield folder, lambda: True
            return
        (Path(aside) / "logs").mkdir()
        readers = start_readers(nodes, Path(aside) / "logs", follows=follows)
        yield Path(aside), lambda: all(map(is_over, readers))


def is_complete(folder: Path, plan: "Plan", *, follows: bool) -> Callable[[], bool]:
    """Whether nothing more is written to the run's folder: the run has ended, or its launcher was killed. Ranks on this machine outlive it."""
    from launcher.plan.commands import FOLDER_VARIABLE
    from launcher.ssh.transport import processes_with

    alone = 0  # how often in a row no launcher was seen: one that starts a run takes the lock after it has made the folder

    def check() -> bool:
        nonlocal alone
        if not follows or has_ended(folder):
            return True
        alone = 0 if is_locked(folder) or processes_with(FOLDER_VARIABLE, plan.spec.output) else alone + 1
        return alone > UNSEEN

    return check


def start_readers(nodes: "Sequence[WorkingNode]", logs: Path, *, follows: bool) -> "tuple[Running | NodeFailed, ...]":
    """Copy the log of each node's container to a file that grows while the run continues."""
    from launcher.ssh.parallel import attempt_each

    def read(node: "WorkingNode") -> "Running":
        argv = node.command.logs if follows else tuple(word for word in node.command.logs if word != "--follow")
        return node.transport.start(argv, log=logs / f"node{node.command.node_rank}.log")

    readers = attempt_each(read, nodes)
    for node, reader in zip(nodes, readers, strict=True):
        if isinstance(reader, NodeFailed):
            (logs / f"node{node.command.node_rank}.log").write_text(f"{reader}\n", encoding="utf-8")
    return readers


def is_over(reader: "Running | NodeFailed") -> bool:
    try:
        return isinstance(reader, NodeFailed) or reader.poll() is not None
    except NodeFailed:
        return True


def follow(folder: Path, *, ended: Callable[[], bool]) -> Iterator[str]:
    """Complete lines of all logs as they are written. After the end the rest is read, even where the last line is incomplete."""
    read_bytes: dict[int, int] = {}  # by inode: the log of another attempt has the same name
    last = False
    while True:
        for path in sorted((folder / "logs").glob("node*.log")):
            yield from (f"[{path.stem}] {line}" for line in new_lines(path, read_bytes, last=last))
        if last:
            return
        last = ended()
        if not last:
            time.sleep(POLL_S)


def new_lines(path: Path, read_bytes: dict[int, int], *, last: bool) -> Iterator[str]:
    """In pieces, since a log may be larger than the memory. A line longer than a piece is cut."""
    try:
        file = path.open("rb")
    except FileNotFoundError:  # moved just now, together with its attempt
        return
    with file:
        inode = os.fstat(file.fileno()).st_ino
        file.seek(read_bytes.get(inode, 0))
        while piece := file.read(PIECE_BYTES):
            length = piece.rfind(b"\n") + 1 or (len(piece) if last else whole_characters(piece) if len(piece) == PIECE_BYTES else 0)
            if not length:
                return
            read_bytes[inode] = file.seek(length - len(piece), os.SEEK_CUR)
            yield from piece[:length].decode("utf-8", errors="replace").splitlines()


def whole_characters(piece: bytes) -> int:
    """The length of `piece` without a UTF-8 character that is cut at its end."""
    start = len(piece) - next((back for back in range(1, min(4, len(piece)) + 1) if piece[-back] & 0xC0 != 0x80), 0)
    try:
        piece[start:].decode()
    except UnicodeDecodeError as error:
        return start if start and error.reason == "unexpected end of data" else len(piece)
    return len(piece)
