"""When the processes of a run were running on each node, for each attempt, and what ended them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from launcher.record.run_files import RunFiles, as_list

MAX_ROWS = 200


@dataclass(frozen=True, kw_only=True)
class Bar:
    """`begin_s`: from the start of the run. `end`: ended, failed, killed or lost. `title`: the same as a sentence."""

    attempt: int
    begin_s: float
    seconds: float
    end: str
    title: str


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """`rows`: (host, its bars), in the order of the node ranks. `failures`: of each attempt that failed, as text. `resumptions`: what each of
    them changed, as text."""

    total_s: float
    rows: tuple[tuple[str, tuple[Bar, ...]], ...]
    failures: tuple[str, ...]
    resumptions: tuple[str, ...] = ()


def lay_out(run: RunFiles) -> Timeline:
    """Empty for a run without a record. A value of the wrong type in the record counts as 0."""
    record = run.record
    begun, total_s = instant(record.get("started_at")) or 0.0, seconds_of(record)
    attempts = sorted(run.attempts, key=lambda attempt: instant(attempt.get("started_at")) or 0.0)
    begins = [max(0.0, (instant(attempt.get("started_at")) or 0.0) - begun) for attempt in attempts]
    ended = instant(record.get("ended_at"))
    if run.resumptions and ended is not None:
        total_s = max(0.0, ended - begun)  # with the pauses
    # The record has no start of the last attempt, but that attempt ended with the run.
    begins.append(max(0.0, total_s - max((seconds_of(node) for node in nodes_of(record)), default=0.0)))
    rows: dict[str, list[Bar]] = {}
    for number, (attempt, begin_s) in enumerate(zip((*attempts, record), begins, strict=True), start=1):
        for host, bar in bars_of(attempt, number, begin_s):
            rows.setdefault(host, []).append(bar)
    last_s = max((bar.begin_s + bar.seconds for bars in rows.values() for bar in bars), default=0.0)
    failures = (describe_failure(number, attempt) for number, attempt in enumerate((*attempts, record), start=1))
    listed = tuple((host, tuple(bars)) for host, bars in rows.items())[:MAX_ROWS]
    return Timeline(
        total_s=max(last_s, total_s),
        rows=listed,
        failures=tuple(text for text in failures if text),
        resumptions=tuple(describe_resumption(resumption) for resumption in run.resumptions),
    )


def describe_resumption(resumption: Mapping[str, Any]) -> str:
    """One line for each thing that is not as before."""
    step, accepted = resumption.get("step"), [str(kind) for kind in as_list(resumption.get("accepted"))]
    start = f"after step {step}" if step else "from step 1"
    parts = [f"attempt {resumption.get('attempt')}: resumed {start}" + (f"; accepted: {', '.join(accepted)}" if accepted else "")]
    changes = (change for change in as_list(resumption.get("changes")) if isinstance(change, dict))
    parts += [f"{change.get('key')}: {change.get('old')} → {change.get('new')}" for change in changes]
    return "\n".join(parts)


def bars_of(attempt: Mapping[str, Any], number: int, begin_s: float) -> Iterator[tuple[str, Bar]]:
    failed = failure_of(attempt)
    for node in nodes_of(attempt):
        code, seconds = node.get("code"), seconds_of(node)
        end = "lost" if node.get("lost") else "killed" if node.get("killed") else "failed" if code else "ended"
        first = ", failed first" if failed.get("host") == node.get("host") else ""
        title = f"attempt {number}, {end} with code {code} after {seconds:,.1f} s{first}"
        yield str(node.get("host")), Bar(attempt=number, begin_s=begin_s, seconds=seconds, end="failed" if first else end, title=title)


def describe_failure(number: int, attempt: Mapping[str, Any]) -> str:
    failed = failure_of(attempt)
    if not failed:
        return ""
    rank, tail = failed.get("rank"), failed.get("tail")
    who = f"rank {rank} on {failed.get('host')}" if isinstance(rank, int) and rank >= 0 else str(failed.get("host"))
    parts = [f"attempt {number}: {who} failed first: {failed.get('message')}"]
    parts += [f"{title}: {failed[key]}" for title, key in (("meaning", "meaning"), ("what to do", "fix")) if failed.get(key)]
    return "\n".join((*parts, *(map(str, tail) if isinstance(tail, list) else ())))


def failure_of(attempt: Mapping[str, Any]) -> Mapping[str, Any]:
    failed = attempt.get("failure")
    return failed if isinstance(failed, dict) else {}


def nodes_of(attempt: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    nodes = attempt.get("nodes")
    return [node for node in nodes if isinstance(node, dict)] if isinstance(nodes, list) else []


def seconds_of(data: Mapping[str, Any]) -> float:
    value = data.get("seconds")
    return float(value) if isinstance(value, (int, float)) and 0 <= value < 1e10 else 0.0


def instant(text: Any) -> float | None:
    """An ISO 8601 time in seconds since 1970."""
    try:
        return datetime.fromisoformat(text).timestamp()
    except (TypeError, ValueError, OverflowError):
        return None
