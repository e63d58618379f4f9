"""The stage quantize: the decoder's linear layers in fewer bits; vision tower, projector and head are not changed. Reports the error of the
weights, of the logits and of the answers."""

import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.contract import SAMPLES_FILE, ImageForm, InputRefused, Quantization, TrainResult, TrainSpec, write_text
from trainer.device.dtype import loading_dtype
from trainer.device.rank import Rank
from trainer.evaluation.evaluate import evaluate
from trainer.export.calibration import measure_inputs
from trainer.export.derived_checkpoint import DerivedCheckpoint, write_derived_checkpoint
from trainer.export.nf4 import write_nf4_checkpoint
from trainer.export.probe import open_on_meta
from trainer.models import find_family
from trainer.observe.memory import MemoryPeaks
from trainer.programs.convert import compare_logits
from trainer.programs.inputs import find_left_out, load_samples, open_weights, prepare_data
from trainer.tensor.int8 import QuantizationLoss, describe_format, quantize_tensor, scale_rows
from trainer.tensor.naming import Names, find_tied, name_in_memory
from trainer.tensor.stream import TensorSource, TensorToWrite, copy_tensor, open_tensors

REPORT_FILE = "quantization.json"
SAMPLES_BEFORE_FILE = "samples_before.jsonl"  # answers of the source weights; those of the result are in samples.jsonl


def run_program(spec: TrainSpec, rank: Rank, environ: Mapping[str, str]) -> TrainResult:
    """Raises InputRefused for a checkpoint without a layer to quantize, and for nf4 on a device that does not support it."""
    began, memory = time.perf_counter(), MemoryPeaks(rank.device)
    wanted = spec.stage.quantization or Quantization()
    lineage, folder = open_weights(spec, rank, environ)
    sources, meta_model = open_tensors(folder), open_on_meta(folder, spec)
    names = name_in_memory(meta_model, sources)
    chosen = choose_weights(meta_model, spec, names, sources)
    if wanted.scheme == "nf4":
        return write_nf4_checkpoint(spec, rank, lineage, folder, meta_model, frozenset(names[name] for name in chosen))
    power = measure_inputs(
        spec, rank, folder, calibration_samples(spec, rank, wanted, lineage.images), frozenset(names[name] for name in chosen)
    )
    scales = {name: scale_rows(sources[name], power.get(names[name])) for name in chosen}
    tensors = quantize_tensors(sources, {name: made for name, (made, _) in scales.items()})
    memory.enter("saving")

    def finish(partial_folder: Path) -> dict[str, float]:
        write_config(partial_folder / "config.json", describe_format(name_ignored(meta_model, names, chosen)))
        figures = report_size(sources, tensors)
        memory.enter("evaluation")
        figures |= compare_logits(spec, rank, folder, partial_folder, wanted.probes)
        figures |= compare_answers(spec, rank, folder, partial_folder, lineage.images) if wanted.compare else {}
        write_report(spec, wanted, {name: coarse for name, (_, coarse) in scales.items()}, sources, figures)
        return figures

    derived = DerivedCheckpoint(tensors=tensors, folders=(folder,), shard_bytes=wanted.shard_bytes, finish=finish)
    result = write_derived_checkpoint(derived, spec, lineage)
    return replace(result, seconds=time.perf_counter() - began, peaks=memory.report())


def choose_weights(model: torch.nn.Module, spec: TrainSpec, names: Names, sources: Mapping[str, TensorSource]) -> tuple[str, ...]:
    """Names in the files of the weights of linear layers in the groups that are not kept, and that no other layer shares."""
    keep = (spec.stage.quantization or Quantization()).keep
    patterns = [re.compile(regex) for group, regex in spec.model.groups.items() if group not in (*keep, "other")]
    tied = find_tied(model)
    shared = {*tied, *tied.values()}
    linear = {f"{name}.weight" for name, module in model.named_modules() if type(module) is torch.nn.Linear}
    chosen = tuple(
        name
        for name, memory in names.items()
        if memory in linear - shared and sources[name].dtype.is_floating_point and any(pattern.match(memory) for pattern in patterns)
    )
    if not chosen:
        raise InputRefused(
            f"stage.quantization.keep={list(keep)}: no linear layer is left to quantize; the model has the groups "
            f"{', '.join(spec.model.groups)}. Keep fewer of them."
        )
    return chosen


