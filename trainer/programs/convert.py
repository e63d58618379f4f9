"""The stage convert: every weight in another type of element, from file to file, after a look at what each tensor loses by it. Also from .bin
to safetensors, and into files of another size."""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.train.model import weights_folder
from trainer.checkpoint.lineage import find_lineage
from trainer.contract import Conversion, InputRefused, TrainResult, TrainSpec, write_text
from trainer.device.dtype import DTYPES
from trainer.device.rank import Rank
from trainer.export.derived_checkpoint import DerivedCheckpoint, write_derived_checkpoint, require_full_weights
from trainer.export.probe import compare, compute_logits, make_probes
from trainer.models import find_family
from trainer.observe.memory import MemoryPeaks
from trainer.tensor.cast_error import CastError, measure_cast_error
from trainer.tensor.fp32_exceptions import FLOAT32_TENSORS
from trainer.tensor.stream import TensorToWrite, TensorSource, copy_tensor, open_tensors, read_pieces
from trainer.programs.dispatch import write_environment_of_files

REPORT_FILE = "conversion.json"
SHOWN = 10  # tensors on the terminal; all are in the report


def run_program(spec: TrainSpec, rank: Rank, environ: Mapping[str, str]) -> TrainResult:
    """Raises InputRefused, with conversion.unfit=refuse, where the new type cannot hold a tensor; before anything is written."""
    began, gauge = time.perf_counter(), MemoryPeaks(rank.device)
    conversion = spec.stage.conversion or Conversion()
    lineage = find_lineage(spec, weights_folder(spec))
    folder = require_full_weights(spec, lineage, adapter=False)
    write_environment_of_files(spec, rank, lineage, environ)
    sources = open_tensors(folder)
    found = [measure_cast_error(name, source, DTYPES[conversion.dtype]) for name, source in sources.items() if source.dtype.is_floating_point]
    write_text(json.dumps(report(conversion, found), indent=2) + "\n", Path(spec.output) / REPORT_FILE)
    print_worst(found, conversion)
    refuse_unfit(found, conversion, Path(spec.output) / REPORT_FILE)
    gauge.enter("saving")
    kept = frozenset(one.name for one in found if one.unfit)
    tensors = [convert_tensor(name, source, kept, DTYPES[conversion.dtype]) for name, source in sources.items()]

    def finish(partial_folder: Path) -> dict[str, float]:
        write_dtype(partial_folder / "config.json", conversion.dtype, sorted(kept))
        gauge.enter("evaluation")
        return {**total_errors(found, kept), **compare_logits(spec, rank, folder, partial_folder, conversion.probes)}

    product = DerivedCheckpoint(tensors=tensors, folders=(folder,), shard_bytes=conversion.shard_bytes, finish=finish)
    result = write_derived_checkpoint(product, spec, lineage)
    return replace(result, seconds=time.perf_counter() - began, peaks=gauge.report())


def convert_tensor(name: str, source: TensorSource, kept: frozenset[str], dtype: torch.dtype) -> TensorToWrite:
    """`kept`: tensors that stay, or become, float32. What has no floating point is copied."""
    target = torch.float32 if name in kept else dtype
    if not source.dtype.is_floating_point or source.dtype == target:
        return copy_tensor(name, source)

    def pieces() -> Iterator[Tensor]:
        return (piece.to(target) for piece in read_pieces(source))

    return TensorToWrite(name=name, dtype=target, shape=source.shape, pieces=pieces)


def write_dtype(file: Path, dtype: str, kept: Sequence[str]) -> None:
    """The new type into the config, of the whole and of its parts, and which tensors are kept in float32."""

    def rename(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {name: rename(item, name) for name, item in value.items()}
        return dtype if key in ("dtype", "torch_dtype") and isinstance(value, str) else value

    config = rename(json.loads(file.read_text(encoding="utf-8")))
    config = {key: value for key, value in config.items() if key not in (FLOAT32_TENSORS, "torch_dtype")} | {"dtype": dtype}
    write_text(json.dumps({**config, **({FLOAT32_TENSORS: list(kept)} if kept else {})}, indent=2, ensure_ascii=False) + "\n", file)


# ----------------------------------------------------------------------------------------------------------------- telling


def report(conversion: Conversion, found: Sequence[CastError]) -> dict[str, Any]:
    tensors = [{**asdict(one), "unfit": one.unfit} for one in found]
    return {"dtype": conversion.dtype, "unfit": conversion.unfit, "tensors": tensors}


def print_worst(found: Sequence[CastError], conversion: Conversion) -> None:
    """The worst tensors, as a table."""
    worst = sorted(found, key=lambda one: (one.unfit, one.nan + one.infinite, one.overflow, one.underflow, one.loss), reverse=True)
    named = [one for one in worst if one.remarks or one.unfit]
    print(f"{len(found)} tensors to {conversion.dtype}: {len(named)} with values that it cannot hold as they are")
    for one in named[:SHOWN]:
        fate = f" ({'refused' if conversion.unfit == 'refuse' else 'kept in float32'})" if one.unfit else ""
        print(f"  {one.name}: {one.remarks or 'too small'} of {one.values:,}; lost {one.loss:.1e} of its norm{fate}")
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
    """How far the logits of two checkpoints lie apart: told, not judged."""
    if not count:
        return {}
    batch = make_probes(spec, find_family(spec.model.family).load_processor(after, spec.model), count)
    logits = partial(compute_logits, spec=spec, batch=batch, device=rank.torch_device)
    found = compare(logits(before), logits(after), count)
    print(
        f"logits before and after, {found.probes} probes, {found.values:,} values: largest difference {found.relative:.2e} of the largest "
        f"logit; the same first choice at {found.agreement:.1%} of the places"
    )
    return {"logit_error": found.relative, "logit_agreement": found.agreement, "probes": float(count)}
