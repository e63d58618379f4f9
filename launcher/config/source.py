"""The section `model.source`, and its short forms: `model.source=modelscope` for its kind, `model.source=/FOLDER` for a folder, and a path that sets
the kind."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from launcher.errors import ConfigRefused

SourceKind = Literal["random", "hub", "modelscope", "path"]
KEY, KIND, PATH = "model.source", "model.source.kind", "model.source.path"
KINDS: tuple[str, ...] = get_args(SourceKind)


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """Where weights come from: `random` (architecture only), `hub` (Hugging Face), `modelscope`, or `path` (a folder). `id`, `modelscope`: the
    repository on either hub, '' = not known. `revision`: a commit, branch or tag there. `path`: with modelscope the folder that `omnilaunch model
    fetch` made. `endpoint`: the address of a mirror of the Hugging Face hub, '' = the caller's HF_ENDPOINT, or the hub itself. `dtype`: of the published
    weights, '' = not known."""

    kind: SourceKind
    id: str = ""
    modelscope: str = ""
    revision: str = ""
    path: str = ""
    endpoint: str = ""
    dtype: Literal["", "float32", "float16", "bfloat16"] = ""


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
