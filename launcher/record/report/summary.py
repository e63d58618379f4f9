"""The figures, the environment and the settings of a run as text, for the page and the Markdown."""

import json
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from launcher.config.schema import AXES
from launcher.plan.text import duration, figure, size
from launcher.record.comparable import collect_comparables, text_of
from launcher.record.metrics import describe_speed
from launcher.record.reader import nested
from launcher.record.run_files import RunFiles, as_list

MAX_EVALUATIONS = 100
TONES = {"finished": "good", "failed": "bad", "refused": "bad", "stopped": "warn"}


def status_of(run: RunFiles) -> str:
    return str(run.record.get("status") or "no record yet")


def describe_axes(run: RunFiles) -> str:
    config = run.plan.get("config")
    return " ".join(f"{axis}={nested(config, axis, 'name')}" for axis in AXES)


def list_figures(run: RunFiles) -> tuple[tuple[str, str], ...]:
    """(name, value with its unit) of the most important figures that the run has."""
    record, speed = run.record, run.curve.speed
    found: dict[str, str] = {"status": status_of(run), "steps": f"{len(run.curve.step)} of {planned_steps(run)}"}
    if record.get("ended"):
        found["ended"] = str(record["ended"])
    if record:
        found["started"] = str(record.get("started_at", ""))[:19].replace("T", " ")
        found["duration"] = duration(seconds) if isinstance(seconds := record.get("seconds"), (int, float)) else as_text(seconds)
    if run.curve.loss:
        found["last loss"] = as_text(run.curve.loss[-1])
    if speed:
        found |= {"throughput": describe_speed(run.curve), "peak memory": size(speed.peak_bytes)}
    scores = record.get("evaluation")
    for name, value in scores.items() if isinstance(scores, dict) else ():
        found["held-out loss" if name == "loss" else name.replace("_", " ")] = as_text(value)
    if len(run.attempts):
        resumed = f", {len(run.resumptions)} of them by --resume" if run.resumptions else ""
        found["attempts"] = f"{len(run.attempts) + 1}{resumed}"
    return tuple(found.items())


def planned_steps(run: RunFiles) -> Any:
    """Of the newest attempt: a run that is resumed may get other ones."""
    changes = (change for resumption in reversed(run.resumptions) for change in as_list(resumption.get("changes")))
    steps = (change.get("new") for change in changes if isinstance(change, dict) and change.get("key") == "run.steps")
    return next(steps, nested(run.plan, "spec", "steps"))


def list_environment(run: RunFiles) -> tuple[tuple[str, str], ...]:
    """(name, value) of the hardware, software, code and data that the run used."""
    environment, source, record = run.environment, run.source, run.record
    packages = environment.get("packages") if isinstance(environment.get("packages"), dict) else {}
    rows = {
        "config": describe_axes(run),
        "commit": describe_commit(source),
        "image": record.get("image") or f"none: {nested(run.plan, 'config', 'cluster', 'runtime')}",
        "image fingerprint": nested(run.plan, "image", "fingerprint"),
        "data": run.data.get("sha256"),
        "initial weights": nested(record, "origin", "path") or "random",
        "final weights": record.get("weights_sha256"),
        "platform": environment.get("platform"),
        "python": environment.get("python"),
        "torch": packages.get("torch") if packages else None,
        "devices": "\n".join(map(str, environment.get("devices") or ())),
        "driver": environment.get("driver"),
        "ranks": environment.get("world_size"),
        "threads": environment.get("threads"),
        "seed": nested(run.plan, "spec", "seed"),
        "forced": record.get("forced"),
    }
    return tuple((name, text_of(value)) for name, value in rows.items() if value not in (None, "", []))


def describe_commit(source: Mapping[str, Any]) -> str:
    """The commit, and what of it was changed: earlier versions called a tree dirty for files that no run uses, too."""
    diff, conf = source.get("diff_sha256") or source.get("diff_lacks"), source.get("conf")
    known = source.get("record_schema", 1) != 1
    changed = ["with changes of the code"] if diff or (source.get("dirty") and not known) else []
    changed += [f"with changes of {', '.join(map(str, conf))}"] if isinstance(conf, (list, tuple)) and conf else []
    return ", ".join((str(source.get("commit") or "none"), *changed))


def list_details(run: RunFiles) -> tuple[tuple[str, tuple[tuple[str, str], ...]], ...]:
    """(title, rows) of all values that a comparison looks at."""
    parts: dict[str, list[tuple[str, str]]] = {}
    for key, value in collect_comparables(run).items():
        title = next((title for prefix, title in DETAILS.items() if key.startswith(prefix)), "other values")
        parts.setdefault(title, []).append((key, text_of(value)))
    return tuple((title, tuple(rows)) for title, rows in parts.items())


DETAILS = {
    "environment.packages.": "packages",
    "environment.environment.": "environment variables of the ranks",
    "variables.": "environment variables that were set",
    "config.": "config",
    "image.files.": "files of the image",
}


def list_commands(run: RunFiles) -> Iterator[tuple[str, str, str]]:
    """(node rank, host, environment variables and command lines) of each node of the first attempt."""
    for command in run.plan.get("commands") or ():
        if not isinstance(command, dict):
            continue
        variables = command.get("environment") if isinstance(command.get("environment"), dict) else {}
        lines = [f"{key}={shlex.quote(str(value))}" for key, value in (variables or {}).items()]
        for name in ("prepare", "start", "stop"):
            argv = command.get(name)
            if isinstance(argv, (list, tuple)) and argv:
                lines.append(f"{name}: {shlex.join(map(str, argv))}")
        yield str(command.get("node_rank")), str(command.get("host")), "\n".join(lines)


def launch_line(run: RunFiles) -> str:
    overrides = run.plan.get("overrides")
    words = map(str, overrides) if isinstance(overrides, (list, tuple)) else ()
    conf = run.plan.get("conf")
    return shlex.join(("omnilaunch", "launch", *words, *(("--conf", str(conf)) if conf else ())))


def list_evaluations(run: RunFiles) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]] | None:
    """(names, rows) of the newest rows of evaluations.jsonl; None if there are none."""
    rows = run.evaluations[-MAX_EVALUATIONS:]
    names = tuple(dict.fromkeys(name for row in rows for name, value in row.items() if value is not None))
    return (names, tuple(tuple(as_text(row.get(name)) for name in names) for row in rows)) if rows else None


def as_text(value: Any) -> str:
    """A number rounded for reading, anything else as it is."""
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return figure(value)


def side_by_side(figures: list[Mapping[str, str]]) -> list[tuple[str, list[str]]]:
    """(name, the value of each run) of every figure that any run has."""
    names = dict.fromkeys(name for one in figures for name in one)
    return [(name, [one.get(name, "") for one in figures]) for name in names]
