"""One file of a repository into an unfinished file beside its place: resumed where it stopped, and checked by size and hash at the end."""

import http.client
import urllib.error
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from launcher.errors import ConfigRefused, HubFailed
from launcher.weights.client import PAUSES_S, HubClient, describe_error, open_path
from launcher.weights.manifest import PIECE_BYTES, HubFile, find_difference

HASH_ATTEMPTS = 2
Report = Callable[[int], None]  # is given the bytes that arrived, less those that were thrown away


def download(client: HubClient, path: str, file: HubFile, part: Path, report: Report) -> None:
    """Make `part` the content of `file`, which is at `path` of the hub. Raises HubFailed, or ConfigRefused for a full disk; what arrived stays in
    `part`, except where its hash is wrong."""
    for _ in range(HASH_ATTEMPTS):
        receive(client, path, file, part, report)
        difference = find_difference(part, file)
        if not difference:
            return
        drop(part, report)
    raise HubFailed(
        f"{client.name}: {file.path} arrived {HASH_ATTEMPTS} times with another content than the hub lists: it {difference}. It was removed; the "
        "other files are kept. Run the command again, or take another hub or mirror"
    )


def receive(client: HubClient, path: str, file: HubFile, part: Path, report: Report) -> None:
    """Until `part` has all bytes. An attempt that brings bytes may be followed by any number of others. Raises HubFailed."""
    failures = 0
    if size_of(part) > file.size:
        drop(part, report)
    part.touch()
    while (have := size_of(part)) < file.size:
        problem = receive_once(client, path, file, part, report)
        failures = 0 if size_of(part) > have else failures + 1
        if failures > len(PAUSES_S):
            raise HubFailed(
                f"{client.name} sent {have:,} of the {file.size:,} bytes of {file.path} and then no more, {failures} times ({problem}). They are kept: "
                "run the same command again, and it continues there"
            )
        if size_of(part) < file.size:
            client.sleep(PAUSES_S[max(0, failures - 1)])


def receive_once(client: HubClient, path: str, file: HubFile, part: Path, report: Report) -> str:
    """One request, from the first missing byte. Returns what ended it."""
    have, tag = size_of(part), tag_file(part)
    headers = {"Range": f"bytes={have}-"} if have else {}
    if have and tag.is_file():  # the rest only if the content is the same; all of it otherwise
        headers["If-Range"] = tag.read_text(encoding="utf-8")
    try:
        answer = open_path(client, path, file.path, headers)
    except urllib.error.HTTPError:  # 416: there is no such rest
        drop(part, report)
        part.touch()
        return "the hub has no more bytes of it"
    try:
        with answer:
            if answer.status != 206 and have:
                report(-have)
                have = 0
            check_length(client, answer, file, have)
            keep_tag(answer, tag)
            append(answer, file, part, have, report)
    except (OSError, http.client.HTTPException) as error:
        return describe_error(error)
    return "the connection was closed early"


def append(answer: Any, file: HubFile, part: Path, have: int, report: Report) -> None:
    """Raises OSError or HTTPException of the connection; ConfigRefused for the disk; HubFailed for too many bytes."""
    try:
        stream = part.open("r+b")
    except OSError as error:
        raise disk_failed(part, error) from error
    with stream:
        stream.truncate(have)
        stream.seek(have)
        while piece := answer.read(PIECE_BYTES // 4):
            have += len(piece)
            if have > file.size:
                raise HubFailed(f"{file.path}: more bytes arrived than the {file.size:,} that the hub lists. Run the command again")
            try:
                stream.write(piece)
            except OSError as error:
                raise disk_failed(part, error) from error
            report(len(piece))


def check_length(client: HubClient, answer: Any, file: HubFile, have: int) -> None:
    """Raises HubFailed where the answer says that it is another content than the listed one: an HTML page of a proxy, or a changed file."""
    given = answer.headers.get("Content-Range", "").rpartition("/")[2] if answer.status == 206 else answer.headers.get("Content-Length")
    begins = answer.headers.get("Content-Range", "").removeprefix("bytes ").partition("-")[0]
    if answer.status == 206 and begins != str(have):
        raise HubFailed(
            f"{client.name} sent another part of {file.path} than was asked for (from byte {begins or '?'}, not {have}). Run the command again"
        )
    if given and given.isdecimal() and int(given) != file.size:
        kind = answer.headers.get("Content-Type", "")
        page = f", of type {kind}: a login page or a proxy's" if "html" in kind else ""
        raise HubFailed(
            f"{client.name} sends {int(given):,} bytes for {file.path}{page}, but lists {file.size:,}. What is here is kept. Run the command again; if it "
            "stays so, take another hub or mirror"
        )


def keep_tag(answer: Any, tag: Path) -> None:
    """The ETag of the content, by which the next request asks for the rest of the same content. A weak one cannot be used (RFC 9110, 13.1.5)."""
    found = answer.headers.get("ETag", "")
    with suppress(OSError):
        if found and not found.startswith("W/"):
            tag.write_text(found, encoding="utf-8")
        else:
            tag.unlink(missing_ok=True)


def disk_failed(part: Path, error: OSError) -> ConfigRefused:
    return ConfigRefused(
        f"{part}: {error.strerror}. What arrived is kept: free disk space, or correct the permissions, and run the command again"
    )


def tag_file(part: Path) -> Path:
    return part.with_name(f"{part.name}.etag")


def size_of(part: Path) -> int:
    return part.stat().st_size if part.is_file() else 0


def drop(part: Path, report: Report) -> None:
    report(-size_of(part))
    part.unlink(missing_ok=True)
    tag_file(part).unlink(missing_ok=True)
