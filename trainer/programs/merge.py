"""The stage merge: merges the adapter of stage.checkpoint into its base, tensor by tensor from file to file, and checks that the result gives
the logits of base and adapter. It needs the memory of the largest layer, and no accelerator."""

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from trainer.checkpoint.adapter import Adapter, changes_rows, merge_tensor, read_adapter
from trainer.contract import InputRefused, Merging, RunFailed, TrainResult, TrainSpec, WeightsLineage, write_text
from trainer.data.batch.probe import make_probes
from trainer.device.rank import Rank
from trainer.export.derived_checkpoint import DerivedCheckpoint, write_derived_checkpoint
from trainer.export.probe import compare, compute_logits, open_on_meta
from trainer.models import find_family
from trainer.observe.memory import MemoryPeaks
from trainer.programs.inputs import open_weights
from trainer.stages.adapter import describe_idle, refuse_idle
from trainer.stages.adapter_layout import read_layout
from trainer.tensor.naming import name_in_memory
from trainer.tensor.stream import TensorSource, TensorToWrite, copy_tensor, open_tensors
from trainer.tensor.table import grow_sources


def run_program(spec: TrainSpec, rank: Rank, environ: Mapping[str, str]) -> TrainResult:
    """Raises InputRefused for an adapter that does not fit its base or cannot be merged, RunFailed if the logits of the result differ by more
    than the bound."""
    began, memory = time.perf_counter(), MemoryPeaks(rank.device)
    lineage, base = open_weights(spec, rank, environ, adapter=True)
    folder = Path(lineage.path)
    memory.enter("saving")
    own, meta_model = open_tensors(base), open_on_meta(base, spec)
    names = name_in_memory(meta_model, own)
    sources = grow_sources(own, names, meta_model)
    layout = read_layout(folder, meta_model)
    refuse_idle(layout)
    adapter = read_adapter(layout, meta_model)
    tensors = merge_tensors(sources, adapter, names, base)
    print(f"{len(adapter.changed)} of {len(tensors)} tensors change: {len(adapter.additions)} by the adapter, {len(adapter.whole)} whole")

    def finish(partial_folder: Path) -> dict[str, float]:
        memory.enter("evaluation")
        write_vocabulary(partial_folder, meta_model)
        if adapter.untied:
            untie_config(partial_folder)
        bound, has_rows = logit_bound(merging_of(spec), sources, adapter), partial(changes_rows, sources, names, adapter)
        return check_logits(spec, rank, lineage, partial_folder, bound, has_rows)

    derived = DerivedCheckpoint(tensors=tensors, folders=(base, folder), shard_bytes=merging_of(spec).shard_bytes, finish=finish)
    result = write_derived_checkpoint(derived, spec, lineage)
    return replace(result, seconds=time.perf_counter() - began, peaks=memory.report())


def write_vocabulary(partial_folder: Path, model: Any) -> None:
    """The number of rows of the merged embeddings, where config.json has that of the base."""
    file, rows = partial_folder / "config.json", model.config.get_text_config().vocab_size
    content = json.loads(file.read_text(encoding="utf-8"))
    thinker = content.get("thinker_config") or {}  # of Qwen2.5-Omni
    whole = (content, content.get("text_config"), thinker.get("text_config"))
    parts = [part for part in whole if isinstance(part, dict) and part.get("vocab_size", rows) != rows]
    for part in parts:
        part["vocab_size"] = rows
    if parts:
        write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", file)


def merging_of(spec: TrainSpec) -> Merging:
    return spec.stage.merging or Merging()


def merge_tensors(sources: Mapping[str, TensorSource], adapter: Adapter, memory: Mapping[str, str], base: Path) -> list[TensorToWrite]:
    """Raises InputRefused if the base's files hold a changed tensor in another form."""
    lost = sorted(adapter.changed - set(memory.values()) - set(adapter.untied))
    if lost:
        raise InputRefused(
            f"the adapter changes {', '.join(lost[:5])}, which the files of {base} hold in another form, so it cannot be merged file by file. "
            "Save the base with this version of transformers (stage=convert does), and merge into that."
        )
    changed = adapter.changed
    merged = [
        merge_tensor(name, memory[name], source, adapter) if memory.get(name) in changed else copy_tensor(name, source)
        for name, source in sources.items()
    ]
    saved = {in_memory: source for name, in_memory in memory.items() if (source := sources[name])}
    return merged + [
        merge_tensor(name, name, saved[other], adapter) if name in changed else copy_tensor(name, saved[other])
        for name, other in adapter.untied.items()
        if name not in saved
    ]


def untie_config(folder: Path) -> None:
    """In config.json of the merged weights, whose head has values of its own."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for part in (config, config.get("text_config")):
        if isinstance(part, dict):
            part["tie_word_embeddings"] = False
    write_text(json.dumps(config, indent=2) + "\n", folder / "config.json")


def logit_bound(merging: Merging, sources: Mapping[str, TensorSource], adapter: Adapter) -> float:
    """The allowed difference of logits, relative to the largest. Sums of float32 weights differ in their last bits only: merging.tolerance. In 16
    bits each merged weight is rounded, by at most u relative to itself (Higham, Accuracy and Stability of Numerical Algorithms, 2.2): bfloat16
    2^-8, float16 2^-11. One layer's output is then off by at most u, relative to its size; the rounding errors of the n layers are independent,
    so their sum grows as the square root of n: u * sqrt(n) is added."""
    dtypes = {source.dtype for source in sources.values() if source.dtype.is_floating_point}
    unit = max((torch.finfo(dtype).eps / 2 for dtype in dtypes if dtype.itemsize < torch.float32.itemsize), default=0.0)
    return merging.tolerance + unit * math.sqrt(len(adapter.changed))


def check_logits(
    spec: TrainSpec, rank: Rank, lineage: WeightsLineage, partial_folder: Path, bound: float, has_rows: Callable[[], bool]
) -> dict[str, float]:
    """The figures of the result. `has_rows`: whether the adapter has rows of tokens, which the probes need not show. Raises RunFailed above the
    bound, and InputRefused for an adapter that does nothing."""
    count = merging_of(spec).probes
    if not count:
        return {}
    batch = make_probes(spec, find_family(spec.model.family).load_processor(partial_folder, spec.model), count)
    without = compute_logits(Path(lineage.base), spec, batch, rank.torch_device)
    apart = compute_logits(Path(lineage.base), spec, batch, rank.torch_device, adapter=Path(lineage.path))
    if torch.equal(without, apart) and not has_rows():
        raise InputRefused(
            f"{describe_idle(Path(lineage.path))}: the logits of {count} probes are those of its base. Name another checkpoint."
        )
    found = compare(apart, compute_logits(partial_folder, spec, batch, rank.torch_device), count)
    print(
        f"logits of base and adapter against merged, {found.probes} probes, {found.values:,} values: largest difference "
        f"{found.relative:.2e} of the largest logit, bound {bound:.2e}; the same top token at {found.agreement:.1%} of the positions"
    )
    if not found.relative <= bound:
        raise RunFailed(
            f"stage merge: the logits of the merged weights differ from those of base and adapter by {found.relative:.2e} of the largest, more than "
            f"the bound {bound:.2e}. The result was removed. A weight that overflows in the base's dtype causes this: convert the base to "
            "float32 with stage=convert stage.conversion.dtype=float32, or set stage.merging.tolerance to what you accept."
        )
    return {"logit_error": found.relative, "logit_bound": bound, "logit_agreement": found.agreement, "probes": float(count)}
