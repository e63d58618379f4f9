"""Which modules of a model an adapter changes, read from the names of its tensors.

The names are those of the transformers that trained it: before 4.52 the layers of Qwen2.5-VL and LLaVA had other names than today, and peft, which
looks for names by the config, leaves out what it does not find and answers as the bare base (huggingface/peft#2699). Here every tensor must land on a
module of the model, or the adapter is refused.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch

from trainer.contract import InputRefused
from trainer.contract.adapter_files import ADAPTER_CONFIG, read_adapter_config
from trainer.contract.listing import list_some
from trainer.contract.wording import plural
from trainer.tensor.naming import name_in_memory
from trainer.tensor.stream import TensorSource, open_tensors

PREFIX = "base_model.model."  # of the names in an adapter's file
# With `.default`, the adapter's own name, in files that a whole training state was turned into. The magnitude is DoRA's (arXiv 2402.09353).
FACTOR = re.compile(
    r"(?P<module>.+)\.(?:lora_(?P<factor>[AB])(?:\.default)?\.(?P<kind>weight|bias)|lora_embedding_(?P<table>[AB])(?:\.default)?"
    r"|lora_(?P<magnitude>magnitude)_vector(?:\.default)?(?:\.weight)?)"
)
ROWS = re.compile(r"(?P<module>.+)\.token_adapter\.trainable_tokens_delta(?:\.default)?")
WRAPPER = re.compile(r"^base_model\.model\.|\.token_adapter(?=\.)|\.base_layer(?=\.)|\.(?:modules_to_save\.default|original_module)(?=\.)")
SHOWN, SHOWN_ROWS = 3, 5
# What peft saves of an adapter that this version cannot read, by a part of the tensor's name.
OTHER_TENSORS = ("lora_", "token_adapter", "hada_", "lokr_", "oft_", "vera_", "ia3_", "prompt_", "router.")
# Config keys that are read, or that describe training only. Another key that is set changes what the tensors mean.
KNOWN = frozenset(
    (
        *(
            "alpha_pattern",
            "auto_mapping",
            "base_model_name_or_path",
            "bias",
            "corda_config",
            "eva_config",
            "exclude_modules",
            "fan_in_fan_out",
        ),
        *("inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha", "lora_bias"),
        *("lora_dropout", "lora_ga_config", "megatron_config", "megatron_core", "modules_to_save", "peft_type", "peft_version"),
        *("qalora_group_size", "r", "rank_pattern", "revision", "runtime_config", "target_modules", "task_type", "use_dora", "use_rslora"),
        *("ensure_weight_tying", "trainable_token_indices"),
        # ms-swift before 3.0 wrote its own settings into the same file: swift/tuners/lora.py, LoRAConfig
        *("lora_dtype", "lorap_lr_ratio", "lorap_emb_lr", "swift_type"),
    )
)


@dataclass(frozen=True, kw_only=True)
class Factors:
    """The low-rank update of one module. `name`: of the module in the file, by which the config's patterns were meant. `table`: of an embedding.
    `tensors`: A, B, and where it has them bias and magnitude. `alpha`: of the config; `scale`: of B A."""

    name: str
    table: bool
    tensors: Mapping[str, TensorSource]
    alpha: float
    scale: float

    @property
    def rank(self) -> int:
        return self.tensors["A"].shape[0]


@dataclass(frozen=True, kw_only=True)
class TokenRows:
    """Rows of embeddings or head that replace those of the base. `ids`: of the rows; `values`: (number of ids, width)."""

    ids: tuple[int, ...]
    values: TensorSource


@dataclass(frozen=True, kw_only=True)
class AdapterLayout:
    """Keys are names in memory: `factors` of modules, `whole` of parameters that were trained whole, `rows` of parameters of which single rows were. Rows
    of embeddings are also those of a head that is tied to them."""

    folder: Path
    config: Mapping[str, Any]
    factors: Mapping[str, Factors] = field(default_factory=dict)
    whole: Mapping[str, TensorSource] = field(default_factory=dict)
    rows: Mapping[str, TokenRows] = field(default_factory=dict)

    @property
    def dora(self) -> bool:
        return any("magnitude" in one.tensors for one in self.factors.values())


def read_layout(folder: Path, model: torch.nn.Module) -> AdapterLayout:
    """`model`: the base, without wrappers, which may be on the meta device. Raises InputRefused for another kind of adapter, and for one with tensors
    that are of no module of the model."""
    config = read_adapter_config(folder)
    refuse_kind(folder, config)
    tensors = open_adapter(folder)
    refuse_tensors(folder, tensors)
    wanted = {name: wanted_parameter(name) for name in tensors}
    places = find_parameters(model, set(wanted.values()))
    refuse_unplaced(folder, model, [name for name in tensors if wanted[name] not in places], wanted)
    own = {name: places[wanted[name]] for name in tensors}
    rows = {own[name]: read_rows(folder, config, name, source) for name, source in tensors.items() if ROWS.fullmatch(name)}
    whole = {own[name]: source for name, source in tensors.items() if not ROWS.fullmatch(name) and not FACTOR.fullmatch(name)}
    refuse_rows(folder, config, rows, model)
    return AdapterLayout(folder=folder, config=config, factors=read_factors(folder, config, tensors, own), whole=whole, rows=rows)


def read_factors(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, TensorSource], places: Mapping[str, str]
) -> dict[str, Factors]:
    """`places`: name of a tensor -> the parameter that it changes. Raises InputRefused for two updates of one module, and for parts that are missing."""
    parts: dict[str, dict[str, TensorSource]] = {}
    names: dict[str, str] = {}
    tables = set()
    for name, source in tensors.items():
        if not (match := FACTOR.fullmatch(name)):
            continue
        module = places[name].rpartition(".")[0]
        if names.setdefault(module, match["module"]) != match["module"]:
            raise InputRefused(
                f"stage.checkpoint: the adapter {folder} has two updates of {module}: of {names[module]} and of {match['module']}."
            )
        part = match["table"] or match["factor"] or "magnitude"
        parts.setdefault(module, {})["bias" if match["kind"] == "bias" else part] = source
        tables |= {module} if match["table"] else set()
    if config.get("use_dora") and not any("magnitude" in of_module for of_module in parts.values()):
        raise InputRefused(
            f"{folder / ADAPTER_CONFIG}: use_dora is set, and there is no magnitude among the tensors. Copy the adapter again."
        )
    return {module: make_factors(folder, config, names[module], of_module, table=module in tables) for module, of_module in parts.items()}


def read_rows(folder: Path, config: Mapping[str, Any], name: str, values: TensorSource) -> TokenRows:
    """peft lists the ids by module, or once for the embeddings. Raises InputRefused for another form."""
    listed, found = config.get("trainable_token_indices") or (), ROWS.fullmatch(name)
    assert found is not None
    ids = next((ids for key, ids in listed.items() if found["module"].endswith(key)), ()) if isinstance(listed, dict) else listed
    if not isinstance(ids, (list, tuple)) or not all(isinstance(one, int) for one in ids):
        raise InputRefused(f"{folder / ADAPTER_CONFIG}: trainable_token_indices has no list of numbers for {name}. Copy the adapter again.")
    return TokenRows(ids=tuple(ids), values=values)


def open_adapter(folder: Path) -> dict[str, TensorSource]:
    """Its tensors by name, without the frozen copies that peft keeps beside modules that were trained whole."""
    tensors = {key.removeprefix(PREFIX): source for key, source in open_tensors(folder).items()}
    return {name: source for name, source in tensors.items() if ".original_module." not in name}


def base_name(name: str) -> str:
    """A parameter's name before peft wrapped the model."""
    return WRAPPER.sub("", name)


