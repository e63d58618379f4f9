"""The failure that came first is found, in the reports of the ranks or in the logs of the nodes."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.plan.plan import Plan
from launcher.record.record import NodeResult, open_run
from launcher.record.source import SourceState
from launcher.run.failure_search import find_failure
from launcher.run.launch import describe_failure
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


OFFLINE = "Got: ConnectError: [Errno 111] Connection refused"
TRACEBACK = f"""Traceback (most recent call last):
  File "/x/_snapshot_download.py", line 400, in snapshot_download
    raise LocalEntryNotFoundError(
    ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
huggingface_hub.errors.LocalEntryNotFoundError: {OFFLINE}
An error happened while trying to locate the files on the Hub.
"""


def test_of_a_known_failure_the_meaning_and_the_next_command_come_first_and_no_traceback(plan: Plan) -> None:
    folder = open_run(plan, SOURCE)
    said = replace(report(0, 1.0), message=OFFLINE, traceback=TRACEBACK)
    contract.write(said, folder / contract.FAILURE_FILES.format(rank=0))
    failure = find_failure(plan, ())
    assert failure is not None and failure.tail, "the record keeps it"
    lines = describe_failure(failure).splitlines()
    assert lines[0] == f"the run failed first at rank 0 on {failure.host}"
    assert lines[1] == "  meaning: The weights are not on the node, and the node cannot reach the hub."
    assert lines[2].startswith(f"  do: where there is a network: omnilaunch model fetch {plan.config.model.name} --to FOLDER;")
    assert "HF_ENDPOINT" in lines[2] and "model.source.path=FOLDER" in lines[2]
    assert lines[3] == f"  message: {OFFLINE}" and lines[4].endswith(f"LocalEntryNotFoundError: {OFFLINE}")
    assert not any(text in "\n".join(lines) for text in ("Traceback", "File ", "^^^", "raise "))


def test_the_traceback_of_an_unknown_failure_is_shown(plan: Plan) -> None:
    folder = open_run(plan, SOURCE)
    trace = 'Traceback (most recent call last):\n  File "x.py", line 1, in f\n    g()\nKeyError: 7\n'
    contract.write(replace(report(0, 1.0), traceback=trace), folder / contract.FAILURE_FILES.format(rank=0))
    failure = find_failure(plan, ())
    assert failure is not None
    assert describe_failure(failure).splitlines() == [
        f"the run failed first at rank 0 on {failure.host}: rank 0 broke",
        *(f"    {line}" for line in trace.splitlines()),
    ]
