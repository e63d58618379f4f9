"""`omnilaunch logs`: complete lines of every node, from the run's folder or from the containers."""

import os
import tracemalloc
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.commands.live import logs
from launcher.commands.live.live_run import load_plan
from launcher.commands.live.logs import PIECE_BYTES, follow
from launcher.plan.plan import Plan
from launcher.record.lock import lock_run
from tests.launcher.planted import write_run


def test_logs_of_all_nodes_line_by_line_until_the_end(tmp_path: Path, plan_for: Callable[..., Plan]) -> None:
    folder = write_run(tmp_path / "r", plan_for())
    first, second = (folder / "logs" / f"node{number}.log" for number in (0, 1))
    first.write_text("one\ntw", encoding="utf-8")
    calls = 0

    def ended() -> bool:
        nonlocal calls
        calls += 1
        if calls == 1:
            with first.open("a", encoding="utf-8") as file:
                file.write("o\n")
            second.write_bytes(b"\xffthree\n")
        return calls > 1

    assert list(follow(folder, ended=ended)) == ["[node0] one", "[node0] two", "[node1] \ufffdthree"]


def test_a_log_larger_than_a_piece_is_read_in_pieces(tmp_path: Path, plan_for: Callable[..., Plan]) -> None:
    folder = write_run(tmp_path / "r", plan_for())
    lines = [f"{number:099}" for number in range(3 * PIECE_BYTES // 100)]
    (folder / "logs" / "node0.log").write_text("\n".join(lines), encoding="utf-8")
    tracemalloc.start()
    assert all(line == f"[node0] {wanted}" for line, wanted in zip(follow(folder, ended=lambda: True), lines, strict=True))
    assert tracemalloc.get_traced_memory()[1] < 8 * PIECE_BYTES, "a file of hours is not held in memory"
    tracemalloc.stop()


def test_another_attempts_log_is_read_from_its_beginning_though_it_is_longer(tmp_path: Path, plan_for: Callable[..., Plan]) -> None:
    folder = write_run(tmp_path / "r", plan_for())
    log = folder / "logs" / "node0.log"
    log.write_text("first\n", encoding="utf-8")
    calls = 0

    def ended() -> bool:
        nonlocal calls
        calls += 1
        if calls == 1:
            (folder / "attempts" / "1").mkdir(parents=True)
            (folder / "logs").rename(folder / "attempts" / "1" / "logs")
            (folder / "logs").mkdir()
            log.write_text("second, and more of it\nlast words", encoding="utf-8")
        return calls > 1

    assert list(follow(folder, ended=ended)) == ["[node0] first", "[node0] second, and more of it", "[node0] last words"]


def test_logs_of_a_detached_run_come_from_its_containers(
    tmp_path: Path, plan_for: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after `launch --detach`, or a launcher that was killed: no launcher writes the logs to the run's folder."""
    folder = write_run(tmp_path / "runs" / "monday", plan_for("cluster.runtime=docker"))
    (folder / "logs" / "node0.log").write_text("step 1\n", encoding="utf-8")
    (tmp_path / "docker").write_text(
        '#!/bin/sh\n[ "$1" = logs ] || exec echo running 0\necho step 1; echo "$*" >&2; [ "$2" = --follow ] || exit; sleep 1; echo step 2\n'
    )
    (tmp_path / "docker").chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for follows, words, more in ((False, "logs", []), (True, "logs --follow", ["[node0] step 2"])):
        said: list[str] = []
        logs.run(Namespace(run="monday", say=said.append, follow=follows))
        name = load_plan(folder).commands[0].name
        assert said == ["[node0] step 1", f"[node0] {words} {name}", *more]
    said.clear()
    with lock_run(folder):
        logs.run(Namespace(run="monday", say=said.append, follow=False))
    assert said == ["[node0] step 1"], "a launcher that supervises the run writes them here"
    (tmp_path / "docker").write_text("#!/bin/sh\necho error: no such object >&2; exit 1\n")
    logs.run(Namespace(run="monday", say=said.append, follow=True))
    assert said == ["[node0] step 1"] * 2, "the containers are gone: the lines read so far are all there are"


@pytest.mark.parametrize("size", range(4, 12))
def test_a_line_longer_than_a_piece_is_not_cut_within_a_character(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr("launcher.commands.live.logs.PIECE_BYTES", size)
    text = "é漢🙂" * 5
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/node0.log").write_text(f"{text}\n", encoding="utf-8")
    lines = list(follow(tmp_path, ended=lambda: True))
    assert "".join(line.removeprefix("[node0] ") for line in lines) == text


def test_following_a_run_of_processes_ends_when_its_launcher_was_killed(
    tmp_path: Path, plan_for: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_run(tmp_path / "runs" / "monday", plan_for())
    (folder / "logs" / "node0.log").write_text("step 1\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("launcher.commands.live.logs.POLL_S", 0.01)
    said: list[str] = []
    logs.run(Namespace(run="monday", say=said.append, follow=True))
    assert said == ["[node0] step 1", "the launcher of run monday was killed. See: omnilaunch status monday"]


def test_a_run_whose_launcher_works_or_whose_ranks_outlived_it_is_followed(
    tmp_path: Path, plan_for: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_for()
    folder = write_run(tmp_path / "R", plan)
    with lock_run(folder):
        complete = logs.is_complete(folder, plan, follows=True)
        assert not any(complete() for _ in range(9))
    monkeypatch.setattr("launcher.ssh.transport.processes_with", lambda *_: (1,))
    assert not any(logs.is_complete(folder, plan, follows=True)() for _ in range(9))
    (folder / "result.json").write_text("{}", encoding="utf-8")
    assert logs.is_complete(folder, plan, follows=True)()
