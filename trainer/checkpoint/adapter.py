"""What a peft adapter changes in its base, tensor by tensor, read from its files: low-rank updates, biases, and weights that were trained
whole. Variants with another formula are refused by name: their result would be wrong without an error.

The formula is that of peft 0.21 (peft/tuners/lora/layer.py, get_delta_weight): scale * B A, with scale = alpha / r, or alpha / sqrt(r) for
rank-stabilised LoRA (Kalajdzievski, arXiv 2312.03732); each layer may have its own r and alpha.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.contract import InputRefused
from trainer.contract.listing import list_some
from trainer.stages.lora import base_name
from trainer.tensor.naming import find_tied, name_in_memory
from trainer.tensor.stream import PIECE_ELEMENTS, TensorSource, TensorToWrite, open_tensors, read_float32, read_pieces
from trainer.tensor.table import replace_rows

CONFIG = "adapter_config.json"
PREFIX = "base_model.model."  # of the names in an adapter's file
ROWS = ".token_adapter.trainable_tokens_delta"  # trained rows of an embedding or of the head: the end of their name
FACTOR = re.compile(r"(?P<module>.+)\.(?:lora_(?P<factor>[AB])\.(?P<kind>weight|bias)|lora_embedding_(?P<table>[AB]))")
# Config keys that are read here, or that only describe how the adapter was trained. Any other key that is set makes it another variant.
READ = frozenset(
    (
        *("alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "eva_config", "exclude_modules", "fan_in_fan_out"),
        *("inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha", "lora_bias", "lora_dropout"),
        *("megatron_core", "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision"),
        *("runtime_config", "target_modules", "task_type", "use_rslora", "ensure_weight_tying", "trainable_token_indices"),
    )
)
# Other initializations take the adapter out of the base's weights and change those (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA).
PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal", None)
SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class LowRankUpdate:
    """scale * B A, added to a weight of (out, in); `a` (r, in), `b` (out, r). `transposed`: the weight is (in, out), as in Conv1D and embeddings."""

    a: TensorSource
    b: TensorSource
    scale: float
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight."""
        out, inner = self.b.shape[0], self.a.shape[1]
        return (inner, out) if self.transposed else (out, inner)


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """Keys: names of parameters in memory. `whole`: tensors that replace those of the base. `biases`: (tensor, scale), to be added. `rows`:
    (ids, tensor), rows that replace those of the base."""

    additions: dict[str, LowRankUpdate] = field(default_factory=dict)
    biases: dict[str, tuple[TensorSource, float]] = field(default_factory=dict)
    whole: dict[str, TensorSource] = field(default_factory=dict)
    rows: dict[str, tuple[tuple[int, ...], TensorSource]] = field(default_factory=dict)

    @property
    def changed(self) -> frozenset[str]:
        return frozenset({*self.additions, *self.biases, *self.whole, *self.rows})


def read_adapter(folder: Path, model: torch.nn.Module) -> Adapter:
    """What the adapter in `folder` changes in `model`, which may be on the meta device. Raises InputRefused for another kind of adapter, for
    another base, and for a changed tensor that the base uses twice (tied)."""
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    refuse_variant(folder, config)
    adapter = Adapter()
    unread: list[str] = []
    factors: dict[str, dict[str, TensorSource]] = {}
    for name, source in open_adapter(folder).items():
        if found := FACTOR.fullmatch(name):
            part = found["table"] or (found["factor"] if found["kind"] == "weight" else "bias")
            factors.setdefault(found["module"] + (":table" if found["table"] else ""), {})[part] = source
        elif name.endswith(ROWS):
            adapter.rows[find_parameter(model, name.removesuffix(ROWS) + ".weight")] = (row_ids(config, name.removesuffix(ROWS)), source)
        elif "lora_" in name or "token_adapter" in name:
            unread.append(name)
        else:
            adapter.whole[find_parameter(model, name_without_wrapper(name))] = source
    if unread:
        raise InputRefused(
            f"{folder}: merging does not support {', '.join(unread[:SHOWN])}, only plain LoRA of linear layers. Merge this adapter with peft's "
            "merge_and_unload."
        )
    for module, parts in factors.items():
        add_factors(adapter, folder, model, config, module, parts)
    refuse_misfits(folder, adapter, model)
    return adapter


def row_ids(config: Mapping[str, Any], module: str) -> tuple[int, ...]:
    """The rows of `module` that the adapter has trained: peft lists them by module, or once for the embeddings."""
    listed = config.get("trainable_token_indices") or ()
    return tuple(next((ids for key, ids in listed.items() if module.endswith(key)), ()) if isinstance(listed, dict) else listed)


def open_adapter(folder: Path) -> dict[str, TensorSource]:
    """Its tensors by name, without the frozen copies that peft keeps beside modules that were trained whole."""
    tensors = {key.removeprefix(PREFIX): source for key, source in open_tensors(folder).items()}
    return {name: source for name, source in tensors.items() if ".original_module." not in name}


def add_factors(
    adapter: Adapter, folder: Path, model: torch.nn.Module, config: dict[str, Any], place: str, parts: dict[str, TensorSource]
) -> None:
    """Add the factors of one module to `adapter`."""
    module, _, table = place.partition(":")
    if not {"A", "B"} <= parts.keys():
        raise InputRefused(f"{folder}: {module} has only one of its two factors. Copy the adapter again.")
    name = find_parameter(model, f"{module}.weight")
    scale = scale_of(config, module, parts["A"].shape[0])
    # peft sets fan_in_fan_out by the kind of the layer, whatever the config says
    transposed = bool(table) or (has_tensor(model, name) and type(model.get_submodule(name.rpartition(".")[0])).__name__ == "Conv1D")
    adapter.additions[name] = LowRankUpdate(a=parts["A"], b=parts["B"], scale=scale, transposed=transposed)
    if "bias" in parts:
        adapter.biases[find_parameter(model, f"{module}.bias")] = (parts["bias"], scale)


