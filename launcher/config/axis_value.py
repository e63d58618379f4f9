"""One line for each value of an axis: the title of its file, or what the file holds."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launcher.config.compose import options
from launcher.config.conf_folder import ConfFolder
from launcher.config.official_name import read_files
from launcher.config.schema import AXES
from launcher.config.setting import load_meanings
from trainer.contract.wording import plural


def describe_values(conf: Path | ConfFolder) -> dict[str, dict[str, str]]:
    """Axis -> value -> one line."""
    found = options(conf)
    return {axis: describe_axis(axis, conf) for axis in (*AXES, *sorted(set(found) - set(AXES)))}


def describe_axis(axis: str, conf: Path | ConfFolder) -> dict[str, str]:
    files, written = dict(read_files(axis, conf)), load_meanings()["values"].get(axis, {})
    return {name: str(files[name].get("title") or written.get(name) or summarize(axis, files[name])) for name in sorted(files)}


def summarize(axis: str, data: Mapping[str, Any]) -> str:
    """A file without a title: a user's own, a benchmark, or a measured cell."""
    if "chain" in data:
        return f"a chain of runs: {', '.join(str(step.get('name')) for step in data['chain'])}"
    if axis == "experiment":
        run = data.get("run") or {}
        return f"a benchmark: {run.get('repeats')} runs of {run.get('steps')} steps"
    if axis == "tune":
        stage, run = data.get("stage") or {}, data.get("run") or {}
        rate = (stage.get("optimizer") or {}).get("lr")
        if not run:  # a rate alone, as the model's owners publish it
            return f"published: learning rate {rate:g}"
        return f"measured: {run.get('steps')} steps of {stage.get('global_batch')}, learning rate {rate}"
    if axis == "cluster":
        hosts = [str(node.get("host")) for node in data.get("nodes") or () if isinstance(node, dict)]
        return f"{plural(len(hosts), 'node')}, {data.get('runtime')}: {', '.join(hosts)}"
    if axis == "precision":
        return f"weights {data.get('weights')}, optimizer {data.get('optimizer')}"
    return f"rows of {data['train']}" if data.get("train") else f"{data.get('builtin') or data.get('name')}"
