"""dataset_info.json: data sets by name, in the shapes of two tools. How a set names the keys of its rows is in trainer.data.sources.column_map.

{"NAME": {"file_name": "rows.json", "num_samples": 100, "columns": {...}, ...}, ...}     hiyouga/LLaMA-Factory: src/llamafactory/data/parser.py
[{"dataset_path": "rows.jsonl", "subsets": [...], "columns": {...}}, ...]                modelscope/ms-swift: swift/llm/dataset/register.py
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.contract.row_sets.row_files import NotFound

INFO_FILE = "dataset_info.json"
PARENTS = 3  # folders above a file of rows in which a dataset_info.json that lists it is looked for
SWIFT_NAMES = ("dataset_path", "ms_dataset_id", "hf_dataset_id")
HUB_URLS = {"hf_hub_url": "HF", "ms_hub_url": "MS", "om_hub_url": "MS"}


@dataclass(frozen=True, kw_only=True)
class InfoEntry:
    """One data set of the file `info`."""

    info: Path
    name: str
    content: dict[str, Any]

    @property
    def of_swift(self) -> bool:
        return any(key in self.content for key in SWIFT_NAMES)

    @property
    def path(self) -> Path | None:
        """The file or folder of its rows, if it names one."""
        given = self.content.get("dataset_path" if self.of_swift else "file_name")
        return self.info.parent / given if isinstance(given, str) and given else None

    @property
    def hub_names(self) -> tuple[tuple[str, str], ...]:
        """(hub, OWNER/NAME) of each hub that has it."""
        keys = {"hf_dataset_id": "HF", "ms_dataset_id": "MS"} if self.of_swift else HUB_URLS
        return tuple((hub, self.content[key]) for key, hub in keys.items() if isinstance(self.content.get(key), str) and self.content[key])

    @property
    def splits(self) -> tuple[str, ...]:
        given = self.content.get("split") or "train"
        return tuple(map(str, given)) if isinstance(given, list) else (str(given),)

    @property
    def samples(self) -> int:
        given = self.content.get("num_samples")
        return given if isinstance(given, int) and not isinstance(given, bool) and given > 0 else 0


def read_info(file: Path) -> tuple[InfoEntry, ...]:
    """Its data sets, and none of those that are no objects. Raises OSError, ValueError and RecursionError for what is no JSON."""
    content = json.loads(file.read_text(encoding="utf-8-sig"))
    if isinstance(content, dict):
        return tuple(InfoEntry(info=file, name=name, content=each) for name, each in content.items() if isinstance(each, dict))
    listed = [each for each in content if isinstance(each, dict)] if isinstance(content, list) else []
    found = [InfoEntry(info=file, name=name, content=each) for each in listed for name in names_of(each)]
    return tuple(entry for entry in found if entry.of_swift)


def names_of(content: dict[str, Any]) -> tuple[str, ...]:
    return tuple(content[key] for key in SWIFT_NAMES if isinstance(content.get(key), str) and content[key])


def find_named(name: str, files: tuple[Path, ...]) -> InfoEntry | None:
    """The data set `name` of the first file that has it. Raises NotFound for a file that cannot be read."""
    for file in files:
        try:
            entries = read_info(file)
        except (OSError, ValueError, RecursionError) as error:
            raise NotFound(
                problem=f"is a name, and {file} cannot be read: {error}", fix="correct that file, or name the file of rows"
            ) from error
        for entry in entries:
            if entry.name == name:
                return entry
    return None


def list_names(files: tuple[Path, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(entry.name for file in files for entry in read_info(file)))


def entries_of_file(file: Path) -> tuple[tuple[InfoEntry, ...], Path | None, Exception | None]:
    """The data sets that have `file` for their rows, of the nearest dataset_info.json that lists it, beside it or above; that file; and why the one
    beside it cannot be read. One further above that cannot be read is not about this file."""
    for above in (file.parent, *list(file.parent.parents)[:PARENTS]):
        info = above / INFO_FILE
        try:
            entries = read_info(info)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, ValueError, RecursionError) as error:
            if above == file.parent:
                return (), info, error
            continue
        listed = {entry.name: entry for entry in entries if entry.path and lists(entry.path, file, above)}
        if listed:
            return tuple(listed.values()), info, None
    return (), None, None


def lists(named: Path, file: Path, above: Path) -> bool:
    """Whether a path of the dataset_info.json in `above` is the file, or the folder that has it."""
    return named == file or (named != above and named in file.parents)


def choose_subsets(entry: InfoEntry, wanted: tuple[str, ...]) -> tuple[str, ...]:
    """The subsets of a data set that are meant, '' for the one without a name. Raises NotFound."""
    if not entry.of_swift:
        given = entry.content.get("subset")
        return wanted or ((str(given),) if given else ("",))
    listed = entry.content.get("subsets")
    named = {str(each.get("name") or each.get("subset")): str(each.get("subset")) for each in listed or () if isinstance(each, dict)}
    named |= {each: each for each in listed or () if isinstance(each, str)}
    if wanted == ("all",) and "all" not in named:
        return tuple(named.values())
    if unknown := [name for name in wanted if named and name not in named]:
        raise NotFound(
            problem=f"has no subset {unknown[0]!r}; {entry.info} lists {', '.join(named)}", fix="name one of them after the colon"
        )
    if not wanted and len(named) > 1:
        fix = f"write {entry.name}:{next(iter(named))}, or {entry.name}:all"
        raise NotFound(problem=f"has the subsets {', '.join(named)}", fix=fix)
    chosen = [named.get(name, name) for name in wanted] or list(named.values())
    return tuple("" if name == "default" else name for name in chosen) or ("",)
