"""Compares the logits of two forms of a model on a few inputs, text and images, in float32 and layer by layer from the disk: a derived
checkpoint is checked by its outputs, on a machine that could not hold the model."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from trainer.contract import TrainSpec
from trainer.models import find_family
from trainer.stages.adapter import untie, wrap
from trainer.stages.adapter_layout import AdapterLayout, base_name, read_layout
from trainer.tensor.int8 import dequantize_sources
from trainer.tensor.naming import find_tied, name_in_memory
from trainer.tensor.paging import ReadTensor, fill_buffers, page
from trainer.tensor.stream import PickledTensor, TensorSource, open_tensors, read_float32
from trainer.tensor.table import grow_sources, replace_rows


@dataclass(frozen=True, kw_only=True)
class LogitDifference:
    """`relative`: the largest difference of two logits over the largest logit. `agreement`: share of positions where both have the same top
    token. `probes`: number of inputs; `values`: number of logits compared."""

    relative: float
    agreement: float
    probes: int
    values: int


def open_on_meta(folder: Path, spec: TrainSpec) -> torch.nn.Module:
    """The model of the checkpoint in `folder`, on the meta device."""
    return find_family(spec.model.family).load(folder, spec.model, torch.float32, on_meta=True)


def compute_logits(folder: Path, spec: TrainSpec, batch: Mapping[str, Tensor], device: torch.device, adapter: Path | None = None) -> Tensor:
    """(positions, vocabulary) float32, on the CPU: of the checkpoint in `folder`, with `adapter` applied but not merged."""
    model = open_on_meta(folder, spec)
    sources = dequantize_sources(open_tensors(folder))
    sources = grow_sources(sources, name_in_memory(model, sources), model)
    read = make_reader(model, sources)
    fill_buffers(model, read, set(name_in_memory(model, sources).values()), device)
    layout = read_layout(adapter, model) if adapter else None
    if layout is not None:
        computing = add_adapter_layers(model, layout)
        computing = page(computing, read_adapted(read, layout, find_tied(model)), device)
    else:
        computing = page(model, read, device)
    with torch.no_grad():
        logits = computing(**{key: value.to(device) for key, value in batch.items()}, use_cache=False).logits
    if logits.ndim == 3:
        logits = logits[batch["logits_to_keep"].to(logits.device)]
    return logits.float().cpu()


def make_reader(model: torch.nn.Module, sources: Mapping[str, TensorSource]) -> ReadTensor:
    """Reads by names in memory; a tied parameter reads the one that it is tied to."""
    saved = {memory: name for name, memory in name_in_memory(model, sources).items()}
    tied = find_tied(model)

    def read(name: str) -> Tensor:
        return read_float32(sources[saved[name if name in saved else tied[name]]])

    return read


def add_adapter_layers(model: torch.nn.Module, layout: AdapterLayout) -> torch.nn.Module:
    """Adds peft's layers to a model on the meta device. Raises InputRefused for an adapter of another model."""
    # Some initializations need the base's values. Rows of tokens are read with those of the base.
    if not layout.config.get("ensure_weight_tying"):
        untie(model, layout)
    return wrap(model, replace(layout, config={**layout.config, "init_lora_weights": False}, rows={}))


def read_adapted(read: ReadTensor, layout: AdapterLayout, tied: Mapping[str, str]) -> ReadTensor:
    """Reads by the names that peft gives to the parameters of the wrapped model. `tied`: those that still are."""
    parts = {"lora_A.weight": "A", "lora_B.weight": "B", "lora_B.bias": "bias", "lora_embedding_A": "A", "lora_embedding_B": "B"}
    parts |= {"lora_magnitude_vector.weight": "magnitude"}

    def read_either(name: str) -> Tensor:
        plain = base_name(name.replace(".default", "")) if ".lora_" in name else base_name(name)
        module, _, part = plain.partition(".lora_")
        if part:
            return read_float32(layout.factors[module].tensors[parts[f"lora_{part}"]])
        values = read_float32(layout.whole[plain]) if plain in layout.whole else read(plain)
        rows = layout.rows.get(plain) or layout.rows.get(tied.get(plain, ""))
        return read_float32(replace_rows(PickledTensor(tensor=values), rows.ids, read_float32(rows.values))) if rows else values

    return read_either


def compare(before: Tensor, after: Tensor, probes: int) -> LogitDifference:
    """Two tensors of logits, (positions, vocabulary). A NaN in either makes `relative` infinite."""
    largest = before.abs().max()
    relative = float((before - after).abs().max() / largest)
    return LogitDifference(
        relative=relative if relative == relative else float("inf"),
        agreement=float((before.argmax(dim=-1) == after.argmax(dim=-1)).float().mean()),
        probes=probes,
        values=before.numel(),
    )
