"""Which failure came first, among the reports of the ranks and the logs of the nodes, and what it means."""

import re
from dataclasses import replace
from pathlib import Path

from launcher.plan.plan import Plan
from launcher.record.reader import read_if_there
from launcher.record.record import Failure, NodeResult
from launcher.run.diagnosis import Diagnosis, explain_log, root_rank
from launcher.run.failures.symptom import Kind
from launcher.run.node_log import LAST_LINES, last_lines, lines_of, read_end, unnamed
from trainer import contract
from trainer.contract import Exit, FailureReport

MODEL = re.compile(r"\bMODEL\b")
CAUSES = ("cause", "layer")  # kinds of a known failure that belong to the process which printed the line


def find_failure(plan: Plan, nodes: tuple[NodeResult, ...]) -> Failure | None:
    """The failure that came first. In this order: the first rank whose report is not a mere consequence of the end of another rank; the first
    node whose log holds a cause; the first failure of all. Where a node was lost, an error that is not a known one, except one of usage, is
    taken for a consequence of that."""
    folder = Path(plan.folder)
    written = (read_if_there(FailureReport, path) for path in sorted(folder.glob(contract.FAILURE_FILES.format(rank="*"))))
    reports = sorted(
        (report for report in written if report is not None), key=lambda report: report.unix_s
    )  # none of a rank that was killed
    failed = sorted((node for node in nodes if node.code), key=lambda node: node.seconds)
    reported = [failure_of_report(plan, report) for report in reports]
    lost = any(node.lost for node in failed)
    for failure, kind in reported:
        if kind in CAUSES or (kind != "consequence" and (failure.code == Exit.USAGE or not lost)):
            return failure
    ended = [failure_of_node(plan, node) for node in failed]
    caused = (failure for failure, kind in ended if kind in CAUSES)
    return next(caused, None) or next((failure for failure, _ in (*reported, *ended)), None)


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


def failure_of_node(plan: Plan, node: NodeResult) -> tuple[Failure, Kind | None]:
    """A node without a report as a failure, by its exit code and its log, and its kind."""
    log = Path(plan.folder) / "logs" / f"node{node.node_rank}.log"
    text = read_end(log)
    message, own = f"the ranks ended with exit code {node.code} and left no report", tuple[str, ...]()
    if node.lost:
        text = message = f"the node stopped responding (cluster.node_timeout_s={plan.config.cluster.node_timeout_s})"
    elif root := root_rank(unnamed(text)):
        message = f"rank {root[0]} ended with exit code {root[1]} and left no report"
        own = lines_of(text, root[0])
    # The exit code of processes that the launcher killed says nothing about the cause.
    diagnosis = cause_in("\n".join(own)) or explain_log(unnamed(text), 0 if node.killed else node.code)
    tail = own[-LAST_LINES:] or last_lines(log)
    return with_diagnosis(plan, Failure(host=node.host, rank=-1, code=node.code, message=message, log=str(log), tail=tail), diagnosis)


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
    return replace(failure, tail=tail, meaning=diagnosis.means, fix=fix), diagnosis.kind
