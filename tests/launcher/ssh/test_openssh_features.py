"""What OpenSSH honours: certificates of hosts and users, the agent of a node, keywords that are ignored. Real sshds and a real agent on loopback."""

import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from launcher.config.schema import Node
from launcher.errors import NodeFailed
from launcher.ssh.config_keyword import find_ignored, keywords
from launcher.ssh.host_certificate import check_certificate
from launcher.ssh.node import Ssh
from launcher.ssh.offer import find_gap, own_offer, parse_offer, read_offer
from launcher.ssh.pool import ConnectionPool
from launcher.ssh.ssh_config import SshFiles
from launcher.ssh.target import find_target
from tests.launcher.ssh.conftest import Start, echo, failure
from tests.launcher.sshd import USER, Sshd, access_in, make_key, node_at


def public(key: Path) -> str:
    return " ".join(key.with_suffix(".pub").read_text().split()[:2])


def sign(authority: Path, key: Path, *options: str) -> Path:
    """The certificate of a key."""
    subprocess.run(("ssh-keygen", "-q", "-s", str(authority), "-I", "test", *options, str(key.with_suffix(".pub"))), check=True)
    return key.with_name(f"{key.name}-cert.pub")


@contextmanager
def certified(folder: Path, client: Path, *options: str) -> Iterator[tuple[Sshd, Path]]:
    """An sshd whose host key an authority has signed, and the authority."""
    authority, host = make_key(folder / "authority"), make_key(folder / "signed")
    certificate = sign(authority, host, "-h", *options)
    sshd = Sshd(folder / "certified", client, f"HostKey {host}", f"HostCertificate {certificate}")
    try:
        yield sshd, authority
    finally:
        sshd.end()


# -------------------------------------------------------------------------------------------------------- hosts


