"""Applies an override that a rule offers to a config, so that the rule can be asked again before the override is printed."""

import shlex
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

from launcher.config.schema import AXES, Config
from launcher.errors import ConfigRefused
from trainer.contract import SpecError, decode

# The config with this override added to what the user typed, composed from conf/. Raises ConfigRefused.
Compose = Callable[[str], Config]


def apply_override(config: Config, override: str, compose: Compose | None) -> Config | None:
    """None where the config is refused then. An override of keys is set in `config` itself; one that chooses a whole axis, or another checkpoint
    where there is a record, needs `compose`. Raises ValueError where there is none."""
    pairs = [part.partition("=") for part in shlex.split(override)]
    recorded = config.stage.recorded is not None and any(key == "stage.checkpoint" for key, _, _ in pairs)
    if recorded or any(key in AXES for key, _, _ in pairs):
        if compose is None:
            raise ValueError(f"{override} can be judged with conf/ only")
        try:
            return compose(override)
        except ConfigRefused:
            return None
    changed: Config | None = config
    for key, _, text in pairs:
        changed = changed and _set_key(changed, key.split("."), text)
    return changed


def _set_key(config: Config, path: list[str], text: str) -> Config | None:
    for value in _read_values(text):
        data: Any = asdict(config)
        try:
            section = data
            for name in path[:-1]:
                section = section[int(name) if isinstance(section, list | tuple) else name]
            section[int(path[-1]) if isinstance(section, list | tuple) else path[-1]] = value
            changed: Config = decode(Config, data)
        except (SpecError, LookupError, TypeError, ValueError):
            continue
        return changed
    return None


def _read_values(text: str) -> Iterator[Any]:
    """What the text may stand for. The type of the key decides: the first that the schema takes is the value."""
    import yaml

    yield yaml.safe_load(text) if text else ""
    if text.replace("e-", "").replace(".", "").isdigit():
        yield float(text)  # 1e-4 is text in YAML
    yield text
