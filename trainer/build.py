"""A model and its processor, from where the stage begins or from where an earlier attempt left off."""

from pathlib import Path

import torch

from trainer.checkpoint import require_whole
from trainer.contract import Origin, TrainSpec
from trainer.models.family import Family, Limit, Processor
from trainer.models.weight import round_weights
from trainer.origin import continues_adapter
from trainer.output import say_phase
from trainer.precision import loading_dtype
from trainer.stages.lora import merge_adapter
from trainer.stages.reset import reset_groups

HUB_FILES = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")  # never a pickle


def build(spec: TrainSpec, family: Family, origin: Origin, *, instead: Path | None = None) -> tuple[torch.nn.Module, Processor]:
    """Model and processor: from the stage's checkpoint, else from the model's source; the weights from `instead`, where it is given.

    An adapter is merged into its base, unless the stage goes on with it."""
    dtype = loading_dtype(spec.precision)
    folder = Path(origin.base or origin.path) if origin.path else None
    limit = Limit(max_pixels=spec.data.max_pixels, max_tiles=spec.data.max_tiles)
    processor = family.load_processor(folder, spec.model, limit) if folder else family.create_processor(spec.model, limit)
    if instead is not None:
        return family.load(instead, spec.model, dtype), processor
    if folder is None:
        return round_weights(family.create(spec.model), dtype), processor
    model = family.load(folder, spec.model, dtype)
    if origin.base and not continues_adapter(origin, spec.stage.lora):
        model = merge_adapter(model, Path(origin.path))
    reset_groups(model, spec)
    return model, processor


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

        return Path(snapshot_download(source.id, revision=source.revision or None, allow_patterns=list(HUB_FILES)))
    return None
