"""The rows to train on, counted on this machine, and the steps that run.epochs stands for.

A row is counted as trainer.data.rows reads it, by the same trainer.contract.annotation_file: an item of a JSON list or a line of JSON Lines,
each conversation of a list in it, and the files of an InternVL meta file as often as it says. Whether the rows are valid is not looked at:
the data check refuses a run with others.
"""

import json
import shlex
from collections.abc import Iterator, Set
from dataclasses import replace
from pathlib import Path
from typing import Any

from launcher.check.problem import Problem
from launcher.config.defaults import EPOCHS, count_steps, keys_of, with_short_warmup
from launcher.config.schema import Config
from launcher.errors import ConfigRefused, suggest
from trainer.contract.annotation_file import count_repeated, first_letter, is_list, read_meta

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


def leaves_rows_out(config: Config) -> bool:
    """Whether a run may use fewer rows than its file has, as DataSpec.leaves_rows_out."""
    return config.data.bad_rows == "skip" or config.data.too_long != "refuse"


def asks_for_usable_rows(config: Config, typed: Set[str], here: Path) -> bool:
    """Whether run.epochs counts rows of which only the data check knows how many are used, and it can be asked on this machine."""
    data = config.data
    known = data.builtin or "data.rows" in typed or config.stage.kind != "train" or config.run.epochs is None
    return not known and leaves_rows_out(config) and config.cluster.is_local and bool(data.train) and (here / data.train).is_file()


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
    lines, items = f"wc -l {shlex.quote(file)}", f"jq length {shlex.quote(file)}"
    return lines if file.endswith(".jsonl") else f"{items}, or for JSON Lines {lines}"


def find_rows(config: Config, here: Path) -> int:
    """The number of rows; that of data.rows, or 0, where the file is not on this machine or takes long to read."""
    data, file = config.data, here / config.data.train
    if not file.is_file() or (config.run.epochs is None and file.stat().st_size > QUICK_BYTES):
        return data.rows
    counted = count_rows(file)
    fits = data.rows == counted or (leaves_rows_out(config) and data.rows < counted)
    if data.rows and counted and not fits and config.cluster.is_local:
        raise ConfigRefused(f"data.rows={data.rows}: {data.train} has {counted:,} rows. Leave data.rows out: they are counted")
    return data.rows or counted


def suggest_file(file: Path) -> str:
    if file.is_dir():
        return "that is a folder: name the JSON file in it"
    names = sorted(path.name for path in file.parent.glob("*.json*")) if file.parent.is_dir() else []
    if not names:
        return f"no JSON file is in {file.parent}" if file.parent.is_dir() else f"there is no folder {file.parent} either"
    return suggest(file.name, names)


# ---------------------------------------------------------------------------------------------------------------- count


def count_rows(file: Path) -> int:
    """Rows of a file; 0 for one that cannot be read, or that is not JSON: the data check says what is wrong with it."""
    try:
        meta = read_meta(file)
        if meta is not None:
            return sum(count_entry(entry, file.parent) for entry in meta.values())
        return sum(map(count_conversations, read_rows(file)))
    except (OSError, ValueError, RecursionError, TypeError, KeyError, AttributeError):
        return 0


def count_entry(entry: Any, folder: Path) -> int:
    return count_repeated(count_rows(folder / entry["annotation"]), entry.get("repeat_time", 1))


def read_rows(file: Path) -> Iterator[Any]:
    """The rows of a list; of JSON Lines only those that are lists, and None for the others, which are not parsed."""
    if is_list(file, first_letter(file)):
        yield from json.loads(file.read_text(encoding="utf-8-sig"))
        return
    with file.open(encoding="utf-8-sig", newline="\n") as opened:
        for line in opened:
            if line.strip():
                yield json.loads(line) if line.lstrip().startswith("[") else None


def count_conversations(row: Any) -> int:
    return len(row) if isinstance(row, list) and row else 1
