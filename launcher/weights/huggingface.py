"""The files of a repository on the Hugging Face hub, or a mirror of it (HF_ENDPOINT).

The same requests as huggingface_hub 1.x: src/huggingface_hub/hf_api.py, model_info and list_repo_tree.
"""

import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

from launcher.errors import HubFailed
from launcher.weights.client import HubClient, get_json, next_page
from launcher.weights.manifest import HubFile, Listing

COMMIT = re.compile(r"[0-9a-f]{40}")
PAGES = 1000  # at most


def list_huggingface(client: HubClient, name: str, revision: str) -> Listing:
    """`name`: ORGANISATION/NAME; `revision`: a branch, tag or commit, '' = main. Raises HubFailed."""
    what = f"{name}{f' at {revision}' if revision else ''}"
    info, _ = get_json(client, f"/api/models/{quote(name)}/revision/{quote(revision or 'main', safe='')}", what)
    commit = info.get("sha") if isinstance(info, dict) else None
    if not isinstance(commit, str) or not COMMIT.fullmatch(commit):
        raise HubFailed(f"{client.name} gives no commit for {what}: is this address a Hugging Face hub? Check HF_ENDPOINT")
    files = tuple(read_entries(client, name, commit))
    return Listing(kind="hub", endpoint=client.endpoint, id=name, revision=commit, files=files)


def read_entries(client: HubClient, name: str, commit: str) -> Iterator[HubFile]:
    path = f"/api/models/{quote(name)}/tree/{commit}?recursive=true"
    for _ in range(PAGES):
        page, headers = get_json(client, path, f"the files of {name}")
        if not isinstance(page, list):
            raise HubFailed(f"{client.name}: the list of files of {name} has an unknown form")
        for entry in page:
            if isinstance(entry, dict) and entry.get("type") == "file":
                yield read_entry(client, name, entry)
        path = next_page(client, headers)
        if not path:
            return
    raise HubFailed(f"{client.name}: the list of files of {name} does not end")


def read_entry(client: HubClient, name: str, entry: dict[str, Any]) -> HubFile:
    """A file in git LFS has its SHA-256; any other one the object id of git."""
    try:
        large = entry.get("lfs")
        if large:
            return HubFile(path=str(entry["path"]), size=int(large["size"]), sha256=str(large["oid"]).removeprefix("sha256:").lower())
        return HubFile(path=str(entry["path"]), size=int(entry["size"]), git_sha1=str(entry.get("oid", "")))
    except (KeyError, TypeError, ValueError) as error:
        raise HubFailed(f"{client.name}: an entry in the list of files of {name} has an unknown form: {str(entry)[:200]}") from error


def huggingface_path(listing: Listing, file: HubFile) -> str:
    return f"/{quote(listing.id)}/resolve/{listing.revision}/{quote(file.path)}"
