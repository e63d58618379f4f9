"""Server-side request forgery: addresses of this machine and its network, files, and hosts that are not allowed are never fetched.

The forbidden target is a server of this test, which must not receive any connection."""

import asyncio
import http.server
import socket
import ssl
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.serving.service import EchoAnswerer, open_files, png, serve, settled
from trainer.contract import InputRefused
from trainer.contract.public_address import choose, is_public
from trainer.serving.fetch import Fetcher, read_hosts
from trainer.serving.refusal import RequestRefused

PUBLIC, NAME = "93.184.216.34", "images.example.org"


@pytest.fixture(scope="module")
def forbidden() -> Iterator[Any]:
    """Listens on the loopback addresses and collects connections."""
    heard: list[Any] = []
    sockets = []
    first = socket.create_server(("127.0.0.1", 0))
    port = first.getsockname()[1]
    sockets.append(first)
    sockets.append(socket.create_server(("::1", port), family=socket.AF_INET6))
    for sock in sockets:
        sock.settimeout(0.05)
    ended = threading.Event()

    def listen(sock: socket.socket) -> None:
        while not ended.is_set():
            try:
                heard.append(sock.accept())
            except TimeoutError:
                continue

    threads = [threading.Thread(target=listen, args=(sock,)) for sock in sockets]
    for thread in threads:
        thread.start()
    yield port, heard
    ended.set()
    for thread in threads:
        thread.join()
    for sock in sockets:
        sock.close()


ATTEMPTS = (
    # this machine, in all notations
    *("http://127.0.0.1:{port}/", "http://127.1:{port}/", "http://127.0.1:{port}/", "http://0:{port}/", "http://0.0.0.0:{port}/"),
    *("http://2130706433:{port}/", "http://0x7f000001:{port}/", "http://0x7f.0.0.1:{port}/", "http://0177.0.0.1:{port}/", "http://017700000001:{port}/"),
    *("http://localhost:{port}/", "http://LOCALHOST:{port}/", "http://localhost.:{port}/", "http://localhost.localdomain:{port}/", "http://[::1]:{port}/"),
    *("http://[::]:{port}/", "http://[::ffff:127.0.0.1]:{port}/", "http://[0:0:0:0:0:ffff:7f00:1]:{port}/", "http://[::1%25lo]:{port}/"),
    *("http://①②⑦.⓪.⓪.①:{port}/", "http://127。0。0。1:{port}/", "http://ⓛocalhost:{port}/", "http://127.0.0.1.nip.io:{port}/"),
    # looks like an allowed name, but means another host
    *(f"https://{NAME}@127.0.0.1:{{port}}/", f"https://{NAME}:x@127.0.0.1:{{port}}/", f"https://{NAME}%00@127.0.0.1:{{port}}/"),
    *(f"https://127.0.0.1:{{port}}\\@{NAME}/", f"https://{NAME}\\@127.0.0.1:{{port}}/", f"https:\\\\{NAME}\\@127.0.0.1:{{port}}/"),
    *(f"https://127.0.0.1:{{port}}#@{NAME}/", f"https://127.0.0.1:{{port}}?@{NAME}/", f"https://127.0.0.1:{{port}}/{NAME}", f"https://{NAME}.127.0.0.1/"),
    *(f"https://{NAME}:{{port}}/", f"http://{NAME}:22/", f"https://{NAME}:0/", f"https://{NAME}:99999/", f"https://{NAME}:/"),
    *(f"https://evil{NAME}/", f"https://{NAME}.evil.org/", f"https://{NAME}%2eevil.org/", f"https://{NAME}\r\nHost: 127.0.0.1/", f"https://{NAME}/a b"),
    *(f"https://{NAME}./", f" https://{NAME}/", f"https://{NAME}/\t", f"https:///{NAME}/", f"https:{NAME}", f"//{NAME}/", f"https://{NAME}/é"),
    # other networks, clouds, files, other schemes
    *("http://169.254.169.254/latest/meta-data/", "http://metadata.google.internal/", "http://100.100.100.200/", "http://192.168.0.1/", "http://10.0.0.1/"),
    *("file:///etc/passwd", "file://localhost/etc/passwd", "FILE:///etc/passwd", "/etc/passwd", "../../etc/passwd", "etc/passwd", "\\\\127.0.0.1\\share"),
    *(f"ftp://{NAME}/a.png", f"gopher://{NAME}/_x", f"jar:https://{NAME}/a!/b", f"dict://{NAME}/", f"ws://{NAME}/", f"unix://{NAME}/", "netdoc:///etc/passwd"),
    *(f"httpss://{NAME}/", f"javascript://{NAME}/", f"blob:https://{NAME}/", "?", "http://", "http:///", "https://" + "a" * 3000 + "/"),
)  # fmt: skip


