"""Copies the files of cluster.sync from this machine to the same path on every node: what a node lacks, nothing else. An existing file of a
node is never overwritten.

A file counts as present if its name and its size agree. A batch arrives in a hidden folder next to the target and is moved when it is
complete, so that no incomplete file ever has its final name, and an interrupted copy continues where it stopped.
"""

import hashlib
import os
import posixpath
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from launcher.doctor.node_facts import GIB
from launcher.doctor.parse import read_disk_space
from launcher.errors import ConfigRefused, ImageFailed, NodeFailed
from launcher.redact import printable
from launcher.run.delivery.broadcast import last_lines, send
from launcher.run.delivery.script import read_script
from launcher.run.run_folder import WorkingNode
from launcher.ssh.parallel import each, together
from launcher.ssh.transport import Transport
from trainer.contract.listing import keep_some
from trainer.contract.wording import plural

# Prefix of the temporary folders, each with letters of its own, so that two launchers do not collide. They are created in the target folder,
# which may be a mount: moving a file is then a rename.
INCOMING = ".omnilaunch-sync"
BATCH_BYTES = 2**30  # an interruption costs at most so much, unless one file is larger
BATCH_FILES = 20_000
LIST_TIMEOUT_S = 600  # a million files on a cold disk
SHOWN = 3  # file names in an error
# For every file: kind, size and path below the given path, empty if that is a file itself. A symbolic link counts as its target; one whose
# target is missing is printed as kind `l`, and refused.
FIND = ("-name", f"{INCOMING}.*", "-prune", "-o", "(", "-type", "f", "-o", "-type", "l", ")", "-printf", r"%y %s %P\0")


@dataclass(frozen=True, kw_only=True)
class SyncPath:
    """One path of cluster.sync on this machine. `files`: path below it -> size in bytes; if it is a file itself, that one path is empty."""

    path: str
    files: dict[bytes, int]

    @property
    def folder(self) -> str:
        """The folder that the files are in, here and on the nodes."""
        return posixpath.dirname(self.path) if b"" in self.files else self.path

    def name(self, below: bytes) -> bytes:
        """A key of `files` as a path below `folder`."""
        return below or os.fsencode(posixpath.basename(self.path))

    def shown(self, below: bytes) -> str:
        return printable(posixpath.join(self.folder, os.fsdecode(self.name(below))))


@dataclass(frozen=True, kw_only=True)
class Missing:
    """The files that a node lacks, and those that it has with another size (bytes)."""

    missing: frozenset[bytes]
    other: dict[bytes, int]


def sync(paths: Sequence[str], nodes: Sequence[WorkingNode], source: Transport, say: Callable[[str], None], *, token: str) -> None:
    """Copy the files below `paths` to every node that lacks them. `source`: this machine; `token`: names the temporary files of this run.

    Raises ConfigRefused for a path that cannot be copied; NodeFailed, before anything is copied, with the files that a node has with
    another size; NodeFailed for a node that cannot receive the files, after the other nodes have them.
    """
    wanted = [read_sync_path(path, source) for path in paths]
    found = [each(partial(find_missing, path), nodes) for path in wanted]
    refused = [refusal for path, gaps in zip(wanted, found, strict=True) for refusal in refusals(path, nodes, gaps)]
    if refused:
        raise together(refused, len(nodes))
    for path, gaps in zip(wanted, found, strict=True):
        if lacking := tuple((node, gap) for node, gap in zip(nodes, gaps, strict=True) if gap.missing):
            copy(path, lacking, source, say, token)


# ---------------------------------------------------------------------------------------------------------------- comparing


def read_sync_path(path: str, source: Transport) -> SyncPath:
    """The files below a path of this machine. Raises ConfigRefused."""
    if not path.startswith("/") or not posixpath.normpath(path).strip("/"):
        raise ConfigRefused(
            f"cluster.sync: {path!r} is not an absolute path of a file or folder; it is the same on the nodes: cluster.sync=[/FOLDER]"
        )
    path = "/" + posixpath.normpath(path).strip("/")
    try:
        with source.stream(("find", "-L", path, *FIND)) as chunks:
            files = read_files(chunks)
    except NodeFailed as error:
        raise ConfigRefused(f"cluster.sync: {path} cannot be read on this machine: {str(error).rpartition(chr(10))[2]}") from error
    found = SyncPath(path=path, files=files)
    dangling = sorted(name for name, size in files.items() if size < 0)
    if dangling or not files:
        what = f"the target of the link {found.shown(dangling[0])} does not exist" if dangling else f"there is no file below {path}"
        raise ConfigRefused(f"cluster.sync: {what}: fix it, or leave it out")
    return found


def read_files(chunks: Iterator[bytes]) -> dict[bytes, int]:
    """Path below -> size in bytes; -1 for a link whose target does not exist."""
    records = (record.split(b" ", 2) for record in b"".join(chunks).split(b"\0") if record)
    return {path: int(size) if kind == b"f" else -1 for kind, size, path in records}


def find_missing(path: SyncPath, node: WorkingNode) -> Missing:
    """A digest of the list is asked first, so that the names of a million files are not fetched from 128 nodes when nothing is missing."""
    argv = ("sh", path.path, *FIND)
    hashed = node.transport.run(("sh", "-c", read_script("hash_list.sh"), *argv), timeout_s=LIST_TIMEOUT_S)
    if hashed.expect(f"{node.command.host}: listing {path.path}").output.split()[:1] == [digest(path.files)]:
        return Missing(missing=frozenset(), other={})
    with node.transport.stream(("sh", "-c", read_script("list_files.sh"), *argv), silence_s=LIST_TIMEOUT_S) as chunks:
        present = read_files(chunks)
    return Missing(
        missing=frozenset(path.files.keys() - present.keys()),
        other={name: present[name] for name, size in path.files.items() if name in present and present[name] != size},
    )


