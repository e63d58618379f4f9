"""Images by URL, from a server on this machine that also does what hosts should not."""

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from launcher.cli import main
from launcher.errors import ConfigRefused
from launcher.media import fetch
from launcher.media.fetch import MANIFEST, Fetching, fetch_rows
from launcher.media.row_url import find_urls, replace_images
from launcher.media.web_image import Limits, NotFetched, choose_address, fetch_image, kind_of

PNG = b"\x89PNG\r\n\x1a\n" + bytes(100)
JPG = b"\xff\xd8\xff\xe0" + bytes(200)
BODIES = {
    "/a.png": PNG,
    "/b.jpg": JPG,
    "/copy.png": PNG,
    "/with%20space.png": PNG + b"1",
    "/q?size=1": PNG + b"2",
    "/page.png": b"<!DOCTYPE html><html>",
    "/empty.png": b"",
    "/large.png": PNG + bytes(10**5),
}
TARGETS = {
    "/moved.png": "/b.jpg", "/round": "/round", "/out": "http://10.0.0.1/a.png", "/file": "file:///etc/passwd", "/user": "http://u:p@localhost/a.png",
}  # fmt: skip


class Handler(BaseHTTPRequestHandler):
    asked: ClassVar[Counter[str]] = Counter()
    fails: ClassVar[dict[str, int]] = {}

    def do_GET(self) -> None:
        self.asked[self.path] += 1
        if self.path in TARGETS:
            self.send_response(302)
            self.send_header("Location", TARGETS[self.path])
            self.end_headers()
        elif self.fails.get(self.path, 0):
            self.fails[self.path] -= 1
            self.send_error(503)
        elif self.path == "/short.png":
            self.answer(PNG, len(PNG) + 50)
        elif self.path == "/zip.png":
            self.answer(PNG, len(PNG), encoding="gzip")
        elif self.path in BODIES:
            self.answer(BODIES[self.path], len(BODIES[self.path]))
        else:
            self.send_error(404)

    def answer(self, body: bytes, length: int, encoding: str = "") -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(length))
        self.send_header("Content-Type", "text/html" if body.startswith(b"<") else "image/png")
        if encoding:
            self.send_header("Content-Encoding", encoding)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(fetch, "PAUSE_S", 0.0)
    Handler.asked, Handler.fails = Counter(), {}
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as made:
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{made.server_address[1]}"
        made.shutdown()
        thread.join()


HERE = Limits(private=True, most_bytes=10**4, timeout_s=5)
OPTIONS = Fetching(limits=HERE, jobs=3)


