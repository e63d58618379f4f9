"""The failure that came first is found, in the reports of the ranks or in the logs of the nodes."""

from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.plan.plan import Plan
from launcher.record.record import NodeResult, open_run
from launcher.record.source import SourceState
from launcher.run.failure_search import find_failure
from trainer import contract
from trainer.contract import SCHEMA, FailureReport

SOURCE = SourceState(commit="c0ffee", dirty=True)


@pytest.fixture
def plan(plan_for: Callable[..., Plan], tmp_path: Path) -> Plan:
    return plan_for(f"cluster.root={tmp_path}", "cluster.devices_per_node=2")


def report(rank: int, unix_s: float, code: int = 1) -> FailureReport:
    return FailureReport(
        schema=SCHEMA, rank=rank, hostname="h", unix_s=unix_s, code=code, kind="Broken", message=f"rank {rank} broke", traceback="a\nb\n"
    )


def test_the_rank_that_failed_first_is_named(plan: Plan) -> None:
    folder = open_run(plan, SOURCE)
    for rank, unix_s in ((0, 20.0), (1, 10.0)):
        contract.write(report(rank, unix_s), folder / contract.FAILURE_FILES.format(rank=rank))
    failure = find_failure(plan, ())
    assert failure is not None and (failure.rank, failure.message, failure.tail) == (1, "rank 1 broke", ("a", "b"))


@pytest.mark.parametrize("code", [2, 5])
def test_what_was_said_on_purpose_has_no_traceback(plan: Plan, code: int) -> None:
    folder = open_run(plan, SOURCE)
    contract.write(report(0, 1.0, code), folder / contract.FAILURE_FILES.format(rank=0))
    failure = find_failure(plan, ())
    assert failure is not None and (failure.code, failure.message, failure.tail) == (code, "rank 0 broke", ())


def test_without_a_report_the_nodes_last_lines_tell(plan: Plan) -> None:
    folder = open_run(plan, SOURCE)
    (folder / "logs/node0.log").write_text("\n".join(f"line {i}" for i in range(40)))
    failure = find_failure(plan, (NodeResult(host="localhost", node_rank=0, code=-9, seconds=1.0, killed=False),))
    assert failure is not None and failure.rank == -1 and failure.tail[-1] == "line 39" and len(failure.tail) == 15
