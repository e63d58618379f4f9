"""Redirects, proxies, and the shapes of the hub that these tests serve."""

from email.message import Message
from io import BytesIO
from pathlib import Path
from urllib.request import Request

import pytest

from launcher.errors import HubFailed
from launcher.weights.client import HubClient, RedirectHandler, get_json, next_page
from launcher.weights.huggingface import list_huggingface
from tests.launcher.weights.hub_server import COMMIT, NAME, Hub
from tests.launcher.weights.test_fetch import TOKEN, run


@pytest.mark.parametrize(
    ("new", "kept"),
    [
        ("https://hub.example/other", True),
        ("https://cdn.hub.example/x", False),
        ("https://hub.example:8443/x", False),
    ],
)
def test_a_redirect_keeps_the_token_on_its_host_only(new: str, kept: bool) -> None:
    asked = Request("https://hub.example/x", headers={"Authorization": f"Bearer {TOKEN}", "Cookie": "m_session_id=1", "Range": "bytes=5-"})
    request = RedirectHandler().redirect_request(asked, BytesIO(), 302, "Found", Message(), new)
    assert request is not None
    assert (request.get_header("Authorization") is not None, request.get_header("Cookie") is not None) == (kept, kept)
    assert request.get_header("Range") == "bytes=5-"


@pytest.mark.parametrize("new", ["http://hub.example/x", "file:///etc/passwd", "ftp://hub.example/x"])
def test_a_redirect_to_something_unencrypted_is_refused(new: str) -> None:
    with pytest.raises(HubFailed, match="which is not encrypted: refused"):
        RedirectHandler().redirect_request(Request("https://hub.example/x"), BytesIO(), 302, "Found", Message(), new)


def test_the_proxy_of_the_environment_is_used(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", hub.address)
    monkeypatch.setenv("no_proxy", "")
    info, _ = get_json(HubClient(kind="hub", endpoint="http://hub.example"), f"/api/models/{NAME}/revision/main", NAME)
    assert info["sha"] == COMMIT
    assert hub.requests[0][:2] == ("hub.example", f"http://hub.example/api/models/{NAME}/revision/main")


@pytest.mark.parametrize(
    ("link", "path"),
    [
        ('<https://huggingface.co/api/models/a/b/tree/c?cursor=x%3D>; rel="next"', "/api/models/a/b/tree/c?cursor=x%3D"),
        ('<https://h/first>; rel="first", <https://h/2?c=1>; rel="next"', "/2?c=1"),
        ("</api/x?c=1>; rel=next", "/api/x?c=1"),
        ('<https://h/last>; rel="last"', ""),
        ("", ""),
    ],
)
def test_the_next_page(link: str, path: str) -> None:
    headers = Message()
    headers["Link"] = link
    assert next_page(HubClient(kind="hub", endpoint="https://mirror.example"), headers) == path


@pytest.mark.parametrize("link", ["mailto:@host/", "mailto:evil.example/x", "data:@h/?c=1"])
def test_a_next_page_that_would_change_the_host_is_refused(link: str) -> None:
    headers = Message()
    headers["Link"] = f'<{link}>; rel="next"'
    with pytest.raises(HubFailed, match="no address of a hub"):
        next_page(HubClient(kind="hub", endpoint="https://mirror.example"), headers)


def test_a_list_that_does_not_end(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.page = 1
    monkeypatch.setattr("launcher.weights.huggingface.PAGES", 3)
    with pytest.raises(HubFailed, match=r"the list of files of .* does not end"):
        run(hub, tmp_path / "a")


def test_the_served_shapes_are_those_that_huggingface_hub_reads(hub: Hub) -> None:
    """Its own client sees the same commit, sizes and hashes as ours, so that the server of these tests is no invention."""
    api = pytest.importorskip("huggingface_hub").HfApi(endpoint=hub.address, token=False)
    listing = list_huggingface(HubClient(kind="hub", endpoint=hub.address), NAME, "main")
    assert api.model_info(NAME, revision="main").sha == listing.revision == COMMIT
    theirs = {
        (file.path, file.size, file.lfs.sha256 if file.lfs else "", "" if file.lfs else file.blob_id)
        for file in api.list_repo_tree(NAME, recursive=True, revision=COMMIT)
        if hasattr(file, "size")
    }
    assert theirs == {(file.path, file.size, file.sha256, file.git_sha1) for file in listing.files}
