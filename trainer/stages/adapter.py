"""Puts an adapter of any origin on its base: exactly the modules that its file has tensors for, whatever its config says of targets. An adapter that
changes nothing is refused: peft would answer with the bare base, without an error."""

import re
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trainer.contract import InputRefused
from trainer.contract.listing import list_some
from trainer.stages.adapter_layout import PREFIX, SHOWN, AdapterLayout, base_name, read_layout
from trainer.stages.module import find_whole_modules
from trainer.tensor.naming import find_tied

if TYPE_CHECKING:
    from peft import LoraConfig

SHOWN_LINES = 2
# Fields of adapter_config.json that peft gets as they are; the others are read from the tensors, or only describe how it was trained.
PASSED = ("bias", "fan_in_fan_out", "init_lora_weights", "lora_dropout", "task_type", "use_rslora", "ensure_weight_tying")
PASSED += ("loftq_config", "corda_config", "lora_ga_config")  # of initializations that change the base
Probe = Callable[[torch.nn.Module, Callable[[], AbstractContextManager[Any]], AdapterLayout], None]


def merge_adapter(model: torch.nn.Module, folder: Path, probe: Probe | None = None) -> torch.nn.Module:
    """The model with the adapter of `folder` merged into its weights, without peft's wrappers; a model on the meta device gets the structure
    that it has after that. `probe`: called with the adapter in place, before the merge. Raises InputRefused for an adapter of another model, and for
    one that does nothing."""
    layout = read_layout(folder, model)
    wrapped = wrap(model, layout)
    if not next(model.parameters()).is_meta:
        load_layout(wrapped, layout)
        refuse_idle(layout)
        if probe is not None:
            probe(wrapped, wrapped.disable_adapter, layout)  # type: ignore[operator]
    merged: torch.nn.Module = wrapped.merge_and_unload()  # type: ignore[operator]
    return merged


def wrap(model: torch.nn.Module, layout: AdapterLayout) -> torch.nn.Module:
    from peft import get_peft_model

    if not layout.config.get("ensure_weight_tying"):
        untie(model, layout)
    try:
        return get_peft_model(model, make_config(layout, model))  # type: ignore[arg-type]
    except (RuntimeError, ValueError) as error:  # a layer of another kind
        raise InputRefused(describe_mismatch(layout.folder, error)) from error


def make_config(layout: AdapterLayout, model: torch.nn.Module) -> "LoraConfig":
    """peft's config of the adapter, with its modules by their full names in `model`, and each with the rank and alpha that it has."""
    from peft import LoraConfig

    config = LoraConfig(**{key: layout.config[key] for key in PASSED if layout.config.get(key) is not None})
    ranks = Counter(one.rank for one in layout.factors.values())
    alphas = Counter(one.alpha for one in layout.factors.values())
    config.r = ranks.most_common(1)[0][0] if ranks else config.r
    config.lora_alpha = alphas.most_common(1)[0][0] if alphas else config.lora_alpha  # type: ignore[assignment]
    config.rank_pattern = {re.escape(name): one.rank for name, one in layout.factors.items() if one.rank != config.r}
    config.alpha_pattern = {re.escape(name): one.alpha for name, one in layout.factors.items() if one.alpha != config.lora_alpha}
    config.target_modules = "|".join(map(re.escape, layout.factors)) or "(?!)"
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    config.use_dora, config.lora_bias = layout.dora, any("bias" in one.tensors for one in layout.factors.values())
    config.modules_to_save = list(find_saved_modules(layout, model)) or None
    config.trainable_token_indices = {name.rpartition(".")[0]: list(rows.ids) for name, rows in layout.rows.items()} or None
    config.base_model_name_or_path = None  # peft writes that of the model, and warns of another one
    return config


def find_saved_modules(layout: AdapterLayout, model: torch.nn.Module) -> tuple[str, ...]:
    """The modules that were trained whole; other tensors of `whole`, such as biases, replace those of the base."""
    return find_whole_modules(model, set(layout.whole))[0] if layout.config.get("modules_to_save") else ()


def load_layout(wrapped: torch.nn.Module, layout: AdapterLayout) -> None:
    """Load the values of the adapter into a model that peft has wrapped for it. Raises InputRefused for other shapes."""
    from peft import set_peft_model_state_dict

    saved = tuple(wrapped.peft_config["default"].modules_to_save or ())  # type: ignore[index,union-attr,operator]
    inside = {name for name in layout.whole if any(name.startswith(f"{module}.") for module in saved)}
    state = {PREFIX + name: value for name, value in tensors_of(layout).items()}
    state |= {PREFIX + name: layout.whole[name].read_whole() for name in inside}
    state |= rows_of(wrapped, layout)
    if layout.config.get("ensure_weight_tying"):  # the file has them once
        tied = find_tied(wrapped.base_model.model)  # type: ignore[union-attr,arg-type]
        state |= {PREFIX + name: state[PREFIX + source] for name, source in tied.items() if PREFIX + source in state}
    try:
        loaded = set_peft_model_state_dict(wrapped, state)
    except (RuntimeError, KeyError) as error:  # other shapes
        raise InputRefused(describe_mismatch(layout.folder, error)) from error
    lost = sorted(loaded.unexpected_keys) + sorted(name for name in loaded.missing_keys if ".lora_" in name or ".modules_to_save." in name)
    if lost:
        raise InputRefused(
            f"stage.checkpoint: {list_some(lost, SHOWN)} of the adapter {layout.folder} could not be put on its base. Copy the adapter again."
        )
    base = wrapped.base_model.model  # type: ignore[union-attr]
    for name in layout.whole.keys() - inside:
        owner: Any = base.get_submodule(name.rpartition(".")[0])  # type: ignore[union-attr,operator]
        place = getattr(getattr(owner, "base_layer", owner), name.rpartition(".")[2])
        with torch.no_grad():
            place.copy_(layout.whole[name].read_whole())


