"""A hub and its storage host on this machine: the two public HTTP APIs with recorded shapes, and every way in which they misbehave.

Shapes: huggingface_hub 1.x hf_api.py (model_info, list_repo_tree), modelscope 1.3x api.py (get_model_files). A fault belongs to a path, and is
used up by one request.
"""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "5b2f3e8c41d07a9b6e1f0c2d3a4b5c6d7e8f9012"
LATER_COMMIT = "9c1e0d7f62a18b3c4d5e6f708192a3b4c5d6e7f8"
NAME = "Qwen/Qwen2.5-VL-7B-Instruct"


@dataclass
class Hub:
    """`files`: path -> content. `faults`: path -> what the next requests for it meet. `requests`: (host, path, headers) of all."""

    files: dict[str, bytes]
    faults: dict[str, list[Any]] = field(default_factory=dict)
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    listed: dict[str, dict[str, Any]] = field(default_factory=dict)  # changes of entries
    page: int = 1000
    commit: str = COMMIT
    storage: str = ""  # address of the storage host: every file is redirected there
    address: str = ""
    latest: Any = None  # LatestCommitter of ModelScope
    code: int = 200  # of ModelScope's envelope

    def fault(self, path: str) -> Any:
        waiting = self.faults.get(path)
        return waiting.pop(0) if waiting else None

    def paths(self) -> list[str]:
        return [path for _, path, _ in self.requests]

    def downloads(self, name: str) -> list[dict[str, str]]:
        return [
            headers
            for _, path, headers in self.requests
            if "/api/models" not in path and "/repo/files" not in path and name in unquote(path)
        ]


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def hugging_face_entry(path: str, content: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "oid": git_sha1(content), "size": len(content), "path": path}
    if path.endswith((".safetensors", ".bin")):
        pointer = hashlib.sha256(content).hexdigest()
        entry |= {"oid": git_sha1(pointer.encode()), "lfs": {"oid": pointer, "size": len(content), "pointerSize": 135}, "xetHash": "0" * 64}
    return entry


