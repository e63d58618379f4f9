"""Reads the JSON files of a run's folder, in two modes.

    read_as(Record, folder / RECORD_FILE)               # strict: RecordRefused, with the file and the key, if anything is wrong
    read_as(Record, folder / RECORD_FILE, problems)     # lenient: None, and one line added to the list `problems`

A missing file is refused in strict mode, and is not a problem in lenient mode: a run that failed early has few files.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launcher.errors import RecordRefused
from trainer import contract
from trainer.contract import SCHEMA, SpecError
from trainer.contract.wording import plural

Problems = list[str] | None  # None: strict


def read_json(path: Path, problems: Problems = None) -> Any:
    """Whatever JSON data the file holds; in lenient mode {} if there is none."""
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return complain(path, "is missing: copy the run's folder again, whole", problems) if problems is None else {}
    except OSError as error:
        return complain(path, f"cannot be read: {error.strerror}", problems)
    except (ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON, or a number of more than 4,300 digits
        return complain(path, f"was cut short or edited: {error}. Copy the run's folder again, whole", problems)


def read_object(path: Path, problems: Problems = None, *, schema: int = SCHEMA) -> dict[str, Any]:
    """The JSON object in the file; in lenient mode {} if there is none. `schema`: the newest schema number that is known."""
    data = read_json(path, problems)
    if not isinstance(data, dict):
        return complain(path, "holds no JSON object", problems)
    found = data.get("schema", schema)
    if not isinstance(found, int) or found > schema:
        known = f"1 to {schema}" if schema > 1 else "1"
        return complain(path, f"was written with schema {found!r}, this version reads {known}. Use the version that wrote it", problems)
    return data


def read_as(cls: Any, path: Path, problems: Problems = None, *, schema: int = SCHEMA) -> Any:
    """The dataclass `cls` in the file; in lenient mode None if there is none."""
    data = read_object(path, problems, schema=schema)
    return decode_as(cls, data, path, problems) if data or problems is None else None


def read_lines(path: Path, problems: Problems = None) -> Iterator[dict[str, Any]]:
    """The JSON object of each line. In lenient mode lines without one are left out and counted as one problem."""
    if not path.exists():
        return
    wrong = 0
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if isinstance(row, dict):
                yield row
            else:
                wrong += 1
    if wrong:
        complain(path, f"has {plural(wrong, 'line')} that cannot be read as whole rows", problems)


def read_if_there(cls: Any, path: Path) -> Any:
    """The dataclass in the file, or None if the file is missing or cannot be read: what ended a run may have cut its files short."""
    return read_as(cls, path, [])


def decode_as(cls: Any, data: Any, path: Path, problems: Problems = None) -> Any:
    try:
        return contract.decode(cls, data)
    except (SpecError, OverflowError) as error:
        complain(path, f"cannot be read by this version: {error}", problems)
        return None


def read_bytes(path: Path) -> bytes:
    """b'' if there is no such file. Raises RecordRefused."""
    try:
        return path.read_bytes() if path.is_file() else b""
    except OSError as error:
        raise RecordRefused(f"{path} cannot be read: {error.strerror}") from error


def complain(path: Path, what: str, problems: Problems) -> dict[str, Any]:
    if problems is None:
        raise RecordRefused(f"{path} {what}")
    problems.append(f"{path.name} {what}")
    return {}


def nested(data: Any, *keys: str) -> Any:
    """data[key][key]..., None if one of the keys is missing."""
    for key in keys:
        data = data.get(key) if isinstance(data, dict) else None
    return data
