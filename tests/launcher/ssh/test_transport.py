"""Commands reach a machine as they are, and come back whole."""

import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from launcher.errors import NodeFailed
from launcher.ssh.node import Ssh
from launcher.ssh.pool import ConnectionPool
from launcher.ssh.transport import Local, Transport
from tests.launcher.hostile import CONTENT, hostile, running
from tests.launcher.sshd import Sshd, access_in, make_key, node_at

LOCAL = Local({"PATH": "/usr/bin:/bin", "SECRET_OF_MY_SHELL": "x", "HOME": "/nowhere"})
TEXT = st.text(alphabet=st.characters(exclude_characters="\0", exclude_categories=("Cs",)), max_size=40)


@settings(max_examples=25, deadline=None)
@given(words=st.lists(TEXT, max_size=4))
def test_arguments_arrive_byte_equal(words: list[str]) -> None:
    code = "import sys; sys.stdout.buffer.write('\\0'.join(sys.argv[1:]).encode())"
    result = LOCAL.run((sys.executable, "-X", "utf8", "-c", code, *words))
    assert result.output.split("\0") == (words or [""]) or "\r" in "".join(words)


def test_only_kept_variables_pass() -> None:
    output = LOCAL.run((sys.executable, "-c", "import os; print(sorted(os.environ))"), environment={"OURS": "1"}).output
    assert "SECRET_OF_MY_SHELL" not in output and "'HOME'" in output and "'OURS'" in output


def test_a_code_is_a_result_and_expect_raises() -> None:
    result = LOCAL.run((sys.executable, "-c", "import sys; print('why', file=sys.stderr); sys.exit(3)"))
    assert result.code == 3
    with pytest.raises(NodeFailed, match=r"probing failed with exit code 3(.|\n)*why"):
        result.expect("probing")


def test_timeout_and_missing_program_say_so(tmp_path: Path) -> None:
    with pytest.raises(NodeFailed, match=r"no answer within 0\.2 s"):
        LOCAL.run((sys.executable, "-c", "import time; time.sleep(9)"), timeout_s=0.2)
    with pytest.raises(NodeFailed, match="'no-such-program' was not found"):
        LOCAL.run(("no-such-program",))
    with pytest.raises(NodeFailed, match="'no-such-program' was not found"):
        LOCAL.start(("no-such-program",), log=tmp_path / "log")


# ------------------------------------------------------------- what every transport keeps to: this machine, and one over a real sshd


@pytest.fixture(scope="module", params=["local", "ssh"])
def transport(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Transport]:
    if request.param == "local":
        yield LOCAL
        return
    folder = tmp_path_factory.mktemp("ssh")
    key = make_key(folder / "id_ed25519")
    sshd = Sshd(folder / "node", key)
    client = ConnectionPool(access_in(folder / "access", key, sshd.known_line()))
    yield Ssh(node_at(sshd), client)
    client.close()
    sshd.end()


def test_long_outputs_on_both_sides_do_not_block(transport: Transport) -> None:
    code = "head -c 5000000 /dev/zero >&2 & head -c 5000000 /dev/zero; wait"
    result = transport.run(("sh", "-c", code), timeout_s=30)
    assert (len(result.output), len(result.errors)) == (5_000_000, 5_000_000)


def test_put_and_get_are_byte_equal(transport: Transport, tmp_path: Path) -> None:
    path = tmp_path / "a b" / "$(touch C)\n" / "file"
    transport.put(CONTENT, str(path), mode=0o640)
    assert path.read_bytes() == CONTENT and path.stat().st_mode & 0o777 == 0o640
    assert path.parent.stat().st_mode & 0o777 == 0o755
    transport.put(b"", str(path))
    assert transport.get(str(path)) == b"" and path.stat().st_mode & 0o777 == 0o600
    path.write_bytes(CONTENT)
    assert transport.get(str(path)) == CONTENT
    assert [entry.name for entry in path.parent.iterdir()] == ["file"]
    assert transport.get(str(tmp_path / "none")) is None and transport.get(str(path / "below")) is None
    with pytest.raises(NodeFailed, match=r"could not be read: .*Is a directory"):
        transport.get(str(tmp_path))
    with pytest.raises(NodeFailed, match=r"could not be written: (it is a folder|Is a directory)"):
        transport.put(b"x", str(tmp_path))
    with pytest.raises(NodeFailed, match=r"could not be written: .*(Not a directory|File exists)"):
        transport.put(b"x", str(path / "below"))


def test_hostile_file_names(transport: Transport, tmp_path: Path) -> None:
    for word in [word for word in hostile(60) if word and "/" not in word and word not in (".", "..")][:12]:
        transport.put(word.encode(), str(tmp_path / word))
        assert (tmp_path / word).read_bytes() == word.encode() == transport.get(str(tmp_path / word))
        (tmp_path / word).unlink()
    assert list(tmp_path.iterdir()) == []


def test_feed_and_stream_are_byte_equal_for_binary_content(transport: Transport, tmp_path: Path) -> None:
    assert transport.feed(("tee", str(tmp_path / "fed")), (CONTENT, b"", CONTENT[:7]), timeout_s=30).code == 0
    assert (tmp_path / "fed").read_bytes() == CONTENT + CONTENT[:7]
    with transport.stream(("cat", str(tmp_path / "fed"))) as chunks:
        assert b"".join(chunks) == CONTENT + CONTENT[:7]
    assert transport.feed(("sh", "-c", "exit 9"), (CONTENT,) * 5, timeout_s=30).code == 9


