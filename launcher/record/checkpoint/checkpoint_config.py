"""The config of a run that starts from a checkpoint of an earlier run: what the checkpoint is decides model, limits of images and adapter; and the
data is that of its run, where the user names none.

What the user typed is kept. Where it contradicts the record, stage.recorded says so, and launcher.check.start refuses it.
"""

import json
from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from launcher.config.compose import compose, compose_over, options
from launcher.config.conf_folder import ConfFolder
from launcher.config.defaults import keys_of
from launcher.config.fact import refuse_ignored
from launcher.config.schema import Config, Model
from launcher.errors import ConfigRefused
from launcher.plan.local_context import for_this_machine
from launcher.plan.plan import RUNS_FOLDER, absolute
from launcher.record.checkpoint.adapter_base import find_base
from launcher.record.checkpoint.checkpoint_data import ROW, refuse_unknown_data, take_data
from launcher.record.checkpoint.checkpoint_record import CheckpointRecord, read_checkpoint
from launcher.record.checkpoint.foreign_weights import read_foreign
from launcher.record.checkpoint.run_to_come import describe_run_to_come
from launcher.record.checkpoint.swift_settings import ARGS_FILE, read_swift, take_swift
from launcher.record.checkpoint_reference import (
    ADAPTER_CONFIG,
    FoundCheckpoint,
    MissingRefused,
    locate_checkpoint,
    resolve_base,
    use_checkpoint,
)
from launcher.redact import printable
from launcher.weights.identity import load_models
from trainer.contract.checkpoint_files import flatten
from trainer.contract.listing import keep_some

NO_ENVIRON: Mapping[str, str] = MappingProxyType({})
OF_ADAPTER = ("r", "alpha", "rank_stabilised", "targets")  # of an adapter that a LoRA stage continues: its files have them
SHOWN = 4  # differences that are named


def compose_from_checkpoint(
    overrides: Sequence[str], conf: Path | ConfFolder, here: Path, environ: Mapping[str, str] = NO_ENVIRON
) -> Config:
    """The config of `conf` with overrides, with folders in place of run ids, and with what the record of stage.checkpoint says. `here`: the
    folder that relative paths start in. Raises ConfigRefused."""
    return start_from_checkpoint(for_this_machine(compose(overrides, conf), overrides), overrides, conf, here, environ)


def start_from_checkpoint(
    config: Config, overrides: Sequence[str], conf: Path | ConfFolder, here: Path, environ: Mapping[str, str] = NO_ENVIRON
) -> Config:
    """The same, of a config that was composed from `conf` with the overrides. `environ`: says where this machine keeps models."""
    runs = find_runs(config, here)
    try:
        text, found = locate_checkpoint(config, *runs)
    except MissingRefused as error:
        raise ConfigRefused(f"{error}{describe_run_to_come(config, keys_of(overrides))}") from error
    if found is None:
        return resolve_base(config, *runs)
    config, found, base = find_base(config, found, text, runs, environ)
    record = read_checkpoint(found, text) or read_foreign_here(found, config, conf)
    if record is not None:
        folder = config.stage.base  # the model of the record is composed again, from what was typed
        config = take_from_record(config, record, overrides, conf)
        config = replace(config, stage=replace(config.stage, base=folder))
        config = take_settings(config, found, keys_of(overrides), base)
    refuse_ignored(overrides, config.model.name, config.model.image_tokens.rule)
    if not found.host and (record is None or record.data is None):
        refuse_unknown_data(config, text, overrides)
    return resolve_base(use_checkpoint(config, found, text), *runs)


def read_foreign_here(found: FoundCheckpoint, config: Config, conf: Path | ConfFolder) -> CheckpointRecord | None:
    """The record of weights that no run of ours wrote, if their files say more than the weights. `conf`: has the models to compare with."""
    if found.host or not any((Path(found.path) / name).is_file() for name in (ADAPTER_CONFIG, ARGS_FILE)):
        return None
    return read_foreign(found, config, load_models(conf))


def take_settings(config: Config, found: FoundCheckpoint, typed: Set[str], base: tuple[str, ...]) -> Config:
    """What ms-swift wrote beside the weights, and the base of an adapter that was found: they join what was taken."""
    swift = read_swift(Path(found.path)) if not found.host else None
    taken, notes = tuple[str, ...](), tuple[str, ...]()
    if swift:
        config, taken, notes = take_swift(config, swift, typed)
    recorded = config.stage.recorded
    assert recorded is not None
    recorded = replace(recorded, taken=(*recorded.taken, *base, *taken), notes=notes)
    return replace(config, stage=replace(config.stage, recorded=recorded))


def find_runs(config: Config, here: Path) -> tuple[Path, Path]:
    """The folders of runs on this machine."""
    return Path(absolute(config.cluster.root, here)) / RUNS_FOLDER, here / RUNS_FOLDER


