"""Maps the keys of a file to the names used here, from the dataset_info.json of LLaMA-Factory and MindSpeed-MM beside it."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.contract import DataProblem
from trainer.contract.row_sets.data_set_info import INFO_FILE as INFO_FILE, SWIFT_NAMES, InfoEntry, entries_of_file
from trainer.data.rows.parsed_row import AddProblem, Row

# Name of a key in dataset_info.json -> its name in the row formats. hiyouga/LLaMA-Factory: src/llamafactory/data/parser.py
COLUMNS = {
    "messages": "messages", "images": "images", "system": "system", "videos": "videos", "audios": "audios", "tools": "tools",
    "prompt": "instruction", "query": "input", "response": "output", "history": "history", "chosen": "chosen", "rejected": "rejected",
    "kto_tag": "kto_tag",
}  # fmt: skip
PARTS = ("attr", "columns", "tags")
ROLE_TAGS = {"user_tag": "user", "assistant_tag": "assistant", "system_tag": "system"}
TOOL_TAGS = {"observation_tag": "observation", "function_tag": "function_call"}
# Keys that identify a row format. If a map selects one of them, the others are ordinary columns and ignored.
FORMAT_KEYS = ("conversations", "messages", "conversation", "query", "instruction", "response", "input", "output")


@dataclass(frozen=True, kw_only=True)
class Columns:
    """`keys`: of a row, name in the file -> name here. `message_keys`: of a message. `roles`: values of the role of a message.

    The hash of a data set contains the repr of this class (trainer.data.sources.source.hash_sources)."""

    keys: dict[str, str] = field(default_factory=dict)
    message_keys: dict[str, str] = field(default_factory=dict)
    roles: dict[str, str] = field(default_factory=dict)

    def rename(self, row: Row) -> Row:
        """The row with the names used here. Keys that are replaced, and keys that would identify another row format, are left out."""
        ours = {self.keys[key]: value for key, value in row.items() if key in self.keys}
        other_formats = FORMAT_KEYS if {"messages", "instruction"} & set(ours) else ()
        row = {**{key: value for key, value in row.items() if key not in self.keys and key not in other_formats}, **ours}
        if isinstance(row.get("messages"), list) and (self.message_keys or self.roles):
            row["messages"] = [self.rename_message(item) for item in row["messages"]]
        return row

    def rename_message(self, item: Any) -> Any:
        if not isinstance(item, dict):
            return item
        item = {self.message_keys.get(key, key): value for key, value in item.items()}
        for key in ("role", "from"):  # LLaMA-Factory reads `from` where the entry has no role_tag
            if isinstance(item.get(key), str):
                item[key] = self.roles.get(item[key], item[key])
        return item

    def with_names_of_the_file(self, add_problem: AddProblem) -> AddProblem:
        """Reports problems with the names of the keys in the file."""
        keys = {ours: theirs for theirs, ours in self.keys.items()}
        message_keys = {ours: theirs for theirs, ours in self.message_keys.items()}

        def add_renamed(field: str, problem: str, fix: str) -> None:
            first, rest = re.fullmatch(r"([^.\[]*)(.*)", field, re.DOTALL).groups()  # type: ignore[union-attr]  # it matches any text
            inner, dot, last = rest.rpartition(".")
            add_problem(keys.get(first, first) + inner + dot + message_keys.get(last, last), problem, fix)

        return add_renamed


def find_columns(file: Path, named: InfoEntry | None = None) -> tuple[Columns | None, tuple[DataProblem, ...]]:
    """The map for an annotation file; None if no dataset_info.json beside it or above lists the file. `named`: the data set that the file was found
    by."""
    entries, info, error = ((named,), named.info, None) if named else entries_of_file(file)
    if error is not None:
        fix = f"fix it; if {file.name} needs no other names for its keys, move it to another folder"
        return None, (DataProblem(file=str(info), row=0, field="", problem=f"cannot be read: {error}", fix=fix),)
    maps = {entry.name: read_columns(entry.content) for entry in entries}
    problems = [problem for entry in entries for problem in find_entry_problems(entry.info, entry.name, entry.content)]
    first = next(iter(maps.values()), None)
    if any(columns != first for columns in maps.values()):
        fix = "keep one of the entries, copy the file for each of them, or name one of them: data.train=NAME"
        problem = f"the entries {' and '.join(maps)} map {file.name} differently"
        problems.append(DataProblem(file=str(info), row=0, field="", problem=problem, fix=fix))
    return first, tuple(problems)


def read_columns(entry: Row) -> Columns:
    """`columns` and `tags` of LLaMA-Factory, or `attr` of MindSpeed-MM, which has both; `columns` and `messages` of ms-swift."""
    if any(key in entry for key in SWIFT_NAMES):
        return read_swift_columns(entry)
    parts = [entry[part] for part in PARTS if isinstance(entry.get(part), dict)]
    given = {key: value for part in parts for key, value in part.items() if isinstance(value, str)}
    tags = {"role_tag": "role", "content_tag": "content"}
    return Columns(
        keys={given[key]: ours for key, ours in COLUMNS.items() if key in given},
        message_keys={given[key]: ours for key, ours in tags.items() if key in given},
        roles={given[key]: role for key, role in ROLE_TAGS.items() if key in given}
        | {given[key]: role for key, role in TOOL_TAGS.items() if given.get(key, role) != role},
    )


def read_swift_columns(entry: Row) -> Columns:
    """`columns` maps names of the file to names of ms-swift, and `messages` has the arguments of its MessagesPreprocessor."""
    columns, messages = (each if isinstance(each, dict) else {} for each in (entry.get("columns"), entry.get("messages")))
    names = {"role_key": "role", "content_key": "content"}
    roles = {"user_role": "user", "assistant_role": "assistant", "system_role": "system"}
    return Columns(
        keys={str(key): ours for key, ours in columns.items() if isinstance(ours, str)},
        message_keys={messages[key]: ours for key, ours in names.items() if isinstance(messages.get(key), str)},
        roles={messages[key]: ours for key, ours in roles.items() if isinstance(messages.get(key), str)},
    )


def find_entry_problems(info: Path, name: str, entry: Row) -> tuple[DataProblem, ...]:
    if entry.get("ranking"):
        fix = "use a data set with one answer for each question"
        return (DataProblem(file=str(info), row=0, field=f"{name}.ranking", problem="preference data is not supported", fix=fix),)
    columns = entry.get("columns")
    if isinstance(columns, dict) and columns.get("kto_tag"):
        fix = "use a data set of right answers, or keep those rows of it"
        return (DataProblem(file=str(info), row=0, field=f"{name}.columns.kto_tag", problem="KTO data is not supported", fix=fix),)
    for part in PARTS:
        if not isinstance(entry.get(part) or {}, dict):
            return (
                DataProblem(
                    file=str(info),
                    row=0,
                    field=f"{name}.{part}",
                    problem="is not an object",
                    fix="write an object that maps names to names",
                ),
            )
    return ()