def test_a_stream_that_fails_says_so_in_place_of_its_end(transport: Transport) -> None:
    with (
        pytest.raises(NodeFailed, match=r"failed with exit code 5(.|\n)*half"),
        transport.stream(("sh", "-c", "echo 1; echo half >&2; exit 5")) as chunks,
    ):
        assert next(chunks) == b"1\n"
        next(chunks)
    with pytest.raises(NodeFailed, match=r"no (answer|output) within 0\.3 s"), transport.stream(("sleep", "4802"), silence_s=0.3) as chunks:
        list(chunks)
    with transport.stream(("sh", "-c", "while echo yes; do :; done; sleep 4802")) as chunks:
        next(chunks)
    assert not running("sleep", "4802")


def test_a_source_that_fails_leaves_no_half_file(transport: Transport, tmp_path: Path) -> None:
    def broken() -> Iterator[bytes]:
        yield CONTENT
        raise NodeFailed("the source is gone")

    with pytest.raises(NodeFailed, match="the source is gone"):
        transport.feed(("sh", "-c", 'cat >"$1.part" && mv "$1.part" "$1"', "sh", str(tmp_path / "file")), broken(), timeout_s=30)
    time.sleep(0.2)
    assert not (tmp_path / "file").exists()


def test_start_follows_into_a_log_and_signals_reach_all(transport: Transport, tmp_path: Path) -> None:
    process = transport.start(("sh", "-c", "echo one; echo two >&2; exec >&- 2>&-; sleep 0.3; exit 4"), log=tmp_path / "log")
    assert process.poll() is None and process.wait(10) == 4
    assert (tmp_path / "log").read_bytes() == b"one\ntwo\n"
    family = transport.start(("sh", "-c", "sleep 4803 & sleep 4803; true"), log=tmp_path / "log")
    assert Path(f"/proc/{family.pid}").exists() and family.wait(0.1) is None
    family.signal(signal.SIGTERM)
    assert (family.wait(5) or 0) < 0 and not running("sleep", "4803")
    family.signal(signal.SIGTERM)
    with pytest.raises(NodeFailed, match="'no-such-program' was not found"):
        transport.start(("no-such-program",), log=tmp_path / "log")


def test_codes_outputs_folder_and_missing_program(transport: Transport, tmp_path: Path) -> None:
    result = transport.run(("sh", "-c", "pwd; echo why >&2; exit 3"), folder=tmp_path)
    assert (result.code, result.output, result.errors) == (3, f"{tmp_path}\n", "why\n")
    assert transport.run(("sh", "-c", "kill -9 $$")).code < 0
    assert transport.run(("printf", r"\377")).output == "\N{REPLACEMENT CHARACTER}"
    assert transport.run(("cat",)).output == ""  # stdin is at its end
    with pytest.raises(
        NodeFailed, match=r"'no-such-program' was not found on (root@127\.0\.0\.1:\d+|this machine), needed for: no-such-program x"
    ):
        transport.run(("no-such-program", "x"))
    with pytest.raises(NodeFailed, match=r"(no/such/folder(.|\n)*the folder does not exist there|/no/such/folder.* was not found)"):
        transport.run(("true",), folder=Path("/no/such/folder"))


SET_ENV = {  # of CANN's and ATB's set_env.sh
    "ASCEND_TOOLKIT_HOME": "/usr/local/Ascend/ascend-toolkit/latest",
    "ASCEND_HOME_PATH": "/usr/local/Ascend/ascend-toolkit/latest",
    "ASCEND_OPP_PATH": "/usr/local/Ascend/ascend-toolkit/latest/opp",
    "ASCEND_AICPU_PATH": "/usr/local/Ascend/ascend-toolkit/latest",
    "TOOLCHAIN_HOME": "/usr/local/Ascend/ascend-toolkit/latest/toolkit",
    "ATB_HOME_PATH": "/usr/local/Ascend/nnal/atb/latest/atb/cxx_abi_1",
    "LD_LIBRARY_PATH": "/usr/local/Ascend/ascend-toolkit/latest/lib64",
    "PATH": "/usr/local/Ascend/ascend-toolkit/latest/bin:/usr/bin:/bin",
}
PACKAGES = "/usr/local/Ascend/ascend-toolkit/latest/python/site-packages"


def test_a_process_on_a_bare_ascend_node_finds_cann() -> None:
    sourced = {**SET_ENV, "PYTHONPATH": f"{PACKAGES}:/home/ann/hacks:/usr/local/Ascend/ascend-toolkit/latestX", "TASK_QUEUE_ENABLE": "2"}
    printed = Local(sourced).run(("env",)).output.splitlines()
    assert dict(line.split("=", 1) for line in printed) == {**SET_ENV, "PYTHONPATH": PACKAGES}, (
        "no setting, and no folder of the user's own"
    )
    assert "PYTHONPATH" not in Local({"PATH": "/usr/bin:/bin", "PYTHONPATH": PACKAGES}).run(("env",)).output
