"""The rank in front of every line: whole, in order, of every writer, and however the rank ends."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.device.log_prefix import PIECE_BYTES, copy_with_prefix, write_all

BEGIN = "import os, sys\nfrom trainer.device.log_prefix import prefix_lines\nwith prefix_lines(os.environ):\n"


def printed(code: str, *, ranks: int = 2, **named: object) -> tuple[str, int]:
    """stdout of rank 1 that runs `code` inside the block, and its exit code. stderr must stay empty."""
    lines = "".join(f"    {line}\n" for line in code.splitlines())
    done = subprocess.run(
        (sys.executable, "-c", BEGIN + lines),
        env={"PATH": os.environ["PATH"], "RANK": "1", "WORLD_SIZE": str(ranks)},
        capture_output=True,
        text=True,
        timeout=60,
        **named,  # type: ignore[call-overload]
    )
    assert ranks == 1 or done.stderr == ""
    return done.stdout, done.returncode


def test_both_streams_come_out_in_the_order_of_writing() -> None:
    text, code = printed("for i in range(3):\n    print('out', i, flush=True)\n    print('err', i, file=sys.stderr, flush=True)")
    assert code == 0
    assert text.splitlines() == [f"[rank 1] {stream} {i}" for i in range(3) for stream in ("out", "err")]


def test_what_is_written_below_python_has_it_too() -> None:
    text, _ = printed(
        "os.write(2, b'from a library\\nand')\nos.write(1, b' on\\n')\nimport subprocess\nsubprocess.run(('echo', 'a child'))"
    )
    assert text.splitlines() == ["[rank 1] from a library", "[rank 1] and on", "[rank 1] a child"]


def test_one_rank_writes_as_it_always_did() -> None:
    assert printed("print('plain')", ranks=1) == ("plain\n", 0)


@pytest.mark.parametrize("end, code", [("os.kill(os.getpid(), 9)", -9), ("os._exit(6)", 6), ("os.killpg(os.getpgid(0), 15)", -15)])
def test_the_last_lines_of_a_rank_that_is_ended_are_there(end: str, code: int) -> None:
    """A line without its end is one: torchrun kills the whole process group."""
    text, got = printed(f"os.write(1, b'first\\nlast words')\n{end}", start_new_session=True)
    assert (text, got) == ("[rank 1] first\n[rank 1] last words\n", code)


def test_an_exit_code_and_an_error_pass() -> None:
    text, code = printed("print('before', flush=True)\nsys.exit(5)")
    assert (text, code) == ("[rank 1] before\n", 5)


def test_many_lines_arrive_whole_and_a_worker_that_stays_holds_nothing_up() -> None:
    text, _ = printed(
        "for i in range(20000):\n    print(i)\nsys.stdout.flush()\nimport subprocess\nsubprocess.Popen(('sleep', '4'), stdin=subprocess.DEVNULL)"
    )
    assert text.splitlines() == [f"[rank 1] {i}" for i in range(20000)]


def test_lines_of_two_ranks_do_not_mix(tmp_path: Path) -> None:
    log = tmp_path / "log"
    code = BEGIN + "    for i in range(2000):\n        print('x' * 200 * int(os.environ['RANK']))\n"
    with log.open("ab") as file:
        ranks = [
            subprocess.Popen((sys.executable, "-c", code), env={"RANK": str(rank), "WORLD_SIZE": "3"}, stdout=file, stderr=file)
            for rank in (1, 2)
        ]
        assert [rank.wait(60) for rank in ranks] == [0, 0]
    lines = log.read_text().splitlines()
    assert len(lines) == 4000 and set(lines) == {f"[rank {rank}] " + "x" * 200 * rank for rank in (1, 2)}


def test_a_line_without_an_end_is_cut_and_not_held(tmp_path: Path) -> None:
    source, target = os.pipe()
    os.set_blocking(target, False)
    sent = os.write(target, b"y" * (PIECE_BYTES - 1))
    os.close(target)
    out = tmp_path / "out"
    with out.open("wb") as file:
        copy_with_prefix(source, file.fileno(), b"> ")
    os.close(source)
    assert out.read_bytes() == b"> " + b"y" * sent + b"\n"


def test_a_full_disk_is_no_end() -> None:
    with Path("/dev/full").open("wb", buffering=0) as full:
        write_all(b"lost\n", full.fileno())
