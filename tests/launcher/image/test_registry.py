"""The digest of a tag, from a registry on this machine that answers for one manifest."""

import json
from collections.abc import Iterator
from hashlib import sha256
from http.server import BaseHTTPRequestHandler

import pytest

from launcher.image.refresh import look_up
from launcher.image.registry import MANIFESTS, tag_digest
from launcher.image.stack import UNPINNED
from tests.launcher.image.test_refresh import serving

MANIFEST = json.dumps({"schemaVersion": 2, "mediaType": MANIFESTS[1], "manifests": []}).encode()
DIGEST = f"sha256:{sha256(MANIFEST).hexdigest()}"


class Registry(BaseHTTPRequestHandler):
    """Asks for a token for the names below private/, as Docker Hub does for every name."""

    def do_GET(self) -> None:
        if self.path.startswith("/token?"):
            self.answer(200, b'{"token": "t0ken"}' if "scope=repository%3Aprivate%2Fpython%3Apull" in self.path else b"{}")
        elif "/private/" in self.path and self.headers["Authorization"] != "Bearer t0ken":
            host = self.headers["Host"]
            challenge = f'Bearer realm="http://{host}/token",service="registry",scope="repository:private/python:pull"'
            self.answer(401, b"{}", ("WWW-Authenticate", challenge))
        elif self.path.endswith("python/manifests/3.11") and MANIFESTS[1] in self.headers["Accept"]:
            self.answer(200, MANIFEST, ("Docker-Content-Digest", DIGEST))
        elif self.path.endswith("nameless/manifests/3.11"):
            self.answer(200, MANIFEST)
        else:
            self.answer(404, b"{}")

    def answer(self, code: int, body: bytes, *headers: tuple[str, str]) -> None:
        self.send_response(code)
        for name, value in (*headers, ("Content-Length", str(len(body)))):
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, format: str, *arguments: object) -> None:
        return


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serving(Registry) as address:
        yield address


@pytest.mark.parametrize("name", ["library/python", "private/python"])
def test_a_digest_is_asked_of_the_registry(registry: str, name: str) -> None:
    assert tag_digest(f"{registry}/{name}:3.11") == DIGEST
    assert look_up(f"{registry}/{name}:3.11", UNPINNED, print) == DIGEST


@pytest.mark.parametrize(
    ("image", "reason"), [("library/python:4", "404"), ("library/nameless:3.11", "names no digest"), ("private/other:1", "404")]
)
def test_a_registry_without_the_tag_leaves_the_known_digest(registry: str, image: str, reason: str) -> None:
    said: list[str] = []
    assert look_up(f"{registry}/{image}", "sha256:known", said.append) == "sha256:known"
    assert f"{registry}/{image}: its registry gave no digest, 'sha256:known' is kept" in said[0] and reason in said[0]


def test_a_registry_that_does_not_answer_leaves_the_known_digest() -> None:
    said: list[str] = []
    assert look_up("registry.invalid/python:3.11", UNPINNED, said.append) == UNPINNED
    assert "registry.invalid/python:3.11: its registry gave no digest, 'unpinned' is kept" in said[0]