def modelscope_entry(path: str, content: bytes, commit: str) -> dict[str, Any]:
    return {
        **{
            "CommitMessage": "upload",
            "CommittedDate": 1737948000,
            "CommitterName": "ann",
            "InCheck": False,
            "IsLFS": False,
            "Mode": "33188",
        },
        **{"Name": path.rpartition("/")[2], "Path": path, "Revision": commit, "Sha256": hashlib.sha256(content).hexdigest()},
        **{"Size": len(content), "Type": "blob"},
    }


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        path, query = unquote(parts.path), {key: values[0] for key, values in parse_qs(parts.query).items()}
        self.hub.requests.append((self.headers["Host"], self.path, dict(self.headers)))
        for begin, answer in (("/api/models/", self.hugging_face), ("/api/v1/models/", self.modelscope), ("/blobs/", self.blob)):
            if path.startswith(begin):
                answer(path.removeprefix(begin), query)
                return
        self.resolve(path.partition("/resolve/")[2].partition("/")[2])

    # ---- the two APIs

    def hugging_face(self, path: str, query: dict[str, str]) -> None:
        if fault := self.hub.fault("list"):
            self.misbehave(fault, b"[]")
        elif path == f"{NAME}/revision/main" or (
            path.startswith(f"{NAME}/revision/") and path.rpartition("/")[2] in (COMMIT, LATER_COMMIT)
        ):
            asked = path.rpartition("/")[2]
            self.send_json(
                {"_id": "67", "id": NAME, "sha": self.hub.commit if asked == "main" else asked, "private": False, "gated": False}
            )
        elif path.startswith(f"{NAME}/revision/"):
            self.send_error_code(404, "RevisionNotFound")
        elif path.startswith(f"{NAME}/tree/"):
            entries = [hugging_face_entry(name, content) | self.hub.listed.get(name, {}) for name, content in self.hub.files.items()]
            entries = [{"type": "directory", "oid": "0" * 40, "size": 0, "path": "assets"}, *entries]
            first = int(query.get("cursor", 0))
            rest = first + self.hub.page < len(entries)
            # as behind a mirror: the link names the original host
            link = f'<https://huggingface.co/api/models/{path}?recursive=true&cursor={first + self.hub.page}>; rel="next"'
            self.send_json(entries[first : first + self.hub.page], {"Link": link} if rest else {})
        else:
            self.send_error_code(404 if "Authorization" in self.headers else 401, "RepoNotFound")

    def modelscope(self, path: str, query: dict[str, str]) -> None:
        if path == f"{NAME}/repo":
            self.resolve(query["FilePath"])
        elif fault := self.hub.fault("list"):
            self.misbehave(fault, b"{}")
        elif path != f"{NAME}/repo/files":
            self.send_json({"Code": 10010205001, "Message": "model not found", "RequestId": "1", "Success": False, "Data": None}, code=404)
        elif self.hub.code != 200:
            self.send_json({"Code": self.hub.code, "Message": "no access", "RequestId": "1", "Success": False, "Data": {}})
        elif query["Revision"] not in ("master", "v1.0", COMMIT, LATER_COMMIT):
            self.send_json(self.envelope({"Files": None, "IsVisual": 0, "LatestCommitter": None}))
        else:
            entries = [
                modelscope_entry(name, content, self.hub.commit) | self.hub.listed.get(name, {}) for name, content in self.hub.files.items()
            ]
            folder = {"Path": "assets", "Name": "assets", "Type": "tree", "Size": 0}
            self.send_json(self.envelope({"Files": [folder, *entries], "IsVisual": 0, "LatestCommitter": self.hub.latest}))

    @staticmethod
    def envelope(data: Any) -> dict[str, Any]:
        return {"Code": 200, "Data": data, "Message": "success", "RequestId": "1", "Success": True}

    # ---- files

    def resolve(self, name: str) -> None:
        if self.hub.storage and name in self.hub.files and name.endswith(".safetensors"):
            self.send_response(302)
            self.send_header("Location", f"{self.hub.storage}/blobs/{name}?signature=x")
            self.send_header("Content-Length", "0")
            self.end_headers()
        else:
            self.blob(name, {})

    def blob(self, name: str, _: dict[str, str]) -> None:
        content = self.hub.files.get(name)
        if content is None:
            self.send_error_code(404, "EntryNotFound")
        elif fault := self.hub.fault(name):
            self.misbehave(fault, content)
        else:
            self.send_range(content, len(content))

    def send_range(self, content: bytes, until: int, *, tag: str = "") -> None:
        """The asked part of the content; the connection is closed after the first `until` bytes of the file."""
        tag = tag or f'"{hashlib.md5(content).hexdigest()}"'
        asked = self.headers.get("Range", "")
        first = int(asked.removeprefix("bytes=").rstrip("-")) if asked and self.headers.get("If-Range", tag) == tag else 0
        if asked and first >= len(content):
            self.send_error_code(416, "")
            return
        self.send_response(206 if first else 200)
        self.send_header("ETag", tag)
        self.send_header("Content-Length", str(len(content) - first))
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        self.wfile.write(content[first:until])
        if until < len(content):
            self.close_connection = True

    def misbehave(self, fault: Any, content: bytes) -> None:
        """(`half`, share), (`changed`, content), (`no range`,), `html`, (code, X-Error-Code, headers), or `drop`."""
        kind = fault if isinstance(fault, str) else fault[0]
        if kind == "drop":
            self.close_connection = True
        elif kind == "html":
            self.send_body(b"<html><body>Please log in</body></html>", {"Content-Type": "text/html"})
        elif kind == "half":
            self.send_range(content, int(len(content) * fault[1]))
        elif kind == "changed":
            self.send_range(fault[1], len(fault[1]))
        elif kind == "no range":
            self.send_body(content, {})
        else:
            self.send_error_code(*fault)

    def send_json(self, value: Any, headers: dict[str, str] | None = None, *, code: int = 200) -> None:
        self.send_body(json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})}, code=code)

    def send_body(self, body: bytes, headers: dict[str, str], *, code: int = 200) -> None:
        self.send_response(code)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)

    def send_error_code(self, code: int, said: str, headers: dict[str, str] | None = None) -> None:
        self.send_body(b"{}", {**({"X-Error-Code": said} if said else {}), **(headers or {})}, code=code)


@contextmanager
def serve(hub: Hub) -> Iterator[str]:
    """The address of the hub."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
