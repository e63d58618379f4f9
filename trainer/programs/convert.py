"""The stage convert: casts every weight to another dtype, from file to file, after measuring the error of each tensor. Also converts .bin
files to safetensors, and changes the size of the files."""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.contract import Conversion, InputRefused, TrainResult, TrainSpec, write_text
from trainer.data.batch.probe import make_probes
from trainer.device.dtype import DTYPES
from trainer.device.rank import Rank
from trainer.export.derived_checkpoint import DerivedCheckpoint, write_derived_checkpoint
from trainer.export.probe import compare, compute_logits
from trainer.models import find_family
from trainer.observe.memory import MemoryPeaks
from trainer.programs.inputs import open_weights
from trainer.tensor.cast_error import CastError, measure_cast_error
from trainer.tensor.fp32_exceptions import FLOAT32_TENSORS
from trainer.tensor.stream import TensorSource, TensorToWrite, copy_tensor, open_tensors, read_pieces

REPORT_FILE = "conversion.json"
SHOWN = 10  # tensors that are printed; all are in the report


def run_program(spec: TrainSpec, rank: Rank, environ: Mapping[str, str]) -> TrainResult:
    """Raises InputRefused, with conversion.unfit=refuse, if a tensor does not fit into the new dtype; before anything is written."""
    began, memory = time.perf_counter(), MemoryPeaks(rank.device)
    conversion = spec.stage.conversion or Conversion()
    lineage, folder = open_weights(spec, rank, environ)
    sources = open_tensors(folder)
    found = [
        measure_cast_error(name, source, DTYPES[conversion.dtype]) for name, source in sources.items() if source.dtype.is_floating_point
    ]
    write_text(json.dumps(report(conversion, found), indent=2) + "\n", Path(spec.output) / REPORT_FILE)
    print_worst(found, conversion)
    refuse_unfit(found, conversion, Path(spec.output) / REPORT_FILE)
    memory.enter("saving")
    kept = frozenset(one.name for one in found if one.unfit)
    tensors = [convert_tensor(name, source, kept, DTYPES[conversion.dtype]) for name, source in sources.items()]

    def finish(partial_folder: Path) -> dict[str, float]:
        write_dtype(partial_folder / "config.json", conversion.dtype, sorted(kept))
        memory.enter("evaluation")
        return {**total_errors(found, kept), **compare_logits(spec, rank, folder, partial_folder, conversion.probes)}

    derived = DerivedCheckpoint(tensors=tensors, folders=(folder,), shard_bytes=conversion.shard_bytes, finish=finish)
    result = write_derived_checkpoint(derived, spec, lineage)
    return replace(result, seconds=time.perf_counter() - began, peaks=memory.report())


def convert_tensor(name: str, source: TensorSource, kept: frozenset[str], dtype: torch.dtype) -> TensorToWrite:
    """`kept`: tensors that stay or become float32. Tensors of integers are copied."""
    target = torch.float32 if name in kept else dtype
    if not source.dtype.is_floating_point or source.dtype == target:
        return copy_tensor(name, source)

    def pieces() -> Iterator[Tensor]:
        return (piece.to(target) for piece in read_pieces(source))

    return TensorToWrite(name=name, dtype=target, shape=source.shape, pieces=pieces)


def write_dtype(file: Path, dtype: str, kept: Sequence[str]) -> None:
    """Write the new dtype into the config and its sections, and which tensors are kept in float32."""

    def rename(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {name: rename(item, name) for name, item in value.items()}
        return dtype if key in ("dtype", "torch_dtype") and isinstance(value, str) else value

    config = rename(json.loads(file.read_text(encoding="utf-8")))
    config = {key: value for key, value in config.items() if key not in (FLOAT32_TENSORS, "torch_dtype")} | {"dtype": dtype}
    write_text(json.dumps({**config, **({FLOAT32_TENSORS: list(kept)} if kept else {})}, indent=2, ensure_ascii=False) + "\n", file)


def report(conversion: Conversion, found: Sequence[CastError]) -> dict[str, Any]:
    tensors = [{**asdict(one), "unfit": one.unfit} for one in found]
    return {"dtype": conversion.dtype, "unfit": conversion.unfit, "tensors": tensors}


def print_worst(found: Sequence[CastError], conversion: Conversion) -> None:
    """Print the tensors with the largest errors as a table."""
    worst = sorted(found, key=lambda one: (one.unfit, one.nan + one.infinite, one.overflow, one.underflow, one.loss), reverse=True)
    named = [one for one in worst if one.remarks or one.unfit]
    print(f"{len(found)} tensors to {conversion.dtype}: {len(named)} with values that it cannot represent")
    for one in named[:SHOWN]:
        action = f" ({'refused' if conversion.unfit == 'refuse' else 'kept in float32'})" if one.unfit else ""
        print(f"  {one.name}: {one.remarks or 'too small'} of {one.values:,}; lost {one.loss:.1e} of its norm{action}")
    if len(named) > SHOWN:
        print(f"  and {len(named) - SHOWN} more, in {REPORT_FILE}")


def refuse_unfit(found: Sequence[CastError], conversion: Conversion, file: Path) -> None:
    """Raises InputRefused that names them."""
    unfit = [f"{one.name} ({one.remarks or 'too small'})" for one in found if one.unfit or one.nan or one.infinite]
    if unfit and conversion.unfit == "refuse":
        more = f" and {len(unfit) - SHOWN} more, all in {file}" if len(unfit) > SHOWN else ""
        raise InputRefused(
            f"stage.conversion.unfit=refuse: {conversion.dtype} cannot hold {'; '.join(unfit[:SHOWN])}{more}. Nothing was written. Keep these "
            "in float32 with stage.conversion.unfit=keep, or convert to bfloat16 or float32."
        )


def total_errors(found: Sequence[CastError], kept: frozenset[str]) -> dict[str, float]:
    fields = ("overflow", "underflow", "denormal", "nan", "infinite")
    counts = {name: float(sum(getattr(one, name) for one in found)) for name in fields}
    errors = [one.largest_error for one in found if one.name not in kept]
    return {"tensors": float(len(found)), "kept": float(len(kept)), **counts, "largest_error": max(errors, default=0.0)}


def compare_logits(spec: TrainSpec, rank: Rank, before: Path, after: Path, count: int) -> dict[str, float]:
    """The difference between the logits of two checkpoints: reported, not checked."""
    if not count:
        return {}
    batch = make_probes(spec, find_family(spec.model.family).load_processor(after, spec.model), count)
    logits = partial(compute_logits, spec=spec, batch=batch, device=rank.torch_device)
    found = compare(logits(before), logits(after), count)
    print(
        f"logits before and after, {found.probes} probes, {found.values:,} values: largest difference {found.relative:.2e} of the largest "
        f"logit; the same top token at {found.agreement:.1%} of the positions"
    )
    return {"logit_error": found.relative, "logit_agreement": found.agreement, "probes": float(count)}
