"""The data of a run that starts from a checkpoint: that of the run that trained it, where the user typed none.

Without this, every stage after a training run on the user's own rows would take the data set of conf/config.yaml, and its scores would be of
other rows. Settings of how rows are trained on (packing, augmentation) are not of the data, and stay as they are.
"""

from collections.abc import Sequence, Set
from dataclasses import replace
from pathlib import Path
from typing import Any

from launcher.config.defaults import keys_of
from launcher.config.schema import Config, Data
from launcher.errors import ConfigRefused
from launcher.record.checkpoint_reference import run_of
from launcher.record.reader import decode_as, nested, read_object
from launcher.record.run_name import PLAN_FILE
from trainer.contract import Entries
from trainer.contract.checkpoint_files import STATE_FILE
from trainer.contract.row_sets.row_set import describe_entries
from trainer.contract.row_sets.selection import read_split

DERIVED = ("merge", "convert", "quantize")
MOST_SOURCES = 20  # of a chain of derived checkpoints
FILES = ("train", "evaluation", "images")
CHOICE = ("split_seed", "max_samples", "mixing", "mixing_stop")  # which rows of the files are meant
PLACES = ("info", "mirror")
CHOOSING = ("data", "data.builtin")
NAMING = (*CHOOSING, *(f"data.{name}" for name in FILES))  # what says which data is meant
# The kinds of a stage that read rows -> how to name them.
NEEDING_ROWS = {
    "train": "data=files data.train=FILE",
    "evaluate": "data=files data.evaluation=FILE",
    "quantize": "data=files data.train=FILE",
}
OF_FILES = ("max_length", "workers")  # go with the user's own rows
ROW = "row"  # data.system: the row's own message, or the default of the chat template


def read_data(plan: dict[str, Any], file: Path) -> Data:
    """The data that the weights of a run were trained on, with whole paths. Derived weights are of the run that trained their source, if its
    record is on this machine. Raises RecordRefused."""
    for _ in range(MOST_SOURCES):
        source = run_of(Path(str(nested(plan, "spec", "stage", "checkpoint") or "")))
        if nested(plan, "config", "stage", "kind") not in DERIVED or source is None:
            break
        file = source / PLAN_FILE
        plan = read_object(file)
    data: Data = decode_as(Data, nested(plan, "config", "data"), file)
    spec = nested(plan, "spec", "data") or {}
    whole = {name: decode_as(Entries, found, file) for name in (*FILES, *PLACES) if (found := spec.get(name))}
    seed = spec.get("split_seed", 0) if spec.get("split") else data.split_seed  # with it, an evaluation has the rows that this run held out
    return replace(data, **whole, split_seed=seed)


def data_of_state(spec: dict[str, Any]) -> Data | None:
    """The data that trainer_state.json names in its flat settings; None where it does not (earlier versions, derived weights)."""
    named = {name: spec.get(f"data.{name}") or "" for name in ("name", "builtin", *FILES)}
    split = spec.get("data.split")
    named |= {"evaluation": f"{split:g}", "split_seed": spec.get("data.split_seed", 0)} if split else {}
    if spec.get("stage.kind", "train") != "train" or not (named["builtin"] or named["train"]):
        return None
    length, workers = (int(spec.get(f"data.{name}") or 0) for name in OF_FILES)
    more = {"max_length": length, "workers": workers, "system": str(spec.get("data.system") or ROW)}
    return decode_as(Data, {**named, **more}, Path(STATE_FILE))  # type: ignore[no-any-return]


def names_set(overrides: Sequence[str]) -> bool:
    """Whether the user chose a data set or files, and not only one of the files."""
    return bool(keys_of(override for override in overrides if override != "experiment=null") & {*CHOOSING, "experiment"})


def names_data(overrides: Sequence[str]) -> bool:
    """Whether the user named the data, or an experiment, which names it too."""
    typed = keys_of(override for override in overrides if override != "experiment=null")
    return bool(typed & {*NAMING, "experiment"})


def refuse_unknown_data(config: Config, text: str, overrides: Sequence[str]) -> None:
    """Raises ConfigRefused for a stage that needs rows, and starts from weights that do not say of which data they are: the data set of
    conf/config.yaml would be another one."""
    kind = config.stage.kind
    if kind not in NEEDING_ROWS or names_data(overrides):
        return
    raise ConfigRefused(
        f"data: stage={config.stage.name} needs rows, and the files of stage.checkpoint={text} do not say which data it was trained on. Name "
        f"yours: {NEEDING_ROWS[kind]} data.images=FOLDER; or data=digits, the data set that comes with omnilaunch"
    )


def with_recorded_split(config: Config, recorded: Data | None, typed: Set[str]) -> Config:
    """The same split of data that the user named again: with the seed of the run that trained, so that no row it trained on is held out now."""
    data = config.data
    same = recorded is not None and read_split(data.evaluation) and data.evaluation == recorded.evaluation and data.split_seed is None
    if recorded is None or not same or "data.split_seed" in typed:
        return config
    return replace(config, data=replace(data, split_seed=recorded.split_seed))


def take_data(config: Config, recorded: Data | None, overrides: Sequence[str]) -> tuple[Config, tuple[str, ...]]:
    """The config with the recorded data, and what was taken; as it was where the user named the data, or an experiment, which names it too.
    A single file that is named, such as data.evaluation, takes the place of the recorded one."""
    typed = keys_of(overrides)
    others = names_data(overrides) if recorded is None or recorded.builtin else names_set(overrides)
    if recorded is None or others:
        return with_recorded_split(config, recorded, typed), ()
    if recorded.builtin and recorded.builtin == config.data.builtin:
        return config, ()
    keys = ["name", "builtin", *FILES, *(() if recorded.builtin else (*PLACES, *CHOICE, *OF_FILES))]
    data = replace(config.data, **{key: getattr(recorded, key) for key in keys if f"data.{key}" not in typed})
    files = [f"data.{name}={describe_entries(found)}" for name in FILES if (found := getattr(data, name)) and f"data.{name}" not in typed]
    return replace(config, data=data), (f"data={recorded.name}", *files)
