"""What cluster.sync names, from this machine to the same place on every node: what a node lacks, nothing else, and nothing over a file
of its own.

A file counts as there when its name and its size are. A batch arrives in a hidden folder beside the others and is moved in when it is
whole, so that no half file ever has its name, and a copy that was interrupted goes on where it stopped.
"""

import hashlib
import os
import posixpath
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.doctor.node_facts import GIB
from launcher.doctor.parse import read_disk_space
from launcher.errors import ConfigRefused, ImageFailed, NodeFailed
from launcher.run.delivery.ship import send, tail_of
from launcher.run.run_folder import WorkingNode
from launcher.ssh.parallel import each, together
from launcher.ssh.transport import Transport

# Then a dot and some letters, so that two launchers do not meet. Below the folder itself, which may be a mount: moving in is then a rename.
INCOMING = ".omnilaunch-sync"
BATCH_BYTES = 2**30  # what an interruption costs at most, unless one file is larger
BATCH_FILES = 20_000
LIST_TIMEOUT_S = 600  # a million files on a cold disk
SHOWN = 3

# Size and path below of every file, an empty one where the path itself is a file. A link counts as what it leads to; one that leads
# nowhere stays a link (`l`), and is refused.
FIND = ("-name", f"{INCOMING}.*", "-prune", "-o", "(", "-type", "f", "-o", "-type", "l", ")", "-printf", r"%y %s %P\0")
# What may not be read there, such as lost+found, is what is not there.
THERE = 'path=$1; shift; find -L "$path" "$@" 2>/dev/null || true'
DIGEST = f"{{ {THERE}; }} | LC_ALL=C sort -z | sha256sum"
MARK = 'set -e; umask 022; mkdir -p -- "$1"; : >"$1/$2"; df -Pk -- "$1"'
# Each folder of what came, made there if need be, and its files renamed into it; one that is there meanwhile stays.
MOVE = """to=$1; shift
for folder; do
  mkdir -p -- "$to/$folder" || exit
  for file in "$folder"/* "$folder"/.[!.]* "$folder"/..?*; do
    if [ -f "$file" ] && [ -e "$to/$file" ]; then rm -- "$file" || exit; fi
  done
  find "$folder" -maxdepth 1 -type f -print0 | xargs -0 -r mv -n -t "$to/$folder" -- || exit
done"""
# A stream that is cut off ends tar with an error in the middle of a file, and at the end of one leaves only whole files.
RECEIVE = f"""set -e
umask 022
find "$1" -maxdepth 1 -name '{INCOMING}.*' -mmin +1440 -exec rm -r -- {{}} +
incoming=$(mktemp -d -- "$1/{INCOMING}.XXXXXX")
trap 'rm -r -- "$incoming"' EXIT
chmod 755 -- "$incoming"
tar -C "$incoming" --no-same-owner -xf -
sync -f -- "$incoming"
cd -- "$incoming"
find . -type d -exec sh -c "$2" sh "$1" {{}} +"""


@dataclass(frozen=True, kw_only=True)
class SyncPath:
    """One path of cluster.sync as it is here. `files`: path below it -> size in bytes; of a file itself the one path is empty."""

    path: str
    files: dict[bytes, int]

    @property
    def folder(self) -> str:
        """What the files are below, here and on the nodes."""
        return posixpath.dirname(self.path) if b"" in self.files else self.path

    def name(self, below: bytes) -> bytes:
        """The same path below `folder`."""
        return below or os.fsencode(posixpath.basename(self.path))

    def shown(self, below: bytes) -> str:
        text = posixpath.join(self.folder, os.fsdecode(self.name(below)))
        return text if text.isprintable() else repr(text)


@dataclass(frozen=True, kw_only=True)
class Missing:
    """What a node lacks of a parcel, and what it has of another size (bytes)."""

    missing: frozenset[bytes]
    other: dict[bytes, int]


