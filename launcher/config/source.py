"""Short forms of `model.source`: `model.source=modelscope` for its kind, `model.source=/FOLDER` for a folder, and a path that sets the kind."""

from collections.abc import Sequence
from typing import get_args

from launcher.config.schema import SourceKind
from launcher.errors import ConfigRefused

KEY, KIND, PATH = "model.source", "model.source.kind", "model.source.path"
KINDS: tuple[str, ...] = get_args(SourceKind)


def expand_source(override: str) -> str:
    """The override with the short form written out. Raises ConfigRefused for `model.source=` with another text."""
    key, equals, text = override.partition("=")
    value = text.strip().strip("'\"")
    if key != KEY or not equals or value.startswith("{"):
        return override
    if value in KINDS:
        return f"{KIND}={value}"
    if value.startswith(("/", "./", "../", "~")) or value in (".", ".."):
        return f"{PATH}={text}"
    repository = f"; a repository of a hub: model.source.id={value}" if value.count("/") == 1 else ""
    raise ConfigRefused(f"{value!r} is no source; valid are {', '.join(KINDS)}, or a folder: model.source.path=FOLDER{repository}")


def kind_that_follows(keys: Sequence[str]) -> str:
    """The override that model.source.path implies, or '': a folder is what the weights are read from."""
    return f"++{KIND}=path" if PATH in keys and KIND not in keys else ""
