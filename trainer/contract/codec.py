"""Dataclasses to JSON files and back: strict about keys and types; a file is written completely or not at all."""

import json
import os
import types
import typing
from dataclasses import MISSING, asdict, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from trainer.contract.spec import SCHEMA, OtherSchema, SpecError


def encode(value: Any) -> str:
    """A dataclass as JSON text, keys in the order of the class, one trailing newline."""
    return json.dumps(asdict(value), indent=2, ensure_ascii=False, allow_nan=True) + "\n"


def decode(cls: Any, data: Any, where: str = "") -> Any:
    """Build `cls` from plain JSON data. Raises SpecError that names the key for a missing, unknown or wrongly typed value."""
    if type(data) is cls:  # the common case: a text, a number
        return data
    if is_dataclass(cls) and isinstance(cls, type):
        if isinstance(data, str) and (short := getattr(cls, "SHORT", "")):  # the key that a text alone stands for
            data = {short: data}
        if not isinstance(data, dict):
            raise SpecError(f"{where or cls.__name__}: expected an object, got {type(data).__name__}")
        hints = types_of(cls)
        unknown = sorted(set(data) - set(hints))
        if unknown:
            raise SpecError(f"{where or cls.__name__}: unknown keys {unknown}; valid are {sorted(hints)}")
        values = {key: decode(hints[key], item, f"{where}.{key}".lstrip(".")) for key, item in data.items()}
        missing = sorted(required_of(cls) - set(values))
        if missing:
            raise SpecError(f"{where or cls.__name__}: missing keys {missing}")
        return cls(**values)
    origin, args = typing.get_origin(cls), typing.get_args(cls)
    if cls is Any:
        return data
    if origin in (types.UnionType, typing.Union):
        if data is None and type(None) in args:
            return None
        return decode(choose_member(args, data), data, where)
    if origin is Literal:
        if data in args:
            return data
        raise SpecError(f"{where}: {data!r} is not one of {', '.join(map(repr, args))}")
    if origin is tuple and isinstance(data, (list, tuple)):
        return tuple(decode(args[0], item, f"{where}[{i}]") for i, item in enumerate(data))
    if origin is dict and isinstance(data, dict):
        return {key: decode(args[1], item, f"{where}.{key}") for key, item in data.items()}
    if cls is float and isinstance(data, int) and not isinstance(data, bool):
        return float(data)
    if isinstance(cls, type) and isinstance(data, cls) and not (cls is int and isinstance(data, bool)):
        return data
    raise SpecError(f"{where}: expected {getattr(cls, '__name__', cls)}, got {data!r}")


def choose_member(args: tuple[Any, ...], data: Any) -> Any:
    """The type of a union that plain data is read as: the tuple for a list, else the first one that is not None."""
    others = [a for a in args if a is not type(None)]
    return next((a for a in others if typing.get_origin(a) is tuple and isinstance(data, (list, tuple))), others[0])


@cache
def required_of(cls: type) -> frozenset[str]:
    return frozenset(f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING)


@cache
def types_of(cls: type) -> dict[str, Any]:
    """Field -> type. Cached: without it, this call is most of the time of reading a thousand records."""
    return typing.get_type_hints(cls)


def read(cls: Any, path: Path) -> Any:
    """Read a dataclass from a JSON file. Raises SpecError naming the file for a bad shape or another schema number."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON, or an integer of over 4,300 digits
        raise SpecError(f"{path}: cannot be read: {error}") from error
    if isinstance(data, dict) and data.get("schema", SCHEMA) != SCHEMA:
        raise OtherSchema(
            f"{path}: written with schema {data['schema']}, this version reads {SCHEMA}; rebuild the image with: omnilaunch image build"
        )
    try:
        return decode(cls, data)
    except (SpecError, OverflowError) as error:
        raise SpecError(f"{path}: {error}") from error


def write(value: Any, path: Path) -> None:
    """Write a dataclass to `path` atomically: temporary file, fsync, rename."""
    write_text(encode(value), path)


def write_text(text: str, path: Path) -> None:
    """Write text to `path` atomically: temporary file, fsync, rename."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with aside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
