"""The config of a peft adapter and the base that it names, read without torch. Standard library only, so that the launcher asks the same.

What adapter_config.json says of layers is not used to find them: each project writes another form (peft a list of names, LLaMA-Factory a list of
full names, ms-swift and Unsloth a regex, all of them with the names of the transformers of that day). The tensors of the file say it exactly.
"""

import json
import re
from pathlib import Path
from typing import Any

from trainer.contract.spec import InputRefused, TrainSpec

ADAPTER_CONFIG = "adapter_config.json"
BASE_KEY = "base_model_name_or_path"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """Raises InputRefused for a file that is no JSON object."""
    return read_json_object(folder / ADAPTER_CONFIG, part="adapter")


def read_json_object(file: Path, *, part: str) -> dict[str, Any]:
    """Raises InputRefused for a file that is no JSON object. `part`: what has to be copied again then."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputRefused(f"{file} is no JSON file: {str(error)[:200]}. Copy the {part} again") from error
    if not isinstance(content, dict):
        raise InputRefused(f"{file} holds no JSON object. Copy the {part} again")
    return content


def named_base(folder: Path) -> str:
    """base_model_name_or_path of the adapter in `folder`, a folder or the id of a hub; '' for none, and where there is no adapter."""
    if not (folder / ADAPTER_CONFIG).is_file():
        return ""
    named = read_adapter_config(folder).get(BASE_KEY)
    return named if isinstance(named, str) else ""


def find_base(folder: Path, spec: TrainSpec) -> str:
    """The base of the adapter in `folder`: a folder, or the hub's id of the model; '' where there is no adapter. stage.base comes first, then the
    folder that the adapter names, then what model.source has, if the adapter names no folder that is here."""
    if not (folder / ADAPTER_CONFIG).is_file():
        return ""
    named, source = named_base(folder), spec.model.source
    if spec.stage.base:
        return spec.stage.base
    if named and Path(named).is_dir():
        return named
    if source.kind == "path":
        return source.path
    if source.kind == "hub" and named.lower() == source.id.lower():
        return source.id
    return named


def describe_missing_base(folder: Path, base: str) -> str:
    """The message for an adapter whose base is not here."""
    if not base:
        return f"{folder} is an adapter, and its {ADAPTER_CONFIG} names no base. Name the folder of the model that it was trained on: stage.base=FOLDER"
    if not HUB_ID.fullmatch(base):
        return f"{folder} is an adapter, and its base {base} is not there. Name the folder that has it now: stage.base=FOLDER"
    if "bnb-4bit" in base:
        return f"{folder} is an adapter that was trained on {base}, a copy in 4 bits. Name the folder of the same model in 16 bits: stage.base=FOLDER"
    return f"{folder} is an adapter of {base}, which is not on this machine. Fetch it: omnilaunch model fetch {base} --to FOLDER; then stage.base=FOLDER"
