"""Who is let in, by which way, and what is said when it does not work. Real sshds on loopback; the real ~/.ssh is not touched."""

import os
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from launcher.config.schema import Cluster, Node
from launcher.errors import NodeFailed
from launcher.ssh.known_hosts import keys_of, load_known_keys
from launcher.ssh.node import Ssh
from launcher.ssh.pool import ConnectionPool
from launcher.ssh.ssh_config import SshFiles, default_settings
from launcher.ssh.target import find_target, node_of, watch_socket
from tests.launcher.ssh.conftest import Start, echo, failure
from tests.launcher.sshd import USER, access_in, free_port, make_key, node_at


def test_an_unknown_key_is_refused_with_the_line_that_adds_it(start: Start, key: Path, tmp_path: Path) -> None:
    sshd, access = start(), access_in(tmp_path / "a", key)
    text = failure(node_at(sshd), access)
    known = access.known_hosts[0]
    line = f"ssh-keyscan -p {sshd.port} -H 127.0.0.1 >> {known}"
    assert "its host key is unknown" in text and f"Next: {line}" in text
    shown = subprocess.run(("ssh-keygen", "-lf", str(sshd.host_key)), capture_output=True, text=True, check=True).stdout.split()[1]
    assert f"ssh-ed25519 {shown}" in text
    assert known.read_text() == "" and "Accepted" not in (sshd.folder / "log").read_text()
    with known.open("ab") as file:  # the advised line, carried out
        subprocess.run(line.split(" >> ")[0].split(), stdout=file, stderr=subprocess.DEVNULL, check=True)
    assert known.read_text().startswith("|1|")
    assert echo(node_at(sshd), access) == "here\n"


def test_a_changed_key_is_refused_with_the_line_that_removes_it(start: Start, key: Path, tmp_path: Path) -> None:
    sshd = start()
    kind, body, *_ = make_key(tmp_path / "other").with_suffix(".pub").read_text().split()
    access = access_in(tmp_path / "a", key, f"# a comment\n[127.0.0.1]:{sshd.port} {kind} {body}\n")
    text = failure(node_at(sshd), access)
    known = access.known_hosts[0]
    assert "has CHANGED" in text and f"{known}:2 has ssh-ed25519 SHA256:" in text
    assert f"Next: ssh-keygen -f {known} -R '[127.0.0.1]:{sshd.port}'" in text
    command = ("ssh-keygen", "-f", str(known), "-R", f"[127.0.0.1]:{sshd.port}")
    subprocess.run(command, check=True, capture_output=True)
    assert "its host key is unknown" in failure(node_at(sshd), access)


@pytest.mark.parametrize(
    ("names", "matches"),
    [("[127.0.0.1]:*", True), ("other,[127.0.0.?]:PORT", True), ("!127.*,*", True), ("![127.*]:PORT,*", False), ("127.0.0.1", False)],
)
def test_names_of_known_hosts(names: str, matches: bool, start: Start, key: Path, tmp_path: Path) -> None:
    sshd = start()
    access = access_in(tmp_path / "a", key, "|1|broken ssh-ed25519 AAAA\n", sshd.known_line(names.replace("PORT", str(sshd.port))))
    if matches:
        assert echo(node_at(sshd), access) == "here\n"
    else:
        assert "its host key is unknown" in failure(node_at(sshd), access)


def test_a_revoked_key_and_an_authority_are_refused(start: Start, key: Path, tmp_path: Path) -> None:
    sshd = start()
    revoked = access_in(tmp_path / "a", key, sshd.known_line(), "@revoked " + sshd.known_line("*"))
    assert "its host key is unknown" in failure(node_at(sshd), revoked)
    assert keys_of(f"[127.0.0.1]:{sshd.port}", load_known_keys(revoked.known_hosts)) == ()
    assert "its host key is unknown" in failure(node_at(sshd), access_in(tmp_path / "b", key, "@cert-authority " + sshd.known_line("*")))


def test_the_kind_of_key_that_is_known_is_asked_for(start: Start, key: Path, tmp_path: Path) -> None:
    rsa = make_key(tmp_path / "rsa", "rsa")
    sshd = start(f"HostKey {rsa}")
    kind, body, *_ = rsa.with_suffix(".pub").read_text().split()
    other = make_key(tmp_path / "rsa2", "rsa").with_suffix(".pub").read_text().split()[1]
    name = f"[127.0.0.1]:{sshd.port}"
    access = access_in(tmp_path / "a", key, f"{name} {kind} {other}\n{name} {kind} {body}\n")
    assert echo(node_at(sshd), access) == "here\n"


