"""A repository of a hub into a folder: listed at one commit, downloaded, checked, and written down in a manifest.

Unfinished files are in FOLDER/.fetch, with the listing that was begun: the next call continues with that commit. A file gets its own name only
when its hash is right, and the manifest is written last. Files that were there before are never changed.
"""

import fcntl
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import datetime
from hashlib import sha256
from pathlib import Path

from launcher.errors import ConfigRefused, HubFailed
from launcher.weights.client import HubClient
from launcher.weights.download import download, size_of
from launcher.weights.endpoint import TITLE, TOKEN_VARIABLE, clean_endpoint, find_endpoint
from launcher.weights.huggingface import huggingface_path, list_huggingface
from launcher.weights.manifest import FORMAT, HubFile, HubKind, Listing, WeightsManifest, find_difference, hash_file, read_manifest
from launcher.weights.modelscope import list_modelscope, modelscope_path
from launcher.weights.selection import refuse_paths, small_files, weight_names
from trainer.contract import SpecError, read, write, write_text
from trainer.contract.weight_files import MANIFEST_FILE
from trainer.contract.wording import plural

UNFINISHED = ".fetch"
PENDING_FILE, LOCK_FILE = "pending.json", "lock"
MARGIN_BYTES = 2**28  # of the disk, for the small files and the file system
LIST: dict[HubKind, Callable[[HubClient, str, str], Listing]] = {"hub": list_huggingface, "modelscope": list_modelscope}
PATH: dict[HubKind, Callable[[Listing, HubFile], str]] = {"hub": huggingface_path, "modelscope": modelscope_path}


@dataclass(frozen=True, kw_only=True)
class FetchProgress:
    """`say`: a line; `begin`: a file with its size and the bytes that are here already; `report`: bytes that arrived."""

    say: Callable[[str], None]
    begin: Callable[[str, int, int], None]
    report: Callable[[int], None]


@dataclass(frozen=True, kw_only=True)
class Fetch:
    """One call: a repository, into `folder`."""

    client: HubClient
    folder: Path
    listing: Listing
    progress: FetchProgress

    @property
    def unfinished(self) -> Path:
        return self.folder / UNFINISHED

    @property
    def what(self) -> str:
        return f"{self.listing.id} at {self.listing.revision}"


def open_client(kind: HubKind, environ: Mapping[str, str], endpoint: str = "") -> HubClient:
    """The client of a hub, by the caller's variables: HF_ENDPOINT and HF_TOKEN, or MODELSCOPE_DOMAIN and MODELSCOPE_API_TOKEN. Raises
    ConfigRefused for an address that is no URL."""
    given = endpoint or find_endpoint(kind, environ)
    token = environ.get(TOKEN_VARIABLE[kind], "").strip()
    secret = {"Authorization": f"Bearer {token}"} if token else {}
    if token and kind == "modelscope":
        secret["Cookie"] = f"m_session_id={token}"  # what older paths of its API read
    return HubClient(kind=kind, endpoint=clean_endpoint(given), secret=secret)


def fetch(
    client: HubClient, name: str, folder: Path, revision: str, progress: FetchProgress, now: Callable[[], datetime]
) -> WeightsManifest:
    """The manifest of the complete folder. Raises HubFailed; ConfigRefused for a folder that holds something else, is in use, or is too small."""
    make_folder(folder)
    with lock_folder(folder), without_traces(folder):
        listing = find_listing(client, name, folder, revision, progress.say)
        call = Fetch(client=client, folder=folder, listing=listing, progress=progress)
        small = small_files(listing.files)
        place_all(call, small)
        weights = weight_names(listing.files, folder, name)
        refuse_small_disk(call, weights)
        progress.say(f"{plural(len(weights), 'file')} of weights, {sum(file.size for file in weights) / 1e9:,.2f} GB")
        place_all(call, weights)
        return finish(call, (*small, *weights), now())