def message(text: str, *images: str) -> dict[str, Any]:
    return {"images": list(images), "messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "Blue"}]}


def write_rows(folder: Path, *rows: Any, name: str = "rows.jsonl") -> Path:
    text = json.dumps(rows) if name.endswith(".json") else "\n".join(map(json.dumps, rows))
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_rows_get_paths_and_a_second_run_fetches_nothing(server: str, tmp_path: Path, name: str) -> None:
    (tmp_path / "local.png").write_bytes(PNG)
    first = message(f"<image>See {server}/a.png", f"{server}/a.png")
    block = {"type": "image_url", "image_url": {"url": f"{server}/b.jpg"}}
    second = {"messages": [{"role": "user", "content": [block, {"type": "text", "text": f"{server}/b.jpg"}]}]}
    file = write_rows(tmp_path, first, second, message("<image>", f"{server}/copy.png"), message("<image>", "local.png"), name=name)
    before = file.read_bytes()
    done = fetch_rows(file, tmp_path / "out", OPTIONS)
    png, jpg = (f"images/{hashlib.sha256(body).hexdigest()}.{kind}" for body, kind in ((PNG, "png"), (JPG, "jpg")))
    rows = json.loads(done.written.read_text()) if name == "rows.json" else list(map(json.loads, done.written.read_text().splitlines()))
    assert rows[0] == first | {"images": [png]} and rows[2]["images"] == [png]
    assert rows[1]["messages"][0]["content"] == [
        {"type": "image_url", "image_url": {"url": jpg}},
        {"type": "text", "text": f"{server}/b.jpg"},
    ]
    assert rows[3]["images"] == [str(tmp_path / "local.png")]
    assert (done.images, done.fetched, done.kept, done.bytes, done.failed) == (3, 3, 0, 2 * len(PNG) + len(JPG), ())
    assert file.read_bytes() == before and (tmp_path / "out" / png).read_bytes() == PNG
    listed = json.loads((tmp_path / "out" / MANIFEST).read_text())["images"]
    assert listed[f"{server}/b.jpg"] == {"sha256": hashlib.sha256(JPG).hexdigest(), "bytes": len(JPG), "kind": "jpg"}
    again = fetch_rows(file, tmp_path / "out", OPTIONS)
    assert (again.fetched, again.kept, again.bytes) == (0, 3, 0) and set(Handler.asked.values()) == {1}
    (tmp_path / "out" / jpg).write_bytes(b"cut")
    assert fetch_rows(file, tmp_path / "out", OPTIONS).fetched == 1, "a file of another size is fetched again"
    assert sorted(path.name for path in (tmp_path / "out" / "images").iterdir()) == sorted(Path(name).name for name in (png, jpg))


# path below the server -> what is said
FAILURES = {
    "/absent.png": "the host answered 404",
    "/page.png": "is no image: it begins with b'<!DOCTYPE ht', and its type is text/html",
    "/empty.png": "is empty",
    "/large.png": "more than the limit of 10,000",
    "/short.png": "ended 50 bytes early",
    "/zip.png": "a compressed answer",
    "/round": "redirects more than 5 times",
    "/file": "the scheme 'file' is not fetched",
    "/user": "names a user",
}


def test_failures_are_reported_with_their_rows(server: str, tmp_path: Path) -> None:
    file = write_rows(tmp_path, *(message("<image>", f"{server}{path}") for path in FAILURES), message("<image>", f"{server}/a.png"))
    done = fetch_rows(file, tmp_path / "out", OPTIONS)
    assert done.fetched == 1 and len(done.failed) == len(FAILURES)
    for place, (row, url, reason) in enumerate(done.failed):
        path = list(FAILURES)[place]
        assert row == place + 1 and url == f"{server}{path}" and FAILURES[path] in reason, reason
    rows = list(map(json.loads, done.written.read_text().splitlines()))
    assert rows[0]["images"] == [f"{server}/absent.png"], "it keeps its URL, which the data check refuses"
    assert not list((tmp_path / "out" / "images").glob(".*")) and Handler.asked["/short.png"] == 3 and Handler.asked["/absent.png"] == 1


def test_a_host_that_is_busy_is_asked_again(server: str, tmp_path: Path) -> None:
    Handler.fails = {"/a.png": 2}
    assert fetch_rows(write_rows(tmp_path, message("<image>", f"{server}/a.png")), tmp_path / "out", OPTIONS).fetched == 1


@pytest.mark.parametrize("path", ["/with%20space.png", "/with space.png", "/q?size=1", "/moved.png"])
def test_addresses(server: str, tmp_path: Path, path: str) -> None:
    body = BODIES[TARGETS.get(path, path.replace(" ", "%20"))]
    found = fetch_image(server + path, tmp_path / "x", HERE)
    assert (found.bytes, (tmp_path / "x").read_bytes()) == (len(body), body)


def test_private_addresses_are_refused(server: str, tmp_path: Path) -> None:
    for url in (
        f"{server}/a.png",
        server.replace("127.0.0.1", "localhost") + "/a.png",
        "http://[::1]/a.png",
        "http://2130706433/",
        "http://169.254.169.254/x",
    ):
        with pytest.raises(NotFetched, match=r"private network; --allow-private|has no address"):
            fetch_image(url, tmp_path / "x", Limits())
    assert not Handler.asked
    with pytest.raises(NotFetched, match="private network"):
        choose_address("both.example", ["93.184.216.34", "10.0.0.1"], Limits())
    assert choose_address("one.example", ["93.184.216.34"], Limits()) == "93.184.216.34"


def test_the_limit_of_a_run(server: str, tmp_path: Path) -> None:
    file = write_rows(tmp_path, *(message("<image>", f"{server}{path}") for path in ("/a.png", "/b.jpg")))
    done = fetch_rows(file, tmp_path / "out", Fetching(limits=HERE, jobs=1, most_total_bytes=150))
    assert done.fetched == 1 and "--max-total-bytes" in done.failed[0][2]


def test_a_foreign_file_is_never_overwritten(tmp_path: Path) -> None:
    file = write_rows(tmp_path, message("<image>", "https://images.example/a.png"))
    with pytest.raises(ConfigRefused, match="Take another folder"):
        fetch_rows(file, tmp_path, OPTIONS)
    other = tmp_path / "other"
    other.mkdir()
    (other / "rows.jsonl").write_text("mine")
    with pytest.raises(ConfigRefused, match="this command has not written it"):
        fetch_rows(file, other, OPTIONS)


@pytest.mark.parametrize(
    ("name", "text"), [("rows.parquet", "x"), ("rows.json", "[1,"), ("rows.jsonl", "not JSON"), ("absent.jsonl", None)]
)
def test_files_that_cannot_be_read(tmp_path: Path, name: str, text: str | None) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigRefused, match=r"rows are fetched from JSON|cannot be read"):
        fetch_rows(tmp_path / name, tmp_path / "out", OPTIONS)


