"""Which rank a line of a node's log is from, and how far the start of each rank is."""

from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.plan.plan import Plan
from launcher.record.record import NodeResult
from launcher.run.failure_search import find_failure
from launcher.run.node_log import NO_OUTPUT, lines_of, read_end, silence_s, start_phases, unnamed
from trainer.contract import PHASE_LINE, START_PHASES

KILLED = """\
torchrun starts
[rank 2] torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB
[rank 3] RuntimeError: Connection closed by peer [10.0.0.1]:4242
[rank 3] the last line of three
[rank 2] the last line of two
============================================================
Root Cause (first observed failure):
[0]:
  time      : 2026-11-21_11:00:00
  host      : b
  rank      : 2 (local_rank: 0)
  exitcode  : 1 (pid: 7)
"""


def said(*phases: int, prefix: str = "") -> str:
    return "".join(f"{prefix}{PHASE_LINE.format(phase=START_PHASES[phase])}\n" for phase in phases)


def test_the_lines_of_one_rank() -> None:
    assert lines_of(KILLED, 3) == ("RuntimeError: Connection closed by peer [10.0.0.1]:4242", "the last line of three")
    assert lines_of(KILLED, -1)[0] == "torchrun starts" and "[rank" not in unnamed(KILLED)


def test_the_slowest_rank_is_first(tmp_path: Path) -> None:
    log = tmp_path / "node1.log"
    log.write_text("hello\n" + said(0, 1, 3, prefix="[rank 2] ") + "[rank 2] a warning\n" + said(0, prefix="[rank 3] "))
    slowest, other = start_phases(log, "b", (2, 3))
    assert (slowest.rank, slowest.phase, other.rank, other.phase, other.last_line) == (3, 0, 2, 3, "a warning")
    assert slowest.describe() == "rank 3 on b: loading its libraries"


@pytest.mark.parametrize("text, described", [(None, NO_OUTPUT), ("pulling\n", NO_OUTPUT), (said(0, 2), START_PHASES[2])])
def test_every_line_belongs_to_the_only_rank(tmp_path: Path, text: str | None, described: str) -> None:
    log = tmp_path / "node0.log"
    if text is not None:
        log.write_text(text)
    (standing,) = start_phases(log, "a", (0,))
    assert standing.describe() == f"rank 0 on a: {described}" and standing.last_line == (text or "").splitlines()[-1:][0] if text else True
    assert (silence_s(log) is None) == (text is None)


def test_a_rank_without_a_report_is_quoted_by_its_own_lines(plan_for: Callable[..., Plan], tmp_path: Path) -> None:
    plan = plan_for(f"cluster.root={tmp_path}", "cluster.devices_per_node=4")
    logs = Path(plan.folder) / "logs"
    logs.mkdir(parents=True)
    (logs / "node0.log").write_text(KILLED)
    failure = find_failure(plan, (NodeResult(host="b", node_rank=0, code=1, seconds=1.0, killed=False),))
    assert failure is not None and failure.message == "rank 2 ended with exit code 1 and left no report"
    assert failure.tail == ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB", "the last line of two")
    assert "memory" in failure.meaning


@pytest.mark.parametrize("size", range(20, 40))
def test_the_end_of_a_log_begins_with_a_whole_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Else its first line has lost its rank, or begins in the middle of a character."""
    monkeypatch.setattr("launcher.run.node_log.END_BYTES", size)
    log = tmp_path / "node0.log"
    log.write_text("[rank 1] 漢漢漢漢\n[rank 2] 字\n", encoding="utf-8")
    end = "[rank 1] 漢漢漢漢\n[rank 2] 字\n" if size >= log.stat().st_size else "[rank 2] 字\n"
    assert read_end(log) == end