def make_folder(folder: Path) -> None:
    """Raises ConfigRefused where it cannot be made, and where its folder of unfinished files is not what a fetch leaves."""
    unfinished = folder / UNFINISHED
    try:
        unfinished.mkdir(parents=True, exist_ok=True)
        foreign = unfinished.is_symlink() or any(path.is_dir() and not path.is_symlink() for path in unfinished.iterdir())
    except OSError as error:
        raise ConfigRefused(f"--to {folder}: {error.strerror}. Name a folder that you can write to") from error
    if foreign:
        raise ConfigRefused(f"{unfinished} is a link or holds a folder, and so was not made by a fetch. Remove it, or name another folder")


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Raises ConfigRefused while another process fetches into the folder. The kernel releases the lock when the process ends."""
    descriptor = os.open(folder / UNFINISHED / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigRefused(f"{folder}: another process fetches into this folder. Wait for it, or name another folder") from error
        yield
    finally:
        os.close(descriptor)


@contextmanager
def without_traces(folder: Path) -> Iterator[None]:
    """A fetch that failed before it wrote anything leaves no folder."""
    try:
        yield
    finally:
        left = [path.name for path in (folder / UNFINISHED).iterdir()] if (folder / UNFINISHED).is_dir() else []
        if left == [LOCK_FILE]:
            (folder / UNFINISHED / LOCK_FILE).unlink()
            (folder / UNFINISHED).rmdir()
            with suppress(OSError):  # it held something before
                folder.rmdir()


# ---------------------------------------------------------------------------------------------------------------- listing


def find_listing(client: HubClient, name: str, folder: Path, revision: str, say: Callable[[str], None]) -> Listing:
    """Of the manifest or the unfinished fetch in the folder, so that one folder holds one commit; otherwise of the hub. Raises ConfigRefused
    where the folder belongs to another repository or commit."""
    begun = read_begun(folder)
    if begun is None:
        return list_new(client, name, folder, revision, say)
    if (begun.kind, begun.id) != (client.kind, name):
        refuse_folder(folder, begun, f"{name} of {TITLE[client.kind]}")
    if revision and revision != begun.revision and (asked := LIST[client.kind](client, name, revision).revision) != begun.revision:
        refuse_folder(folder, begun, f"{name} at {asked}")
    listing = Listing(kind=begun.kind, endpoint=client.endpoint, id=begun.id, revision=begun.revision, files=begun.files)
    refuse_paths(listing.files, name)
    say(f"{folder}: {'already fetched' if begun.date else 'continues'}, {begun.id} at {begun.revision}")
    return listing


def read_begun(folder: Path) -> WeightsManifest | None:
    try:
        done = read_manifest(folder)
        pending = folder / UNFINISHED / PENDING_FILE
        return done or (read(WeightsManifest, pending) if pending.is_file() else None)
    except SpecError as error:
        raise ConfigRefused(f"{error}. It is damaged: remove it, or name another folder") from error


def refuse_folder(folder: Path, begun: WeightsManifest, asked: str) -> None:
    state = "holds" if begun.date else "holds an unfinished fetch of"
    raise ConfigRefused(f"--to {folder}: it {state} {begun.id} at {begun.revision} ({TITLE[begun.kind]}), not {asked}. Name another folder")


def list_new(client: HubClient, name: str, folder: Path, revision: str, say: Callable[[str], None]) -> Listing:
    listing = LIST[client.kind](client, name, revision)
    refuse_paths(listing.files, name)
    begun = WeightsManifest(
        format=FORMAT, kind=listing.kind, endpoint=listing.endpoint, id=name, revision=listing.revision, date="", files=listing.files
    )
    write(begun, folder / UNFINISHED / PENDING_FILE)
    say(f"{listing.id} at {listing.revision}, from {client.name}")
    return listing


# ------------------------------------------------------------------------------------------------------------------ files


def place_all(call: Fetch, files: Sequence[HubFile]) -> None:
    """Every file under its own name, the smallest first. Raises HubFailed and ConfigRefused."""
    for file in sorted(files, key=lambda file: (file.size, file.path)):
        place(call, file)


def place(call: Fetch, file: HubFile) -> None:
    target, part = call.folder / file.path, part_of(call, file)
    if target.exists() or target.is_symlink():
        refuse_other_file(call, target, file)
        return
    call.progress.begin(file.path, file.size, size_of(part))
    download(call.client, PATH[call.listing.kind](call.listing, file), file, part, call.progress.report)
    sync_file(part)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigRefused(f"{target.parent} cannot be made: {error.strerror}. Name an empty folder, or remove what is there") from error
    part.rename(target)
    mark_checked(call, file)


def refuse_other_file(call: Fetch, target: Path, file: HubFile) -> None:
    """Raises ConfigRefused for a file that has another content than the hub's. One that this fetch placed is not hashed again."""
    mark = mark_of(call, file)
    if target.is_file() and mark.is_file() and mark.read_text(encoding="utf-8") == stamp(target):
        return
    difference = find_difference(target, file) if target.is_file() else "is no file"
    if difference:
        raise ConfigRefused(
            f"{target} is there already, and is not the file of {call.what}: it {difference}. Nothing was changed. Name an empty folder, or remove it"
        )
    mark_checked(call, file)


