import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from trainer.contract import TrainSpec
from trainer.data.batch.collate import collate
from trainer.data.batch.pack import collate_packed, collate_unpadded
from trainer.data.encode import IGNORED
from trainer.data.rows.sample import Sample, read_samples

WORDS = ["which", "of", "these", "is", "in", "the", "picture", "what", "does", "it", "show", "and", "why", "would", "one", "say", "so"]


@pytest.fixture
def mixed(tmp_path: Path) -> tuple[Sample, ...]:
    """Six conversations of different lengths with 1, 0, 2, 1, 0 and 1 images of several sizes."""
    random = np.random.default_rng(3)
    rows = []
    for number, images in enumerate((1, 0, 2, 1, 0, 1)):
        names = [f"{number}_{index}.png" for index in range(images)]
        for name in names:
            size = tuple(int(side) for side in random.integers(28, 90, 2))
            Image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8)).save(tmp_path / name)
        turns = []
        for turn in range(1 + number % 2):
            marks = "<image>\n" * (images if turn == 0 else 0)
            turns.append({"role": "user", "content": marks + " ".join(random.choice(WORDS, 3 + 2 * number))})
            turns.append({"role": "assistant", "content": " ".join(random.choice(WORDS, 2 + 3 * number))})
        rows.append({"images": names, "messages": turns})
    (tmp_path / "mixed.json").write_text(json.dumps(rows), encoding="utf-8")
    samples, problems = read_samples(tmp_path / "mixed.json", tmp_path)
    assert not problems
    return samples


def test_samples_are_concatenated(mixed, processor, spec: TrainSpec) -> None:
    batch = collate_packed([mixed[:2], mixed[4:5], ()], processor, spec)
    singles = [collate([sample], processor, replace(spec, stage=replace(spec.stage, trainable=("lm",)))) for sample in mixed]
    ids = [single["input_ids"][0] for single in singles]
    labels = [single["labels"][0] for single in singles]
    lengths = [len(ids[number]) for number in (0, 1, 4)]
    assert batch["input_ids"].shape == (1, sum(lengths)), "no padding"
    assert torch.equal(batch["input_ids"][0], torch.cat([ids[number] for number in (0, 1, 4)]))
    assert torch.equal(batch["labels"][0], torch.cat([labels[number] for number in (0, 1, 4)])), (
        "the first token of a sample is never in the loss"
    )
    assert torch.equal(batch["position_ids"][0], torch.cat([torch.arange(length) for length in lengths]))
    assert batch["attention_mask"].all()
    assert batch["sample_ends"].tolist() == [[[[lengths[0], sum(lengths[:2]), sum(lengths)]]]] and batch["sample_ends"].dtype == torch.int32
    assert len(batch["pixel_values"]) == 1
    others = replace(spec, model=replace(spec.model, attention="flash2"))
    assert "sample_ends" not in collate_packed([mixed[:2]], processor, others), "flash attention uses the positions"


def test_a_dummy_image_is_a_separate_block(mixed, processor, spec: TrainSpec) -> None:
    batch = collate_packed([[mixed[1]], [mixed[4]]], processor, spec)
    image = processor.tokenizer.convert_tokens_to_ids("<image>")
    assert len(batch["pixel_values"]) == 1 and (batch["input_ids"] == image).sum() == 4
    start = int((batch["input_ids"][0] == image).nonzero()[0])
    assert batch["position_ids"][0, start] == 0 and (batch["labels"][0, start:] == IGNORED).all()
    assert batch["attention_mask"][0, :start].all() and batch["attention_mask"][0, start:].sum() == 0
    assert batch["sample_ends"].flatten().tolist()[-2:] == [start, batch["input_ids"].shape[1]]


def test_a_rank_without_samples_runs_the_tower(processor, spec: TrainSpec) -> None:
    assert len(collate_packed([()], processor, spec)["pixel_values"]) == 1, "the dummy image runs the vision tower"
    idle = collate_packed([()], processor, replace(spec, stage=replace(spec.stage, trainable=("lm",))))
    assert idle["input_ids"].shape == (1, 1) and idle["labels"].tolist() == [[IGNORED]] and idle["attention_mask"].sum() == 0


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_samples_of_different_length_are_packed(mixed, processor, spec: TrainSpec) -> None:
    unequal = mixed[:3]
    assert not collate(unequal, processor, spec)["attention_mask"].all()
    assert same(collate_unpadded(unequal, processor, spec), collate_packed([unequal], processor, spec))
    equal = (mixed[0], replace(mixed[0], row=99))
    assert same(collate_unpadded(equal, processor, spec), collate(equal, processor, spec)), "one attention call for both"
    text_only = (mixed[1], replace(mixed[1], row=99))
    assert same(collate_unpadded(text_only, processor, spec), collate_packed([text_only], processor, spec)), (
        "the dummy image makes one of them longer"
    )
