"""dataset_info.json of LLaMA-Factory and MindSpeed-MM: other names of keys."""

import json
from pathlib import Path
from typing import Any

import pytest

from trainer.data.rows.parsed_row import ToolCall
from trainer.data.rows.sample import read_samples
from trainer.data.sources.column_map import INFO_FILE, find_columns, read_columns
from trainer.data.sources.source import hash_sources

MESSAGES = [{"speaker": "customer", "words": "<image>\nWhat?"}, {"speaker": "clerk", "words": "A cat."}]
TAGS = {"role_tag": "speaker", "content_tag": "words", "user_tag": "customer", "assistant_tag": "clerk"}
ROW = {"dialog": MESSAGES, "pictures": ["a.png"], "messages": "a column of something else", "query": 7}


def read(folder: Path, info: Any, *rows: Any) -> Any:
    (folder / "a.png").write_bytes(b"")
    (folder / "rows.json").write_text(json.dumps(rows))
    (folder / INFO_FILE).write_text(json.dumps(info))
    return read_samples(folder / "rows.json", folder)


COLUMNS = {"messages": "dialog", "images": "pictures"}
INFOS = {
    "LLaMA-Factory": {"file_name": "rows.json", "formatting": "sharegpt", "columns": COLUMNS, "tags": TAGS},
    "MindSpeed-MM": {"file_name": "./rows.json", "attr": COLUMNS | TAGS | {"system": None}},
}


@pytest.mark.parametrize("name", INFOS)
def test_keys_and_roles_are_mapped(tmp_path: Path, name: str) -> None:
    (sample,), problems = read(tmp_path, {"mine": INFOS[name], "other": {"file_name": "other.json"}}, ROW)
    assert problems == ()
    assert [(message.role, message.content) for message in sample.messages] == [("user", "<image>\nWhat?"), ("assistant", "A cat.")]
    assert sample.images == (tmp_path / "a.png",)


def test_a_map_of_questions_and_answers(tmp_path: Path) -> None:
    columns = {"prompt": "ask", "query": "more", "response": "say", "history": "before", "images": "pictures", "system": "rule"}
    row = {"ask": "<image>", "more": "What?", "say": "A cat.", "before": [["Hi", "Hi!"]], "pictures": "a.png", "rule": "Be brief."}
    (sample,), problems = read(tmp_path, {"mine": {"file_name": "rows.json", "columns": columns}}, row)
    assert problems == ()
    assert [message.content for message in sample.messages] == ["Be brief.", "Hi", "Hi!", "<image>\nWhat?", "A cat."]


def test_roles_of_tools_are_mapped(tmp_path: Path) -> None:
    talk = [MESSAGES[0], {"speaker": "caller", "words": '{"name": "zoom"}'}, {"speaker": "machine", "words": "ok"}, MESSAGES[1]]
    info = INFOS["LLaMA-Factory"] | {"tags": TAGS | {"function_tag": "caller", "observation_tag": "machine"}}
    (sample,), problems = read(tmp_path, {"mine": info}, ROW | {"dialog": talk})
    assert problems == () and [message.role for message in sample.messages] == ["user", "assistant", "tool", "assistant"]
    assert sample.messages[1].calls == (ToolCall(name="zoom", arguments="{}"),)


def test_usual_names_of_roles_of_tools_change_no_hash(tmp_path: Path) -> None:
    usual = TAGS | {"function_tag": "function_call", "observation_tag": "observation"}
    columns = [read_columns({"columns": COLUMNS, "tags": tags}) for tags in (TAGS, usual)]
    assert columns[0] == columns[1]


def test_problems_use_the_names_of_the_file(tmp_path: Path) -> None:
    info = {"mine": INFOS["LLaMA-Factory"]}
    absent = ROW | {"pictures": ["b.png"]}
    robot = ROW | {"dialog": [{"speaker": "robot", "words": "x"}]}
    empty = ROW | {"dialog": [MESSAGES[0], {"speaker": "clerk", "words": " "}]}
    _, problems = read(tmp_path, info, absent, robot, empty)
    assert [(problem.row, problem.field) for problem in problems] == [(1, "pictures[0]"), (2, "dialog[0].speaker"), (3, "dialog[1].words")]


def test_without_an_entry_nothing_is_renamed(tmp_path: Path) -> None:
    assert find_columns(tmp_path / "rows.json") == (None, ())
    (tmp_path / INFO_FILE).write_text(json.dumps({"other": {"file_name": "other.json"}, "odd": 3}))
    assert find_columns(tmp_path / "rows.json") == (None, ())
    assert find_columns(tmp_path / "rows.json" / "below") == (None, ())


# info -> (field, problem)
BAD = {
    "no JSON": ("{", "", "cannot be read"),
    "preferences": ({"mine": {"file_name": "rows.json", "ranking": True}}, "mine.ranking", "preference data is not supported"),
    "columns in a list": ({"mine": {"file_name": "rows.json", "columns": ["a"]}}, "mine.columns", "is not an object"),
    "two maps": (
        {"a": {"file_name": "rows.json", "columns": {"images": "x"}}, "b": {"file_name": "rows.json", "columns": {"images": "y"}}},
        "",
        "the entries a and b map rows.json differently",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_invalid_maps(tmp_path: Path, name: str) -> None:
    info, field, text = BAD[name]
    (tmp_path / INFO_FILE).write_text(info if isinstance(info, str) else json.dumps(info))
    _, (problem,) = find_columns(tmp_path / "rows.json")
    assert (problem.file, problem.row, problem.field) == (str(tmp_path / INFO_FILE), 0, field)
    assert text in problem.problem


def test_another_map_changes_the_hash(tmp_path: Path) -> None:
    """A resumed run would train on other samples. Entries for other files do not matter."""
    info, rows = {"columns": COLUMNS, "file_name": "rows.json", "tags": TAGS}, tmp_path / "rows.json"
    read(tmp_path, {"mine": info}, ROW)
    before = hash_sources(rows, tmp_path)
    read(tmp_path, {"mine": info, "other": {"file_name": "b.json", "columns": {}}}, ROW)
    assert hash_sources(rows, tmp_path) == before
    read(tmp_path, {"mine": {**info, "tags": TAGS | {"user_tag": "clerk", "assistant_tag": "customer"}}}, ROW)
    assert hash_sources(rows, tmp_path) != before


def test_roles_of_messages_with_from_and_value(tmp_path: Path) -> None:
    """hiyouga/LlamaFactory#2381: names of roles without a role_tag, whose default is `from`."""
    info = {"columns": {"messages": "conversations"}, "file_name": "rows.json", "tags": {"user_tag": "hummany", "assistant_tag": "gpt"}}
    turns = [{"from": "hummany", "value": "A town?"}, {"from": "gpt", "value": "Ulm."}]
    (tmp_path / INFO_FILE).write_text(json.dumps({"mine": info}))
    columns, problems = find_columns(tmp_path / "rows.json")
    assert columns is not None and problems == ()
    assert [item["from"] for item in columns.rename({"conversations": turns})["messages"]] == ["user", "assistant"]
