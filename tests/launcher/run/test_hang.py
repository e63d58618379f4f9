"""Which rank a hung step waits for, by logs that real runs left (tests/golden/hang)."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.plan.plan import Plan
from launcher.record.record import NodeResult
from launcher.run.diagnosis import failed_ranks, find_known
from launcher.run.failure_search import MISMATCH, find_failure
from launcher.run.hang import HangVerdict, judge_hang, judge_timeouts, read_waiting
from launcher.run.launch import advice
from trainer import contract
from trainer.contract import SCHEMA, Exit, FailureReport

GOLDEN = Path(__file__).resolve().parents[2] / "golden"


def recorded(name: str) -> str:
    return (GOLDEN / f"{name}.txt").read_text(encoding="utf-8")


def judged(logs: list[str], ranks: int = 2) -> HangVerdict:
    verdict = judge_hang(logs, ranks)
    assert verdict is not None
    return verdict


def split(text: str) -> list[str]:
    """The log of two ranks as those of two nodes with one rank each, where no line names a rank."""
    return [
        "\n".join(line.removeprefix(f"[rank {rank}] ") for line in text.splitlines() if line.startswith(f"[rank {rank}]"))
        for rank in (0, 1)
    ]


# ---------------------------------------------------------------------------------------------------------------- stacks


@pytest.mark.parametrize("apart", [False, True], ids=["one node", "two nodes"])
def test_ranks_in_different_collectives_are_a_mismatch_and_none_is_blamed(apart: bool) -> None:
    text = recorded("hang/mismatch")
    verdict = judged(split(text) if apart else [text])
    assert verdict.rank == -1 and verdict.mismatch
    assert verdict.message == (
        "collective mismatch in step 2: the ranks wait for each other in different collectives: "
        "rank 0 (forward and backward): trainer/distributed/engine.py:96 in backward, torch/distributed/distributed_c10d.py:4943 in reduce_scatter_single; "
        "rank 1 (forward and backward): trainer/distributed/engine.py:96 in backward, runtime/zero/partition_parameters.py:720 in wait"
    )


def test_the_rank_that_is_in_no_collective_is_the_cause() -> None:
    verdict = judged([recorded("hang/stopped")])
    assert verdict.rank == 1 and not verdict.mismatch and "rank 1 (update): trainer/distributed/engine.py:112 in step" in verdict.message


def test_the_rank_that_prints_nothing_is_the_cause() -> None:
    """As the log was while that rank was stopped."""
    text = recorded("hang/stopped")
    verdict = judged([text[: text.index("[rank 1] omnilaunch")]])
    assert verdict.rank == 1 and "rank 1 reported nothing, while 1 other rank printed where they wait" in verdict.message


def test_the_same_place_on_every_rank_blames_none() -> None:
    own = recorded("hang/mismatch")
    own = own[: own.index("[rank 1]")]
    verdict = judged([own + own.replace("rank 0", "rank 1")])
    assert verdict.rank == -1 and not verdict.mismatch and "every rank waits in the same collective" in verdict.message


def test_without_a_report_of_the_watchdog_there_is_no_verdict() -> None:
    assert judge_hang([], 2) is judge_hang(["", "step 3\n"], 2) is None
    assert read_waiting(["[rank 0] omnilaunch: rank 0 has waited 8 s in step 2 (update)\n"])[0].frames == ()


# -------------------------------------------------------------------------------------------------------------- timeouts


def test_a_rank_whose_collective_did_not_time_out_is_the_cause() -> None:
    """Published lines of ranks 2 and 4."""
    verdict = judge_timeouts([recorded("log/nccl-watchdog")], 5)
    assert verdict is not None and verdict.rank == 0 and not verdict.mismatch
    assert (
        verdict.message
        == "2 ranks waited in ALLREDUCE number 3106 of 16666624 elements until it timed out, and rank 0, 1, 3 did not arrive there"
    )
    assert judge_timeouts([recorded("log/gloo-closed")], 5) is None


def test_timeouts_in_different_collectives_are_a_mismatch() -> None:
    first, second = recorded("log/nccl-watchdog").splitlines()[:2]
    other = second.replace("OpType=ALLREDUCE, NumelIn=16666624", "OpType=_ALLGATHER_BASE, NumelIn=512")
    verdict = judge_timeouts([first, other], 5)
    assert verdict is not None and verdict.mismatch and verdict.rank == -1
    assert "rank 2: _ALLGATHER_BASE number 3106 of 512 elements; rank 4: ALLREDUCE number 3106" in verdict.message


# ------------------------------------------------------------------------------------------------------- what is reported


@pytest.fixture
def plan(plan_for: Callable[..., Plan], tmp_path: Path) -> Plan:
    """One node with two ranks."""
    made = replace(plan_for("cluster.devices_per_node=2"), folder=str(tmp_path))
    (tmp_path / "logs").mkdir()
    return made


def report(plan: Plan, rank: int, message: str, code: int) -> None:
    said = FailureReport(schema=SCHEMA, rank=rank, hostname="h", unix_s=1.0, code=code, kind="RunFailed", message=message, traceback="")
    contract.write(said, Path(plan.folder) / contract.FAILURE_FILES.format(rank=rank))


def ended(code: int) -> NodeResult:
    return NodeResult(host="localhost", node_rank=0, code=code, seconds=9.0, killed=False)


HUNG = "step 2 (forward and backward) has not ended in 38 s; run.hang_timeout_s is 8"


def test_the_first_rank_to_notice_a_mismatch_is_not_blamed(plan: Plan) -> None:
    (Path(plan.folder) / "logs/node0.log").write_text(recorded("hang/mismatch"))
    report(plan, 1, HUNG, Exit.HUNG)
    failure = find_failure(plan, (ended(6),))
    assert failure is not None and (failure.rank, failure.host, failure.code) == (-1, "localhost", Exit.HUNG)
    assert failure.message.startswith("collective mismatch in step 2: ") and failure.message.endswith(f". {HUNG}")
    assert failure.meaning == find_known(MISMATCH).means and "strategy=zero2" in advice(failure)


def test_the_rank_that_hangs_is_named_and_not_the_one_that_ended_the_run(plan: Plan) -> None:
    (Path(plan.folder) / "logs/node0.log").write_text(recorded("hang/stopped"))
    report(plan, 0, HUNG, Exit.HUNG)
    failure = find_failure(plan, (ended(6),))
    assert failure is not None and failure.rank == 1 and failure.meaning == "" and "but not rank 1 (update)" in failure.message


def test_without_stacks_the_report_stands(plan: Plan) -> None:
    report(plan, 1, HUNG, Exit.HUNG)
    failure = find_failure(plan, (ended(6),))
    assert failure is not None and (failure.rank, failure.message) == (1, HUNG)


def test_a_rank_that_gloo_aborted_is_a_mismatch_and_the_one_that_lost_it_is_not_blamed(plan: Plan) -> None:
    """Rank 0 aborts without a report, rank 1 reports that it has lost a connection: the order in which this was found."""
    text = recorded("log/gloo-mismatch")
    (Path(plan.folder) / "logs/node0.log").write_text(text)
    report(plan, 1, text.splitlines()[2].removeprefix("[rank 1] "), Exit.RUN)
    failure = find_failure(plan, (ended(1),))
    assert failure is not None and failure.rank == -1 and failure.meaning == find_known(MISMATCH).means
    assert (
        failure.message
        == "the ranks were in different collectives, which rank 0 noticed: rank 0 ended with exit code -6 and left no report"
    )


@pytest.mark.parametrize("first", [0, 1], ids=["torchrun saw the cause first", "torchrun saw the consequence first"])
def test_a_rank_that_died_without_a_word_comes_before_one_that_noticed(plan: Plan, first: int) -> None:
    """The same log without the words of gloo, whose second rank may also be the one that torchrun sees first."""
    lines = [line for line in recorded("log/gloo-mismatch").splitlines() if "terminate called" not in line and "what():" not in line]
    text = "\n".join(lines)
    if first:
        text = (
            text.replace("rank      : 0", "rank      : 9")
            .replace("rank      : 1", "rank      : 0")
            .replace("rank      : 9", "rank      : 1")
        )
        text = (
            text.replace("exitcode  : -15", "exitcode  : 9")
            .replace("exitcode  : -6", "exitcode  : 5")
            .replace("exitcode  : 9", "exitcode  : -6")
        )
        assert failed_ranks(text) == ((1, 5), (0, -6))
    (Path(plan.folder) / "logs/node0.log").write_text(text)
    report(
        plan,
        1,
        "rank 1 lost the connection to another rank, which ended first: see its log for the cause. (remote process exited)",
        Exit.RUN,
    )
    failure = find_failure(plan, (ended(1),))
    assert failure is not None and (failure.rank, failure.message) == (0, "rank 0 ended with exit code -6 and left no report")


def test_all_ranks_of_torchruns_summary_are_read() -> None:
    assert failed_ranks(recorded("log/rank-killed")) == ((1, -9), (0, -15))
    assert failed_ranks("nothing") == ()