def take_from_record(config: Config, record: CheckpointRecord, overrides: Sequence[str], conf: Path | ConfFolder) -> Config:
    """Raises ConfigRefused if the record has only the name of a model, and `conf` lacks it."""
    typed = keys_of(overrides)
    config, taken = take_model(config, record, overrides, conf)
    config, limits = take_limits(config, record, typed)
    config, adapter = take_adapter(config, record, typed)
    config, data = take_data(config, record.data, overrides)
    config, system = take_system(config, record, typed)
    taken = (*taken, *limits, *adapter, *data, *system)
    recorded = replace(record.weights, differences=find_differences(config.model, record), taken=taken)
    return replace(config, stage=replace(config.stage, recorded=recorded))


def take_model(
    config: Config, record: CheckpointRecord, overrides: Sequence[str], conf: Path | ConfFolder
) -> tuple[Config, tuple[str, ...]]:
    """The recorded model with the typed keys of it, unless the user chose another one. The settings of conf/tune are then those of that
    model."""
    typed, name = keys_of(overrides), record.weights.model
    chosen = "model" in typed or any(override.startswith("experiment=") and override != "experiment=null" for override in overrides)
    if chosen and config.model.name != name:
        return config, ()
    known = name in options(conf)["model"]
    if record.model is None and not known:
        raise ConfigRefused(
            f"stage.checkpoint: {config.stage.checkpoint} is of model {name}, which conf/model lacks, and it is not in its run's folder, "
            f"whose plan.json describes the model. Name the run or that folder, or put {name}.yaml into conf/model"
        )
    if config.model.name != name:
        more = (f"model={name}",) if known else () if "tune" in typed else ("tune=null",)
        config = for_this_machine(compose((*overrides, *more), conf), overrides)
    own = [override for override in overrides if override.startswith("model.")]
    config = replace(config, model=record.model or with_recorded(config.model, record))
    return compose_over(config, own, conf) if own else config, (f"model={name}",)


def with_recorded(model: Model, record: CheckpointRecord) -> Model:
    """The model of conf/model with the chat template and the sizes that the checkpoint was saved with. Of what comes from a hub, conf/model has the
    sizes."""
    model = replace(model, chat_template=record.chat_template or model.chat_template)
    return replace(model, architecture=record.architecture) if record.architecture and model.source.kind == "random" else model


def take_limits(config: Config, record: CheckpointRecord, typed: Set[str]) -> tuple[Config, tuple[str, ...]]:
    """The limits of an image that the checkpoint's processor has."""
    values = {name: getattr(record, name) for name in ("max_pixels", "max_tiles")}
    found = {name: value for name, value in values.items() if value and not getattr(config.data, name) and f"data.{name}" not in typed}
    return replace(config, data=replace(config.data, **found)), tuple(f"data.{name}={value}" for name, value in found.items())


def take_system(config: Config, record: CheckpointRecord, typed: Set[str]) -> tuple[Config, tuple[str, ...]]:
    """The system message that the weights were trained with, for a stage that asks them."""
    trained = record.data.system if record.data else ROW
    if trained == config.data.system or "data.system" in typed or config.stage.kind == "train":
        return config, ()
    return replace(config, data=replace(config.data, system=trained)), (
        f"data.system={printable(repr(trained) if ' ' in trained else trained)}",
    )


def take_adapter(config: Config, record: CheckpointRecord, typed: Set[str]) -> tuple[Config, tuple[str, ...]]:
    """The settings of the adapter that a LoRA stage continues."""
    lora, adapter = config.stage.lora, record.weights.adapter
    if lora is None or adapter is None or config.stage.kind != "train":
        return config, ()
    keys = [name for name in OF_ADAPTER if f"stage.lora.{name}" not in typed and getattr(lora, name) != getattr(adapter, name)]
    lora = replace(lora, **{name: getattr(adapter, name) for name in keys})
    return replace(config, stage=replace(config.stage, lora=lora)), tuple(
        f"stage.lora.{name}={write(getattr(adapter, name))}" for name in keys
    )


def write(value: Any) -> str:
    return f"[{','.join(value)}]" if isinstance(value, tuple) else str(value).lower()


def find_differences(model: Model, record: CheckpointRecord) -> tuple[str, ...]:
    """In which the chosen model differs from the recorded one, so that its weights could not be loaded."""
    if record.model is None:
        return () if model.name == record.weights.model else (f"its model is {record.weights.model}",)
    if model.family != record.model.family:
        return (f"its family is {printable(record.model.family)}, and not {model.family}",)
    there, here = (numbers_of(each) for each in (record.model, model))
    named = sorted({*there, *here}, key=lambda key: (not key.startswith(("text", "vision")), "options" in key, key))  # sizes first
    keys = [key for key in named if there.get(key) != here.get(key) and "unverified" not in key]
    return keep_some([printable(f"its {key} is {there.get(key)}, and not {here.get(key)}") for key in keys], SHOWN)


def numbers_of(model: Model) -> dict[str, Any]:
    """Its architecture as dotted keys. An empty section is not a value."""
    return {key: value for key, value in flatten(json.loads(json.dumps(asdict(model.architecture)))) if value != {}}