def rows_of(wrapped: torch.nn.Module, layout: AdapterLayout) -> dict[str, Tensor]:
    """The rows of tokens by the names that peft gives them in a file. Rows that the model trains and the adapter does not have, as those of tokens that
    this stage adds, are those of the model."""
    found: dict[str, Tensor] = {}
    for name, module in wrapped.named_modules():
        if not name.endswith(".token_adapter") or getattr(module, "tied_adapter", None) is not None:
            continue
        trained, ids = module.trainable_tokens_delta["default"].detach().clone(), list(module.token_indices["default"])  # type: ignore[union-attr,index,operator,arg-type]
        if rows := layout.rows.get(base_name(name.removesuffix(".token_adapter") + ".weight")):
            trained[[ids.index(row) for row in rows.ids]] = rows.values.read_whole().to(trained)
        found[f"{name}.trainable_tokens_delta"] = trained
    return found


def tensors_of(layout: AdapterLayout) -> dict[str, Tensor]:
    """The low-rank parts by the names that peft gives them in a file."""
    found: dict[str, Tensor] = {}
    for module, one in layout.factors.items():
        names = {"A": "lora_embedding_A", "B": "lora_embedding_B"} if one.table else {"A": "lora_A.weight", "B": "lora_B.weight"}
        names |= {"bias": "lora_B.bias", "magnitude": "lora_magnitude_vector"}
        found |= {f"{module}.{names[part]}": source.read_whole() for part, source in one.tensors.items()}
    return found


def find_apart(layout: AdapterLayout, model: torch.nn.Module) -> dict[str, str]:
    """Tied parameter of `model` -> the one that it is tied to, where the adapter changes one of them by itself. Rows of embeddings are of both."""
    changed = {f"{module}.weight" for module in layout.factors} | layout.whole.keys()
    return {name: source for name, source in find_tied(model).items() if {name, source} & changed or name in layout.rows}


def untie(model: torch.nn.Module, layout: AdapterLayout) -> None:
    """Give a tied head its own weights, if the adapter changes it or the embeddings: a merge into weights that are used twice would change both. In
    training only one of them had the update (peft, tuners_utils.py, _check_tied_modules)."""
    tied = find_apart(layout, model)
    for name, source in tied.items():
        owner: Any = model.get_submodule(name.rpartition(".")[0])
        values = model.get_parameter(source)
        owner.weight = torch.nn.Parameter(values.detach().clone(), requires_grad=values.requires_grad)
        model.all_tied_weights_keys.pop(name)  # type: ignore[operator,union-attr]
    if tied:
        for config in (model.config, getattr(model.config, "text_config", None)):
            if getattr(config, "tie_word_embeddings", False):
                config.tie_word_embeddings = False  # type: ignore[union-attr]


# --------------------------------------------------------------------------------------------------------------- refusals


def refuse_idle(layout: AdapterLayout) -> None:
    """Raises InputRefused for an adapter whose update is zero in every module. Whether rows of tokens differ is not known without the base."""
    if layout.whole or layout.rows or layout.dora or any("bias" in one.tensors for one in layout.factors.values()):
        return
    if any(one.scale and is_set(one.tensors["A"]) and is_set(one.tensors["B"]) for one in layout.factors.values()):
        return
    raise InputRefused(
        f"{describe_idle(layout.folder)}: B A is zero in all {len(layout.factors)} modules, as at the start of training. It was not trained, or its run "
        "saved the start. Name a checkpoint after a step that trained, or the base itself."
    )


def describe_idle(folder: Path) -> str:
    return f"stage.checkpoint: the adapter {folder} did nothing"


def is_set(source: Any) -> bool:
    return bool(source.read_whole().any())


def describe_mismatch(folder: Path, error: Exception) -> str:
    """The message for an adapter that does not fit; torch's error has one line per tensor."""
    head, *lines = (line.strip() for line in str(error).splitlines() or [type(error).__name__])
    more = f" ... and {len(lines) - SHOWN_LINES} more." if len(lines) > SHOWN_LINES else ""
    return (
        f"stage.checkpoint: the adapter {folder} does not fit its base: {' '.join((head, *lines[:SHOWN_LINES]))}{more} "
        "Name the model that it was trained on in stage.base, or name another checkpoint."
    )