def scale_of(config: Mapping[str, Any], module: str, rank: int) -> float:
    patterns = config.get("alpha_pattern") or {}
    alpha = next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), config["lora_alpha"])
    return float(alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank)


def name_without_wrapper(name: str) -> str:
    """The base's name of a tensor that was trained whole; the files of an adapter leave out the adapter's own name."""
    return base_name(name).replace(".modules_to_save.", ".")


def find_parameter(model: torch.nn.Module, name: str) -> str:
    """The name in memory. Adapters trained with an older transformers have the names of the files."""
    if has_tensor(model, name):
        return name
    return name_in_memory(model, [name]).get(name, name)


def has_tensor(model: torch.nn.Module, name: str) -> bool:
    try:
        owner = model.get_submodule(name.rpartition(".")[0])
        return name.rpartition(".")[2] in {**owner._parameters, **owner._buffers}
    except AttributeError:
        return False


def refuse_variant(folder: Path, config: Mapping[str, Any]) -> None:
    wrong = [f"{key} is {value!r}" for key, value in config.items() if value and key not in READ]
    if (start := config.get("init_lora_weights")) not in PLAIN_STARTS:
        wrong.append(f"init_lora_weights is {start!r}")
    if config.get("peft_type") != "LORA":
        wrong.insert(0, f"peft_type is {config.get('peft_type')!r}")
    if wrong:
        raise InputRefused(
            f"{folder / CONFIG}: {'; '.join(wrong)}: merging file by file supports only plain LoRA (with rank-stabilised scales, ranks and "
            "alphas by layer, biases and whole modules). Merge this one with peft's merge_and_unload, on a machine that can hold the model."
        )


def refuse_misfits(folder: Path, adapter: Adapter, model: torch.nn.Module) -> None:
    """Raises InputRefused that names each tensor that the base does not have, has in another shape, or ties to another one."""
    has = model.state_dict(keep_vars=True)
    shapes = {name: addition.shape for name, addition in adapter.additions.items()}
    shapes |= {name: source.shape for name, (source, _) in adapter.biases.items()} | {n: s.shape for n, s in adapter.whole.items()}
    has_rows = {name: (ids, source.shape) for name, (ids, source) in adapter.rows.items()}
    ranks = [name for name, one in adapter.additions.items() if one.a.shape[0] != one.b.shape[1] or len(one.a.shape) != 2]
    wrong = [f"{name} is not in the base" for name in shapes if name not in has]
    wrong += [
        f"{name} is {list(has[name].shape)}, not {list(s)}" for name, s in shapes.items() if name in has and tuple(has[name].shape) != s
    ]
    wrong += [f"the factors of {name} have different ranks" for name in ranks]
    wrong += [f"{name} is not in the base" for name in has_rows if name not in has]
    wrong += [
        f"the rows {list(ids)[:SHOWN]} of {name} are {list(shape)}, and the base has {list(has[name].shape)}"
        for name, (ids, shape) in has_rows.items()
        if name in has and not (shape == (len(ids), has[name].shape[1]) and max(ids, default=0) < len(has[name]))
    ]
    if wrong:
        raise InputRefused(
            f"stage.checkpoint: the adapter {folder} does not fit its base: {list_some(wrong, SHOWN, '; ')}. Set base_model_name_or_path in its "
            f"{CONFIG} to the model that it was trained on, or name another checkpoint."
        )
    tied = find_tied(model)
    if both := sorted((adapter.changed - set(adapter.rows)) & {*tied, *tied.values()}):  # peft trains rows of both
        raise InputRefused(
            f"{folder} changes {', '.join(both)}, which the base uses in two places (tied embeddings): merged, both would change, or the "
            "model would grow. Train the adapter without it."
        )


def merge_tensor(name: str, memory: str, base: TensorSource, adapter: Adapter) -> TensorToWrite:
    """The merged tensor `name` of the files (`memory` in memory): in the base's dtype, summed in float32."""
    source = adapter.whole.get(memory, base)
    if memory in adapter.rows:
        ids, rows = adapter.rows[memory]
        source = base = replace_rows(source, ids, rows.read_whole())

    def pieces() -> Iterator[Tensor]:
        if memory in adapter.additions:
            yield from add_low_rank(source, adapter.additions[memory], base.dtype)
        elif memory in adapter.biases:
            bias, scale = adapter.biases[memory]
            yield (source.read_whole().float() + bias.read_whole().float() * scale).to(base.dtype)
        else:
            yield from (piece.to(base.dtype) for piece in read_pieces(source))

    return TensorToWrite(name=name, dtype=base.dtype, shape=base.shape, pieces=pieces)


def add_low_rank(base: TensorSource, addition: LowRankUpdate, dtype: torch.dtype) -> Iterator[Tensor]:
    """Rows of base + scale * B A, a piece at a time, in `dtype`."""
    a, b = read_float32(addition.a), read_float32(addition.b)
    rows, width = base.shape
    step = max(1, PIECE_ELEMENTS // width)
    for start in range(0, rows, step):
        end = min(rows, start + step)
        weight = base.read(start * width, (end - start) * width).view(-1, width).float()
        product = (b @ a[:, start:end]).T if addition.transposed else b[start:end] @ a
        yield weight.add_(product.mul_(addition.scale)).to(dtype)
