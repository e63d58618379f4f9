import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from trainer.contract import TrainSpec
from trainer.data.collate import collate
from trainer.data.encode import IGNORED
from trainer.data.pack import collate_packed
from trainer.data.sample import Sample, read_samples

WORDS = ["which", "of", "these", "is", "in", "the", "picture", "what", "does", "it", "show", "and", "why", "would", "one", "say", "so"]


@pytest.fixture
def mixed(tmp_path: Path) -> tuple[Sample, ...]:
    """Six conversations of mixed length and turns with 1, 0, 2, 1, 0 and 1 images of several sizes."""
    random = np.random.default_rng(3)
    rows = []
    for number, images in enumerate((1, 0, 2, 1, 0, 1)):
        names = [f"{number}_{place}.png" for place in range(images)]
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


def test_rows_end_to_end(mixed, processor, spec: TrainSpec) -> None:
    batch = collate_packed([mixed[:2], mixed[4:5], ()], processor, spec)
    singles = [collate([sample], processor, replace(spec, stage=replace(spec.stage, trainable=("lm",)))) for sample in mixed]
    ids = [single["input_ids"][0] for single in singles]
    labels = [single["labels"][0] for single in singles]
    used = len(ids[0]) + len(ids[1])
    assert torch.equal(batch["input_ids"][0, :used], torch.cat(ids[:2]))
    assert torch.equal(batch["labels"][0, :used], torch.cat(labels[:2])), "the first token of a text is never trained on"
    assert torch.equal(batch["position_ids"][0, :used], torch.cat([torch.arange(len(one)) for one in ids[:2]]))
    assert batch["attention_mask"].sum(1).tolist() == [used, len(ids[4]), 0]
    assert (batch["labels"][2] == IGNORED).all() and torch.equal(batch["position_ids"][2], torch.arange(batch["input_ids"].shape[1]))
    assert len(batch["pixel_values"]) == 1


def test_a_dummy_image_is_a_text_of_its_own(mixed, processor, spec: TrainSpec) -> None:
    batch = collate_packed([[mixed[1]], [mixed[4]]], processor, spec)
    image = processor.tokenizer.convert_tokens_to_ids("<image>")
    assert len(batch["pixel_values"]) == 1 and (batch["input_ids"] == image).sum() == 4
    start = int((batch["input_ids"][1] == image).nonzero()[0])
    assert batch["position_ids"][1, start] == 0 and (batch["labels"][1, start:] == IGNORED).all()
    assert batch["attention_mask"][1, start:].sum() == 0
    assert len(collate_packed([()], processor, spec)["pixel_values"]) == 1, "an idle rank runs the vision tower, too"
    assert collate_packed([()], processor, replace(spec, stage=replace(spec.stage, trainable=("lm",))))["input_ids"].shape == (1, 1)