def refuse_to_connect(*arguments: Any, **options: Any) -> Any:
    raise AssertionError(f"connection attempt: {arguments}")


def test_forbidden_urls_are_refused_without_a_connection(forbidden: Any) -> None:
    """The allowed name resolves to the forbidden target here, as an attacker's name server could answer."""
    port, heard = forbidden

    async def resolve(host: str, port: int) -> list[str]:
        return ["127.0.0.1"]

    fetcher = Fetcher(hosts=read_hosts((NAME,)), timeout_s=5, most_bytes=10**6, resolve=resolve)
    with serve(EchoAnswerer(), fetcher=fetcher) as served:
        for attempt in (*ATTEMPTS, f"https://{NAME}/a.png", f"http://{NAME}/a.png"):
            reply = served.ask(image=attempt.replace("{port}", str(port)))
            assert reply.status == 400 and reply.error["code"] in ("image_not_fetched", "host_not_allowed"), (attempt, reply.data)
            assert b"root:" not in reply.data and b"127.0.0.1" not in reply.data
        assert served.ask("after").text == "after"
    assert len(ATTEMPTS) >= 40 and heard == []


def test_with_an_empty_list_no_host_is_connected_to(forbidden: Any) -> None:
    port, heard = forbidden
    fetcher = Fetcher(hosts=frozenset(), timeout_s=5, most_bytes=10**6, resolve=refuse_to_connect, connect=refuse_to_connect)
    with serve(EchoAnswerer(), fetcher=fetcher) as served:
        for url in (f"http://127.0.0.1:{port}/", f"https://{NAME}/a.png"):
            assert served.ask(image=url).error["code"] == "host_not_allowed"
    assert heard == []


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "127.255.255.255", "0.0.0.0", "0.1.2.3", "10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1", "169.254.169.254"),
        *("100.64.0.1", "100.127.255.255", "192.0.0.192", "192.0.2.1", "198.18.0.1", "198.51.100.7", "203.0.113.9", "224.0.0.1", "239.255.255.250"),
        *("240.0.0.1", "255.255.255.255", "192.88.99.1", "168.63.129.16", "::", "::1", "::127.0.0.1", "::ffff:127.0.0.1", "::ffff:8.8.8.8"),
        *("64:ff9b::7f00:1", "64:ff9b::808:808", "64:ff9b:1::1", "2002:7f00:1::", "2001:0:7f00:1::", "2001:db8::1", "3fff::1", "fc00::1", "fd00:ec2::254"),
        *("fe80::1", "fe80::1%lo", "fec0::1", "ff02::1", "100::1", "4000::1", "2001:10::1", "2606:2800::1%lo", "", "localhost", "8.8.8", "08.8.8.8"),
    ],
)  # fmt: skip
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(address)
    assert choose([PUBLIC, address]) is None and choose([address, PUBLIC]) is None, "one private address refuses the name"


@pytest.mark.parametrize("address", [PUBLIC, "8.8.8.8", "1.1.1.1", "2606:2800:220:1:248:1893:25c8:1946", "2a00:1450:4001::200e"])
def test_addresses_that_are_public(address: str) -> None:
    assert is_public(address) and choose([address, PUBLIC]) == address


def test_a_name_without_addresses_is_refused() -> None:
    assert choose([]) is None


@pytest.mark.parametrize(
    "host",
    ["", "127.0.0.1", "Images.example.org", "https://x.org", "x.org/", "*.x.org", "x.org:0", "x.org:70000", "[::1]", "a b", "x.org."],
)
def test_the_list_of_hosts_allows_only_names(host: str) -> None:
    with pytest.raises(InputRefused, match=r"stage\.serving\.hosts"):
        read_hosts((host,))


# ---------------------------------------------------------------------------------------- an allowed host that misbehaves