def sync(paths: Sequence[str], sites: Sequence[WorkingNode], source: Transport, say: Callable[[str], None], *, token: str) -> None:
    """Have the files below `paths` on every node. `source`: this machine; `token`: a word of this run for marks that are made and removed.

    Raises ConfigRefused for a path that cannot be copied; NodeFailed, before anything is copied, with every file that a node has of
    another size; NodeFailed for a node that cannot take them in, when the others have them.
    """
    parcels = [read_sync_path(path, source) for path in paths]
    gaps = [each(lambda site, parcel=parcel: find_missing(parcel, site), sites) for parcel in parcels]  # type: ignore[misc]
    refused = [refusal for parcel, found in zip(parcels, gaps, strict=True) for refusal in refusals(parcel, sites, found)]
    if refused:
        raise together(refused, len(sites))
    for parcel, found in zip(parcels, gaps, strict=True):
        lacking = tuple((site, gap) for site, gap in zip(sites, found, strict=True) if gap.missing)
        if lacking:
            copy(parcel, lacking, source, say, token)


# ------------------------------------------------------------------------------------------------------------- what is where


def read_sync_path(path: str, source: Transport) -> SyncPath:
    """The files below a path of this machine. Raises ConfigRefused."""
    if not path.startswith("/") or not posixpath.normpath(path).strip("/"):
        raise ConfigRefused(
            f"cluster.sync: {path!r} is not a file or folder from the root on, and its place on the nodes is the same: cluster.sync=[/FOLDER]"
        )
    path = "/" + posixpath.normpath(path).strip("/")
    try:
        with source.stream(("find", "-L", path, *FIND)) as chunks:
            files = read_files(chunks)
    except NodeFailed as error:
        raise ConfigRefused(f"cluster.sync: {path} cannot be read on this machine: {str(error).rpartition(chr(10))[2]}") from error
    parcel = SyncPath(path=path, files=files)
    loose = sorted(name for name, size in files.items() if size < 0)
    if loose or not files:
        what = f"the link {parcel.shown(loose[0])} leads nowhere" if loose else f"there is no file below {path}"
        raise ConfigRefused(f"cluster.sync: {what}: mend it, or leave it out")
    return parcel


def read_files(chunks: Iterator[bytes]) -> dict[bytes, int]:
    """Path below -> size in bytes, -1 for a link that leads nowhere."""
    records = (record.split(b" ", 2) for record in b"".join(chunks).split(b"\0") if record)
    return {path: int(size) if kind == b"f" else -1 for kind, size, path in records}


def find_missing(parcel: SyncPath, site: WorkingNode) -> Missing:
    """Asked for a digest first: a million names of each of 128 nodes are not fetched when all is well."""
    argv = ("sh", parcel.path, *FIND)
    told = site.transport.run(("sh", "-c", DIGEST, *argv), timeout_s=LIST_TIMEOUT_S).expect(
        f"{site.command.host}: looking at {parcel.path}"
    )
    if told.output.split()[:1] == [digest(parcel.files)]:
        return Missing(missing=frozenset(), other={})
    with site.transport.stream(("sh", "-c", THERE, *argv), silence_s=LIST_TIMEOUT_S) as chunks:
        there = read_files(chunks)
    return Missing(
        missing=frozenset(parcel.files.keys() - there.keys()),
        other={name: there[name] for name, size in parcel.files.items() if name in there and there[name] != size},
    )


def digest(files: dict[bytes, int]) -> str:
    return hashlib.sha256(b"".join(sorted(b"f %d %s\0" % (size, name) for name, size in files.items()))).hexdigest()


def refusals(parcel: SyncPath, sites: Sequence[WorkingNode], gaps: Sequence[Missing]) -> Iterator[NodeFailed]:
    for site, gap in zip(sites, gaps, strict=True):
        if gap.other:
            lines = [
                f"  {parcel.shown(name)}: {gap.other[name]} bytes there, {parcel.files[name]} here" for name in sorted(gap.other)[:SHOWN]
            ]
            lines += [f"  and {len(gap.other) - SHOWN} more"] if len(gap.other) > SHOWN else []
            yield NodeFailed(
                f"{site.command.host} has other files under these names; nothing was copied, and none is overwritten:\n"
                + "\n".join(lines)
                + f"\n  Next: move them away there, or leave {parcel.path} out of cluster.sync"
            )


# ------------------------------------------------------------------------------------------------------------------ copying


