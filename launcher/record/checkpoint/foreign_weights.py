"""What the files of a folder say that no run of ours wrote, if it holds an adapter or is of ms-swift: model, and the settings of the adapter.

Adapters of peft, TRL, LLaMA-Factory, ms-swift and Unsloth have one form. Their target_modules is a list, full names, or a regex over the names of that day:
what the adapter changes is read from its tensors.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launcher.config.schema import Config
from launcher.config.source import RecordedWeights
from launcher.errors import ConfigRefused
from launcher.memory.states import linear_shapes
from launcher.record.checkpoint.checkpoint_record import CheckpointRecord
from launcher.record.checkpoint.swift_settings import read_swift
from launcher.record.checkpoint_reference import ADAPTER_CONFIG, FoundCheckpoint, exists
from launcher.weights.identity import find_differences, read_object
from trainer.contract import InputRefused, Lora
from trainer.contract.weight_files import is_safetensors, read_header, weight_files

FACTOR = re.compile(r"\.(?P<leaf>[^.]+)\.lora_(?:A|B|embedding_A|embedding_B)\b")


def read_foreign(found: FoundCheckpoint, config: Config, models: Mapping[str, Mapping[str, Any]]) -> CheckpointRecord | None:
    """None for any other folder. Raises ConfigRefused for an adapter whose files cannot be read."""
    folder = Path(found.path)
    adapter = exists(folder / ADAPTER_CONFIG)
    if found.host or not (adapter or read_swift(folder)):
        return None
    named = str(read_object(folder / ADAPTER_CONFIG).get("base_model_name_or_path") or "") if adapter else ""
    base = config.stage.base or next(iter(found.bases), "") or named
    name = find_model(Path(base) if adapter else folder, base, config, models)
    weights = RecordedWeights(run_id="", stage="", model=name, adapter=read_adapter(folder, config) if adapter else None)
    return CheckpointRecord(weights=weights, model=None)


def find_model(folder: Path, base: str, config: Config, models: Mapping[str, Mapping[str, Any]]) -> str:
    """By the config of the base, or by its id on a hub; the chosen model where neither says more."""
    if exists(folder / "config.json"):
        content = read_object(folder / "config.json")
        fitting = [name for name, model in models.items() if not find_differences(model, content)]
    else:
        ids = {name: {str(model["source"].get(key, "")).lower() for key in ("id", "modelscope")} - {""} for name, model in models.items()}
        fitting = [name for name, known in ids.items() if base.lower() in known]
    return config.model.name if config.model.name in fitting or not fitting else fitting[0]


def read_adapter(folder: Path, config: Config) -> Lora:
    content = read_object(folder / ADAPTER_CONFIG)
    r, alpha, dropout = (content.get(key) for key in ("r", "lora_alpha", "lora_dropout"))
    if not isinstance(r, int) or not isinstance(alpha, int | float):
        raise ConfigRefused(
            f"{folder / ADAPTER_CONFIG}: peft_type is {content.get('peft_type')!r}, r is {r!r} and lora_alpha is {alpha!r}: only LoRA is read"
        )
    known = linear_shapes(config.model.architecture.text)
    leaves = find_leaves(folder)
    return Lora(
        r=r,
        alpha=int(alpha) if alpha == int(alpha) else alpha,  # type: ignore[arg-type]
        dropout=float(dropout or 0.0),
        targets=tuple(name for name in known if name in leaves) or tuple(known),
        rank_stabilised=bool(content.get("use_rslora")),
    )


def find_leaves(folder: Path) -> set[str]:
    """The last parts of the names of the layers that the adapter changes; () for a file without a header."""
    try:
        files = [file for file in weight_files(folder) if is_safetensors(file) and file.is_file()]
        names = [name for file in files for name, _, _ in read_header(file)]
    except InputRefused as error:
        raise ConfigRefused(f"stage.checkpoint: {error}") from error
    return {match["leaf"] for name in names if (match := FACTOR.search(name))}