class Host(http.server.BaseHTTPRequestHandler):
    """The path selects the behaviour."""

    asked: list[tuple[str, dict[str, str]]]

    def do_GET(self) -> None:
        self.server.asked.append((self.path, dict(self.headers)))  # type: ignore[attr-defined]
        getattr(self, f"send_{self.path.strip('/').partition('?')[0]}")()

    def send(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        for name, value in {"Content-Length": str(len(body)), **named}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def send_image(self) -> None:
        self.send(200, png(50, 40))

    def send_elsewhere(self) -> None:
        self.send(302, Location="http://127.0.0.1:1/")

    def send_nothing(self) -> None:
        self.send(404)

    def send_packed(self) -> None:
        self.send(200, png(), Content_Encoding="gzip")

    def send_large(self) -> None:
        self.send(200, Content_Length=str(10**12))

    def send_endless(self) -> None:
        self.send_response(200)
        self.end_headers()
        while True:
            self.wfile.write(bytes(1 << 16))

    def send_slow(self) -> None:
        self.send_response(200)
        self.end_headers()
        while not self.server.over.wait(0.05):  # type: ignore[attr-defined]
            self.wfile.write(b"x")
            self.wfile.flush()

    def send_headers(self) -> None:
        self.send_response(200)
        while True:
            self.wfile.write(b"X-More: " + b"x" * 1000 + b"\r\n")

    def send_short(self) -> None:
        self.send(200, b"abc", Content_Length="100")

    def send_text(self) -> None:
        self.send(200, b"root:x:0:0")

    def log_message(self, *_: Any) -> None:
        return None


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        """Clients disconnect during the answer in these tests."""


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A self-signed certificate for NAME."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, NAME)])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key()).serial_number(1)
        .not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(NAME)]), critical=False).sign(key, hashes.SHA256())
    )  # fmt: skip
    file = tmp_path_factory.mktemp("tls") / "host.pem"
    secret = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    file.write_bytes(secret + made.public_bytes(serialization.Encoding.PEM))
    return file


@pytest.fixture(scope="module")
def host(certificate: Path) -> Iterator[Any]:
    server = Server(("127.0.0.1", 0), Host)
    server.asked, server.over = [], threading.Event()  # type: ignore[attr-defined]
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield server
    server.over.set()  # type: ignore[attr-defined]
    server.shutdown()
    thread.join()
    server.server_close()


def fetcher_of(host: Any, certificate: Path, reached: list[Any], *, name: str = NAME, **options: Any) -> Fetcher:
    """Resolves `name` to a public address, and connects to `host` instead of it."""

    async def resolve(asked: str, port: int) -> list[str]:
        reached.append((asked, port))
        return [PUBLIC]

    async def connect(address: str, port: int, **secure: Any) -> Any:
        reached.append((address, port, secure.get("server_hostname")))
        return await asyncio.open_connection("127.0.0.1", host.server_port, **secure)

    tls = ssl.create_default_context(cafile=certificate)
    settings = {"hosts": read_hosts((name,)), "timeout_s": 1.0, "most_bytes": 10**6, **options}
    return Fetcher(resolve=resolve, connect=connect, tls=tls, **settings)


def test_an_image_is_fetched_from_the_checked_address_with_a_certificate_for_its_name(host: Any, certificate: Path) -> None:
    reached: list[Any] = []
    with serve(EchoAnswerer(), fetcher=fetcher_of(host, certificate, reached)) as served:
        assert served.ask("see", image=f"https://{NAME}/image?size=50").text == "<image> see"
        assert served.chat.answerer.looked == [(50, 40)]  # type: ignore[union-attr]
    assert reached == [(NAME, 443), (PUBLIC, 443, NAME)]
    path, headers = host.asked[-1]
    assert path == "/image?size=50" and headers["Host"] == NAME and "Authorization" not in headers and "Cookie" not in headers


@pytest.mark.parametrize("path", ["elsewhere", "nothing", "packed", "large", "endless", "slow", "headers", "short", "text"])
def test_a_misbehaving_host_is_refused(path: str, host: Any, certificate: Path) -> None:
    reached: list[Any] = []
    with serve(EchoAnswerer(), fetcher=fetcher_of(host, certificate, reached)) as served:
        before = open_files()
        reply = served.ask(image=f"https://{NAME}/{path}")
        assert reply.status == 400 and b"root:" not in reply.data, reply.data
        assert reply.error["code"] == {"large": "image_too_large", "endless": "image_too_large", "text": "invalid_image"}.get(
            path, "image_not_fetched"
        )
        assert len(reached) == 2, "one resolution and one connection"
        assert served.ask("after").text == "after" and served.chat.budget.reserved == 0
        assert settled(open_files, before + 1) <= before + 1


def test_a_certificate_of_another_name_is_refused(host: Any, certificate: Path) -> None:
    other = "other.example.org"
    with serve(EchoAnswerer(), fetcher=fetcher_of(host, certificate, [], name=other)) as served:
        assert "could not be fetched from other.example.org" in served.ask(image=f"https://{other}/image").error["message"]


def test_ports_in_the_list_of_hosts() -> None:
    fetcher = Fetcher(hosts=read_hosts(("x.org:8443", "y.org")), timeout_s=1, most_bytes=10)
    assert fetcher.read_url("https://X.org:8443/a", "p").port == 8443
    for url in ("https://x.org/a", "https://y.org:8443/a", "http://y.org:443/a"):
        with pytest.raises(RequestRefused):
            fetcher.read_url(url, "p")
    assert [fetcher.read_url(url, "p").port for url in ("https://y.org", "http://y.org/?a=b", "https://y.org:443/")] == [443, 80, 443]
