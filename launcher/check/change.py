"""A change of a config that a refusal may offer: values by key, how it is typed, and its cost."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from launcher.config.schema import Config

QUOTES = "''"  # an empty text, as it is typed
Cost = Literal["speed", "quality", "context", "hardware"]


@dataclass(frozen=True, kw_only=True)
class Change:
    """`values`: dotted key of a config -> its value. `override` is what the user types instead, where a whole axis is chosen."""

    cost: Cost
    values: Mapping[str, Any]
    override: str = ""

    def __str__(self) -> str:
        return self.override or " ".join(map(write_override, self.shown.items()))

    @property
    def shown(self) -> dict[str, Any]:
        """Without what every file of conf/strategy sets anyway."""
        return {key: value for key, value in self.values.items() if (key, value) != ("strategy.gradient_checkpointing", False)}


def set_values(config: Config, values: Mapping[str, Any]) -> Config:
    for key, value in values.items():
        config = _put(config, key.split("."), value)
    return config


def _put(section: Any, path: list[str], value: Any) -> Any:
    name, *rest = path
    if isinstance(section, dict):
        return section | {name: value}
    return replace(section, **{name: _put(getattr(section, name), rest, value) if rest else value})


def write_override(pair: tuple[str, Any]) -> str:
    key, value = pair
    if key == "strategy.name":
        return f"strategy={value}"
    if isinstance(value, tuple):
        return f"{key}=[{','.join(map(str, value))}]"
    return f"{key}={str(value).lower() if isinstance(value, bool) else value if value != '' else QUOTES}"