def test_logins_that_are_refused(start: Start, key: Path, tmp_path: Path) -> None:
    sshd = start()
    access = access_in(tmp_path / "a", key, sshd.known_line())
    text = failure(node_at(sshd, user="games"), access)
    assert "the login of user 'games' was refused" in text and f"{key}: refused" in text
    assert f"Next: ssh-copy-id -p {sshd.port} games@127.0.0.1" in text
    stranger = make_key(tmp_path / "stranger")
    locked = make_key(tmp_path / "locked", passphrase="words")
    (tmp_path / "broken").write_text("no key")
    keys = (tmp_path / "none", locked, tmp_path / "broken", stranger)
    text = failure(node_at(sshd), access_in(tmp_path / "b", key, sshd.known_line(), keys=keys))
    for words in ("none: no such file", f"needs its passphrase (ssh-add {locked})", "broken: cannot be read", f"{stranger}: refused"):
        assert words in text
    assert "no key file, and no key in an agent" in failure(node_at(sshd), access_in(tmp_path / "c", key, sshd.known_line(), keys=()))


def test_too_many_keys_and_a_server_without_keys(start: Start, key: Path, tmp_path: Path) -> None:
    impatient, passwords = start("MaxAuthTries 2"), start("PubkeyAuthentication no", "PasswordAuthentication yes", "PermitRootLogin yes")
    keys = tuple(make_key(tmp_path / f"k{number}") for number in range(4))
    access = access_in(tmp_path / "a", key, impatient.known_line(), passwords.known_line(), keys=(*keys, key))
    assert "MaxAuthTries" in failure(node_at(impatient), access)
    assert "does not accept keys, only password" in failure(node_at(passwords), access)


