"""The model of a run: loaded or started at random, with the stage applied."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError

from trainer.checkpoint.checkpoint import require_whole
from trainer.checkpoint.lineage import continues_adapter, find_lineage
from trainer.checkpoint.resume import ResumePoint, continue_adapter, resume_adapter, resume_weights_folder
from trainer.contract import InputRefused, ModelSpec, TrainSpec, WeightsLineage
from trainer.contract.adapter_files import find_base
from trainer.device.dtype import loading_dtype
from trainer.device.log_prefix import report_phase
from trainer.device.rank import Rank
from trainer.distributed.collective import refuse_on_all_ranks
from trainer.distributed.zero3 import SOURCE_RANK
from trainer.kernels.fused import use_kernels
from trainer.models import find_family
from trainer.models.attention import attend_by_sample
from trainer.models.family import Family, Limit, Processor
from trainer.models.weight import round_weights
from trainer.stages.adapter import merge_adapter, refuse_idle
from trainer.stages.adapter_layout import AdapterLayout, read_layout
from trainer.stages.adapter_probe import refuse_idle_logits
from trainer.stages.gradient_checkpointing import checkpoint_layers
from trainer.stages.group import Staged, apply_stage
from trainer.stages.reset import reset_groups
from trainer.tensor.fp32_exceptions import keep_float32

HUB_FILES = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")
PICKLES = ("pytorch_model*.bin",)  # only if a model has no other files; torch reads tensors from them and no code
CPU = torch.device("cpu")
DAMAGED = (OSError, ValueError, LookupError, TypeError, AttributeError, SafetensorError, UnpicklingError)
LARGE_PARAMETERS = 10**9  # so many take one core 13 s to draw, and 4 GB in float32


@dataclass(frozen=True, kw_only=True)
class BuiltModel:
    """A model with its stage applied, without an engine. `kernels`: see use_kernels."""

    staged: Staged
    processor: Processor
    lineage: WeightsLineage
    kernels: dict[str, str]


def build_model(spec: TrainSpec, rank: Rank, start: ResumePoint) -> BuiltModel:
    """The model that a stage trains, at its first step or resumed. Under ZeRO 3 only rank 0 has its values. Every rank must call it; raises
    InputRefused on all of them."""
    family = find_family(spec.model.family)
    on_meta = spec.partitioned and rank.number != SOURCE_RANK
    with refuse_on_all_ranks():
        lineage = trace_weights(spec)
        weights, first = resume_weights_folder(spec, start), start.checkpoint is None and rank.number == 0
        model, processor = load_or_create(spec, family, lineage, weights=weights, device=rank.torch_device, on_meta=on_meta, probe=first)
        continued = read_layout(Path(lineage.path), model) if continues_adapter(lineage, spec.stage.lora) else None
    report_phase(4)
    kernels = use_kernels(model, spec)
    with refuse_on_all_ranks():
        if spec.gradient_checkpointing:
            checkpoint_layers(model, spec)
        staged = apply_stage(model, spec, family.unused(model), continued)
        if not on_meta and start.checkpoint is None and continued:
            continue_adapter(staged.model, continued)
            probe_adapter(staged.model, continued, spec, processor, first=first)
        if not on_meta:
            resume_adapter(staged.model, spec, start)
    return BuiltModel(staged=staged, processor=processor, lineage=lineage, kernels=kernels)


def load_or_create(
    spec: TrainSpec,
    family: Family,
    lineage: WeightsLineage,
    *,
    weights: Path | None = None,
    device: torch.device = CPU,
    on_meta: bool = False,
    probe: bool = False,
) -> tuple[torch.nn.Module, Processor]:
    """Model and processor: from the stage's checkpoint, else from the model's source; the weights from the folder `weights`, if it is given.

    An adapter is merged into its base, unless the stage continues with it. The model is on the CPU, except for a large random start, which is
    on `device`. `on_meta`: the same modules on the meta device, without values, which trainer.distributed.zero3 then brings. `probe`: whether the
    logits with and without an adapter that is merged are compared; once for a run is enough."""
    attend_by_sample()
    dtype = loading_dtype(spec.precision)
    folder = Path(lineage.base or lineage.path) if lineage.path else None
    limit = Limit(max_pixels=spec.data.max_pixels, max_tiles=spec.data.max_tiles)
    with reading(folder):
        processor = family.load_processor(folder, spec.model, limit) if folder else family.create_processor(spec.model, limit)
    if weights is not None:
        return family.load(weights, spec.model, dtype, on_meta=on_meta), processor
    if folder is None:
        create = create_on_meta if on_meta else partial(create_random, device=device, partitioned=spec.partitioned)
        return create(spec.model, family, dtype), processor
    with reading(folder):
        model = family.load(folder, spec.model, dtype, on_meta=on_meta)
    if not on_meta:
        keep_float32(model, folder, spec, dtype)
    if lineage.base and not continues_adapter(lineage, spec.stage.lora):
        compare = partial(refuse_idle_logits, spec=spec, processor=processor) if probe else None
        model = merge_adapter(model, Path(lineage.path), compare)
    if not on_meta:
        reset_groups(model, spec)
    return model, processor


@contextmanager
def reading(folder: Path | None) -> Iterator[None]:
    """Raises InputRefused for files of a folder that are damaged, or of another model: transformers' own errors name its code and not the file.
    An error of the system, such as a full memory, passes."""
    try:
        yield
    except DAMAGED as error:
        if folder is None or getattr(error, "errno", None) is not None:
            raise
        raise InputRefused(
            f"{folder}: its files cannot be read as those of a model: {type(error).__name__}: {error}\n    copy the folder again, whole; omnilaunch "
            f"model check {folder} compares names, sizes and headers"
        ) from error


def create_random(
    model: ModelSpec, family: Family, dtype: torch.dtype, device: torch.device, *, partitioned: bool = False
) -> torch.nn.Module:
    """Random weights in `dtype`, from torch's current seed: drawn in float32 on the CPU and rounded, so that one seed gives the same start
    in every precision and on every device. More than LARGE_PARAMETERS are drawn on the accelerator, in `dtype`: 8 billion would take the CPU
    two minutes and 33 GB; their start is the same only on devices of one kind, and in one dtype. `partitioned`: no device can hold the
    whole model, so it is drawn on the CPU after all, but in `dtype`."""
    if device.type != "cpu" and count_parameters(model, family) > LARGE_PARAMETERS:
        with CPU if partitioned else device, default_dtype(dtype):
            return round_weights(family.create(model), dtype)
    return round_weights(family.create(model), dtype)


def create_on_meta(model: ModelSpec, family: Family, dtype: torch.dtype) -> torch.nn.Module:
    """A random start without values and memory. The state of the random numbers does not change."""
    with torch.random.fork_rng(devices=()), torch.device("meta"):
        return round_weights(family.create(model), dtype)


def count_parameters(model: ModelSpec, family: Family) -> int:
    """Takes 0.1 s for 8 billion."""
    return sum(parameter.numel() for parameter in create_on_meta(model, family, torch.float32).parameters())


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """As in from_pretrained(dtype=...): what is explicitly float32, such as rotary frequencies, stays so."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def trace_weights(spec: TrainSpec) -> WeightsLineage:
    """The lineage of what the stage starts from, which is on this node when it returns. Raises InputRefused."""
    folder = weights_folder(spec)
    base = find_base(folder, spec) if folder and spec.stage.checkpoint else ""
    downloaded = download(spec) if base and base == spec.model.source.id and not Path(base).is_dir() else None
    return find_lineage(spec, folder, downloaded)