def test_the_command(server: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_rows(tmp_path, message("<image>", f"{server}/a.png"), message("<image>", f"{server}/absent.png"))
    command = ["data", "fetch", str(file), "--to", str(tmp_path / "out")]
    assert main(command) == 4 and "2 images of 2 rows are missing" in capsys.readouterr().out
    assert main([*command, "--allow-private"]) == 4
    said = capsys.readouterr().out
    assert "2 images by URL in 2 rows: 1 fetched" in said and f"row 2: {server}/absent.png: the host answered 404" in said
    assert main([*command, "--jobs", "0"]) == 2


# value -> its URLs
ROWS: dict[str, tuple[Any, list[str]]] = {
    "a list": ({"images": ["https://a/1.png", "b.png"]}, ["https://a/1.png"]),
    "one": ({"image": "http://a/1.png"}, ["http://a/1.png"]),
    "objects": ({"images": [{"path": "https://a/1.png", "note": "https://b/2.png"}]}, ["https://a/1.png"]),
    "marks of MiniCPM": ({"image": {"<image_00>": "https://a/1.png"}}, ["https://a/1.png"]),
    "in the text of Qwen-VL": ({"conversations": [{"value": "1: <img>https://a/1.png</img> https://b/2.png"}]}, ["https://a/1.png"]),
    "a text": ({"messages": [{"content": "https://a/1.png"}]}, []),
    "a block": ({"content": [{"type": "image", "image": "https://a/1.png"}]}, ["https://a/1.png"]),
    "base64": ({"images": ["data:image/png;base64," + "A" * 9000]}, []),
    "a number": ({"image": 3, "images": None}, []),
}


@pytest.mark.parametrize("name", ROWS)
def test_urls_of_a_row(name: str) -> None:
    row, expected = ROWS[name]
    assert list(find_urls(row)) == expected
    assert replace_images(row, lambda text: text) == row


@pytest.mark.parametrize(
    ("head", "kind"),
    [
        (PNG, "png"),
        (JPG, "jpg"),
        (b"RIFF\0\0\0\0WEBPVP8 ", "webp"),
        (b"\0\0\0\x20ftypavif", "avif"),
        (b"\0\0\0\x20ftypisom", ""),
        (b"version https://git-lfs", ""),
    ],
)
def test_kinds(head: bytes, kind: str) -> None:
    assert kind_of(head[:32]) == kind
