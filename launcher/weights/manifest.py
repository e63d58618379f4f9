"""What a hub lists, and the manifest of a folder that was fetched: the repository, its commit, and the hash of every file."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trainer.contract import SpecError, read
from trainer.contract.weight_files import MANIFEST_FILE

HubKind = Literal["hub", "modelscope"]  # as in model.source.kind; `hub` is the Hugging Face hub
PIECE_BYTES = 2**22  # read at a time
FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class HubFile:
    """A file of a repository. `path`: relative, with slashes. `sha256`: of the content, '' where the hub gives none; `git_sha1`: the object id
    of the content in git, '' where it is not known. `revision`: the commit to ask for, '' = that of the listing."""

    path: str
    size: int
    sha256: str = ""
    git_sha1: str = ""
    revision: str = ""


@dataclass(frozen=True, kw_only=True)
class Listing:
    """The files of a repository at one commit. `revision`: the commit; on ModelScope the name that was asked for, where the answer does not
    identify the commit."""

    kind: HubKind
    endpoint: str
    id: str
    revision: str
    files: tuple[HubFile, ...]


@dataclass(frozen=True, kw_only=True)
class WeightsManifest:
    """The manifest of a folder. While files are missing it is in the folder of the unfinished files. `files` have their SHA-256, which was
    computed here. `date`: when the fetch ended, in UTC."""

    format: int
    kind: HubKind
    endpoint: str
    id: str
    revision: str
    date: str
    files: tuple[HubFile, ...]


def read_manifest(folder: Path) -> WeightsManifest | None:
    """None for a folder that was not fetched. Raises SpecError for a manifest that cannot be read."""
    path = folder / MANIFEST_FILE
    if not path.is_file():
        return None
    found: WeightsManifest = read(WeightsManifest, path)
    if found.format != FORMAT:
        raise SpecError(f"{path}: format {found.format}; this version reads {FORMAT}")
    return found


def hash_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(PIECE_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def hash_git_object(path: Path) -> str:
    """The id of the content in git: SHA-1 over a header and the bytes (git-hash-object(1))."""
    digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as stream:
        while piece := stream.read(PIECE_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def find_difference(path: Path, file: HubFile) -> str:
    """How the file at `path` differs from what the hub lists, or ''. Reads the whole file."""
    size = path.stat().st_size
    if size != file.size:
        return f"has {size:,} bytes, and {file.size:,} are listed"
    if file.sha256:
        found = hash_file(path)
        return "" if found == file.sha256 else f"has the SHA-256 {found}, and {file.sha256} is listed"
    if file.git_sha1:
        found = hash_git_object(path)
        return "" if found == file.git_sha1 else f"has the git object id {found}, and {file.git_sha1} is listed"
    return ""
