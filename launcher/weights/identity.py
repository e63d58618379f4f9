"""Which model a folder holds: its config.json compared with the numbers of conf/model. Reads small files and no weights."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.config.conf_folder import ConfFolder, as_conf_folder
from launcher.errors import ConfigRefused
from trainer.contract import InputRefused
from trainer.contract.adapter_files import read_json_object
from trainer.contract.checkpoint_files import find_state_file
from trainer.contract.weight_files import ADDED_TOKENS, read_added_tokens

CONFIG_FILE, ADAPTER_CONFIG_FILE = "config.json", "adapter_config.json"
# model_type of a config -> our family; "minicpmv" is read by `family_of`. tests/launcher/weights checks them against the trainer's families.
FAMILIES = {
    "llava": "llava",
    "qwen2_5_vl": "qwen2_5_vl",
    "internvl": "internvl",
    "qwen2_5_omni": "qwen2_5_omni",
    "qwen2_5_omni_thinker": "qwen2_5_omni",
    "minicpmv4_6": "minicpm_v_4_6",
    "minicpmv": "minicpm_v_2_6",
    "minicpmo": "minicpm_o_2_6",
    "omnilmm": "omnilmm",
}
# Keys that determine the shape of a weight, as in trainer/models/architecture.py: SHAPE.
TEXT_KEYS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "head_dim",
)
VISION_KEYS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "patch_size",
    "image_size",
    "out_hidden_size",
)
NAMES = {"num_hidden_layers": "depth", "num_attention_heads": "num_heads"}  # of Qwen's vision towers
# What a published config leaves out because it is the default of its class: transformers, LlamaConfig.
DEFAULTS = {"llama": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}}


@dataclass(frozen=True, kw_only=True)
class Identity:
    """`model`: the name in conf/model, '' for none of ours; then `nearest` is the one with the fewest `differences`. `family`: '' if the trainer
    has none for this `model_type`."""

    model_type: str
    family: str
    model: str = ""
    nearest: str = ""
    differences: tuple[str, ...] = ()


def load_models(conf: Path | ConfFolder) -> dict[str, dict[str, Any]]:
    """The files of the axis `model` by name, as plain data."""
    from yaml import safe_load

    conf = as_conf_folder(conf)
    return {name: safe_load(conf.find("model", name).read_text(encoding="utf-8")) for name in conf.list_groups()["model"]}


def identify(folder: Path, models: Mapping[str, Mapping[str, Any]]) -> Identity:
    """Which of `models` the folder holds. An adapter is of the model of its base. Raises ConfigRefused for a folder without a readable config."""
    content, state = read_config(folder), recorded_model(folder)
    if content is None and state:
        family = str(models[state]["family"]) if state in models else ""
        return Identity(model_type="adapter", family=family, model=state if state in models else "")
    if content is None:
        raise ConfigRefused(f"{folder} has no {CONFIG_FILE}, so its model is not known")
    family = family_of(content)
    own = {name: find_differences(model, content) for name, model in models.items() if model["family"] == family}
    whole = [name for name, lines in own.items() if not lines]
    kind = str(content.get("model_type", ""))
    if whole:
        return Identity(model_type=kind, family=family, model=state if state in whole else whole[0])
    nearest = min(own, key=lambda name: len(own[name]), default="")
    return Identity(model_type=kind, family=family, nearest=nearest, differences=tuple(own.get(nearest, ())))


def read_config(folder: Path) -> dict[str, Any] | None:
    """config.json of the folder, or of the base of an adapter, and the tokens that a run has added; None if there is none. Raises ConfigRefused
    for one that cannot be read."""
    base = folder
    if (folder / ADAPTER_CONFIG_FILE).is_file() and not (folder / CONFIG_FILE).is_file():
        named = read_object(folder / ADAPTER_CONFIG_FILE).get("base_model_name_or_path")
        base = Path(str(named)) if named else folder
    if not (base / CONFIG_FILE).is_file():
        return None
    added = read_added_tokens(base)
    return read_object(base / CONFIG_FILE) | ({ADDED_TOKENS: list(added)} if added else {})


def read_object(path: Path) -> dict[str, Any]:
    try:
        return read_json_object(path, part="folder")
    except InputRefused as error:
        raise ConfigRefused(str(error)) from error


def recorded_model(folder: Path) -> str:
    """The model that a checkpoint of ours names, or ''."""
    try:
        file = find_state_file(folder)
        found = json.loads(file.read_text(encoding="utf-8"))["spec"]["model.name"] if file else ""
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    return str(found)


def family_of(content: Mapping[str, Any]) -> str:
    """Two families have the type minicpmv: the later one divides images into slices."""
    kind = str(content.get("model_type", ""))
    if kind == "minicpmv" and not content.get("slice_mode") and "vision_config" not in content:
        return "omnilmm_3b"
    return FAMILIES.get(kind, "")


def find_differences(model: Mapping[str, Any], content: Mapping[str, Any]) -> list[str]:
    """The lines `part.key: ours, the folder has its`, of each number that the config states. Also where the family is another one."""
    family = family_of(content)
    if family != model["family"]:
        kind = content.get("model_type", "none")
        return [f"family: {model['family']}, the folder has model_type {kind}{f' (family {family})' if family else ''}"]
    root = part_of(content, "thinker_config") or content
    text = part_of(root, "text_config") or part_of(root, "llm_config") or root
    parts = {
        "text": {**DEFAULTS.get(str(text.get("model_type")), {}), **text},
        "vision": part_of(root, "vision_config") or part_of(root, "tower"),
    }
    unsure = (model["architecture"].get("options") or {}).get("unverified", ())
    return [
        f"architecture.{part}.{key}: {wanted}, the folder has {found}"
        for part, keys in (("text", TEXT_KEYS), ("vision", VISION_KEYS))
        for key in keys
        if f"{part}.{key}" not in unsure
        and (wanted := wanted_value(model["architecture"][part], key)) is not None
        and (found := one_side(parts[part].get(key, parts[part].get(NAMES.get(key, key))))) is not None
        and found != wanted
        and not (key == "vocab_size" and content.get(ADDED_TOKENS) and isinstance(found, int) and found > wanted)
    ]


def part_of(content: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """A section of a config; {} where there is none, or something else."""
    found = content.get(key)
    return found if isinstance(found, dict) else {}


def wanted_value(part: Mapping[str, Any], key: str) -> Any:
    value = part.get(key)
    return value if value is not None else (part.get("options") or {}).get(key)


def one_side(value: Any) -> Any:
    """Some configs write the side of a square twice."""
    return value[0] if isinstance(value, list) and len(set(map(str, value))) == 1 else value