def wanted_parameter(name: str) -> str:
    """The name of the parameter that a tensor of an adapter's file changes, in the version that wrote the file."""
    if match := FACTOR.fullmatch(name):
        return f"{match['module']}.{'bias' if match['kind'] == 'bias' else 'weight'}"
    rows = ROWS.fullmatch(name)
    return f"{rows['module']}.weight" if rows else plain(name)


def plain(name: str) -> str:
    """The base's name of a tensor that was trained whole; the files of an adapter leave out the adapter's own name."""
    return base_name(name).replace(".modules_to_save.", ".")


def make_factors(folder: Path, config: Mapping[str, Any], module: str, tensors: Mapping[str, TensorSource], *, table: bool) -> Factors:
    """Raises InputRefused for a module without both factors, and for a config without alpha."""
    if not {"A", "B"} <= tensors.keys():
        raise InputRefused(f"{folder}: {module} has only one of its two factors. Copy the adapter again.")
    rank = tensors["A"].shape[0]
    patterns = config.get("alpha_pattern") or {}
    alpha = next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), config.get("lora_alpha"))
    if not isinstance(alpha, (int, float)) or not rank:
        raise InputRefused(
            f"{folder / ADAPTER_CONFIG}: lora_alpha is {alpha!r}, and the rank of {module} is {rank}. Copy the adapter again."
        )
    scale = float(alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank)
    return Factors(name=module, table=table, tensors=tensors, alpha=alpha, scale=scale)


