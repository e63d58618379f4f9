"""The names that others give to the models and devices of conf/: the repository on the hub, the title, the chips. They are read from the
files, so that a new file brings its own."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launcher.config.conf_folder import ConfFolder, as_conf_folder
from launcher.errors import plain

# Words of a published name that do not tell two models apart. `-HF` repositories hold the same weights.
TAIL = re.compile(r"[-_ ]+(instruct|hf|chat|it|base|sft)$", re.IGNORECASE)
VERSION = re.compile(r"(?<=[-_ ])v(?=\d)", re.IGNORECASE)  # llava-v1.5
IN_BRACKETS = re.compile(r"\s*\([^)]*\)")
LEAST = 4  # letters of the beginning of a name
MOST = 4  # names that a beginning may stand for


def find_official(axis: str, text: str, conf: Path | ConfFolder) -> tuple[str, ...]:
    """The values of `axis` that `text` names: one for a whole name, several for the beginning of some, () for none or too many."""
    text = text.strip().strip("'\"")
    known = {name: set(list_names(name, data)) for name, data in read_files(axis, conf)}
    if whole := [name for name, names in known.items() if text.lower() in {each.lower() for each in names if "/" in each}]:
        return tuple(whole)
    word = normalize(text.rstrip("/").rpartition("/")[2])
    same = [name for name, names in known.items() if word in map(normalize, names)]
    begun = [name for name, names in known.items() if len(word) >= LEAST and any(normalize(each).startswith(word) for each in names)]
    found = dict.fromkeys((*same, *begun))  # MiniCPM-V is a whole name, and the beginning of two others
    return tuple(found) if len(found) <= MOST else tuple(same)


def read_files(axis: str, conf: Path | ConfFolder) -> Iterator[tuple[str, dict[str, Any]]]:
    conf = as_conf_folder(conf)
    for file in (conf.find(axis, name) for name in conf.list_groups().get(axis, ())):
        if data := read_yaml(file):
            yield file.stem, data


def read_yaml(file: Path) -> dict[str, Any]:
    """{} for a file that is no mapping or cannot be read: composing reports it."""
    import yaml

    try:
        data = yaml.load(file.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return data if isinstance(data, dict) else {}


def list_names(name: str, data: dict[str, Any]) -> Iterator[str]:
    source = data.get("source")
    given = [name, data.get("title"), *(data.get("chips") or ())]
    given += [value for key, value in source.items() if key not in ("kind", "revision", "path")] if isinstance(source, dict) else []
    for text in given:
        if isinstance(text, str) and text:
            yield text
            if "/" in text:
                yield text.rpartition("/")[2]
    if isinstance(data.get("title"), str):
        yield IN_BRACKETS.sub("", data["title"])
        yield from re.findall(r"\(([^)]*)\)", data["title"])


def normalize(name: str) -> str:
    """Letters and digits of a published name, without what does not tell models apart."""
    while TAIL.search(name):
        name = TAIL.sub("", name)
    return plain(VERSION.sub("", name))