def test_a_key_of_the_agent(start: Start, key: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sshd, place = start(), tmp_path / "agent"
    agent = subprocess.Popen(("ssh-agent", "-D", "-a", str(place)), stdout=subprocess.DEVNULL)
    try:
        monkeypatch.setenv("SSH_AUTH_SOCK", str(place))
        while not place.exists():
            time.sleep(0.02)
        subprocess.run(("ssh-add", "-q", str(key)), check=True)
        access = access_in(tmp_path / "a", key, sshd.known_line(), keys=(), agent=True)
        assert echo(node_at(sshd), access) == "here\n"
    finally:
        agent.terminate()
        agent.wait()


def test_the_ssh_config_says_how(start: Start, key: Path, tmp_path: Path) -> None:
    sshd, folder = start(), tmp_path / "a"
    access = access_in(folder, tmp_path / "none")
    (folder / "own_known").write_text(sshd.known_line())
    (folder / "config").write_text(f"Include more/*.conf\nHost *\n  User games\n  UserKnownHostsFile {folder / 'own_known'}\n")
    (folder / "more").mkdir()
    (folder / "more" / "lab.conf").write_text(f"Host gpu?\n  HostName 127.0.0.1\n  Port {sshd.port}\n  User root\n  IdentityFile {key}\n")
    assert echo(Node(host="gpu1"), access) == "here\n"
    assert f"gpu1 (games@127.0.0.1:{sshd.port}): the login" in failure(Node(host="gpu1", user="games"), access)


def test_a_jump_host_from_the_cluster_file_and_from_the_ssh_config(start: Start, key: Path, tmp_path: Path) -> None:
    sshd, jump, folder = start(), start(), tmp_path / "a"
    access = access_in(folder, key, sshd.known_line(), jump.known_line())
    assert echo(node_at(sshd, jump=f"root@127.0.0.1:{jump.port}"), access) == "here\n"
    assert "Accepted publickey" in (jump.folder / "log").read_text()
    assert echo(node_at(sshd, jump=f"127.0.0.1:{jump.port},root@127.0.0.1:{jump.port}"), access) == "here\n"
    (folder / "config").write_text(
        f"Host door\n  HostName 127.0.0.1\n  Port {jump.port}\nHost inner\n  HostName 127.0.0.1\n  Port {sshd.port}\n  ProxyJump door\n"
    )
    before = (jump.folder / "log").read_text().count("Accepted publickey")
    assert echo(Node(host="inner"), access) == "here\n"
    assert (jump.folder / "log").read_text().count("Accepted publickey") == before + 1


def test_a_proxy_command_of_the_ssh_config(start: Start, key: Path, tmp_path: Path) -> None:
    sshd, jump, folder = start(), start(), tmp_path / "a"
    access = access_in(folder, key, sshd.known_line(), jump.known_line())
    through = f"ssh -F none -o UserKnownHostsFile={access.known_hosts[0]} -i {key} -p {jump.port} -W %h:%p root@127.0.0.1"
    (folder / "config").write_text(f"Host inner\n  HostName 127.0.0.1\n  Port {sshd.port}\n  ProxyCommand {through}\n")
    assert echo(Node(host="inner"), access) == "here\n"
    assert "Accepted publickey" in (jump.folder / "log").read_text()
    (folder / "config").write_text("ProxyCommand no-such-program %h\n")
    assert "ProxyCommand was not found: no-such-program 127.0.0.1" in failure(node_at(sshd), access)
    (folder / "config").write_text("ProxyCommand true\n")
    assert "did not answer with SSH" in failure(node_at(sshd), access)


def test_silence_behind_a_jump_host_is_noticed(start: Start, key: Path, tmp_path: Path) -> None:
    sshd, jump = start(), start()
    client = ConnectionPool(access_in(tmp_path / "a", key, sshd.known_line(), jump.known_line(), silence_s=1.5))
    try:
        process = Ssh(node_at(sshd, jump=f"127.0.0.1:{jump.port}"), client).start(("sleep", "30"), log=tmp_path / "log")
        assert process.wait(2) is None  # its signs of life are taken for what they are
        os.kill(sshd.children()[0], signal.SIGSTOP)  # as a cable pulled behind the jump host: what is sent is never answered
        with pytest.raises(NodeFailed, match="lost the connection"):
            process.wait(4)
        os.kill(process.pid, signal.SIGKILL)
    finally:
        client.close()


def test_jump_hosts_that_do_not_work(start: Start, key: Path, tmp_path: Path) -> None:
    jump, closed, folder = start(), start("AllowTcpForwarding no"), tmp_path / "a"
    access = access_in(folder, key, jump.known_line(), closed.known_line())
    dead = free_port()
    text = failure(Node(host="127.0.0.1", port=dead, jump=f"127.0.0.1:{jump.port}"), access)
    assert f"the jump host root@127.0.0.1:{jump.port} cannot reach port {dead} of 127.0.0.1" in text
    assert "AllowTcpForwarding" in failure(node_at(jump, jump=f"127.0.0.1:{closed.port}"), access)
    assert f"port {dead} of 127.0.0.1 refused the connection" in failure(node_at(jump, jump=f"127.0.0.1:{dead}"), access)
    hidden = start()
    unknown = failure(node_at(hidden, jump=f"127.0.0.1:{jump.port}"), access)
    assert f"Next: ssh ssh://127.0.0.1:{jump.port} ssh-keyscan -p {hidden.port} -H 127.0.0.1 >> " in unknown
    (folder / "config").write_text("Host a\n  ProxyJump b\nHost b\n  ProxyJump a\n")
    assert "form a loop: " in failure(Node(host="a"), access)
    assert "is not a jump host: write user@host:port" in failure(Node(host="127.0.0.1", jump="x:y"), access)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ann@h:22", ("h", "ann", 22)),
        ("h", ("h", "", None)),
        ("ann@[::1]:2222", ("::1", "ann", 2222)),
        ("::1", ("::1", "", None)),
        ("ssh://h:9", ("h", "", 9)),
    ],
)
def test_jump_hosts_as_they_are_written(text: str, expected: tuple[str, str, int | None]) -> None:
    node = node_of(text)
    assert (node.host, node.user, node.port) == expected


