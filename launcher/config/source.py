"""Where weights come from: the section `stage.recorded`, which a record fills in; the section `model.source`, and its short forms,
`model.source=modelscope` for its kind, `model.source=/FOLDER` for a folder, and a path that sets the kind."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from launcher.errors import ConfigRefused
from trainer.contract import Lora

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


@dataclass(frozen=True, kw_only=True)
class RecordedWeights:
    """What the record of stage.checkpoint says about its weights. Set by the plan, never typed. `run_id`: the run that wrote them, by its stage
    `stage`; `source`: the checkpoint that it made them from, '' = none. `adapter`: its settings, null = full weights. `dtype`: of the weights,
    '' = not known. `quantized`: all linear layers but those of the groups in `kept`. `trained`: groups trained so far, () = not known.
    `differences`: of the chosen model from the recorded one. `taken`: what the config has from the record, in words.
    `notes`: what the files say that was not taken. Weights of no run of ours have no run_id."""

    run_id: str
    stage: str
    model: str
    source: str = ""
    adapter: Lora | None = None
    dtype: str = ""
    quantized: Literal["", "int8", "nf4"] = ""
    kept: tuple[str, ...] = ()
    trained: tuple[str, ...] = ()
    differences: tuple[str, ...] = ()
    taken: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


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
