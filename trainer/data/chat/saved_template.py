"""The chat template in the files of a checkpoint: read, and written again byte for byte.

Where they are: transformers 5.23, processing_utils.py and tokenization_utils_base.py. chat_template.jinja, with further ones in
additional_chat_templates/; chat_template.json of earlier processors; the key chat_template of tokenizer_config.json, one text or a list of named
ones. The first of these that a folder has is that of the model.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.contract import InputRefused

JINJA, JSON, FOLDER = "chat_template.jinja", "chat_template.json", "additional_chat_templates"
TOKENIZER_CONFIG, KEY = "tokenizer_config.json", "chat_template"
DEFAULT, TOOL_USE = "default", "tool_use"  # names in a list; the second is for conversations with tools
MOST_BYTES = 4 * 2**20  # of a file


@dataclass(frozen=True, kw_only=True)
class SavedTemplate:
    """`texts`: name -> Jinja, of which `default` is always there. `file`: that they were read from. `files`: all files of chat templates, name ->
    content; `key`: what tokenizer_config.json has, None = nothing."""

    folder: Path
    file: str
    texts: Mapping[str, str]
    files: Mapping[str, bytes] = field(default_factory=dict)
    key: Any = None

    @property
    def path(self) -> str:
        return str(self.folder / self.file)


def read_saved(folder: Path) -> SavedTemplate | None:
    """None for a folder without a chat template. Raises InputRefused for one that cannot be read."""
    files = {name: read_bytes(folder / name) for name in (JINJA, JSON) if (folder / name).is_file()}
    more = {f"{FOLDER}/{path.name}": read_bytes(path) for path in sorted((folder / FOLDER).glob("*.jinja")) if path.is_file()}
    key = read_key(folder / TOKENIZER_CONFIG)
    found = find_texts(folder, {**files, **more}, key)
    if found is None:
        return None
    return SavedTemplate(folder=folder, file=found[0], texts=found[1], files={**files, **more}, key=key)


def find_texts(folder: Path, files: Mapping[str, bytes], key: Any) -> tuple[str, Mapping[str, str]] | None:
    """(file, name -> text) of the first place that has a default template."""
    named = {Path(name).stem: decode(folder / name, files[name]) for name in files if name.startswith(FOLDER)}
    if JINJA in files:
        return JINJA, {**named, DEFAULT: decode(folder / JINJA, files[JINJA])}
    if JSON in files:
        return JSON, name_texts(folder / JSON, parse(folder / JSON, files[JSON]).get(KEY))
    return (TOKENIZER_CONFIG, name_texts(folder / TOKENIZER_CONFIG, key)) if key is not None else None


def name_texts(file: Path, value: Any) -> Mapping[str, str]:
    """One text, {name: text}, or [{"name": ..., "template": ...}]."""
    listed = isinstance(value, list) and all(isinstance(each, dict) for each in value)
    texts = {str(each.get("name")): each.get("template") for each in value} if listed else value
    texts = {DEFAULT: texts} if isinstance(texts, str) else texts
    if not isinstance(texts, dict) or not isinstance(texts.get(DEFAULT), str) or not all(isinstance(text, str) for text in texts.values()):
        raise refused(file, f"{KEY} is neither a text nor a list of named texts with {DEFAULT!r} among them")
    return texts


def read_key(file: Path) -> Any:
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError):
        return None  # the tokenizer is refused with a better message
    return content.get(KEY) if isinstance(content, dict) else None


def parse(file: Path, content: bytes) -> Mapping[str, Any]:
    try:
        found = json.loads(content)
    except ValueError as error:
        raise refused(file, f"is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise refused(file, "is not a JSON object")
    return found


def decode(file: Path, content: bytes) -> str:
    try:
        return content.decode("utf-8").replace("\r\n", "\n")  # as Python opens a text
    except UnicodeDecodeError as error:
        raise refused(file, f"is not UTF-8: {error}") from error


def read_bytes(file: Path) -> bytes:
    if file.stat().st_size > MOST_BYTES:
        raise refused(file, f"has more than {MOST_BYTES:,} bytes")
    return file.read_bytes()


def refused(file: Path, problem: str) -> InputRefused:
    return InputRefused(
        f"{file}: the chat template of the checkpoint {problem}\n    copy the file again, or set model.chat_template=conf, which writes conversations "
        "with model.template"
    )


def write_saved(saved: SavedTemplate, folder: Path) -> None:
    """The files of chat templates of `folder` become those that the checkpoint came with."""
    for name in (JINJA, JSON):
        (folder / name).unlink(missing_ok=True)
    if (folder / FOLDER).is_dir():
        shutil.rmtree(folder / FOLDER)
    for name, content in saved.files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    config = folder / TOKENIZER_CONFIG
    if config.is_file() and read_key(config) != saved.key:
        content = {key: value for key, value in json.loads(config.read_text(encoding="utf-8")).items() if key != KEY}
        content |= {KEY: saved.key} if saved.key is not None else {}
        config.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
