"""Calibration: the mean square of each input of a linear layer on real samples. The scales of int8 weights are chosen by it, since an error
on an input that is always near zero costs nothing."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from trainer.contract import TrainSpec
from trainer.data.batch.collate import collate
from trainer.data.rows.sample import Sample
from trainer.device.rank import Rank
from trainer.export.probe import make_reader, open_on_meta
from trainer.models import find_family
from trainer.tensor.int8 import dequantize_sources
from trainer.tensor.naming import name_in_memory
from trainer.tensor.paging import fill_buffers, page
from trainer.tensor.stream import open_tensors

BATCH = 8  # samples per forward pass; each pass reads the model once


def measure_inputs(spec: TrainSpec, rank: Rank, folder: Path, samples: Sequence[Sample], weights: frozenset[str]) -> dict[str, Tensor]:
    """Name of a weight in memory -> (in,) float32. {} without samples."""
    if not samples:
        return {}
    model = open_on_meta(folder, spec)
    sources = dequantize_sources(open_tensors(folder))
    read = make_reader(model, sources)
    fill_buffers(model, read, set(name_in_memory(model, sources).values()), rank.torch_device)
    sums: dict[str, tuple[Tensor, int]] = {}
    seen: list[Tensor] = []  # the mask of the current batch
    for name, module in model.named_modules():
        if f"{name}.weight" in weights:
            module.register_forward_pre_hook(input_power_hook(f"{name}.weight", sums, seen))
    page(model, read, rank.torch_device)
    processor = find_family(spec.model.family).load_processor(folder, spec.model)
    with torch.no_grad():
        for start in range(0, len(samples), BATCH):
            batch = collate(samples[start : start + BATCH], processor, spec)
            seen[:] = [batch["attention_mask"].bool()]
            model(**{key: value.to(rank.torch_device) for key, value in batch.items() if key != "labels"}, use_cache=False)
    print(f"calibrated on {len(samples)} samples: {len(sums)} layers")
    return {name: total / count for name, (total, count) in sums.items()}


def input_power_hook(name: str, sums: dict[str, tuple[Tensor, int]], seen: list[Tensor]) -> Callable[..., None]:
    """A hook that adds the squares of a module's inputs to its sum, without padding."""

    def add(_: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        values, mask = inputs[0].detach().float().cpu(), seen[0]
        values = values[mask] if values.shape[:2] == mask.shape else values.reshape(-1, values.shape[-1])
        total, count = sums.get(name, (torch.zeros(values.shape[-1]), 0))
        sums[name] = (total + values.square().sum(dim=0), count + len(values))

    return add
