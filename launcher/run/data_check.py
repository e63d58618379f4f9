"""What the data check of a node reports: problems in the data, which refuse the run, or a failure of the check itself."""

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path, PurePosixPath

from launcher.errors import ConfigRefused, NodeFailed
from launcher.record.metrics import read_rows
from launcher.record.reader import read_if_there
from launcher.record.record import RECORDED_INPUTS_FILE, Failure
from launcher.run.gang import node_log_path
from launcher.run.node_log import last_lines
from launcher.run.node_process import NodeProcess
from launcher.run.run_folder import WorkingNode, fetch_large
from launcher.run.session import Session
from trainer.contract import (
    DATA_FILE,
    DATA_LEFT_OUT_FILE,
    DATA_PROBLEMS_FILE,
    INPUTS_FILE,
    METRICS_FILE,
    DataProblem,
    DataReport,
    Inputs,
    SpecError,
    blame,
    decode,
    describe_groups,
    describe_left_out,
    suggest_skip,
)
from trainer.contract.listing import describe_changes, list_some
from trainer.contract.wording import plural

SHOWN_CAUSES = 20
SHOWN_ROWS = 20


def refuse_data(folder: Path, check: NodeProcess) -> None:
    """Raise the problems that a check found as ConfigRefused: the first ones, and where all of them are."""
    report: DataReport | None = read_if_there(DataReport, folder / DATA_FILE)
    if report is None or not report.problems:
        log = node_log_path(folder / "logs", check.command, "data")
        output, changed = "\n".join(last_lines(log)), "".join(f"\n  data {line}" for line in changed_files(folder))
        raise ConfigRefused(
            f"the data check on {check.command.host} refused the data, and the ranks were stopped:\n{output}{changed}\n  log: {log}\n"
            f"  record: {folder}"
        )
    here, there = folder / DATA_PROBLEMS_FILE, PurePosixPath(check.command.folder) / DATA_PROBLEMS_FILE
    problems, count = read_problems(here) or report.problems, max(report.problem_count, len(report.problems))
    lines = [f"  {text}" for text in describe_groups(problems, SHOWN_CAUSES)]
    if len(problems) == count and (way := suggest_skip(problems, report.train_rows + report.evaluation_rows)):
        lines.append(f"  {way}")
    lines += describe_uses(report, folder)
    lines += [f"  all problems, one JSON object per line: {here if here.is_file() else f'{check.command.host}:{there}'}"]
    where = f" on {check.command.host}" if check.command.runtime == "docker" else ""
    raise ConfigRefused("\n".join((f"the {blame(problems)}{where} has {plural(count, 'problem')}, and the ranks were stopped:", *lines)))


def say_left_out(folder: Path, say: Callable[[str], None]) -> bool:
    """Say how many rows the run does not use, or not as they are written. Whether the check has written its report."""
    report: DataReport | None = read_if_there(DataReport, folder / DATA_FILE)
    if report is not None and report.left_out:
        say(f"data: {describe_left_out(report.left_out)}; {folder / DATA_LEFT_OUT_FILE} lists them")
    return report is not None


def describe_uses(report: DataReport, folder: Path) -> list[str]:
    """Which rows with a problem the ranks had trained on before the check found it: none where they waited for it."""
    done = max((row.step for row in read_rows(folder / METRICS_FILE)), default=0)
    used = [use for use in report.uses if use.step <= done]
    if not used:
        return []
    rows: dict[str, list[str]] = {}
    for use in used:
        rows.setdefault(use.file, []).append(str(use.row))
    named = "; ".join(f"{file} rows {list_some(found, SHOWN_ROWS)}" for file, found in rows.items())
    may = "may have trained" if any(use.earliest for use in used) else "trained"
    return [f"  the ranks had taken {plural(done, 'step')} before that, and {may} on {len(used):,} of these rows: {named}"]


def read_problems(file: Path) -> tuple[DataProblem, ...]:
    """All problems; () where the file could not be copied to this machine, or is damaged."""
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
        return tuple(decode(DataProblem, json.loads(line)) for line in lines if line)
    except (OSError, ValueError, SpecError):
        return ()


def changed_files(folder: Path) -> tuple[str, ...]:
    """In a rerun, the data files that differ from those of the recorded run; () when either list cannot be read."""
    recorded, now = (read_if_there(Inputs, folder / name) for name in (RECORDED_INPUTS_FILE, INPUTS_FILE))
    if recorded is None or now is None:
        return ()
    return describe_changes(recorded.data, now.data)


def fetch_problems(folder: Path, session: Session, check: NodeProcess) -> None:
    """Copy the report and the list of all problems from the node of the check. What cannot be copied stays there, and the refusal says where."""
    node = WorkingNode(command=check.command, transport=session.transports[check.command.node_rank])
    if folder == Path(check.command.folder):
        return
    for name in (DATA_FILE, INPUTS_FILE, DATA_PROBLEMS_FILE):
        with suppress(NodeFailed):
            fetch_large(node, name, folder / name)


def check_failure(folder: Path, check: NodeProcess) -> Failure:
    """A check that ended without a report, as the failure of an attempt."""
    log, code = node_log_path(folder / "logs", check.command, "data"), check.poll() or 0
    message = f"the data check ended with exit code {code} and without a report"
    if check.lost:
        message = "the node stopped responding while its data was checked"
    return Failure(host=check.command.host, rank=-1, code=code, message=message, log=str(log), tail=last_lines(log))
