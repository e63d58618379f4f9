"""Which failure came first, among the reports of the ranks and the logs of the nodes, and what it means."""

import re
from dataclasses import replace
from pathlib import Path

from launcher.plan.plan import Plan
from launcher.record.reader import read_if_there
from launcher.record.record import Failure, NodeResult
from launcher.run.diagnosis import Diagnosis, explain_log, failed_ranks, find_known
from launcher.run.failures.symptom import Kind
from launcher.run.hang import HangVerdict, judge_hang, judge_timeouts
from launcher.run.node_log import LAST_LINES, NO_RANK, last_lines, lines_of, read_end, unnamed
from trainer import contract
from trainer.contract import Exit, FailureReport

MODEL = re.compile(r"\bMODEL\b")
CAUSES = ("cause", "layer")  # kinds of a known failure that belong to the process which printed the line
MISMATCH = "collective-mismatch"  # the known failure of ranks that are in different collectives
ENDED_BY_TORCHRUN = (-15, -9)  # exit codes of the ranks that torchrun ends because another one has ended


def find_failure(plan: Plan, nodes: tuple[NodeResult, ...]) -> Failure | None:
    """The failure that came first. In this order: the rank that a hung step waits for; the first rank whose report is not a mere consequence
    of the end of another rank; the first node whose log holds a cause; the first node with a rank that died without a report; the first
    failure of all. Where a node was lost, an error that is not a known one, except one of usage, is taken for a consequence of that."""
    folder = Path(plan.folder)
    written = (read_if_there(FailureReport, path) for path in sorted(folder.glob(contract.FAILURE_FILES.format(rank="*"))))
    reports = sorted(
        (report for report in written if report is not None), key=lambda report: report.unix_s
    )  # none of a rank that was killed
    failed = sorted((node for node in nodes if node.code), key=lambda node: node.seconds)
    reported = [failure_of_report(plan, report) for report in reports]
    lost = any(node.lost for node in failed)
    if not lost and any(report.code == Exit.HUNG for report in reports) and (hung := failure_of_hang(plan, reports)):
        return hung
    for failure, kind in reported:
        if kind in CAUSES or (kind != "consequence" and (failure.code == Exit.USAGE or not lost)):
            return failure
    silent = frozenset(range(plan.spec.device.world_size)) - {report.rank for report in reports}
    ended = [failure_of_node(plan, node, silent) for node in failed]
    caused = (failure for failure, kind in ended if kind in CAUSES)
    died = (failure for failure, kind in ended if kind != "consequence" and failure.rank in silent)  # in whose lines no cause is known
    first = next((failure for failure, _ in (*reported, *ended)), None)
    return next(caused, None) or next(died, None) or failure_of_timeout(plan, first, lost=lost)


def failure_of_timeout(plan: Plan, first: Failure | None, *, lost: bool) -> Failure | None:
    """`first`, or where the ranks' collectives timed out the rank that did not arrive."""
    verdict = judge_timeouts(read_logs(plan), plan.spec.device.world_size) if first is not None and not lost else None
    return failure_of_verdict(plan, verdict, first) if first is not None and verdict is not None else first


def failure_of_hang(plan: Plan, reports: list[FailureReport]) -> Failure | None:
    """Of a step that did not end, by the stacks of all ranks; None if they are not in the logs."""
    verdict = judge_hang(read_logs(plan), plan.spec.device.world_size)
    first = next(report for report in reports if report.code == Exit.HUNG)
    return failure_of_verdict(plan, verdict, failure_of_report(plan, first)[0]) if verdict is not None else None


def read_logs(plan: Plan) -> list[str]:
    return [read_end(Path(plan.folder) / "logs" / f"node{command.node_rank}.log") for command in plan.commands]


def failure_of_verdict(plan: Plan, verdict: HangVerdict, noticed: Failure) -> Failure:
    """`noticed`: the failure of a rank that waited."""
    failure = replace(noticed, rank=verdict.rank, message=f"{verdict.message}. {noticed.message}", tail=())
    if verdict.rank >= 0:
        node = verdict.rank // plan.spec.device.devices_per_node
        failure = replace(failure, host=plan.commands[node].host, log=str(Path(plan.folder) / "logs" / f"node{node}.log"))
    if not verdict.mismatch:
        return replace(failure, meaning="", fix="")
    known = find_known(MISMATCH)
    return replace(failure, meaning=known.means, fix=known.fix)


