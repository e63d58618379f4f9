"""Which files of a repository are needed: config, index, weights, tokenizer, image processor, chat template and licence.

The same files as the trainer downloads itself (`trainer/train/model.py: HUB_FILES`), at the top of the repository only. Code is left out, and so
are weights that are there twice: .bin files beside safetensors, and safetensors that the index does not name.
"""

import json
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from launcher.errors import HubFailed
from launcher.weights.manifest import HubFile
from trainer.contract.weight_files import INDEX, PICKLED, PICKLED_INDEX, WEIGHTS

SMALL = ("*.json", "*.jinja", "*.model", "*.txt", "LICEN[CS]E*", "NOTICE*", "README.md")


def is_plain_path(path: str) -> bool:
    """Whether it is a relative path that stays below its folder."""
    return bool(path) and not {"", ".", ".."} & set(path.split("/")) and "\\" not in path and path.isprintable()


def refuse_paths(files: Iterable[HubFile], name: str) -> None:
    """Raises HubFailed for a name that would be written outside of the folder, or that is no plain relative path."""
    for file in files:
        if not is_plain_path(file.path):
            raise HubFailed(f"{name} lists a file {file.path!r}, which leaves the folder or is no plain name: nothing was written")


def small_files(files: Sequence[HubFile]) -> tuple[HubFile, ...]:
    """All that is needed except the weights; with the index of the weights."""
    top = [file for file in files if "/" not in file.path and any(fnmatchcase(file.path, pattern) for pattern in SMALL)]
    unused = PICKLED_INDEX if any(file.path.endswith(".safetensors") for file in files) else INDEX
    return tuple(file for file in top if file.path != unused)


def index_of(files: Sequence[HubFile]) -> str:
    """The file that names the weight files, or ''."""
    names = {file.path for file in files}
    candidates = (INDEX,) if any(name.endswith(".safetensors") for name in names) else (PICKLED_INDEX,)
    return next((name for name in candidates if name in names), "")


def weight_names(files: Sequence[HubFile], folder: Path, name: str) -> tuple[HubFile, ...]:
    """The weight files; the index, where there is one, is already in `folder`. Raises HubFailed if the repository lacks one."""
    known = {file.path: file for file in files}
    index = index_of(files)
    if index:
        wanted = read_index(folder / index, name)
    elif WEIGHTS in known:
        wanted = (WEIGHTS,)
    else:
        wanted = (PICKLED,)
    if missing := [path for path in wanted if path not in known]:
        what = (
            f"{index} names {', '.join(missing[:3])}"
            if index
            else f"neither {WEIGHTS} nor {PICKLED} nor an index of several files is listed"
        )
        raise HubFailed(f"{name} is not whole on the hub: {what}{', which it does not list' if index else ''}")
    return tuple(known[path] for path in wanted)


def read_index(path: Path, name: str) -> tuple[str, ...]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        return tuple(sorted({str(shard) for shard in found.values()}))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise HubFailed(f"{name}: {path.name} is not an index of weights") from error