def copy(parcel: SyncPath, lacking: Sequence[tuple[WorkingNode, Missing]], source: Transport, say: Callable[[str], None], token: str) -> None:
    sites, names = [site for site, _ in lacking], sorted(frozenset[bytes]().union(*(gap.missing for _, gap in lacking)))
    total_bytes, sent_bytes, sent = sum(parcel.files[name] for name in names), 0, 0
    owners = open_folders(parcel, sites, token, total_bytes)
    hosts = ", ".join(site.command.host for site in owners)
    say(f"copying {len(names)} file(s), {total_bytes / 1e9:.1f} GB, of {parcel.path} to {hosts}")
    with tempfile.TemporaryDirectory(prefix="omnilaunch-") as folder:
        for batch in batches(names, parcel.files):
            listed = Path(folder) / "names"
            listed.write_bytes(b"".join(parcel.name(name) + b"\0" for name in batch))
            send_batch(parcel, listed, owners, source, say, sent_bytes, total_bytes)
            sent_bytes, sent = sent_bytes + sum(parcel.files[name] for name in batch), sent + len(batch)
            say(f"  {sent} of {len(names)} file(s)")
    require(parcel, sites)


def batches(names: Sequence[bytes], sizes: dict[bytes, int]) -> Iterator[list[bytes]]:
    batch: list[bytes] = []
    room_bytes = BATCH_BYTES
    for name in names:
        if batch and (sizes[name] > room_bytes or len(batch) == BATCH_FILES):
            yield batch
            batch, room_bytes = [], BATCH_BYTES
        batch.append(name)
        room_bytes -= sizes[name]
    yield batch


def send_batch(
    parcel: SyncPath, listed: Path, sites: Sequence[WorkingNode], source: Transport, say: Callable[[str], None], sent_bytes: int, total_bytes: int
) -> None:
    """The files whose names, each with a NUL after it, are in `listed`."""
    links = ("-h", "--hard-dereference")
    save = (
        "tar", "-C", parcel.folder, "--format=gnu", *links, "--no-recursion",
        "--null", "--verbatim-files-from", f"--files-from={listed}", "-cf", "-",
    )  # fmt: skip
    load = ("sh", "-c", RECEIVE, "sh", parcel.folder, MOVE)
    try:
        answers = send(save, load, sites, source, say, what=parcel.path, before_bytes=sent_bytes, total_bytes=total_bytes)
    except ImageFailed as error:
        raise ConfigRefused(f"cluster.sync: {error}\n  what has arrived whole stays; launch again to go on") from error
    failures = [answer for answer in answers if answer]
    if failures:
        raise together(failures, len(sites))


def open_folders(parcel: SyncPath, sites: Sequence[WorkingNode], token: str, total_bytes: int) -> tuple[WorkingNode, ...]:
    """The folder made on every node, and one node of each group that sees the same folder: a network file system is copied to once.
    Raises NodeFailed where it cannot be made or has no room."""
    marks = {id(site): f".omnilaunch-{token}-{site.command.node_rank}" for site in sites}

    def mark(site: WorkingNode) -> None:
        made = site.transport.run(("sh", "-c", MARK, "sh", parcel.folder, marks[id(site)]))
        if made.code:
            raise NodeFailed(
                f"{site.command.host}: cluster.sync cannot write to {parcel.folder}: {tail_of(made)}\n"
                f"  Next: make the folder there once for the user who logs in: sudo install -d -o USER {parcel.folder}"
            )
        room = read_disk_space(parcel.folder, made.output)
        if room and room.free_gib * GIB < total_bytes:
            raise NodeFailed(f"{site.command.host}: {parcel.path} takes {total_bytes / 1e9:.1f} GB, {room.free_gib:.1f} GiB are free there")

    def look(site: WorkingNode) -> frozenset[str]:
        argv = ("find", parcel.folder, "-maxdepth", "1", "-name", f".omnilaunch-{token}-*", "-printf", r"%f\n")
        return frozenset(site.transport.run(argv).output.splitlines())

    try:
        each(mark, sites)
        seen = each(look, sites)
    finally:
        each(lambda site: site.transport.run(("rm", "-f", "--", f"{parcel.folder}/{marks[id(site)]}")), sites)
    first: dict[frozenset[str], WorkingNode] = {}
    for names, site in zip(seen, sites, strict=True):
        first.setdefault(names, site)
    return tuple(first.values())


def require(parcel: SyncPath, sites: Sequence[WorkingNode]) -> None:
    for site, gap in zip(sites, each(lambda site: find_missing(parcel, site), sites), strict=True):
        wrong = sorted({*gap.missing, *gap.other})
        if wrong:
            raise NodeFailed(
                f"after copying, {site.command.host} does not have {len(wrong)} file(s) of {parcel.path} as they are here, such as "
                f"{parcel.shown(wrong[0])}: launch again to go on"
            )
