"""Other names for a file's keys, from the dataset_info.json that LLaMA-Factory and MindSpeed-MM keep beside it."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.contract import DataProblem
from trainer.data.rows.parsed_row import Complain, Row

INFO_FILE = "dataset_info.json"
# What a column map calls a key -> what the shapes call it. hiyouga/LLaMA-Factory: src/llamafactory/data/parser.py
COLUMNS = {
    "messages": "messages", "images": "images", "system": "system", "videos": "videos", "audios": "audios", "tools": "tools",
    "prompt": "instruction", "query": "input", "response": "output", "history": "history", "chosen": "chosen", "rejected": "rejected",
}  # fmt: skip
PARTS = ("attr", "columns", "tags")
ROLE_TAGS = {"user_tag": "user", "assistant_tag": "assistant", "system_tag": "system"}
# Keys that tell a shape: where a map says which of them counts, the others are columns without a meaning.
TELLING = ("conversations", "messages", "conversation", "query", "instruction", "response", "input", "output")


@dataclass(frozen=True, kw_only=True)
class Columns:
    """`keys`: of a row, theirs -> ours. `message_keys`: of a message. `roles`: values of a message's role."""

    keys: dict[str, str] = field(default_factory=dict)
    message_keys: dict[str, str] = field(default_factory=dict)
    roles: dict[str, str] = field(default_factory=dict)

    def rename(self, row: Row) -> Row:
        """The row under our names. A key that the map gives to something else, and one that would tell another shape, is left out."""
        ours = {self.keys[key]: value for key, value in row.items() if key in self.keys}
        telling = TELLING if {"messages", "instruction"} & set(ours) else ()
        row = {**{key: value for key, value in row.items() if key not in self.keys and key not in telling}, **ours}
        if isinstance(row.get("messages"), list) and (self.message_keys or self.roles):
            row["messages"] = [self.rename_message(item) for item in row["messages"]]
        return row

    def rename_message(self, item: Any) -> Any:
        if not isinstance(item, dict):
            return item
        item = {self.message_keys.get(key, key): value for key, value in item.items()}
        if isinstance(item.get("role"), str):
            item["role"] = self.roles.get(item["role"], item["role"])
        return item

    def complain_in_theirs(self, complain: Complain) -> Complain:
        """A complaint that names the keys as the file does."""
        keys = {ours: theirs for theirs, ours in self.keys.items()}
        message_keys = {ours: theirs for theirs, ours in self.message_keys.items()}

        def say(field: str, problem: str, fix: str) -> None:
            first, rest = re.fullmatch(r"([^.\[]*)(.*)", field, re.DOTALL).groups()  # type: ignore[union-attr]  # it matches any text
            inner, dot, last = rest.rpartition(".")
            complain(keys.get(first, first) + inner + dot + message_keys.get(last, last), problem, fix)

        return say


def find_columns(file: Path) -> tuple[Columns | None, tuple[DataProblem, ...]]:
    """The map for an annotation file; None where nothing beside it names the file."""
    info = file.parent / INFO_FILE
    try:
        entries = json.loads(info.read_text(encoding="utf-8-sig"))
    except (FileNotFoundError, NotADirectoryError):
        return None, ()
    except (OSError, ValueError, RecursionError) as error:
        fix = f"mend it, or move it away from {file.name} where its keys need no other names"
        return None, (DataProblem(file=str(info), row=0, field="", problem=f"cannot be read: {error}", fix=fix),)
    named = {name: entry for name, entry in entries.items() if names(entry, file)} if isinstance(entries, dict) else {}
    maps = {name: read_columns(entry) for name, entry in named.items()}
    problems = [problem for name, entry in named.items() for problem in find_entry_problems(info, name, entry)]
    first = next(iter(maps.values()), None)
    if any(columns != first for columns in maps.values()):
        fix = "keep the one that fits, or make a copy of the file for each"
        problems.append(DataProblem(file=str(info), row=0, field="", problem=f"{' and '.join(maps)} map {file.name} in two ways", fix=fix))
    return first, tuple(problems)


def names(entry: Any, file: Path) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("file_name"), str) and Path(entry["file_name"]) == Path(file.name)


def read_columns(entry: Row) -> Columns:
    """`columns` and `tags` of LLaMA-Factory, or MindSpeed-MM's `attr`, which holds both."""
    parts = [entry[part] for part in PARTS if isinstance(entry.get(part), dict)]
    given = {key: value for part in parts for key, value in part.items() if isinstance(value, str)}
    tags = {"role_tag": "role", "content_tag": "content"}
    return Columns(
        keys={given[key]: ours for key, ours in COLUMNS.items() if key in given},
        message_keys={given[key]: ours for key, ours in tags.items() if key in given},
        roles={given[key]: role for key, role in ROLE_TAGS.items() if key in given},
    )


def find_entry_problems(info: Path, name: str, entry: Row) -> tuple[DataProblem, ...]:
    if entry.get("ranking"):
        fix = "take a set with one answer for each question"
        return (DataProblem(file=str(info), row=0, field=f"{name}.ranking", problem="preferences are not trained on", fix=fix),)
    for part in PARTS:
        if not isinstance(entry.get(part) or {}, dict):
            return (DataProblem(file=str(info), row=0, field=f"{name}.{part}", problem="is not an object", fix="map names to names"),)
    return ()