def digest(files: dict[bytes, int]) -> str:
    return hashlib.sha256(b"".join(sorted(b"f %d %s\0" % (size, name) for name, size in files.items()))).hexdigest()


def refusals(path: SyncPath, nodes: Sequence[WorkingNode], gaps: Sequence[Missing]) -> Iterator[NodeFailed]:
    for node, gap in zip(nodes, gaps, strict=True):
        if gap.other:
            lines = [f"{path.shown(name)}: {gap.other[name]} bytes there, {path.files[name]} here" for name in sorted(gap.other)]
            yield NodeFailed(
                f"{node.command.host} has other files with these names; nothing was copied, and none is overwritten:\n"
                + "\n".join(f"  {line}" for line in keep_some(lines, SHOWN))
                + f"\n  Next: move them away there, or leave {path.path} out of cluster.sync"
            )


# ------------------------------------------------------------------------------------------------------------------ copying


def copy(path: SyncPath, lacking: Sequence[tuple[WorkingNode, Missing]], source: Transport, say: Callable[[str], None], token: str) -> None:
    nodes, names = [node for node, _ in lacking], sorted(frozenset[bytes]().union(*(gap.missing for _, gap in lacking)))
    total_bytes, sent_bytes, sent = sum(path.files[name] for name in names), 0, 0
    receivers = open_folders(path, nodes, token, total_bytes)
    hosts = ", ".join(node.command.host for node in receivers)
    say(f"copying {plural(len(names), 'file')}, {total_bytes / 1e9:.1f} GB, of {path.path} to {hosts}")
    with tempfile.TemporaryDirectory(prefix="omnilaunch-") as folder:
        for batch in batches(names, path.files):
            listed = Path(folder) / "names"
            listed.write_bytes(b"".join(path.name(name) + b"\0" for name in batch))
            send_batch(path, listed, receivers, source, say, before_bytes=sent_bytes, total_bytes=total_bytes)
            sent_bytes, sent = sent_bytes + sum(path.files[name] for name in batch), sent + len(batch)
            say(f"  {sent} of {plural(len(names), 'file')}")
    for node, gap in zip(nodes, each(partial(find_missing, path), nodes), strict=True):
        if wrong := sorted({*gap.missing, *gap.other}):
            raise NodeFailed(
                f"after copying, {node.command.host} still lacks {plural(len(wrong), 'file')} of {path.path}, or has them with another size, such as "
                f"{path.shown(wrong[0])}: launch again to continue"
            )


def batches(names: Sequence[bytes], sizes: dict[bytes, int]) -> Iterator[list[bytes]]:
    batch: list[bytes] = []
    left_bytes = BATCH_BYTES
    for name in names:
        if batch and (sizes[name] > left_bytes or len(batch) == BATCH_FILES):
            yield batch
            batch, left_bytes = [], BATCH_BYTES
        batch.append(name)
        left_bytes -= sizes[name]
    yield batch


def send_batch(
    path: SyncPath, listed: Path, nodes: Sequence[WorkingNode], source: Transport, say: Callable[[str], None], **progress: int
) -> None:
    """Send the files whose names, each with a NUL after it, are in `listed`."""
    save = (
        "tar", "-C", path.folder, "--format=gnu", "-h", "--hard-dereference", "--no-recursion",
        "--null", "--verbatim-files-from", f"--files-from={listed}", "-cf", "-",
    )  # fmt: skip
    load = ("sh", "-c", read_script("receive_files.sh"), "sh", path.folder, read_script("move_files.sh"), INCOMING)
    try:
        answers = send(save, load, nodes, source, say, what=path.path, **progress)
    except ImageFailed as error:
        raise ConfigRefused(f"cluster.sync: {error}\n  complete files stay on the nodes; launch again to continue") from error
    if failures := [answer for answer in answers if answer]:
        raise together(failures, len(nodes))


def open_folders(path: SyncPath, nodes: Sequence[WorkingNode], token: str, total_bytes: int) -> tuple[WorkingNode, ...]:
    """Create the folder on every node; then one node of each group that sees the same folder, since a network file system is copied to
    once. Raises NodeFailed where the folder cannot be created or its disk is too full."""
    marks = {id(node): f".omnilaunch-{token}-{node.command.node_rank}" for node in nodes}

    def mark(node: WorkingNode) -> None:
        made = node.transport.run(("sh", "-c", read_script("mark_folder.sh"), "sh", path.folder, marks[id(node)]))
        if made.code:
            raise NodeFailed(
                f"{node.command.host}: cluster.sync cannot write to {path.folder}: {last_lines(made)}\n"
                f"  Next: create the folder there once for the user who logs in: sudo install -d -o USER {path.folder}"
            )
        space = read_disk_space(path.folder, made.output)
        if space and space.free_gib * GIB < total_bytes:
            raise NodeFailed(f"{node.command.host}: {path.path} takes {total_bytes / 1e9:.1f} GB, {space.free_gib:.1f} GiB are free there")

    def look(node: WorkingNode) -> frozenset[str]:
        argv = ("find", path.folder, "-maxdepth", "1", "-name", f".omnilaunch-{token}-*", "-printf", r"%f\n")
        return frozenset(node.transport.run(argv).output.splitlines())

    try:
        each(mark, nodes)
        seen = each(look, nodes)
    finally:
        each(lambda node: node.transport.run(("rm", "-f", "--", f"{path.folder}/{marks[id(node)]}")), nodes)
    first: dict[frozenset[str], WorkingNode] = {}
    for names, node in zip(seen, nodes, strict=True):
        first.setdefault(names, node)
    return tuple(first.values())