def part_of(call: Fetch, file: HubFile) -> Path:
    return call.unfinished / f"{sha256(file.path.encode()).hexdigest()[:8]}-{file.path.replace('/', '-')}.part"


def mark_of(call: Fetch, file: HubFile) -> Path:
    return part_of(call, file).with_suffix(".checked")


def mark_checked(call: Fetch, file: HubFile) -> None:
    write_text(stamp(call.folder / file.path), mark_of(call, file))


def stamp(path: Path) -> str:
    found = path.stat()
    return f"{found.st_size} {found.st_mtime_ns}"


def sync_file(path: Path) -> None:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def refuse_small_disk(call: Fetch, files: Iterable[HubFile]) -> None:
    """Raises ConfigRefused before the first weight file if the disk cannot hold all of them."""
    missing = sum(file.size - size_of(part_of(call, file)) for file in files if not (call.folder / file.path).exists())
    free = shutil.disk_usage(call.folder).free
    if missing and free < missing + MARGIN_BYTES:
        raise ConfigRefused(
            f"{call.folder} has {free / 1e9:.1f} GB free, and the files of {call.what} that are missing take {missing / 1e9:.1f} GB. Free as much, or "
            "name a folder on another disk: --to FOLDER"
        )


def finish(call: Fetch, files: Sequence[HubFile], date: datetime) -> WeightsManifest:
    """Write the manifest, and remove the folder of unfinished files."""
    own = read_manifest(call.folder)
    if own is None:
        hashed = tuple(
            replace(file, sha256=file.sha256 or hash_file(call.folder / file.path)) for file in sorted(files, key=lambda file: file.path)
        )
        listing = call.listing
        own = WeightsManifest(
            format=FORMAT,
            kind=listing.kind,
            endpoint=listing.endpoint,
            id=listing.id,
            revision=listing.revision,
            date=f"{date:%Y-%m-%dT%H:%M:%SZ}",
            files=hashed,
        )
        write(own, call.folder / MANIFEST_FILE)
    for path in sorted(call.unfinished.iterdir()):
        path.unlink()
    call.unfinished.rmdir()
    return own


def refuse_offline(kind: HubKind, environ: Mapping[str, str]) -> None:
    """Raises ConfigRefused where the caller's variables forbid the network."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if kind == "hub" and environ.get(name, "").strip().upper() in ("1", "ON", "YES", "TRUE"):
            raise ConfigRefused(f"{name}={environ[name]} forbids the network: unset it for this command, or fetch on another machine")


def refuse_id(name: str) -> None:
    """Raises HubFailed for an id that is not ORGANISATION/NAME."""
    parts = name.split("/")
    if len(parts) != 2 or not all(
        part and not part.startswith(".") and part.replace("-", "").replace("_", "").replace(".", "").isalnum() for part in parts
    ):
        raise HubFailed(f"{name!r} is no id of a repository: ORGANISATION/NAME")