def name_ignored(model: torch.nn.Module, names: Names, chosen: Sequence[str]) -> list[str]:
    """Linear layers that are not quantized, as regexes over module names: in memory for transformers, and in the files for vLLM."""
    memory = {names[name].removesuffix(".weight") for name in chosen}
    others = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)} - memory
    files = {name.removesuffix(".weight") for name in chosen}
    saved = {held: name for name, held in names.items()}
    others_saved = {saved.get(f"{name}.weight", f"{name}.weight").removesuffix(".weight") for name in others}
    prefixes = {*outermost(others, memory), *outermost(others_saved, files)}
    return [rf"re:{re.escape(prefix)}($|\..*)" for prefix in sorted(prefixes)]


def outermost(kept: set[str], chosen: set[str]) -> set[str]:
    """The shortest prefixes, whole parts between dots, that cover all of `kept` and none of `chosen`."""
    taken = {".".join(parts[:depth]) for parts in (name.split(".") for name in chosen) for depth in range(1, len(parts) + 1)}

    def cut(name: str) -> str:
        parts = name.split(".")
        starts = (".".join(parts[:depth]) for depth in range(1, len(parts)))
        return next((start for start in starts if start not in taken), name)

    return {cut(name) for name in kept}


def quantize_tensors(sources: Mapping[str, TensorSource], scales: Mapping[str, Tensor]) -> list[TensorToWrite]:
    tensors: list[TensorToWrite] = []
    for name, source in sources.items():
        tensors += quantize_tensor(name, source, scales[name]) if name in scales else [copy_tensor(name, source)]
    return tensors


def calibration_samples(spec: TrainSpec, rank: Rank, wanted: Quantization, form: ImageForm) -> tuple:
    """Evenly spread over the training rows."""
    if not wanted.calibration:
        return ()
    paths = prepare_data(spec)
    samples = load_samples(paths.train, paths, form, find_left_out(spec, rank, "train"))
    step = max(1, len(samples) // wanted.calibration)
    return samples[::step][: wanted.calibration]


def report_size(sources: Mapping[str, TensorSource], tensors: Sequence[TensorToWrite]) -> dict[str, float]:
    """Bytes of all weights, their ratio to those of the source, and to 16 bits per value."""
    before = sum(torch.Size(source.shape).numel() * source.dtype.itemsize for source in sources.values())
    after, halves = sum(tensor.nbytes for tensor in tensors), sum(2 * torch.Size(source.shape).numel() for source in sources.values())
    print(
        f"weights: {after / 2**30:.3f} GiB, before {before / 2**30:.3f}: {after / before:.3f} of it, and {after / halves:.3f} of 16 bits each"
    )
    return {"bytes": float(after), "bytes_before": float(before), "size_ratio": after / before, "size_of_16_bits": after / halves}


def compare_answers(spec: TrainSpec, rank: Rank, before: Path, after: Path, form: ImageForm) -> dict[str, float]:
    """The run's evaluation of both; {} without held-out rows."""
    paths = prepare_data(spec)
    left_out = find_left_out(spec, rank, "evaluation")
    held_out = load_samples(paths.evaluation, paths, form, left_out) if spec.evaluation.enabled else ()
    if not held_out:
        return {}
    found = {}
    for folder, file in ((before, SAMPLES_BEFORE_FILE), (after, SAMPLES_FILE)):
        family = find_family(spec.model.family)
        model = family.load(folder, spec.model, loading_dtype(spec.precision)).to(rank.torch_device)
        ranks = {"rank": rank.number, "world_size": rank.world_size, "partitioned": False}
        found[folder] = evaluate(model, held_out, family.load_processor(folder, spec.model), spec, rank.torch_device, file=file, **ranks)
    scores = {**found[after], **{f"{name}_before": value for name, value in found[before].items() if name != "count"}}
    print(", ".join(f"{name} {value:.4g}" for name, value in scores.items()))
    return scores


def write_config(file: Path, how: Mapping[str, Any]) -> None:
    config = json.loads(file.read_text(encoding="utf-8"))
    write_text(json.dumps({**config, "quantization_config": how}, indent=2, ensure_ascii=False) + "\n", file)


def write_report(
    spec: TrainSpec, wanted: Quantization, found: Mapping[str, QuantizationLoss], sources: Mapping[str, TensorSource], figures: dict
) -> None:
    kept = sorted(name for name in sources if name not in found)
    tensors = [{"name": name, **asdict(coarse)} for name, coarse in found.items()]
    content = {"scheme": wanted.scheme, "calibration": wanted.calibration, "figures": figures, "tensors": tensors, "kept": kept}
    write_text(json.dumps(content, indent=2) + "\n", Path(spec.output) / REPORT_FILE)
    worst = sorted(found.items(), key=lambda item: -item[1].error)[:3]
    print(f"{len(found)} int8 weights, {len(kept)} tensors not changed; the largest errors:")
    for name, coarse in worst:
        print(f"  {name}: off by {coarse.error:.2e} of its norm")
