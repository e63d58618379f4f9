"""The folder of an adapter's base on this machine: what the user names, what the adapter names, or what this machine has of the hub's id."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from launcher.config.schema import Config
from launcher.errors import ConfigRefused
from launcher.record.checkpoint_reference import ADAPTER_CONFIG, FoundCheckpoint, exists, find_checkpoint, full_name
from launcher.weights.source import find_cached
from trainer.contract import InputRefused
from trainer.contract.adapter_files import HUB_ID, describe_missing_base, named_base
from trainer.contract.checkpoint_files import find_state_file

KEY = "stage.base"


def find_base(
    config: Config, found: FoundCheckpoint, text: str, runs: tuple[Path, ...], environ: Mapping[str, str]
) -> tuple[Config, FoundCheckpoint, tuple[str, ...]]:
    """Config and checkpoint with the base, and what was taken without being typed. `text`: stage.checkpoint as it was typed. Raises ConfigRefused for a
    base that is not here and that no node downloads."""
    base, taken = config.stage.base, tuple[str, ...]()
    if found.host:
        return (config, replace(found, bases=(base,)), ()) if base else (config, found, ())
    folder = Path(found.path)
    if not exists(folder / ADAPTER_CONFIG):
        if base:
            raise ConfigRefused(f"{KEY}={base} is the base of an adapter, and stage.checkpoint={text} holds full weights. Leave {KEY} out")
        return config, found, ()
    try:
        named = named_base(folder)
    except InputRefused as error:
        raise ConfigRefused(f"stage.checkpoint={text}: {error}") from error
    if base:
        base = locate(base, runs, local=config.cluster.is_local)
    elif (named and exists(Path(named))) or (not named and (found.run or find_state_file(folder))):
        return config, found, ()
    else:
        base = search(named, config, environ)
        taken = (f"{KEY}={base}",)
    if base:
        stage = replace(config.stage, base=base)
        return replace(config, stage=stage), replace(found, bases=(base,)), taken
    source = config.model.source
    downloads = source.kind == "hub" and named.lower() == source.id.lower()
    if downloads or (named.startswith("/") and not config.cluster.is_local):
        return config, replace(found, bases=()), ()  # the nodes have it, or get it
    raise ConfigRefused(f"stage.checkpoint={text}: {describe_missing_base(folder, named)}")


def locate(text: str, runs: tuple[Path, ...], *, local: bool) -> str:
    """stage.base as a folder: a run, or a path. Raises ConfigRefused."""
    try:
        found = find_checkpoint(full_name(text, runs), runs, local=local)
    except ConfigRefused as error:
        raise ConfigRefused(str(error).replace("stage.checkpoint=", f"{KEY}=")) from error
    path = str(Path(found.path).absolute()) if found else text
    if exists(Path(path) / ADAPTER_CONFIG):
        raise ConfigRefused(
            f"{KEY}={text} is itself an adapter. Merge it first: omnilaunch launch stage=merge stage.checkpoint={text} --run-id merged; then {KEY}=merged"
        )
    return path


def search(named: str, config: Config, environ: Mapping[str, str]) -> str:
    """model.source.path, or a folder of this machine that holds the repository of the hub; '' for neither."""
    if config.model.source.kind == "path":
        return config.model.source.path
    if not HUB_ID.fullmatch(named):
        return ""
    return find_cached("hub", named, environ) or find_cached("modelscope", named, environ)
