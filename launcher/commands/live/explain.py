"""`omnilaunch explain FILE|-`: which known failure a log shows, what it means, and what to do. Nothing in the log is executed."""

import argparse
import json
import stat
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.errors import ConfigRefused
from trainer.contract import Exit

if TYPE_CHECKING:
    from launcher.run.failures.explanation import Explanation, KnownFailure
    from launcher.run.failures.log_text import LogText

STDIN = "-"
PAGE = "docs/errors.md"
MOST_NAMED = 8  # further failures of a log, logs of a folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE|-", help="the output of any program, also not of omnilaunch; - reads what is piped in")
    parser.add_argument("--json", action="store_true", help="print what was found as JSON")
    parser.epilog = f"exit codes: 0 a known failure is in it, 7 none is, 2 not readable as text\n\n{parser.epilog}"


def run(arguments: argparse.Namespace) -> int:
    from launcher.run.failures.explanation import explain

    log = read(arguments.file)
    explained = explain(log)
    arguments.say(as_json(arguments.file, log, explained) if arguments.json else describe(arguments.file, log, explained))
    return Exit.OK if explained.found else Exit.DIFFERENT


def read(name: str) -> "LogText":
    """Raises ConfigRefused where there is no such file, or no text in it."""
    from launcher.run.failures.log_text import PIPE_BYTES, read_log

    if name == STDIN:
        if sys.stdin is None:  # closed by who started this
            raise ConfigRefused("there is no input. PROGRAM 2>&1 | omnilaunch explain -")
        return read_log(sys.stdin.buffer, "the input", most=PIPE_BYTES)
    path = Path(name)
    if path.is_dir():
        raise ConfigRefused(f"{path} is a folder; explain reads one file{name_logs(path)}")
    try:
        with path.open("rb") as file:
            regular = stat.S_ISREG(path.stat().st_mode)
            return read_log(file, name, most=0 if regular else PIPE_BYTES)
    except FileNotFoundError:
        other = "A run has its logs in runs/RUN/logs. To explain what a program prints: PROGRAM 2>&1 | omnilaunch explain -"
        raise ConfigRefused(f"there is no file {name}{name_logs(Path('runs') / name)}. {other}") from None
    except OSError as error:
        raise ConfigRefused(f"{name} cannot be read: {error.strerror}") from error


def name_logs(folder: Path) -> str:
    """The commands for the logs of a run's folder; '' where it is none."""
    logs = sorted((folder / "logs").glob("node*.log"))[:MOST_NAMED]
    return "".join((": " if number == 0 else ", ") + f"omnilaunch explain {log}" for number, log in enumerate(logs))


def describe(name: str, log: "LogText", explained: "Explanation") -> str:
    lines = [describe_reading(name, log)]
    if not explained.found:
        lines += [f"none of {explained.compared} known failures ({PAGE}) is in it"]
        lines += ["the lines that look most like errors:" if explained.likely else "no line looks like an error"]
        return "\n".join((*lines, *(f"  line {each.number}: {each.line}" for each in explained.likely)))
    for each in explained.explained:
        lines += ["", f"{describe_place(each)}: {each.line}"]
        lines += [
            f"  known as: {each.symptom.name}",
            f"  meaning: {each.symptom.means}",
            f"  do: {each.symptom.fix}",
            f"  source: {each.symptom.source}",
        ]
    if explained.explained[0].symptom.kind == "consequence":
        lines += ["", "the cause is not in this log: explain the logs of the other ranks and nodes too"]
    if others := explained.others:
        lines += ["", "also in this log, and often because of it:"]
        lines += [f"  {describe_place(each)}: {each.symptom.name}" for each in others[:MOST_NAMED]]
        lines += [f"  and {len(others) - MOST_NAMED} more"] if len(others) > MOST_NAMED else []
    return "\n".join(lines)


def describe_reading(name: str, log: "LogText") -> str:
    text = f"{'the input' if name == STDIN else name}: {log.lines:,} {'line' if log.lines == 1 else 'lines'}, {log.size:,} bytes"
    if log.skipped:
        text += f"; the {log.skipped:,} in the middle were not searched"
    return text if log.ended else f"{text}; reading stopped there, since it did not end"


def describe_place(finding: "KnownFailure") -> str:
    named = [f"rank {finding.rank}" if finding.rank >= 0 else "", finding.time]
    return f"line {finding.number}" + (f" ({', '.join(filter(None, named))})" if any(named) else "")


def as_json(name: str, log: "LogText", explained: "Explanation") -> str:
    found = [
        {
            "name": each.symptom.name, "kind": each.symptom.kind, "number": each.number, "rank": each.rank if each.rank >= 0 else None,
            "time": each.time or None, "line": each.line, "meaning": each.symptom.means, "do": each.symptom.fix, "source": each.symptom.source,
        }
        for each in explained.found
    ]  # fmt: skip
    likely = [{"number": each.number, "line": each.line} for each in explained.likely]
    whole = {"file": name, "lines": log.lines, "bytes": log.size, "not_searched_bytes": log.skipped, "ended": log.ended}
    return json.dumps({**whole, "compared": explained.compared, "found": found, "look_like_errors": likely}, ensure_ascii=False, indent=2)
