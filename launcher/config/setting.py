"""What is known of one key of the config: type, allowed values, default, current value and the file that sets it, meaning, other names.

`meanings.yaml` has one line for each key; the words of other tools are those of `synonyms.yaml`.
"""

import json
import typing
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from launcher.config.compose import compose_with_places, find_type
from launcher.config.conf_folder import ConfFolder
from launcher.config.fact import explain, may_set
from launcher.config.key import list_keys
from launcher.config.schema import Config
from launcher.config.synonym import load_synonyms
from launcher.config.variable import load_variables

FILE = Path(__file__).with_name("meanings.yaml")
KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
NO_DEFAULT = "none"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """`default`: of the schema, as JSON, or NO_DEFAULT where a file must set the key. `place`: the override or the file that sets it, '' =
    none. `fixed`: why it cannot be set, '' = it can."""

    key: str
    meaning: str
    kind: str
    allowed: tuple[str, ...]
    default: str
    current: str
    place: str
    fixed: str
    words: tuple[str, ...]


@cache
def load_meanings() -> dict[str, Any]:
    import yaml

    return dict(yaml.load(FILE.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader)))


def find_keys(key: str, conf: Path | ConfFolder) -> tuple[str, ...]:
    """The key itself, or the keys of a section. Raises ConfigRefused with a hint for a key that does not exist."""
    kind = find_type(key, conf)
    inner = next((each for each in typing.get_args(kind) if is_dataclass(each)), kind)
    return tuple(list_keys(inner, key)) if is_dataclass(inner) else (key,)


def describe_settings(keys: Sequence[str], overrides: Sequence[str], conf: Path | ConfFolder) -> list[Setting]:
    """In the order of the schema. Raises ConfigRefused for wrong overrides."""
    config, find_place = compose_with_places(overrides, conf)
    words = words_by_key()
    found = []
    for key in keys:
        kind = find_type(key, conf)
        found.append(
            Setting(
                key=key,
                meaning=load_meanings()["keys"].get(key, ""),
                kind=name_kind(kind),
                allowed=list_allowed(kind),
                default=find_default(key),
                current=write_value(read(config, key)),
                place=find_place(key),
                fixed="" if may_set(key, config.model.source.kind) else explain(key, "VALUE"),
                words=tuple(words.get(key, ())),
            )
        )
    return found


def read(config: Config, key: str) -> Any:
    """None where a section that the key is in is null."""
    value: Any = config
    for part in key.split("."):
        if isinstance(value, tuple):
            value = value[int(part)] if int(part) < len(value) else None
        else:
            value = value.get(part) if isinstance(value, dict) else getattr(value, part, None)
    return value


def write_value(value: Any) -> str:
    plain = asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
    return json.dumps(plain, ensure_ascii=False, default=asdict) if not isinstance(plain, str) else plain or "''"


def find_default(key: str) -> str:
    kind: Any = Config
    default: Any = MISSING
    for part in key.split("."):
        inner = next((each for each in typing.get_args(kind) if is_dataclass(each)), kind)
        if not is_dataclass(inner):
            return NO_DEFAULT
        field = next(field for field in fields(inner) if field.name == part)
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        kind = typing.get_type_hints(inner)[part]
    return NO_DEFAULT if default is MISSING else write_value(default)


def name_kind(kind: Any) -> str:
    """In words, as an error would say it."""
    arguments = typing.get_args(kind)
    origin = typing.get_origin(kind)
    if type(None) in arguments:
        return f"{name_kind(next(each for each in arguments if each is not type(None)))}, or null"
    if origin is Literal:
        return "one of the allowed values"
    if origin is tuple:
        return f"a list: {name_kind(arguments[0])}"
    if origin is dict:
        return "names and values"
    return "a section" if is_dataclass(kind) else KINDS.get(kind, "any value")


def list_allowed(kind: Any) -> tuple[str, ...]:
    """The values of a closed set; () where it is open."""
    if typing.get_origin(kind) is Literal:
        return tuple(str(value) or "''" for value in typing.get_args(kind))
    return next((found for each in typing.get_args(kind) if (found := list_allowed(each))), ())


@cache
def words_by_key() -> dict[str, list[str]]:
    """Key -> the words of other tools that are answered with it, variables included."""
    found: dict[str, list[str]] = {}
    pairs = [(row.write, row.words) for row in dict.fromkeys(load_synonyms().keys.values())]
    for write, words in (*pairs, *(((row.write,), row.names) for row in load_variables())):
        for key in dict.fromkeys(part.partition("=")[0] for text in write for part in text.split(" ") if "." in part.partition("=")[0]):
            found.setdefault(key, []).extend(word for word in words if word not in found.get(key, []))
    return found
