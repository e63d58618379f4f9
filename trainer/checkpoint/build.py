"""A model and its processor, from where the stage begins or from where an earlier attempt left off."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from trainer.checkpoint.checkpoint import require_whole
from trainer.checkpoint.lineage import continues_adapter
from trainer.contract import ModelSpec, Origin, TrainSpec
from trainer.device.dtype import loading_dtype
from trainer.device.log_prefix import say_phase
from trainer.models.attention import attend_by_sample
from trainer.models.family import Family, Limit, Processor
from trainer.models.weight import round_weights
from trainer.stages.lora import merge_adapter
from trainer.stages.reset import reset_groups
from trainer.tensor.fp32_exceptions import keep_single

HUB_FILES = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")
PICKLES = ("pytorch_model*.bin",)  # where a model was published as nothing else; torch reads tensors from them and no code
CPU = torch.device("cpu")
LARGE = 10**9  # parameters; so many take a core 13 s to draw, and 4 GB in float32


def build(
    spec: TrainSpec, family: Family, origin: Origin, *, instead: Path | None = None, place: torch.device = CPU, hollow: bool = False
) -> tuple[torch.nn.Module, Processor]:
    """Model and processor: from the stage's checkpoint, else from the model's source; the weights from `instead`, where it is given.

    An adapter is merged into its base, unless the stage goes on with it. On the CPU, but for a large random start, which is made on
    `place`, the device of this rank. `hollow`: the same modules without values, on the meta device; trainer.checkpoint.scatter brings those."""
    attend_by_sample()
    dtype = loading_dtype(spec.precision)
    folder = Path(origin.base or origin.path) if origin.path else None
    limit = Limit(max_pixels=spec.data.max_pixels, max_tiles=spec.data.max_tiles)
    processor = family.load_processor(folder, spec.model, limit) if folder else family.create_processor(spec.model, limit)
    if instead is not None:
        return family.load(instead, spec.model, dtype, on_meta=hollow), processor
    if folder is None:
        started = start_hollow if hollow else partial(start_at_random, place=place, partitioned=spec.partitioned)
        return started(spec.model, family, dtype), processor
    model = family.load(folder, spec.model, dtype, on_meta=hollow)
    if not hollow:
        keep_single(model, folder, spec, dtype)
    if origin.base and not continues_adapter(origin, spec.stage.lora):
        model = merge_adapter(model, Path(origin.path))
    if not hollow:
        reset_groups(model, spec)
    return model, processor


def start_at_random(
    model: ModelSpec, family: Family, dtype: torch.dtype, place: torch.device, *, partitioned: bool = False
) -> torch.nn.Module:
    """Random weights in `dtype`, from torch's current seed: drawn in float32 on the CPU and rounded, so that one seed gives one start in
    every precision and on every device. More than LARGE parameters are drawn on an accelerator, in `dtype`: 8 billion would take the CPU
    two minutes and 33 GB. Their start is one for all devices of a kind, and of a dtype. `partitioned`: no device has room for the whole,
    which is drawn on the CPU after all, though in `dtype`."""
    if place.type != "cpu" and count_parameters(model, family) > LARGE:
        with CPU if partitioned else place, default_dtype(dtype):
            return round_weights(family.create(model), dtype)
    return round_weights(family.create(model), dtype)


def start_hollow(model: ModelSpec, family: Family, dtype: torch.dtype) -> torch.nn.Module:
    """A random start without its values and without memory for them. The random numbers stay where they are."""
    with torch.random.fork_rng(devices=()), torch.device("meta"):
        return round_weights(family.create(model), dtype)


def count_parameters(model: ModelSpec, family: Family) -> int:
    """0.1 s for 8 billion."""
    return sum(parameter.numel() for parameter in start_hollow(model, family, torch.float32).parameters())


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """As from_pretrained(dtype=...) makes a model: what is float32 by intention, such as rotary frequencies, stays so."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def weights_folder(spec: TrainSpec) -> Path | None:
    """The folder to load from, whole; None for a random start. Raises InputRefused."""
    say_phase(3)  # a download is the longest part of it
    source = spec.model.source
    if spec.stage.checkpoint:
        require_whole(Path(spec.stage.checkpoint), "stage.checkpoint")
        return Path(spec.stage.checkpoint)
    if source.kind == "path":
        require_whole(Path(source.path), "model.source.path")
        return Path(source.path)
    if source.kind == "hub":
        from huggingface_hub import snapshot_download

        def fetch(*patterns: str) -> Path:
            return Path(snapshot_download(source.id, revision=source.revision or None, allow_patterns=list(patterns)))

        folder = fetch(*HUB_FILES)
        return folder if any(folder.glob("*.safetensors")) else fetch(*HUB_FILES, *PICKLES)
    return None