def probe_adapter(model: torch.nn.Module, layout: AdapterLayout, spec: TrainSpec, processor: Processor, *, first: bool) -> None:
    """Raises InputRefused if the adapter that a LoRA stage continues with did nothing. `model`: wrapped, with the adapter's values."""
    refuse_idle(layout)
    if first and spec.stage.lora and not spec.stage.lora.base:  # the kernels of 4-bit weights need the device, where the model is not yet
        refuse_idle_logits(model, model.disable_adapter, layout, spec=spec, processor=processor)  # type: ignore[operator]


def weights_folder(spec: TrainSpec) -> Path | None:
    """The folder to load from, complete; None for a random start. Raises InputRefused."""
    report_phase(3)  # a download takes most of it
    source = spec.model.source
    if spec.stage.checkpoint:
        require_whole(Path(spec.stage.checkpoint), "stage.checkpoint")
        return Path(spec.stage.checkpoint)
    if source.kind == "path":
        require_whole(Path(source.path), "model.source.path")
        return Path(source.path)
    if source.kind == "hub":
        return download(spec)
    return None


def download(spec: TrainSpec) -> Path:
    """The folder of model.source.id, from the hub or its cache."""
    from huggingface_hub import snapshot_download

    source = spec.model.source

    def fetch(*patterns: str) -> Path:
        return Path(snapshot_download(source.id, revision=source.revision or None, allow_patterns=list(patterns)))

    folder = fetch(*HUB_FILES)
    return folder if any(folder.glob("*.safetensors")) else fetch(*HUB_FILES, *PICKLES)