def test_what_the_cluster_file_leaves_out_is_the_ssh_configs(key: Path, tmp_path: Path) -> None:
    access = access_in(tmp_path / "a", key)
    access.config.write_text("Host gpu?\n  HostName 192.0.2.7\n  Port 2222\n  User ann\nHost *\n  ProxyJump door\n")
    login = SshFiles(access)

    def target(**said: Any) -> tuple[str, str, int, str, tuple[str, ...]]:
        found = find_target(Node(**said), login)
        return found.node, found.host, found.port, found.user, found.jumps

    assert target(host="gpu1") == ("gpu1", "192.0.2.7", 2222, "ann", ("door",))
    assert target(host="gpu1", port=22, user="bob") == ("gpu1", "192.0.2.7", 22, "bob", ("door",)), "22 is a port like any other"
    assert target(host="gpu9", jump="none") == ("gpu9", "192.0.2.7", 2222, "ann", ()), "straight there"
    assert target(host="other") == ("other", "other", 22, USER, ("door",))
    assert target(host="door") == target(host="door", port=22) == ("door", "door", 22, USER, ()), "the jump host is reached without itself"


def test_times_are_the_clusters(tmp_path: Path) -> None:
    cluster = Cluster(name="lab", runtime="docker", root="/srv", nodes=(), connect_timeout_s=3, silence_s=90)
    access = default_settings(tmp_path, "ann", cluster)
    assert (access.connect_timeout_s, access.silence_s, access.user) == (3, 90, "ann")
    with socket.socket() as plain:
        watch_socket(plain, silence_s=access.silence_s)
        kept = [plain.getsockopt(socket.IPPROTO_TCP, option) for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)]
        assert kept == [30, 15, 2] and plain.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 60_000


def test_what_cannot_be_reached_says_why_and_what_next(key: Path, tmp_path: Path) -> None:
    access = access_in(tmp_path / "a", key, connect_timeout_s=1.0)
    port = free_port()
    text = failure(Node(host="127.0.0.1", port=port), access)
    assert f"port {port} of 127.0.0.1 refused the connection" in text and f"Next: ssh -v -p {port} root@127.0.0.1 true" in text
    assert "the name 'no-such-host.invalid' could not be resolved" in failure(Node(host="no-such-host.invalid"), access)
    started = time.monotonic()
    assert "192.0.2.1" in failure(Node(host="192.0.2.1"), access)
    assert time.monotonic() - started < 3


def test_name_servers_that_do_not_answer_are_named_in_time(key: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stay, look = threading.Event(), socket.getaddrinfo

    def hang(*arguments: object, flags: int = 0, **options: object) -> object:
        return look(*arguments, flags=flags, **options) if flags else stay.wait(20)  # type: ignore[call-overload]

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    text = failure(Node(host="gpu1.lab"), access_in(tmp_path / "a", key, connect_timeout_s=0.3))
    stay.set()
    monkeypatch.undo()
    assert "gpu1.lab" in text and "no answer from the name servers within 0.3 s" in text and "Next: getent hosts gpu1.lab" in text
    assert "not a valid host name" in failure(Node(host="x" * 70), access_in(tmp_path / "b", key))


def test_a_port_that_is_silent_and_one_whose_packets_are_dropped_are_named_in_time(key: Path, tmp_path: Path) -> None:
    access = access_in(tmp_path / "a", key, connect_timeout_s=1.0)
    with socket.create_server(("127.0.0.1", 0), backlog=1) as silent:
        node = Node(host="127.0.0.1", port=silent.getsockname()[1])
        started = time.monotonic()
        assert "did not answer with SSH" in failure(node, access)
        held = [socket.socket() for _ in range(4)]  # more than the backlog: the kernel drops what comes after
        for connection in held:
            connection.setblocking(False)
            connection.connect_ex(silent.getsockname())
        assert "no answer from port" in failure(node, access)
        assert time.monotonic() - started < 4
        for connection in held:
            connection.close()


def test_limits_of_the_far_side_are_named(start: Start, key: Path, tmp_path: Path) -> None:
    narrow, forced = start("MaxSessions 1"), start("ForceCommand echo This account is closed")
    client = ConnectionPool(access_in(tmp_path / "a", key, narrow.known_line(), forced.known_line()))
    try:
        ssh = Ssh(node_at(narrow), client)
        process = ssh.start(("sleep", "30"), log=tmp_path / "log")
        with pytest.raises(NodeFailed, match=r"MaxSessions in its sshd_config"):
            ssh.run(("true",))
        os.kill(process.pid, 9)
        assert process.wait(5) == -1
        with pytest.raises(NodeFailed, match=r"'This account is closed': the login did not run the command"):
            Ssh(node_at(forced), client).run(("true",))
    finally:
        client.close()
