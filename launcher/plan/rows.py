"""The rows to train on, counted on this machine, and the steps that run.epochs stands for.

A row is counted as trainer.data.rows reads it (launcher.plan.row_count), each conversation of a list in it, and the files of an InternVL meta file
as often as it says.
"""

import shlex
from collections.abc import Set
from dataclasses import replace
from pathlib import Path

from launcher.check.problem import Problem
from launcher.config.defaults import EPOCHS, count_steps, keys_of, with_short_warmup
from launcher.config.schema import Config
from launcher.errors import ConfigRefused, suggest
from launcher.plan.row_count import count_rows
from trainer.contract.row_file import BY_SUFFIX, COMPRESSED, suffix_of

BUILTIN_ROWS = 1500  # that train, of each of the built-in sets (trainer.data.digits.TRAIN_ROWS)
QUICK_BYTES = 64 * 2**20  # counted in a second, also where no epochs are asked for
MOST_EPOCHS = 10**6


def settle_rows(config: Config, typed: Set[str], here: Path) -> Config:
    """The config with the rows that were counted and, with run.epochs, the steps. `here`: the folder that relative paths start in. Raises
    ConfigRefused for epochs of rows that cannot be counted, and for another number than data.rows."""
    if config.stage.kind != "train":
        return config
    if not config.data.builtin and config.data.train:
        config = replace(config, data=replace(config.data, rows=find_rows(config, here)))
    return with_short_warmup(with_steps(config, here), typed)


def find_missing(config: Config, here: Path) -> tuple[Problem, ...]:
    """The files of the data that a run on this machine would not find. A plan may be made before they are there."""
    data = config.data
    if data.builtin or not config.cluster.is_local or config.stage.kind not in ("train", "evaluate", "quantize"):
        return ()
    named = {"data.train": data.train if config.stage.kind != "evaluate" else "", "data.evaluation": data.evaluation}
    files = {key: here / name for key, name in named.items() if name}
    return tuple(
        Problem(key=key, what=f"there is no file {named[key]}; {suggest_file(file)}{ask_for_place(config, key)}", launch_only=True)
        for key, file in files.items()
        if not file.is_file()
    )


def ask_for_place(config: Config, key: str) -> str:
    """What to type, for a file that the record of a checkpoint names."""
    recorded = config.stage.recorded
    if recorded is None or key not in keys_of(recorded.taken):
        return ""
    return f". It is from the record of run {recorded.run_id}: type data={config.data.name} {key}=FILE with its place now, or other data"


def with_steps(config: Config, here: Path) -> Config:
    """run.steps from run.epochs. A number out of range is left to the rules, which report it."""
    epochs, rows, batch = config.run.epochs, rows_of(config), config.stage.global_batch
    if epochs is None or not 0 < epochs <= MOST_EPOCHS or batch < 1:
        return config
    if not rows:
        raise ConfigRefused("\n".join(map(str, find_missing(config, here))) or ask_for_rows(config))
    return replace(config, run=replace(config.run, steps=count_steps(epochs, rows, batch)))


def rows_of(config: Config) -> int:
    """Rows of an epoch; 0 where they are not known."""
    return BUILTIN_ROWS if config.data.builtin else config.data.rows


def ask_for_rows(config: Config) -> str:
    where = ", ".join(node.host for node in config.cluster.working) if not config.cluster.is_local else "this machine"
    return (
        f"{EPOCHS}={config.run.epochs:g} needs the number of rows of data.train={config.data.train}, and the file cannot be counted here; the "
        f"nodes of the run: {where}\n  Next: add data.rows=NUMBER ({count_with(config.data.train)} on the node; a launch refuses another number), or "
        "give run.steps instead"
    )


def count_with(file: str) -> str:
    """The command that counts the rows of a file, by its name."""
    quoted = shlex.quote(file)
    if suffix_of(Path(file)) in BY_SUFFIX or Path(file).suffix in COMPRESSED:
        return f"omnilaunch data check data=files data.train={quoted}"
    lines, items = f"wc -l {quoted}", f"jq length {quoted}"
    return lines if file.endswith(".jsonl") else f"{items}, or for JSON Lines {lines}"


def find_rows(config: Config, here: Path) -> int:
    """The number of rows; that of data.rows, or 0, where the file is not on this machine or takes long to read."""
    data, file = config.data, here / config.data.train
    if not file.is_file() or (config.run.epochs is None and file.stat().st_size > QUICK_BYTES):
        return data.rows
    counted = count_rows(file)
    if data.rows and counted and counted != data.rows and config.cluster.is_local:
        raise ConfigRefused(f"data.rows={data.rows}: {data.train} has {counted:,} rows. Leave data.rows out: they are counted")
    return data.rows or counted


def is_named_as_rows(path: Path) -> bool:
    return suffix_of(path) in (*BY_SUFFIX, ".json", ".jsonl")


def suggest_file(file: Path) -> str:
    if file.is_dir():
        return "that is a folder: name the JSON file in it"
    names = sorted(path.name for path in file.parent.iterdir() if is_named_as_rows(path)) if file.parent.is_dir() else []
    if not names:
        return f"no file of rows is in {file.parent}" if file.parent.is_dir() else f"there is no folder {file.parent} either"
    return suggest(file.name, names)
