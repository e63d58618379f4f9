"""What is random about one sample in one step: keys from the run's seed, the step and the number of the sample, and nothing else."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from trainer.contract import TrainSpec
from trainer.data.rows.sample import Sample


def mark_draw(sample: Sample, spec: TrainSpec, *, step: int, number: int) -> Sample:
    """The sample as it is used in `step`. A row that a small data set repeats within one step has the same numbers each time. Unchanged if
    nothing is drawn."""
    draws = spec.stage.neftune_alpha or spec.data.augmentation.any
    return replace(sample, draw=f"{step}:{number}") if draws else sample


def noise_spans(samples: Sequence[Sample], places: Sequence[tuple[int, int, int]], spec: TrainSpec) -> dict[str, Tensor]:
    """{"noise_spans": (samples, 4) int64} for trainer.kernels.noise, {} without noise. `places`: (row, first position, length) of each sample."""
    if not spec.stage.neftune_alpha or not any(sample.draw for sample in samples):
        return {}
    rows = [(*place, noise_key(sample, spec)) for sample, place in zip(samples, places, strict=True)]
    return {"noise_spans": torch.tensor(rows, dtype=torch.int64).view(-1, 4)}


def noise_key(sample: Sample, spec: TrainSpec) -> int:
    """Below 2**63."""
    digest = hashlib.sha256(f"{spec.seed}:noise:{sample.draw}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def image_key(sample: Sample, index: int, spec: TrainSpec) -> str:
    """For trainer.data.media.augment, of the sample's image `index`."""
    return f"{spec.seed}:image:{sample.draw}:{index}"
