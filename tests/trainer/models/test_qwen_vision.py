from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.trainer.models.conftest import to_arguments
from trainer.data.batch.collate import collate
from trainer.data.rows.sample import Sample
from trainer.models.qwen_vision import rotary_positions


@pytest.mark.parametrize("name", ["tiny_qwen2_5_vl", "tiny_qwen2_5_omni"])
def test_rotary_positions_equal_those_of_transformers(name: str, make_tiny: Any, samples: tuple[Sample, ...]) -> None:
    """For each sample: one image, several images with different grids, no image."""
    made = make_tiny(name)
    for sample in samples:
        batch = collate([sample], made.processor, replace(made.spec, deepspeed={}, stage=replace(made.spec.stage, trainable=("lm",))))
        marks = {"mm_token_type_ids": batch["mm_token_type_ids"]} if "mm_token_type_ids" in batch else {}
        grids = batch.get("image_grid_thw")
        wanted, _ = made.model.model.get_rope_index(
            batch["input_ids"], image_grid_thw=grids, attention_mask=batch["attention_mask"], **marks
        )
        images = [{"image_grid_thw": grid[None]} for grid in ([] if grids is None else grids)]
        found = made.processor.position_ids(batch["input_ids"][0], images)
        assert torch.equal(found[1:], wanted[:, 0])
        assert torch.equal(found[0], torch.arange(batch["input_ids"].shape[1]))


def test_text_continues_after_the_longest_side() -> None:
    ids = torch.tensor([5, 9, 9, 9, 9, 9, 9, 6, 9, 7])
    positions = rotary_positions(ids, 9, [(2, 3), (1, 1)])
    assert positions.tolist() == [
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9],
        [0, 1, 1, 1, 1, 1, 1, 4, 5, 6],
        [0, 1, 1, 1, 2, 2, 2, 4, 5, 6],
        [0, 1, 2, 3, 1, 2, 3, 4, 5, 6],
    ]
    assert rotary_positions(ids[:0], 9, []).shape == (4, 0)


def test_without_token_types_qwen_would_use_other_positions(make_tiny: Any, samples: tuple[Sample, ...]) -> None:
    """Why the processor adds mm_token_type_ids: without them the model computes other logits, without an error."""
    made = make_tiny("tiny_qwen2_5_vl")
    batch = collate(samples, made.processor, made.spec)
    with torch.no_grad():
        whole = made.model(**to_arguments(batch, "labels")).logits
        lost = made.model(**to_arguments(batch, "labels", "mm_token_type_ids")).logits
    assert not torch.allclose(whole, lost, atol=1e-4)