def failure_of_report(plan: Plan, report: FailureReport) -> tuple[Failure, Kind | None]:
    """A rank's report as a failure, and its kind. If the report names only a layer of the software, the node's log is searched for a cause."""
    rank = report.rank // plan.spec.device.devices_per_node
    log = Path(plan.folder) / "logs" / f"node{rank}.log"
    diagnosis = explain_log(f"{report.message}\n{report.traceback}")
    if diagnosis and diagnosis.kind in ("layer", "wrapper"):
        text = read_end(log)
        diagnosis = cause_in("\n".join(lines_of(text, report.rank))) or cause_in(unnamed(text)) or diagnosis
    tail = tuple(report.traceback.splitlines()[-10:]) if report.code == Exit.BUG else ()  # an expected error needs no traceback
    failure = Failure(host=plan.commands[rank].host, rank=report.rank, code=report.code, message=report.message, log=str(log), tail=tail)
    return with_diagnosis(plan, failure, diagnosis)


def failure_of_node(plan: Plan, node: NodeResult, silent: frozenset[int]) -> tuple[Failure, Kind | None]:
    """A node as a failure, by its exit code and its log, and its kind. `silent`: the ranks that left no report; of those that torchrun saw end,
    the first one that it did not end itself has failed."""
    log = Path(plan.folder) / "logs" / f"node{node.node_rank}.log"
    text = read_end(log)
    message, own, rank = f"the ranks ended with exit code {node.code} and left no report", tuple[str, ...](), -1
    if node.lost:
        text = message = f"the node stopped responding (cluster.node_timeout_s={plan.config.cluster.node_timeout_s})"
    elif root := dead_rank(failed_ranks(unnamed(text)), silent):
        rank = root[0]
        message = f"rank {rank} ended with exit code {root[1]} and left no report"
        own = lines_of(text, rank)
    # The exit code of processes that the launcher killed says nothing about the cause.
    code = 0 if node.killed else node.code
    diagnosis = cause_in("\n".join(own)) or explain_log(unnamed(text), code)
    if rank >= 0 and diagnosis and diagnosis.kind == "consequence":  # what another rank has printed
        diagnosis = explain_log("\n".join((*own, *lines_of(text, NO_RANK))), code)
    tail = own[-LAST_LINES:] or last_lines(log)
    return with_diagnosis(plan, Failure(host=node.host, rank=rank, code=node.code, message=message, log=str(log), tail=tail), diagnosis)


def dead_rank(ended: tuple[tuple[int, int], ...], silent: frozenset[int]) -> tuple[int, int] | None:
    """The first of `ended`, torchrun's root cause first, that left no report and was not ended by torchrun; else the root cause, if it left no
    report."""
    own = (each for number, each in enumerate(ended) if each[0] in silent and (each[1] not in ENDED_BY_TORCHRUN or not number))
    return next(own, None)


def cause_in(text: str) -> Diagnosis | None:
    found = explain_log(text)
    return found if found and found.kind == "cause" else None


def with_diagnosis(plan: Plan, failure: Failure, diagnosis: Diagnosis | None) -> tuple[Failure, Kind | None]:
    """The failure with its meaning, and with the line that shows it if its last lines do not; and the kind of the diagnosis. A fix that names
    MODEL gets that of the plan."""
    if diagnosis is None:
        return failure, None
    seen = any(diagnosis.line in line for line in (*failure.tail, failure.message))
    tail = failure.tail if seen else (diagnosis.line, "...", *failure.tail)
    fix = MODEL.sub(lambda _: plan.config.model.name, diagnosis.fix)
    explained = replace(failure, tail=tail, meaning=diagnosis.means, fix=fix)
    if diagnosis.name == MISMATCH and failure.rank >= 0:  # that rank has only noticed it
        explained = replace(
            explained, rank=-1, message=f"the ranks were in different collectives, which rank {failure.rank} noticed: {failure.message}"
        )
    return explained, diagnosis.kind
