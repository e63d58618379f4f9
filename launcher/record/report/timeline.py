"""When each node of a run was at work, attempt by attempt, and what ended it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from launcher.record.run_files import RunFiles

MOST_ROWS = 200


@dataclass(frozen=True, kw_only=True)
class Bar:
    """`begin_s` from the start of the run. `end`: ended, failed, killed or lost; `told`: what there is to say of it."""

    attempt: int
    begin_s: float
    seconds: float
    end: str
    told: str


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """Bars by host, in the order of the node ranks. `failures`: of each attempt, as text."""

    total_s: float
    rows: tuple[tuple[str, tuple[Bar, ...]], ...]
    failures: tuple[str, ...]


def lay_out(run: RunFiles) -> Timeline:
    """Nothing of a run that has left no record yet. What a record has in the wrong type counts as nothing."""
    record = run.record
    begun, total_s = instant(record.get("started_at")), seconds_of(record)
    attempts = sorted(run.attempts, key=lambda attempt: instant(attempt.get("started_at")) or 0.0)
    rows: dict[str, list[Bar]] = {}
    for number, attempt in enumerate(attempts, start=1):
        begin_s = max(0.0, (instant(attempt.get("started_at")) or 0.0) - (begun or 0.0))
        for host, bar in bars_of(attempt, number, begin_s):
            rows.setdefault(host, []).append(bar)
    # The last attempt has no start of its own in the record: it ended with the run.
    last = max((seconds_of(node) for node in nodes_of(record)), default=0.0)
    for host, bar in bars_of(record, len(attempts) + 1, max(0.0, total_s - last)):
        rows.setdefault(host, []).append(bar)
    total_s = max((bar.begin_s + bar.seconds for bars in rows.values() for bar in bars), default=0.0) if rows else 0.0
    failures = [describe_failure(number, attempt) for number, attempt in enumerate((*attempts, record), start=1)]
    listed = tuple((host, tuple(bars)) for host, bars in rows.items())[:MOST_ROWS]
    return Timeline(total_s=max(total_s, seconds_of(record)), rows=listed, failures=tuple(text for text in failures if text))


def bars_of(attempt: Mapping[str, Any], number: int, begin_s: float) -> Iterator[tuple[str, Bar]]:
    failed = failure_of(attempt)
    for node in nodes_of(attempt):
        host, code = str(node.get("host")), node.get("code")
        end = "lost" if node.get("lost") else "killed" if node.get("killed") else "failed" if code else "ended"
        first = ", failed first" if failed.get("host") == node.get("host") else ""
        told = f"attempt {number}, {end} with code {code} after {seconds_of(node):,.1f} s{first}"
        yield host, Bar(attempt=number, begin_s=begin_s, seconds=seconds_of(node), end="failed" if first else end, told=told)


def describe_failure(number: int, attempt: Mapping[str, Any]) -> str:
    failed = failure_of(attempt)
    if not failed:
        return ""
    rank = failed.get("rank")
    who = f"rank {rank} on {failed.get('host')}" if isinstance(rank, int) and rank >= 0 else str(failed.get("host"))
    parts = [f"attempt {number}: {who} failed first: {failed.get('message')}"]
    parts += [f"{word}: {failed[key]}" for word, key in (("meaning", "meaning"), ("do", "fix")) if failed.get(key)]
    tail = failed.get("tail")
    return "\n".join((*parts, *(map(str, tail) if isinstance(tail, (list, tuple)) else ())))


def failure_of(attempt: Mapping[str, Any]) -> Mapping[str, Any]:
    failed = attempt.get("failure")
    return failed if isinstance(failed, dict) else {}


def nodes_of(attempt: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    nodes = attempt.get("nodes")
    return [node for node in nodes if isinstance(node, dict)] if isinstance(nodes, (list, tuple)) else []


def seconds_of(data: Mapping[str, Any]) -> float:
    value = data.get("seconds")
    return float(value) if isinstance(value, (int, float)) and 0 <= value < 1e10 else 0.0


def instant(text: Any) -> float | None:
    """Seconds since 1970 of an ISO 8601 time."""
    try:
        return datetime.fromisoformat(text).timestamp()
    except (TypeError, ValueError, OverflowError):
        return None