@pytest.mark.parametrize("options", [("-n", "127.0.0.1"), ("-n", "other,127.0.0.*"), ()])
def test_a_host_that_an_authority_has_signed(key: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    with certified(tmp_path, key, *options) as (sshd, authority):
        access = access_in(tmp_path / "a", key, f"@cert-authority 127.0.0.1,[127.0.0.1]:* {public(authority)}\n")
        assert echo(node_at(sshd), access) == "here\n"


def test_host_certificates_that_do_not_hold(key: Path, tmp_path: Path) -> None:
    cases = {
        ("-n", "gpu7"): "is for gpu7, not for 127.0.0.1",
        ("-n", "127.0.0.1", "-V", "20200101:20200102"): "is not valid now",
    }
    for number, (options, says) in enumerate(cases.items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        with certified(folder, key, *options) as (sshd, authority):
            access = access_in(folder / "a", key, f"@cert-authority * {public(authority)}\n")
            text = failure(node_at(sshd), access)
            assert says in text and "No login was tried" in text and "Accepted" not in (sshd.folder / "log").read_text()
    folder = tmp_path / "other"
    folder.mkdir()
    with certified(folder, key) as (sshd, _):
        other = make_key(folder / "someone")
        assert "is no @cert-authority" in failure(node_at(sshd), access_in(folder / "a", key, f"@cert-authority * {public(other)}\n"))
        assert "its host key is unknown" in failure(node_at(sshd), access_in(folder / "b", key, f"@cert-authority other {public(other)}\n"))


def test_a_certificate_of_a_user_is_none_of_a_host(key: Path, tmp_path: Path) -> None:
    authority, host = make_key(tmp_path / "authority"), make_key(tmp_path / "signed")
    body = sign(authority, host, "-n", "127.0.0.1").read_text().split()[1]
    import base64

    access = access_in(tmp_path / "a", key, f"@cert-authority * {public(authority)}\n")
    target = find_target(Node(host="127.0.0.1"), SshFiles(access))
    assert "is one of a user" in check_certificate(base64.b64decode(body), target, time.time())
    assert "cannot be read" in check_certificate(base64.b64decode(body)[:-9], target, time.time())
    assert "cannot be read" in check_certificate(b"", target, time.time())


def test_known_hosts_in_dev_null_are_read_from_the_usual_file(start: Start, key: Path, tmp_path: Path) -> None:
    sshd = start()
    access = access_in(tmp_path / "a", key, sshd.known_line())
    access.config.write_text("Host *\n  UserKnownHostsFile /dev/null\n  StrictHostKeyChecking no\n")
    assert echo(node_at(sshd), access) == "here\n"
    access.known_hosts[0].write_text("")
    assert f">> {access.known_hosts[0]}" in failure(node_at(sshd), access), "the advice must not write to /dev/null"


# -------------------------------------------------------------------------------------------------------- users


@contextmanager
def agent_with(key: Path, socket: Path) -> Iterator[None]:
    process = subprocess.Popen(("ssh-agent", "-D", "-a", str(socket)), stdout=subprocess.DEVNULL)
    try:
        for _ in range(100):
            if socket.exists():
                break
            time.sleep(0.02)
        subprocess.run(("ssh-add", "-q", str(key)), env={"SSH_AUTH_SOCK": str(socket)}, check=True, stdin=subprocess.DEVNULL)
        yield
    finally:
        process.terminate()
        process.wait()


def test_the_agent_that_the_ssh_config_names(start: Start, key: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sshd, socket = start(), tmp_path / "agent.sock"
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    access = access_in(tmp_path / "a", key, sshd.known_line(), keys=(), agent=True)
    with agent_with(key, socket):
        access.config.write_text(f"Host *\n  IdentityAgent {socket}\n")
        assert echo(node_at(sshd), access) == "here\n"
        monkeypatch.setenv("OTHER_AGENT", str(socket))
        access.config.write_text("Host *\n  IdentityAgent $OTHER_AGENT\n")
        assert echo(node_at(sshd), access) == "here\n"
        monkeypatch.setenv("SSH_AUTH_SOCK", str(socket))
        access.config.write_text("Host *\n  IdentityAgent none\n")
        assert "no key in an agent" in failure(node_at(sshd), access)
    access.config.write_text(f"Host *\n  IdentityAgent {tmp_path / 'gone'}\n")
    assert "no key in an agent" in failure(node_at(sshd), access)


def test_a_certificate_elsewhere_than_beside_its_key(key: Path, tmp_path: Path) -> None:
    authority, user = make_key(tmp_path / "users"), make_key(tmp_path / "mine")
    certificate = sign(authority, user, "-n", USER).rename(tmp_path / "elsewhere.pub")
    sshd = Sshd(tmp_path / "node", key, f"TrustedUserCAKeys {authority.with_suffix('.pub')}")
    try:
        access = access_in(tmp_path / "a", user, sshd.known_line())
        assert "refused" in failure(node_at(sshd), access)
        access.config.write_text(f"Host *\n  CertificateFile {certificate}\n")
        assert echo(node_at(sshd), access) == "here\n"
        other = access_in(tmp_path / "b", key, sshd.known_line())
        other.config.write_text(f"Host *\n  CertificateFile {certificate}\n")
        assert echo(node_at(sshd), other) == "here\n", "a key that the certificate is not of is used alone"
        other.config.write_text("Host *\n  CertificateFile /nowhere/at/all\n")
        assert echo(node_at(sshd), other) == "here\n"
    finally:
        sshd.end()


# ------------------------------------------------------------------------------------------------- keywords and algorithms


def test_every_keyword_of_this_machines_ssh_is_in_the_table() -> None:
    """`ssh -G` prints every keyword that has a value."""
    printed = subprocess.run(("ssh", "-F", "/dev/null", "-G", "localhost"), capture_output=True, text=True, check=True).stdout
    known = {keyword.lower() for group in keywords().values() for keyword in group}
    names = {line.split()[0].lower() for line in printed.splitlines()} - {"host"}
    assert {name for name in names if name not in known} == set()


def test_each_keyword_is_in_one_group() -> None:
    words = [keyword for group in keywords().values() for keyword in group]
    assert len(words) == len(set(words)) and all(keywords()["ignored"].values())


def test_keywords_that_ask_for_nothing_are_not_named() -> None:
    config = {"pkcs11provider": "none", "canonicalizehostname": "no", "ciphers": "aes256-ctr", "serveraliveinterval": "9"}
    assert list(find_ignored(config)) == ["Ciphers is ignored: the ciphers of this machine's own SSH library are offered"]


def test_a_match_that_runs_a_command_is_not_run(start: Start, key: Path, tmp_path: Path) -> None:
    sshd, witness = start(), tmp_path / "ran"
    access = access_in(tmp_path / "a", key, sshd.known_line())
    for match in (f'Match exec "touch {witness}"', f'match host * EXEC "touch {witness}"', f'Match !exec "touch {witness}"'):
        access.config.write_text(f"{match}\n  Port 1\nHost *\n  User {USER}\n")
        client = ConnectionPool(access)
        node = Ssh(node_at(sshd), client)
        assert node.run(("echo", "here")).output == "here\n" and not witness.exists()
        assert [line for line in node.remarks if line.startswith("Match exec is ignored")] != []
        client.close()


def test_the_config_of_the_machine_comes_after_that_of_the_user(start: Start, key: Path, tmp_path: Path) -> None:
    sshd, system = start(), tmp_path / "ssh_config"
    system.write_text(f"Host gpu*\n  HostName 127.0.0.1\n  Port {sshd.port}\n  User games\n")
    access = access_in(tmp_path / "a", key, sshd.known_line(), system_configs=(system,))
    access.config.write_text(f"Host other\n  User daemon\nHost gpu7\n  User {USER}\n")
    assert echo(Node(host="gpu7"), access) == "here\n"
    assert "the login of user 'games' was refused" in failure(Node(host="gpu8"), access)


@pytest.mark.parametrize("text", ["Host\n", "Host *\n  User\n", "Host *\n  User =\n", "Host *\n  Port\t\n"])
def test_a_line_without_a_value_is_named(start: Start, key: Path, tmp_path: Path, text: str) -> None:
    access = access_in(tmp_path / "a", key)
    access.config.write_text(text)
    number = len(text.splitlines())
    with pytest.raises(NodeFailed, match=rf"config line {number}: \w+ has no value"):
        ConnectionPool(access)


HARDENED = {
    "Ciphers chacha20-poly1305@openssh.com": ("the node allows only chacha20-poly1305@openssh.com", "Ciphers +aes128-gcm@openssh.com"),
    "KexAlgorithms sntrup761x25519-sha512@openssh.com": (
        "KexAlgorithms: the node allows only sntrup761",
        "KexAlgorithms +mlkem768x25519-sha256",
    ),
    "MACs umac-128-etm@openssh.com\nCiphers aes128-ctr": ("MACs: the node allows only umac-128-etm", "MACs +hmac-sha2-256-etm@openssh.com"),
}


@pytest.mark.parametrize("lines", HARDENED)
def test_what_a_hardened_server_has_in_common_with_nothing(start: Start, key: Path, tmp_path: Path, lines: str) -> None:
    says, line = HARDENED[lines]
    sshd = start(*lines.splitlines())
    text = failure(node_at(sshd), access_in(tmp_path / "a", key, sshd.known_line()))
    assert says in text and f"add the line `{line}`" in text


def test_the_offer_of_an_sshd_is_what_it_is_configured_to(start: Start) -> None:
    sshd = start("Ciphers aes256-ctr,aes128-ctr")
    offer = read_offer("127.0.0.1", sshd.port, timeout_s=5)
    assert offer["Ciphers"] == ("aes256-ctr", "aes128-ctr") and find_gap(offer) == ("", "")
    assert set(offer) == set(own_offer())
    assert read_offer("127.0.0.1", 1, timeout_s=1) == {}


@pytest.mark.parametrize(
    "text", [b"", b"SSH-2.0-x\r\n", b"SSH-2.0-x\r\n" + b"\0" * 5, b"SSH-2.0-x\r\n" + b"\xff" * 40, b"HTTP/1.1 400\r\n\r\n"]
)
def test_bytes_that_are_no_offer(text: bytes) -> None:
    assert parse_offer(text) == {}


# --------------------------------------------------------------------------------------------------------- login shells

SHELLS = ("fish", "tcsh", "zsh", "bash", "dash")
AWKWARD = (
    "a b",
    "it's",
    '"',
    "$HOME `id` $(id)",
    "!!",
    "*?[a]",
    "back\\slash \\n",
    "two\nlines",
    "",
    "-n",
    "%s%%",
    "ü 图",
    "~",
    "{a,b}",
    "#",
    ";|&<>",
)


@pytest.mark.parametrize("shell", SHELLS)
def test_a_login_shell_of_any_kind_starts_commands(start: Start, key: Path, tmp_path: Path, shell: str) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    sshd = start(f'ForceCommand {shell} -c "$SSH_ORIGINAL_COMMAND"')  # as sshd starts the login shell of a user
    client = ConnectionPool(access_in(tmp_path / "a", key, sshd.known_line()))
    try:
        node = Ssh(node_at(sshd), client)
        script = 'printf "%s|" "$@"; printf "%s|%s" "$SECRET" "$PWD"; exit 7'
        done = node.run(("sh", "-c", script, "sh", *AWKWARD), environment={"SECRET": "it's $x\nand more"}, folder=Path("/usr"))
        assert done.code == 7 and done.output == "".join(f"{word}|" for word in AWKWARD) + "it's $x\nand more|/usr"
        assert client.connection_to(node_at(sshd)).wraps is None and node.connection.wraps is (shell in ("fish", "tcsh"))
        node.put(b"\0\xff\n", str(tmp_path / "put"))
        assert node.get(str(tmp_path / "put")) == b"\0\xff\n" and node.get(str(tmp_path / "nothing")) is None
        with pytest.raises(NodeFailed, match="'no-such-program' was not found"):
            node.run(("no-such-program",))
        running = node.start(("sleep", "60"), log=tmp_path / "log")
        deadline = time.monotonic() + 10  # its id is printed before it replaces the shell
        while (line := Path(f"/proc/{running.pid}/cmdline").read_bytes()) != b"sleep\x0060\0" and time.monotonic() < deadline:
            time.sleep(0.02)
        assert line == b"sleep\x0060\0"
        running.signal(signal.SIGTERM)
        assert running.wait(10) == -1
    finally:
        client.close()


REFUSING = {
    "echo This account is currently not available.; exit 1": "'This account is currently not available.': the user has no login shell",
    "echo WARNING: Your password has expired. >&2; exit 1": "'WARNING: Your password has expired.': the user must change the password first",
    "echo welcome to the appliance": "'welcome to the appliance': the login did not run the command",
    "true": "the command did not start (exit code 0): the login did not run the command",
}


@pytest.mark.parametrize("command", REFUSING)
def test_a_login_that_runs_something_else_is_quoted_first(start: Start, key: Path, tmp_path: Path, command: str) -> None:
    sshd = start(f"ForceCommand {command}")
    text = failure(node_at(sshd), access_in(tmp_path / "a", key, sshd.known_line()))
    assert f"({USER}@127.0.0.1:{sshd.port}): {REFUSING[command]}" in text or f"{USER}@127.0.0.1:{sshd.port}: {REFUSING[command]}" in text
    assert "Next: " in text and "omnilaunch" not in text


def test_login_files_that_take_long_are_named(start: Start, key: Path, tmp_path: Path) -> None:
    sshd = start('ForceCommand echo loading modules; sleep 30; sh -c "$SSH_ORIGINAL_COMMAND"')
    client = ConnectionPool(access_in(tmp_path / "a", key, sshd.known_line()))
    try:
        with pytest.raises(
            NodeFailed,
            match=r"no answer within 1 s: the login shell did not start a command: its login files .* it printed 'loading modules'",
        ):
            Ssh(node_at(sshd), client).run(("true",), timeout_s=1)
    finally:
        client.close()
