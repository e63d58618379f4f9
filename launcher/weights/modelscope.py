"""The files of a repository on ModelScope.

The same requests as modelscope_hub: src/modelscope_hub/_legacy_api.py, list_repo_files and the download of a file. An unknown revision is
answered with code 200 and no files. Each file has the commit that changed it last, and is downloaded from that commit.
"""

from typing import Any
from urllib.parse import quote, urlencode

from launcher.errors import HubFailed
from launcher.weights.client import HubClient, get_json
from launcher.weights.huggingface import COMMIT
from launcher.weights.manifest import HubFile, Listing

BRANCH = "master"


def list_modelscope(client: HubClient, name: str, revision: str) -> Listing:
    """`name`: ORGANISATION/NAME; `revision`: a branch, tag or commit, '' = master. Raises HubFailed."""
    asked = revision or BRANCH
    what = f"{name} at {asked}"
    query = urlencode({"Revision": asked, "Recursive": "true"})
    answer, _ = get_json(client, f"/api/v1/models/{quote(name)}/repo/files?{query}", what)
    if not isinstance(answer, dict) or answer.get("Code") != 200 or not isinstance(answer.get("Data"), dict):
        said = answer.get("Message", "") if isinstance(answer, dict) else ""
        raise HubFailed(
            f"{client.name}: {what} could not be listed: {said or 'the answer has an unknown form'}. Check the id and MODELSCOPE_DOMAIN"
        )
    data = answer["Data"]
    entries = [entry for entry in data.get("Files") or () if isinstance(entry, dict) and entry.get("Type") != "tree"]
    if not entries:
        raise HubFailed(f"{client.name}: {name} has no files at revision {asked}: check --revision, a branch, tag or commit of ModelScope")
    files = tuple(read_entry(client, name, entry) for entry in entries)
    commit = asked if COMMIT.fullmatch(asked) else find_commit(data.get("LatestCommitter"), files)
    return Listing(kind="modelscope", endpoint=client.endpoint, id=name, revision=commit or asked, files=files)


def read_entry(client: HubClient, name: str, entry: dict[str, Any]) -> HubFile:
    try:
        revision = str(entry.get("Revision") or "")
        return HubFile(
            path=str(entry["Path"]),
            size=int(entry["Size"]),
            sha256=str(entry.get("Sha256") or "").lower(),
            revision=revision if COMMIT.fullmatch(revision) else "",
        )
    except (KeyError, TypeError, ValueError) as error:
        raise HubFailed(f"{client.name}: an entry in the list of files of {name} has an unknown form: {str(entry)[:200]}") from error


def find_commit(latest: Any, files: tuple[HubFile, ...]) -> str:
    """The newest commit: its id is often empty, and then only its first digits are given, which a file that it changed completes. '' if no
    file does."""
    if not isinstance(latest, dict):
        return ""
    whole, short = str(latest.get("Id") or ""), str(latest.get("ShortId") or "")
    if COMMIT.fullmatch(whole):
        return whole
    found = {file.revision for file in files if short and file.revision.startswith(short)}
    return found.pop() if len(found) == 1 else ""


def modelscope_path(listing: Listing, file: HubFile) -> str:
    query = urlencode({"Revision": file.revision or listing.revision, "FilePath": file.path})
    return f"/api/v1/models/{quote(listing.id)}/repo?{query}"