def find_parameters(model: torch.nn.Module, names: set[str]) -> dict[str, str]:
    """Name of a parameter in a file of any version -> its name in memory; without those that the model does not have."""
    has = model.state_dict(keep_vars=True)
    known = {name: name for name in names if name in has}
    found = name_in_memory(model, sorted(names - known.keys())) if names - known.keys() else {}
    # CLIP's and SigLIP's towers had one level more; transformers drops it when it loads a model of its own class only.
    shorter = {name: name.replace(".vision_model.", ".") for name in names - known.keys() - found.keys() if ".vision_model." in name}
    inside = find_parameters(model, set(shorter.values())) if shorter else {}
    return known | found | {name: inside[short] for name, short in shorter.items() if short in inside}


# --------------------------------------------------------------------------------------------------------------- refusals


def refuse_kind(folder: Path, config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    wrong = [f"{key} is {value!r}" for key, value in config.items() if value and key not in KNOWN]
    if kind != "LORA":
        wrong.insert(0, f"peft_type is {kind!r}")
    if wrong:
        raise InputRefused(
            f"{folder / ADAPTER_CONFIG}: {'; '.join(wrong)}: only LoRA is read (with DoRA, rank-stabilised scales, ranks and alphas by layer, biases, "
            "whole modules and rows of tokens). Merge this adapter with peft's merge_and_unload, and name the merged folder in stage.checkpoint."
        )


def refuse_tensors(folder: Path, tensors: Mapping[str, TensorSource]) -> None:
    unknown = [name for name in tensors if not FACTOR.fullmatch(name) and not ROWS.fullmatch(name)]
    other = [name for name in unknown if any(part in name for part in OTHER_TENSORS)]
    if other:
        raise InputRefused(
            f"{folder}: {list_some(other, SHOWN)} cannot be read, only LoRA of linear layers and embeddings, and rows of tokens. Merge this "
            "adapter with peft's merge_and_unload, and name the merged folder in stage.checkpoint."
        )
    if not tensors:
        raise InputRefused(
            f"{folder}: its weight file has no tensors. Copy the adapter again; one that was saved under ZeRO 3 may be empty."
        )


def refuse_rows(folder: Path, config: Mapping[str, Any], rows: Mapping[str, TokenRows], model: torch.nn.Module) -> None:
    """Raises InputRefused for rows that the base does not have: a run that adds tokens gives them to it."""
    if config.get("trainable_token_indices") and not rows:
        raise InputRefused(
            f"{folder / ADAPTER_CONFIG}: trainable_token_indices is set, and there are no rows among the tensors. Copy the adapter again."
        )
    has = model.state_dict(keep_vars=True)
    wrong = [
        f"the rows {list(one.ids)[:SHOWN_ROWS]} of {name} are {list(one.values.shape)}, and the base has {list(has[name].shape)}"
        for name, one in rows.items()
        if tuple(one.values.shape) != (len(one.ids), *has[name].shape[1:]) or not all(0 <= row < len(has[name]) for row in one.ids)
    ]
    if wrong:
        raise InputRefused(
            f"stage.checkpoint: the adapter {folder} does not fit its base: {list_some(wrong, SHOWN, '; ')}. Set model.add_tokens to what its run had, name "
            "the model that it was trained on in stage.base, or name another checkpoint."
        )


def refuse_unplaced(folder: Path, model: torch.nn.Module, lost: list[str], wanted: Mapping[str, str]) -> None:
    if not lost:
        return
    similar = max(model.state_dict(keep_vars=True), key=partial(count_shared, wanted[lost[0]]))
    has = f", which has {similar}" if count_shared(wanted[lost[0]], similar) > 1 else ""
    raise InputRefused(
        f"stage.checkpoint: {plural(len(lost), 'tensor')} of the adapter {folder} without a module in its base: {list_some(lost, SHOWN)}. Looked for: "
        f"{list_some([wanted[name] for name in lost], SHOWN)}, as they are written and by the older names of transformers, in {type(model).__name__}{has}. The "
        "adapter was trained on another model: name its base in stage.base=FOLDER and its model in model=NAME, or name another checkpoint."
    )


def count_shared(first: str, second: str) -> int:
    """How many parts at the end of two names are equal."""
    pairs = zip(reversed(first.split(".")), reversed(second.split(".")), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
