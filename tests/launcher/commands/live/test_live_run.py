"""Runs that are there: found, refused with what there is, their logs side by side."""

import gc
import json
import os
import tracemalloc
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.cli import main
from launcher.commands import live_run as run_action
from launcher.commands.live_run import PIECE_BYTES, attach_run, find_run, follow, load_plan, require_containers, show_logs, show_status
from launcher.errors import ConfigRefused
from launcher.plan.plan import Plan, to_plain
from launcher.record.lock import claim


def write_run(folder: Path, plan: Plan) -> Path:
    (folder / "logs").mkdir(parents=True)
    (folder / "plan.json").write_text(json.dumps(to_plain(plan)), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    "overrides", [(), ("hardware=ascend910b", "model=qwen2_5_vl_32b", "stage=lora", "precision=bf16", "cluster=example")]
)
def test_a_plan_is_read_as_it_was_written(tmp_path: Path, plan_for: Callable[..., Plan], overrides: tuple[str, ...]) -> None:
    plan = plan_for(*overrides)
    assert load_plan(write_run(tmp_path / "r", plan)) == plan


def test_a_run_that_is_not_there(tmp_path: Path, plan_for: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigRefused, match=r"there are no runs"):
        find_run("monday")
    write_run(tmp_path / "runs" / "monday", plan_for())
    assert find_run("monday") == tmp_path / "runs" / "monday"
    with pytest.raises(ConfigRefused, match=r"no run 'mondy'.*did you mean 'monday'"):
        find_run("mondy")


@pytest.mark.parametrize("text", ["", "{", "{}", '{"schema": 1, "more": 2}'])
def test_a_plan_that_cannot_be_read(tmp_path: Path, text: str) -> None:
    (tmp_path / "plan.json").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigRefused, match=r"plan\.json cannot be read by this version"):
        load_plan(tmp_path)


def test_a_run_of_processes_is_its_launchers(plan_for: Callable[..., Plan]) -> None:
    with pytest.raises(ConfigRefused, match=r"cluster\.runtime=docker"):
        require_containers(plan_for(), "attach")


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


@pytest.mark.parametrize(("words", "said"), [((), ", step 5 of 300"), (("stage=merge", "stage.checkpoint=/a"), "")], ids=("full", "merge"))
def test_the_status_of_a_run_that_did_not_train_counts_no_steps(
    tmp_path: Path, plan_for: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], said: str
) -> None:
    plan = plan_for(*words)
    write_run(tmp_path / "runs" / "monday", plan)
    ended = type("Ended", (), {"status": "finished", "ended_at": "noon", "steps": 5})
    monkeypatch.setattr(run_action, "recorded", lambda _: ended)
    monkeypatch.chdir(tmp_path)
    heard: list[str] = []
    show_status(Namespace(run="monday", say=heard.append))
    assert heard == [f"finished at noon{said}"]


@pytest.mark.parametrize("text", ["{", "{}", '{"schema": 1, "of_a_later_version": 2}'])
def test_a_run_with_a_record_that_cannot_be_read_is_not_taken_up_again(
    tmp_path: Path, plan_for: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    folder = write_run(tmp_path / "runs" / "monday", plan_for("cluster.runtime=docker"))
    (folder / "result.json").write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_action, "supervise", lambda *_: pytest.fail("it was taken up again"))
    for verb in (attach_run, show_status):
        with pytest.raises(ConfigRefused, match=r"monday has ended, and this version cannot read how: .*result\.json"):
            verb(Namespace(run="monday", say=print))
    assert (folder / "result.json").read_text(encoding="utf-8") == text
    said: list[str] = []
    (folder / "logs" / "node0.log").write_text("done\n", encoding="utf-8")
    assert show_logs(Namespace(run="monday", say=said.append, follow=True)) == 0 and said == ["[node0] done"]


def test_logs_of_a_run_that_was_left_to_itself_come_from_its_engine(
    tmp_path: Path, plan_for: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after `launch --detach`, or a launcher that was killed: nobody adds to the logs here."""
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
        show_logs(Namespace(run="monday", say=said.append, follow=follows))
        name = load_plan(folder).commands[0].name
        assert said == ["[node0] step 1", f"[node0] {words} {name}", *more]
    said.clear()
    with claim(folder):
        show_logs(Namespace(run="monday", say=said.append, follow=False))
    assert said == ["[node0] step 1"], "with a launcher that looks after it they come here"
    (tmp_path / "docker").write_text("#!/bin/sh\necho error: no such object >&2; exit 1\n")
    show_logs(Namespace(run="monday", say=said.append, follow=True))
    assert said == ["[node0] step 1"] * 2, "its containers are gone: what has come is all there is"


def test_what_may_take_days_collects_its_garbage(tmp_path: Path, plan_for: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line starts without: each command to a node leaves some in a cycle, and a run asks once a second."""
    write_run(tmp_path / "runs" / "monday", plan_for("cluster.runtime=docker"))
    monkeypatch.chdir(tmp_path)
    seen: list[bool] = []

    def attached(*_: object) -> None:
        seen.append(gc.isenabled())
        raise ConfigRefused("enough")

    monkeypatch.setattr("launcher.run.launch.attach", attached)
    try:
        assert main(["attach", "monday"]) == 2 and seen == [True]
    finally:
        gc.enable()


def test_a_run_of_another_user_is_no_bug(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """root may write anywhere, so the refusal of the system is stood in for."""

    def refuse(_: Namespace) -> int:
        raise PermissionError(13, "Permission denied", "runs/monday/logs/stop0.log")

    monkeypatch.setattr("launcher.cli.parse", lambda _: Namespace(verb=refuse))
    assert main(["stop", "monday"]) == 2
    said = capsys.readouterr().err
    assert "runs/monday/logs/stop0.log: Permission denied" in said and "Traceback" not in said
