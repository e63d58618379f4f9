"""The dotted keys of the schema, and which words are keys elsewhere."""

import types
import typing
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any

from launcher.config.fact import may_set
from launcher.config.schema import AXES, Config
from launcher.config.synonym import find_row, find_topic, list_variants, load_synonyms
from launcher.errors import plain
from trainer.contract import choose_member

FROM_RECORD = "stage.recorded"  # a section that the plan sets, never typed


def is_known_elsewhere(word: str) -> bool:
    """Whether an option is a word of another tool, or a key or an axis written as an option."""
    keys = list_keys()
    name = word.replace("-", "_")
    return bool(find_row(load_synonyms().keys, name)) or name in AXES or name in keys or any(key.endswith(f".{name}") for key in keys)


def is_about_known(word: str) -> bool:
    """Whether the parts of an option say what it is about, so that it has an answer: `--moe_router_topk`."""
    name, rows = word.replace("-", "_"), load_synonyms().keys
    return find_topic(name) is not None or any(plain(rest) in rows for rest, _ in list_variants(name))


def list_settings() -> list[str]:
    """Every dotted key that can be set, whatever the model."""
    return [key for key in list_keys() if may_set(key, "") and not (key.endswith(".name") and key.count(".") == 1)]


def list_keys(kind: Any = Config, prefix: str = "") -> list[str]:
    """Every dotted key of the schema, or of one of its sections."""
    kind = without_null(kind)
    if not is_dataclass(kind):
        return [prefix]
    sections = types_of(typing.cast(type, kind)).items()
    named = ((f"{prefix}.{name}" if prefix else name, inner) for name, inner in sections)
    return [leaf for key, inner in named if key != FROM_RECORD for leaf in list_keys(inner, key)]


@cache
def types_of(kind: type) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in fields(kind)}


def without_null(kind: Any) -> Any:
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        return next(inner for inner in typing.get_args(kind) if inner is not type(None))
    return kind


def member_of(kind: Any, data: Any) -> Any:
    """The type of a union that plain data is read as; a type that is no union is itself."""
    is_union = typing.get_origin(kind) in (types.UnionType, typing.Union)
    return choose_member(typing.get_args(kind), data) if is_union else kind


def takes_list(kind: Any) -> bool:
    """Whether a key is a text or a list."""
    return any(typing.get_origin(inner) is tuple for inner in typing.get_args(kind))
