"""Files and folders that a plan names: the questions that a run on this machine would not find, and what only the nodes can have."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from launcher.check.problem import Problem
from launcher.plan.data.rows import suggest_file
from launcher.plan.plan import Plan
from trainer.contract.row_sets.row_files import is_glob
from trainer.contract.row_sets.row_set import as_entries, read_samples_mark


def find_missing_questions(plan: Plan) -> tuple[Problem, ...]:
    """What a run of stage=infer on this machine would end for, after its model is loaded."""
    asked = plan.spec.stage.inference
    if asked is None or not plan.is_local:
        return ()
    files = {f"stage.inference.{name}": Path(path) for name in ("image", "input") if (path := getattr(asked, name))}
    return tuple(Problem(key=key, what=what, launch_only=True) for key, file in files.items() if (what := describe_missing(key, file)))


def describe_missing(key: str, file: Path) -> str:
    """'' for a file that has something in it, or that only another user may read."""
    try:
        if file.is_file():
            return "" if file.stat().st_size else f"{file} is empty"
        if file.is_dir():
            return f"{file} is a folder: name one image" if key.endswith("image") else f"{file} is a folder: name the JSON Lines file in it"
        folder = "" if file.parent.is_dir() else f", and no folder {file.parent}"
        return f"there is no file {file}{folder}" + (f"; {suggest_file(file)}" if key.endswith("input") and not folder else "")
    except OSError:
        return ""


def with_unseen_note(plan: Plan) -> Plan:
    """The plan of a run on other machines, with a note of the paths that are not on this one: a launch fails where the nodes lack them."""
    names = [f"{key}={path}" for key, path in named_paths(plan) if not plan.is_local and not is_here(path)]
    if not names:
        return plan
    note = (
        f"not on this machine, so that the plan did not look into it: {', '.join(names)}. The nodes must have it at this path: "
        "omnilaunch doctor asks them"
    )
    return replace(plan, verdict=replace(plan.verdict, notes=(*plan.verdict.notes, note)))


def named_paths(plan: Plan) -> Iterator[tuple[str, str]]:
    """(key, absolute path) of what the user named; of stage.checkpoint launcher.check.start says it."""
    spec, config = plan.spec, plan.config
    if not spec.stage.checkpoint and spec.model.source.path:
        yield "model.source.path", spec.model.source.path
    if config.stage.kind in ("train", "evaluate", "quantize") and not spec.data.builtin:
        names = ("train", "evaluation") if config.stage.kind != "evaluate" else ("evaluation",)
        listed = ((name, read_samples_mark(entry.file)[0]) for name in names for entry in as_entries(getattr(spec.data, name)))
        yield from ((f"data.{name}", path) for name, path in listed if path.startswith("/") and not is_glob(path))
    if spec.stage.inference is not None:
        yield from ((f"stage.inference.{name}", path) for name in ("image", "input") if (path := getattr(spec.stage.inference, name)))


def is_here(path: str) -> bool:
    try:
        return Path(path).exists()
    except OSError:
        return False
