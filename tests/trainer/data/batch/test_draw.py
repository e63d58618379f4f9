"""Augmented batches and noise: the same for any number of ranks and workers, and after a resume."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.trainer.data.conftest import conversation, with_data
from trainer.contract import Augmentation, Batch, TrainSpec
from trainer.data.batch.cache import Cache
from trainer.data.batch.collate import collate
from trainer.data.batch.load import batches
from trainer.data.rows.sample import Sample, read_samples

ALL = Augmentation(crop=0.5, flip=0.5, colour=0.4, jpeg=75)


@pytest.fixture
def samples(tmp_path: Path) -> tuple[Sample, ...]:
    """Ten rows with images of noise."""
    for index in range(10):
        Image.fromarray(np.random.default_rng(index).integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(tmp_path / f"{index}.png")
    (tmp_path / "train.json").write_text(json.dumps([conversation(f"{index}.png", index) for index in range(10)]), encoding="utf-8")
    return read_samples(tmp_path / "train.json", tmp_path)[0]


@pytest.fixture
def drawing(spec: TrainSpec) -> TrainSpec:
    return replace(with_data(spec, augmentation=ALL), steps=6, stage=replace(spec.stage, neftune_alpha=5.0))


def images_of(steps: Any) -> list[list[bytes]]:
    """Step -> its images, sorted: which rank has which row does not matter."""
    return [sorted(image.numpy().tobytes() for micro in step for image in micro["pixel_values"]) for step in steps]


def noise_of(steps: Any) -> list[list[tuple[int, ...]]]:
    """Step -> (length, key) of each sample, sorted."""
    return [sorted(tuple(span[2:].tolist()) for micro in step for span in micro["noise_spans"]) for step in steps]


def test_ranks_and_workers_and_a_resume_see_the_same_images_and_noise(samples: Any, processor: Any, drawing: TrainSpec) -> None:
    alone = replace(drawing, device=replace(drawing.device, world_size=1), batch=Batch(global_batch=4, micro_batch=2, accumulation=2))
    one = list(batches(samples, processor, alone, rank=0, first_step=0))
    two = [list(batches(samples, processor, with_data(drawing, workers=2), rank=rank, first_step=0)) for rank in (0, 1)]
    together = [(*left, *right) for left, right in zip(*two, strict=True)]
    assert images_of(one) == images_of(together) and noise_of(one) == noise_of(together)
    later = list(batches(samples, processor, alone, rank=0, first_step=4))
    assert images_of(later) == images_of(one)[4:] and noise_of(later) == noise_of(one)[4:]


@pytest.mark.parametrize("layout", [{"packing": True}, {"padding_free": True}, {"length_aware": "step"}])
def test_the_layout_of_a_batch_does_not_change_what_is_drawn(
    layout: dict[str, Any], samples: Any, processor: Any, drawing: TrainSpec
) -> None:
    alone = replace(drawing, device=replace(drawing.device, world_size=1), batch=Batch(global_batch=4, micro_batch=2, accumulation=2))
    usual = list(batches(samples, processor, alone, rank=0, first_step=0))
    other = list(batches(samples, processor, with_data(alone, **layout), rank=0, first_step=0))
    assert images_of(usual) == images_of(other) and noise_of(usual) == noise_of(other)
    for step in other:
        for micro in step:
            for row, start, length, _ in micro["noise_spans"].tolist():
                assert micro["attention_mask"][row, start : start + length].sum() == length


def test_every_step_draws_again(samples: Any, processor: Any, drawing: TrainSpec) -> None:
    few = samples[:4]  # each step has all of them
    steps = list(batches(few, processor, drawing, rank=0, first_step=0))
    assert len({image for step in images_of(steps) for image in step}) == 2 * 6
    other = list(batches(few, processor, replace(drawing, seed=2), rank=0, first_step=0))
    assert not {image for step in images_of(steps) for image in step} & {image for step in images_of(other) for image in step}


def test_held_out_rows_and_default_runs_are_left_alone(samples: Any, processor: Any, spec: TrainSpec, drawing: TrainSpec) -> None:
    cache = Cache(2**20)
    plain, held_out = collate(samples, processor, spec), collate(samples, processor, drawing, cache)
    assert plain.keys() == held_out.keys() and "noise_spans" not in plain
    assert all(torch.equal(plain[name], held_out[name]) for name in plain)
    (step, *_) = batches(samples, processor, spec, rank=0, first_step=0)
    assert "noise_spans" not in step[0]
