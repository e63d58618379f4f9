import json
from pathlib import Path
from typing import Any

import pytest

from trainer.contract import InputRefused
from trainer.data.chat.saved_template import read_saved, write_saved

NAMED = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]


def fill(folder: Path, files: dict[str, Any]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name).write_bytes(text.encode())


@pytest.mark.parametrize(
    ("files", "file", "texts"),
    [
        ({"chat_template.jinja": "J"}, "chat_template.jinja", {"default": "J"}),
        ({"chat_template.jinja": "J\r\n", "chat_template.json": {"chat_template": "O"}}, "chat_template.jinja", {"default": "J\n"}),
        (
            {"chat_template.jinja": "J", "additional_chat_templates/tool_use.jinja": "T"},
            "chat_template.jinja",
            {"default": "J", "tool_use": "T"},
        ),
        (
            {"chat_template.json": {"chat_template": "O"}, "tokenizer_config.json": {"chat_template": "K"}},
            "chat_template.json",
            {"default": "O"},
        ),
        ({"tokenizer_config.json": {"chat_template": "K"}}, "tokenizer_config.json", {"default": "K"}),
        ({"tokenizer_config.json": {"chat_template": NAMED}}, "tokenizer_config.json", {"default": "D", "tool_use": "T"}),
    ],
)
def test_where_a_template_is_read_and_that_it_is_written_as_it_was(
    tmp_path: Path, files: dict[str, Any], file: str, texts: dict[str, str]
) -> None:
    source, target = tmp_path / "from", tmp_path / "to"
    fill(source, files)
    found = read_saved(source)
    assert found is not None
    assert (found.file, dict(found.texts)) == (file, texts)
    fill(target, {"tokenizer_config.json": {"eos_token": "é"}, "chat_template.jinja": "ours", "additional_chat_templates/old.jinja": "x"})
    write_saved(found, target)
    kept = [name for name in files if "template" in name]
    assert {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()} == {*kept, "tokenizer_config.json"}
    assert all((target / name).read_bytes() == (source / name).read_bytes() for name in kept)
    config = json.loads((target / "tokenizer_config.json").read_text(encoding="utf-8"))
    wanted = files.get("tokenizer_config.json", {}).get("chat_template")
    assert config == {"eos_token": "é", **({"chat_template": wanted} if wanted else {})}


def test_a_folder_without_a_template(tmp_path: Path) -> None:
    fill(tmp_path, {"tokenizer_config.json": {"eos_token": "x"}, "config.json": {}})
    assert read_saved(tmp_path) is None


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        ({"chat_template.json": "{"}, r"chat_template\.json: .* is not JSON"),
        ({"chat_template.json": {"template": "x"}}, "neither a text nor a list of named texts"),
        ({"tokenizer_config.json": {"chat_template": [{"name": "rag", "template": "x"}]}}, "with 'default' among them"),
        ({"tokenizer_config.json": {"chat_template": 3}}, "neither a text"),
    ],
)
def test_a_template_that_cannot_be_read(tmp_path: Path, files: dict[str, Any], problem: str) -> None:
    fill(tmp_path, files)
    with pytest.raises(InputRefused, match=problem):
        read_saved(tmp_path)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(InputRefused, match=r"is not UTF-8.*\n.*model\.chat_template=conf"):
        read_saved(tmp_path)
